"""LoRA files merged into weights while these are read: in every layout, on every mesh, and rounded once."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from lora_models import FILE, RANK, layers

from vpae_jax import sharding
from vpae_jax.config import MeshConfig
from vpae_jax.types import UserError
from vpae_jax.weights import stream
from vpae_jax.weights.extraction import extract
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import Adapter, Lora, Merged, write_lora
from vpae_jax.weights.merging import LoraFile, Merging, about_base, merged, open_merging, parse_lora, told
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import from_tree

MESHES = [None, dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)]


@pytest.fixture(scope="module")
def loras(t2v, tmp_path_factory):
    """Two files: of linear layers alone, and of everything, whole differences of norms and biases among it."""
    folder = tmp_path_factory.mktemp("loras")
    everything = extract(t2v.student, t2v.teacher, RANK // 4, differences=True).lora
    write_lora(folder / FILE, t2v.lora, "diffusers")
    write_lora(folder / "wan.safetensors", everything, "wan")
    return LoraFile(folder / FILE, 0.8), LoraFile(folder / "wan.safetensors", -0.5)


@pytest.fixture(scope="module", params=["diffusers", "wan", "orbax"])
def folder(request, t2v, tmp_path_factory):
    """The model in a layout."""
    target = tmp_path_factory.mktemp(request.param) / "model"
    write_model(target, Contents(find_model(t2v.folder)), request.param)
    return target


def by_rules(mesh):
    if mesh is None:
        return None
    placed = sharding.make_mesh(MeshConfig(**mesh))

    def place(path, shape):
        return NamedSharding(placed, next(spec for rule, spec in sharding.TRANSFORMER_RULES if re.search(rule, path)))

    return place


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_read_is_the_sum_rounded_once(folder, t2v, loras, mesh, dtype, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 999)
    found = flat(read_part(folder, "transformer", dtype, by_rules(mesh), open_merging(loras, t2v.config))[1])
    expected, changed = merged(t2v.teacher, loras), 0
    for path, layer in layers(expected):
        value = found[path][layer] if path.startswith("blocks/") else found[path]
        whole = expected.read(path, layer)
        assert value.dtype == dtype
        if dtype == jnp.float32:
            np.testing.assert_allclose(value, whole, rtol=1e-6, atol=1e-6, err_msg=path)
        else:  # within half a unit of the sum, but for float32's own rounding in parts of another size
            unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(whole), 1e-30))) - 7)
            assert (np.abs(np.asarray(value, np.float32) - whole) <= 0.5 * unit + 1e-6).all(), path
        changed += bool((whole != t2v.teacher.read(path, layer)).any())
    assert changed == len(list(layers(expected)))


def test_without_files_every_number_stays(folder, t2v):
    found = flat(read_part(folder, "transformer", jnp.float32, None, open_merging([], t2v.config))[1])
    for path, value in flat(t2v.params).items():
        np.testing.assert_array_equal(found[path], value)


def test_parts_of_a_change_are_parts_of_the_whole(t2v):
    adapter = Adapter(np.arange(12, dtype=np.float32).reshape(6, 2), np.ones((2, 4), np.float32), 0.5)
    lora = Lora({("proj_out", 0): adapter}, {("blocks/norm2/bias", 1): np.arange(24, dtype=np.float32)})
    whole = lora.change("proj_out/kernel", 0)
    index = (slice(1, 5), slice(2, 3))
    np.testing.assert_array_equal(lora.change("proj_out/kernel", 0, index), whole[index])
    np.testing.assert_array_equal(lora.change("proj_out/kernel", 0, index[:1]), whole[index[0]])
    np.testing.assert_array_equal(lora.change("blocks/norm2/bias", 1, (slice(3, 7),)), np.arange(3, 7))
    value = np.ones(4, np.float32)
    assert lora.added(value, 2.0, "blocks/norm2/bias", 0, (slice(3, 7),)) is value
    np.testing.assert_array_equal(lora.added(value, 2.0, "blocks/norm2/bias", 1, (slice(3, 7),)), [7, 9, 11, 13])


def test_a_sum_that_overflows_is_refused(t2v):
    huge = Adapter(np.full((24, 1), 3e38, np.float32), np.ones((1, 64), np.float32))
    merge = Merging(((Lora({("proj_out", 0): huge}), 2.0),))
    with pytest.raises(UserError, match="proj_out/kernel of layer 0 plus its changes overflows float32; lower the str"):
        read_part(t2v.folder, "transformer", jnp.float32, None, merge)


def test_files_and_strengths(tmp_path):
    file = tmp_path / "a.safetensors"
    assert parse_lora(str(file), "--lora") == LoraFile(file, 1.0)
    assert parse_lora(f"{file}:-0.5", "--lora") == LoraFile(file, -0.5)
    odd = tmp_path / "a:2"
    assert parse_lora(str(odd), "--lora") == LoraFile(tmp_path / "a", 2.0)
    odd.touch()
    assert parse_lora(str(odd), "--lora") == LoraFile(odd, 1.0)
    for text in (f"{file}:nan", f"{file}:", f"{file}:inf", f"{file}:much"):
        strength = text.rpartition(":")[2]
        with pytest.raises(
            UserError, match=rf"^config.x=\S+: the strength is '{strength}', expected a number, such as"
        ):
            parse_lora(text, "config.x")
    with pytest.raises(UserError, match="an address"):
        parse_lora("gs://bucket/a.safetensors", "--lora")
    two = [LoraFile(file, 0.8), LoraFile(odd)]
    assert told(two) == f"{file}:0.8, {odd}:1" and told([]) == ""
    assert about_base("tiny", []) == {"base": "tiny"}
    assert about_base("tiny", two) == {"base": "tiny", "base_lora": told(two)}


def test_merging_nothing_is_nothing(t2v):
    values = from_tree("transformer", t2v.config, t2v.params)
    assert merged(values, []) is values and not isinstance(values, Merged)
