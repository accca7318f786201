"""From files into shards: the same numbers on every mesh, no byte read twice, and damage told in one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import original_wan
import pytest
import torch
from flax import nnx
from folders import PARTS, edit, files, mixed, read, values, write
from jax.sharding import NamedSharding, PartitionSpec

from vpae_jax import sharding
from vpae_jax.config import MeshConfig
from vpae_jax.types import UserError
from vpae_jax.weights import stream
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import load_part, read_part
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import open_values, write_part

# Eight divides every axis that is sharded; few different shapes are few programs to compile.
SIZES = dict(dim=16, ffn_dim=16, freq_dim=16, text_dim=16, image_dim=16, out_dim=4, in_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    module = original_wan.Transformer("flf2v", num_heads=2, num_layers=3, image_tokens=4, **SIZES)
    write(folder / "weights.safetensors", module.state_dict())
    (folder / "config.json").write_text(json.dumps(module.config_json()))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "model")


def stacked(folder, part="transformer"):
    """Weights by path as they lie in the files, layers along the first axis."""
    layers = {}
    for name, value in values(folder, part).items():
        layers.setdefault(name[: name.index("[")], []).append(value)
    many = ("blocks/", "layers/")
    return {path: found if path.startswith(many) else found[0] for path, found in layers.items()}


def assert_equal(loaded, expected, dtype):
    assert loaded.keys() == expected.keys()
    for path, value in loaded.items():
        assert value.dtype == dtype, path
        whole = expected[path]
        whole = np.stack([v.astype(dtype) for v in whole]) if isinstance(whole, list) else whole.astype(dtype)
        np.testing.assert_array_equal(np.asarray(value).astype(np.float32), whole.astype(np.float32))


def by_rules(mesh):
    """Where the transformer's parameters lie in training."""
    placed = sharding.make_mesh(MeshConfig(**mesh))

    def place(path, shape):
        return NamedSharding(placed, next(spec for rule, spec in sharding.TRANSFORMER_RULES if re.search(rule, path)))

    return place


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=["fsdp 8", "2x2x2"])
def test_on_a_mesh(folder, mesh):
    expected, place = stacked(folder), by_rules(mesh)
    with find_model(folder).part("transformer").open() as tensors:
        loaded = stream.load(tensors, jnp.float32, place, "transformer")
        # All devices together hold each number at least once, and no byte was read twice.
        assert tensors.bytes_read == sum(tensors.stored(n).nbytes for n in tensors.names)
    assert_equal(loaded, expected, np.float32)
    for path, value in loaded.items():
        assert value.sharding.is_equivalent_to(place(path, value.shape), value.ndim), path
    (shard, *_) = loaded["blocks/attn1/to_q/kernel"].addressable_shards
    assert shard.data.shape == ((3, 2, 16) if mesh == dict(fsdp=8) else (3, 8, 8))
    assert len(loaded["blocks/norm2/scale"].addressable_shards) == 8


def test_casts_keep_the_shardings(folder):
    place = by_rules(dict(data=2, fsdp=2, tensor=2))
    model = load_part(folder, "transformer", jnp.bfloat16, place)
    assert_equal({p: leaf.get_value() for p, leaf in flat(nnx.state(model)).items()}, stacked(folder), jnp.bfloat16)
    kernel = model.blocks.attn1.to_q.kernel[...]
    assert kernel.sharding.is_equivalent_to(place("blocks/attn1/to_q/kernel", kernel.shape), kernel.ndim)
    assert model.dtype == kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("chunk", [100, 999, 2**20])
def test_chunks_of_any_size(folder, monkeypatch, chunk):
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    place = by_rules(dict(data=2, fsdp=2, tensor=2))
    _, params = read_part(folder, "transformer", jnp.bfloat16, place)
    assert_equal(flat(params), stacked(folder), jnp.bfloat16)


def test_other_dtypes_are_read(copy):
    kinds = {
        "blocks.0.ffn.0.weight": torch.float16,
        "blocks.1.ffn.0.weight": torch.float64,
        "blocks.2.ffn.0.weight": torch.float8_e4m3fn,
        "blocks.1.cross_attn.o.weight": torch.float8_e5m2,
        "blocks.1.modulation": torch.bfloat16,
        "head.head.weight": torch.float64,
        "patch_embedding.bias": torch.float16,
    }
    edit(copy / "weights.safetensors", lambda t: t.update({name: t[name].to(kind) for name, kind in kinds.items()}))
    _, params = read_part(copy, "transformer", placement=by_rules(dict(fsdp=8)))
    assert_equal(flat(params), stacked(copy), np.float32)


def test_the_widest_dtype_of_the_layers_is_kept(copy):
    edit(copy / "weights.safetensors", lambda t: t.update(mixed(t)))
    edit(copy / "weights.safetensors", lambda t: t.update({"head.head.bias": t["head.head.bias"].double()}))
    found = flat(read_part(copy, "transformer", None)[1])
    kinds = set()
    for path, value in stacked(copy).items():
        layers = value if isinstance(value, list) else [value]
        wide = jnp.bfloat16 if all(v.dtype == jnp.bfloat16 for v in layers) else np.float32
        kinds.add((np.dtype(wide).name, len({v.dtype for v in layers})))
        assert_equal({path: found[path]}, {path: value}, wide)
    assert kinds == {("float32", 1), ("float32", 2), ("bfloat16", 1)}
    half, brain, fine = np.dtype(np.float16), np.dtype(jnp.bfloat16), np.dtype(jnp.float8_e5m2)
    assert stream.widest([half, brain]) == np.float32 and stream.widest([fine, brain, fine]) == brain


def test_any_axis_may_be_sharded(folder):
    """Layers, columns of the file, and what eight devices cannot divide but by leaving it whole."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))

    def place(path, shape):
        axes = [next((axis for axis, n in (("fsdp", 4), ("data", 2)) if size % n == 0), None) for size in shape]
        used = {axis: i for i, axis in reversed(list(enumerate(axes))) if axis is not None}
        return NamedSharding(mesh, PartitionSpec(*(a if used.get(a) == i else None for i, a in enumerate(axes))))

    with find_model(folder).part("transformer").open() as tensors:
        loaded = stream.load(tensors, jnp.float32, place, "transformer")
    assert_equal(loaded, stacked(folder), np.float32)
    for path, value in loaded.items():
        assert value.sharding == place(path, value.shape), path


# Damage.

NAN, INF = float("nan"), float("inf")
DAMAGE = [
    ("transformer", "blocks.1.self_attn.q.weight", (3, 7), NAN, torch.float32, "wan"),
    ("transformer", "blocks.0.modulation", (0, 5, 23), -INF, torch.float32, "orbax"),
    ("vae", "encoder.head.0.gamma", (7, 0, 0, 0), INF, torch.float32, "diffusers"),
    ("text_encoder", "token_embedding.weight", (383, 31), NAN, torch.float32, "wan"),
    ("text_encoder", "blocks.1.pos_embedding.embedding.weight", (31, 0), INF, torch.float32, "orbax"),
    ("image_encoder", "visual.transformer.2.attn.to_qkv.weight", (95, 31), NAN, torch.bfloat16, "wan"),
    ("image_encoder", "visual.cls_embedding", (0, 0, 5), NAN, torch.float32, "diffusers"),
]


@pytest.mark.parametrize("part, name, index, bad, dtype, form", DAMAGE)
def test_nan_and_infinity_are_one_line(wan_folder, tmp_path, part, name, index, bad, dtype, form):
    folder = shutil.copytree(wan_folder, tmp_path / "model")
    for path in files(folder, part):
        edit(path, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
        if name in read(path):
            edit(path, lambda t: t[name].index_put_(tuple(map(torch.tensor, index)), torch.tensor(bad, dtype=dtype)))
            damaged = path
    model = find_model(folder)
    expected = re.escape(f"{damaged}: tensor '{name}' holds NaN or infinity; the weights are damaged") + "$"
    if part != "vae":  # which takes long, and is read as the others
        with pytest.raises(UserError, match=expected):
            read_part(model, part, jnp.float32 if form == "wan" else None)
    with pytest.raises(UserError, match=expected), open_values(model, part) as given:
        write_part(tmp_path / "part", part, given)
    assert not list((tmp_path / "part").iterdir())
    with pytest.raises(UserError, match=expected):
        write_model(tmp_path / "out", Contents(model), form)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "part"}


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_shrinks_while_it_is_read(wan_folder, tmp_path, part):
    folder = shutil.copytree(wan_folder, tmp_path / "model")
    source = find_model(folder).part(part)
    path = files(folder, part)[-1]
    with source.open() as tensors:
        os.truncate(path, path.stat().st_size - 600)
        with pytest.raises(UserError, match=r"but was longer before|became shorter while it was open") as error:
            stream.load(tensors, None, None, part)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="truncated or not a"):
        read_part(folder, part)
    with pytest.raises(UserError, match="truncated or not a"):
        write_model(tmp_path / "out", Contents(find_model(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Several processes.


def test_two_processes_read_their_own_shards(folder, copy):
    """Four devices each, of which one process has half of every output and the other the other half."""
    edit(copy / "weights.safetensors", lambda t: t["blocks.2.self_attn.k.weight"].fill_(NAN))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    repository = Path(__file__).parents[2]
    script = Path(__file__).with_name("two_processes.py")
    paths = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    running = [
        subprocess.Popen(
            [sys.executable, script, str(port), "2", str(number), folder, copy],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    bytes_read = []
    for process, (out, err) in zip(running, printed, strict=True):
        assert process.returncode == 0, err[-3000:]
        lines = out.splitlines()
        bytes_read += [int(line.split()[1]) for line in lines if line.startswith("read")]
        refused = [line for line in lines if line.startswith("refused")]
        assert len(refused) == 1 and "'blocks.2.self_attn.k.weight' holds NaN or infinity" in refused[0]
        assert lines[-1] == "equal"
    total = sum(value.nbytes for value in read(folder / "weights.safetensors").values())
    assert len(bytes_read) == 2 and max(bytes_read) < 0.9 * total


def test_sizes_are_worth_reading(folder):
    """What the tests above compare is neither empty nor small beside what eight devices cannot divide."""
    shapes = [prod(v.shape) for v in jax.tree.leaves(stacked(folder))]
    assert sum(shapes) > 10_000 and all(np.isfinite(v).all() for v in jax.tree.leaves(stacked(folder)))
