"""LoRA: extracted, written for diffusers and ComfyUI and loaded by diffusers, read in every dialect and merged."""

import logging
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import random_model
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.train.roles import merge_trees
from vpae_jax.types import Condition, UserError
from vpae_jax.weights import extraction
from vpae_jax.weights.extraction import extract, format_energies, low_rank
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import build, load_part, read_part
from vpae_jax.weights.lora import Adapter, Lora, Merged, from_adapters, write_lora
from vpae_jax.weights.lora_reading import _targets, read_lora
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import from_tree, verify_part, write_part

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
RANK = 20  # more than the shorter side of one layer, so that ranks differ
FILE = "pytorch_lora_weights.safetensors"


def model(folder: Path, image: bool) -> SimpleNamespace:
    """A pipeline of diffusers, its transformer as the teacher, and a student that differs everywhere."""
    pipe = random_model.pipeline(folder, image)
    config, params = read_part(folder, "transformer")
    draw = np.random.default_rng(0).standard_normal
    changed = jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw(x.shape, np.float32), params)
    teacher, student = (from_tree("transformer", config, tree) for tree in (params, changed))
    lora = extract(student, teacher, RANK).lora
    return SimpleNamespace(pipe=pipe, config=config, params=params, teacher=teacher, student=student, lora=lora)


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return model(tmp_path_factory.mktemp("t2v"), image=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return model(tmp_path_factory.mktemp("i2v"), image=True)


@pytest.fixture(params=["t2v", "i2v"])
def made(request):
    return request.getfixturevalue(request.param)


@contextmanager
def silent(caplog):
    """Fails if diffusers or PEFT has something to remark."""
    diffusers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    diffusers.logging.disable_propagation()
    assert [r.getMessage() for r in caplog.records if r.name.startswith(("diffusers", "peft"))] == []


def layers(values):
    """Every parameter and layer."""
    for path, shape in values.shapes().items():
        for layer in range(shape[0] if path.startswith("blocks/") else 1):
            yield path, layer


def assert_same(found: Lora, expected: Lora):
    assert found.adapters.keys() == expected.adapters.keys()
    assert found.differences.keys() == expected.differences.keys()
    for key, adapter in expected.adapters.items():
        np.testing.assert_array_equal(found.adapters[key].a, adapter.a)
        np.testing.assert_array_equal(found.adapters[key].b, adapter.b)
    for key, value in expected.differences.items():
        np.testing.assert_array_equal(found.differences[key], value)


def assert_merges_as(merged: Merged, module: torch.nn.Module, tmp_path: Path):
    """Merged weights are those of diffusers' module."""
    module.save_pretrained(tmp_path / "fused" / "transformer")
    fused = flat(read_part(tmp_path / "fused", "transformer")[1])
    for path, layer in layers(merged):
        expected = fused[path][layer] if path.startswith("blocks/") else fused[path]
        np.testing.assert_allclose(merged.read(path, layer), expected, atol=1e-6, rtol=1e-6, err_msg=path)


def velocities(config, torch_models, our_models):
    """Outputs for one random input."""
    draw = np.random.default_rng(1).standard_normal
    x = draw((1, 3, 4, 6, config.in_channels), np.float32)
    text, image = draw((1, 512, config.text_dim), np.float32), draw((1, 5, config.image_dim or 1), np.float32)
    has_image = config.image_dim is not None
    condition = Condition(
        text=jnp.asarray(text),
        text_mask=jnp.ones((1, 512), bool),
        image=jnp.asarray(image) if has_image else None,
        frames=jnp.asarray(x[..., 16:]) if has_image else None,
    )
    for ours in our_models:
        yield np.asarray(ours(jnp.asarray(x[..., :16]), jnp.asarray([0.7]), condition))
    for theirs in torch_models:
        with torch.no_grad():
            out = theirs(
                torch.tensor(x).permute(0, 4, 1, 2, 3),
                torch.tensor([700.0]),
                torch.tensor(text),
                torch.tensor(image) if has_image else None,
            ).sample
        yield out.permute(0, 2, 3, 4, 1).numpy()


# Extraction


def test_at_full_rank_an_extraction_is_the_student(made):
    found = extract(made.student, made.teacher, 10_000)
    merged, linear = Merged(made.teacher, found.lora), {(energy.path, energy.layer) for energy in found.energies}
    assert all(energy.retained == pytest.approx(1, abs=1e-6) for energy in found.energies)
    kernels = set()
    for path, layer in layers(made.student):
        expected, value = made.student.read(path, layer), merged.read(path, layer)
        if path.endswith("/kernel") and path != "patch_embedding/kernel":
            assert np.linalg.norm(value - expected) <= 1e-6 * np.linalg.norm(expected), path
            kernels.add((path.removesuffix("/kernel"), layer))
        else:
            np.testing.assert_array_equal(value, made.teacher.read(path, layer))
    assert linear == kernels
    everything = Merged(made.teacher, extract(made.student, made.teacher, 10_000, differences=True).lora)
    for path, layer in layers(made.student):
        np.testing.assert_allclose(everything.read(path, layer), made.student.read(path, layer), atol=2e-6)


def test_a_truncated_extraction_holds_the_energy_of_the_exact_one(i2v):
    found = extract(i2v.student, i2v.teacher, 5)
    squares = {"in": 0.0, "out": 0.0}
    for path, layer in layers(i2v.student):
        change = (i2v.student.read(path, layer) - i2v.teacher.read(path, layer)).astype(np.float64)
        linear = path.endswith("/kernel") and change.ndim == 2
        squares["in" if linear else "out"] += np.sum(change**2)
        if not linear:
            continue
        [energy] = [e for e in found.energies if (e.path + "/kernel", e.layer) == (path, layer)]
        sizes = np.linalg.svd(change, compute_uv=False)
        assert energy.rank == 5
        assert energy.change == pytest.approx(np.sqrt(np.sum(change**2)))
        assert energy.retained == pytest.approx(np.sum(sizes[:5] ** 2) / np.sum(sizes**2), rel=1e-6)
        product = found.lora.change(path, layer)
        assert np.sum(product**2) / np.sum(change**2) == pytest.approx(energy.retained, rel=1e-5)
        rest = np.linalg.norm(change - product) / energy.change
        assert rest**2 == pytest.approx(1 - energy.retained, abs=1e-5)
    assert found.outside == pytest.approx(squares["out"] / sum(squares.values()))
    held = sum(e.retained * e.change**2 for e in found.energies)
    assert found.retained == pytest.approx(held / squares["in"])


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_a_large_matrix_loses_little_to_subspace_iteration(shape, monkeypatch):
    draw = np.random.default_rng(0).standard_normal
    change = (draw((shape[0], 90)) * np.arange(1, 91) ** -0.7) @ draw((90, shape[1])) + 0.1 * draw(shape)
    change = change.astype(np.float32)
    exact, best = low_rank(change, 8)
    monkeypatch.setattr(extraction, "EXACT_SIDE", 64)
    adapter, held = low_rank(change, 8, seed=1)
    assert adapter.a.shape == exact.a.shape == (shape[0], 8)
    assert 0.995 * best < held <= best * (1 + 1e-6)
    assert np.sum((adapter.a @ adapter.b) ** 2) == pytest.approx(held, rel=1e-4)


def test_what_did_not_change_is_left_out(t2v):
    params = jax.tree.map(np.asarray, t2v.params)
    kernel = params["blocks"]["attn1"]["to_q"]["kernel"] = params["blocks"]["attn1"]["to_q"]["kernel"].copy()
    kernel[1, :, 3] += 1
    found = extract(from_tree("transformer", t2v.config, params), t2v.teacher, 4, differences=True)
    assert list(found.lora.adapters) == [("blocks/attn1/to_q", 1)]
    assert found.lora.differences == {}
    assert found.outside == 0
    assert {(e.rank, e.retained) for e in found.energies if e.change == 0} == {(0, 1.0)}
    text = format_energies(found)
    assert "1 of 26 linear layers changed; the adapters hold 100.00% of their squared change" in text
    nothing = extract(t2v.teacher, t2v.teacher, 4)
    assert (nothing.retained, nothing.outside, nothing.lora) == (1.0, 0.0, Lora({}))
    assert "0 of 26 linear layers changed" in format_energies(nothing)


def test_energies_as_text(t2v):
    found = extract(t2v.student, t2v.teacher, 5)
    lines = format_energies(found).splitlines()
    of_layers = [line.split() for line in lines if line.startswith("blocks/attn1/to_q ")]
    first, second = [e for e in found.energies if e.path == "blocks/attn1/to_q"]
    low, mean = min(first.retained, second.retained), (first.retained + second.retained) / 2
    assert of_layers == [
        ["blocks/attn1/to_q", "0", "5", f"{first.change:.3g}", f"{first.retained:.4f}"],
        ["blocks/attn1/to_q", "1", "5", f"{second.change:.3g}", f"{second.retained:.4f}"],
        ["blocks/attn1/to_q", "2", f"{low:.4f}", f"{mean:.4f}"],
    ]
    assert any(line.split()[:2] == ["all", "26"] for line in lines)
    assert lines[-1].startswith(f"{found.outside:.2%} of the squared change")


def test_extraction_refuses(t2v, i2v):
    with pytest.raises(UserError, match="rank is 0, expected at least 1"):
        extract(t2v.student, t2v.teacher, 0)
    with pytest.raises(UserError, match=r"the student's in_channels is 16, the teacher's 36; give the teacher"):
        extract(t2v.student, i2v.teacher, 4)
    params = jax.tree.map(np.array, t2v.params)
    params["blocks"]["ffn"]["proj_in"]["kernel"][1, 2, 3] = np.nan
    with pytest.raises(UserError, match=r"blocks/ffn/proj_in/kernel of layer 1: .* holds NaN"):
        extract(from_tree("transformer", t2v.config, params), t2v.teacher, 4)


# The two forms that are written


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_diffusers_computes_what_we_merge(made, form, tmp_path, caplog):
    write_lora(tmp_path / "lora" / FILE, made.lora, form)
    found = read_lora(tmp_path / "lora" / FILE, made.config)
    assert_same(found, made.lora)
    merged = Merged(made.teacher, found)
    write_part(tmp_path / "merged", "transformer", merged)
    verify_part(find_model(tmp_path / "merged"), "transformer", merged, None)
    with silent(caplog):
        made.pipe.load_lora_weights(tmp_path / "lora")
    try:
        base = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer")
        ours = load_part(tmp_path / "merged", "transformer")
        of_ours, of_lora, of_base = velocities(made.config, [made.pipe.transformer, base], [ours])
        np.testing.assert_allclose(of_lora, of_base, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(of_lora, of_ours, atol=1e-4, rtol=1e-4)
        made.pipe.disable_lora()
        [of_teacher] = velocities(made.config, [made.pipe.transformer], [])
        assert np.abs(of_teacher - of_lora).max() > 0.1
    finally:
        made.pipe.unload_lora_weights()


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_merged_as_diffusers_fuses(made, form, tmp_path):
    write_lora(tmp_path / FILE, made.lora, form)
    module = diffusers.WanTransformer3DModel(**made.pipe.transformer.config)
    module.load_state_dict(made.pipe.transformer.state_dict())
    module.load_lora_adapter(type(made.pipe).lora_state_dict(tmp_path / FILE))
    module.fuse_lora(lora_scale=0.5)
    module.unload_lora()
    assert_merges_as(Merged(made.teacher, read_lora(tmp_path / FILE, made.config), 0.5), module, tmp_path)


def test_names_of_both_forms(i2v, tmp_path):
    for form in ("diffusers", "wan"):
        write_lora(tmp_path / f"{form}.safetensors", i2v.lora, form, jnp.bfloat16)
    adapter = i2v.lora.adapters["blocks/ffn/proj_in", 1]
    theirs, wan = (load_torch(tmp_path / f"{form}.safetensors") for form in ("diffusers", "wan"))
    down = theirs["transformer.blocks.1.ffn.net.0.proj.lora_A.weight"]
    assert (down.dtype, tuple(down.shape)) == (torch.bfloat16, (RANK, 24))
    assert torch.equal(down, torch.tensor(adapter.a.T).bfloat16())
    assert torch.equal(down, wan["diffusion_model.blocks.1.ffn.0.lora_down.weight"])
    up = wan["diffusion_model.blocks.1.ffn.0.lora_up.weight"]
    assert torch.equal(up, theirs["transformer.blocks.1.ffn.net.0.proj.lora_B.weight"])
    assert wan["diffusion_model.blocks.1.ffn.0.alpha"] == RANK
    assert tuple(wan["diffusion_model.time_embedding.0.lora_down.weight"].shape) == (16, 16)
    assert "diffusion_model.head.head.alpha" not in wan  # diffusers would refuse the file
    assert len(theirs) == 2 * len(i2v.lora.adapters)


def test_whole_differences_in_the_wan_form(made, tmp_path, caplog):
    lora = extract(made.student, made.teacher, RANK, differences=True).lora
    write_lora(tmp_path / FILE, lora, "wan")
    assert_same(read_lora(tmp_path / FILE, made.config), lora)
    tensors = load_file(tmp_path / FILE)
    assert tensors["diffusion_model.blocks.0.norm3.diff_b"].shape == (24,)
    assert tensors["diffusion_model.blocks.0.modulation.diff"].shape == (1, 6, 24)
    assert tensors["diffusion_model.patch_embedding.diff"].shape == (24, made.config.in_channels, 1, 2, 2)
    with silent(caplog):
        made.pipe.load_lora_weights(tmp_path / FILE)
    made.pipe.unload_lora_weights()
    with pytest.raises(UserError, match=r"has \d+ \(as of \S+\); write the wan form"):
        write_lora(tmp_path / "other.safetensors", lora, "diffusers")
    assert not (tmp_path / "other.safetensors").exists()


def test_writing_refuses(t2v, tmp_path):
    with pytest.raises(UserError, match=r"out.pt: a LoRA is one safetensors file"):
        write_lora(tmp_path / "out.pt", t2v.lora, "wan")
    with pytest.raises(UserError, match="nothing to write, as no layer differs"):
        write_lora(tmp_path / FILE, Lora({}), "wan")
    bad = Lora({("proj_out", 0): Adapter(np.full((24, 2), np.nan, np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match=r"tensor 'transformer.proj_out.lora_A.weight' would hold NaN or infinity"):
        write_lora(tmp_path / FILE, bad, "diffusers")
    large = Lora({("proj_out", 0): Adapter(np.full((24, 2), 1e6, np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match="would hold NaN or infinity; write float32"):
        write_lora(tmp_path / FILE, large, "wan", np.float16)
    assert list(tmp_path.iterdir()) == []


# Merging


def test_merging_adds_in_float32_and_keeps_dtypes(t2v):
    half = from_tree("transformer", t2v.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), t2v.params))
    merged = Merged(half, t2v.lora, 0.7)
    path, adapter = "blocks/attn2/to_out/kernel", t2v.lora.adapters["blocks/attn2/to_out", 1]
    expected = half.read(path, 1).astype(np.float32) + np.float32(0.7) * (adapter.a @ adapter.b)
    assert merged.dtype(path, 1) == merged.read(path, 1).dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.read(path, 1), expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(merged.read("blocks/norm2/bias", 0), half.read("blocks/norm2/bias", 0))
    assert merged.config == t2v.config
    assert merged.shapes() == half.shapes()
    assert list(merged.extras("wan")) == []


def test_merging_refuses_another_model(t2v, i2v):
    with pytest.raises(UserError, match=r"changes \S*add_k_proj/kernel of layer 0, .* has no such parameter"):
        Merged(t2v.teacher, i2v.lora)
    wide = Lora({("proj_out", 0): Adapter(np.zeros((25, 2), np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match=r"of shape \[25, 64\], but this model has shape \[24, 64\] there"):
        Merged(t2v.teacher, wide)
    with pytest.raises(UserError, match=r"of layer 2, .* has no such parameter"):
        Merged(t2v.teacher, Lora({("blocks/ffn/proj_in", 2): t2v.lora.adapters["blocks/ffn/proj_in", 0]}))


def test_adapters_of_training_merge(made, tmp_path):
    spec = LoRASpec(rank=3, alpha=6.0, targets=r"^(?!patch)")
    shapes = nnx.eval_shape(lambda: WanTransformer(made.config, rngs=nnx.Rngs(0), lora=spec))
    graph, adapters, _ = nnx.split(shapes, nnx.LoRAParam, nnx.Param)
    draw = np.random.default_rng(2).standard_normal
    adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * draw(x.shape), jnp.float32), nnx.to_pure_dict(adapters))
    lora = from_adapters(adapters, spec.alpha, spec.rank)
    assert lora.adapters.keys() == made.lora.adapters.keys()
    write_part(tmp_path, "transformer", Merged(made.teacher, lora))
    trained = nnx.merge(graph, merge_trees(made.params, adapters))
    base = build("transformer", made.config, made.params)
    found, expected, without = velocities(made.config, [], [load_part(tmp_path, "transformer"), trained, base])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(without - expected).max() > 0.1


def test_adapters_of_training_refuse():
    half = {"proj_out": {"lora_a": np.zeros((24, 3), np.float32)}}
    with pytest.raises(UserError, match="proj_out: has lora_a only; the checkpoint is damaged"):
        from_adapters(half, 1.0, 3)
    with pytest.raises(UserError, match="no lora_a or lora_b among the weights"):
        from_adapters({"proj_out": {"kernel": np.zeros((24, 3), np.float32)}}, 1.0, 3)
    whole = {"proj_out": {"lora_a": np.zeros((24, 3), np.float32), "lora_b": np.zeros((3, 64), np.float32)}}
    with pytest.raises(UserError, match="proj_out: adapters of rank 3, expected 4"):
        from_adapters(whole, 1.0, 4)


# Files that others make


def test_no_two_parameters_share_a_name(i2v):
    targets = _targets(i2v.config)
    reached = {(entry.path, layer) for entry, layer in targets.values()}
    assert reached == set(layers(i2v.teacher))
    names = {name.replace("_", ".") for name in targets}
    assert len(names) == len(targets)


def test_dialects(t2v, tmp_path):
    draw = np.random.default_rng(3).standard_normal
    down, up = draw((4, 24), np.float32), draw((40, 4), np.float32)
    wan, theirs = "blocks.1.ffn.0", "blocks.1.ffn.net.0.proj"
    kohya = f"lora_unet_{wan.replace('.', '_')}"
    pairs = {
        "peft": (f"transformer.{theirs}.lora_A.weight", f"transformer.{theirs}.lora_B.weight", None, 1),
        "no prefix": (f"{theirs}.lora_A.weight", f"{theirs}.lora_B.weight", None, 1),
        "named adapter": (f"{wan}.lora_A.default.weight", f"{wan}.lora_B.default.weight", None, 1),
        "peft's prefix": (
            f"base_model.model.{theirs}.lora_A.weight",
            f"base_model.model.{theirs}.lora_B.weight",
            None,
            1,
        ),
        "comfy": (f"diffusion_model.{wan}.lora_down.weight", f"diffusion_model.{wan}.lora_up.weight", None, 1),
        "comfy with alpha": (
            f"diffusion_model.{wan}.lora_down.weight",
            f"diffusion_model.{wan}.lora_up.weight",
            (f"diffusion_model.{wan}.alpha", np.asarray(8, np.int64)),
            2,
        ),
        "original names": (f"diffusion_model.{wan}.lora_A.weight", f"diffusion_model.{wan}.lora_B.weight", None, 1),
        "one more prefix": (
            f"model.diffusion_model.{wan}.lora_A.weight",
            f"model.diffusion_model.{wan}.lora_B.weight",
            None,
            1,
        ),
        "kohya": (
            f"{kohya}.lora_down.weight",
            f"{kohya}.lora_up.weight",
            (f"{kohya}.alpha", np.asarray([2], np.float16)),
            0.5,
        ),
    }
    for first, second, alpha, scale in pairs.values():
        save_file({first: down, second: up, **dict([alpha] if alpha else [])}, tmp_path / FILE)
        expected = Adapter(down.T, up.T * np.float32(scale))
        assert_same(read_lora(tmp_path / FILE, t2v.config), Lora({("blocks/ffn/proj_in", 1): expected}))


def test_kohya_as_diffusers_reads_it(i2v, tmp_path, caplog):
    write_lora(tmp_path / "wan.safetensors", i2v.lora, "wan")
    tensors = {}
    for name, value in load_file(tmp_path / "wan.safetensors").items():
        if name.startswith("diffusion_model.blocks."):
            module, end = re.fullmatch(r"diffusion_model\.(.+)(\.alpha|\.lora_.*)", name).groups()
            tensors[f"lora_unet_{module.replace('.', '_')}{end}"] = np.asarray(value / 4) if end == ".alpha" else value
    save_file(tensors, tmp_path / FILE)
    with silent(caplog):
        i2v.pipe.load_lora_weights(tmp_path / FILE)
    i2v.pipe.unload_lora_weights()
    found = read_lora(tmp_path / FILE, i2v.config)
    blocks = {key: a for key, a in i2v.lora.adapters.items() if key[0].startswith("blocks/")}
    assert_same(found, Lora({key: Adapter(a.a, a.b / 4) for key, a in blocks.items()}))


def test_whole_differences(t2v, tmp_path):
    draw = np.random.default_rng(4).standard_normal
    values = {
        "blocks.0.self_attn.q.diff": (24, 24),
        "blocks.0.self_attn.q.diff_b": (24,),
        "blocks.1.norm3.diff": (24,),
        "blocks.1.norm3.diff_b": (24,),
        "blocks.1.self_attn.norm_k.diff": (24,),
        "blocks.1.diff_m": (1, 6, 24),
        "head.modulation.diff": (1, 2, 24),
        "head.head.diff": (64, 24),
        "patch_embedding.diff": (24, 16, 1, 2, 2),
        "patch_embedding.diff_b": (24,),
    }
    values = {f"diffusion_model.{name}": draw(shape, np.float32) for name, shape in values.items()}
    save_file(values, tmp_path / FILE)
    lora = read_lora(tmp_path / FILE, t2v.config)
    assert not lora.adapters
    found = [(path, layer, value.shape) for (path, layer), value in lora.differences.items()]
    assert sorted(found) == [
        ("blocks/attn1/norm_k/scale", 1, (24,)),
        ("blocks/attn1/to_q/bias", 0, (24,)),
        ("blocks/attn1/to_q/kernel", 0, (24, 24)),
        ("blocks/norm2/bias", 1, (24,)),
        ("blocks/norm2/scale", 1, (24,)),
        ("blocks/scale_shift_table", 1, (1, 6, 24)),
        ("patch_embedding/bias", 0, (24,)),
        ("patch_embedding/kernel", 0, lora.differences["patch_embedding/kernel", 0].shape),
        ("proj_out/kernel", 0, (24, 64)),
        ("scale_shift_table", 0, (1, 2, 24)),
    ]
    kernel = values["diffusion_model.blocks.0.self_attn.q.diff"].T
    np.testing.assert_array_equal(lora.differences["blocks/attn1/to_q/kernel", 0], kernel)
    merged = Merged(t2v.teacher, lora, 2.0)
    for path, layer in layers(t2v.teacher):
        change = lora.differences.get((path, layer), np.float32(0))
        np.testing.assert_array_equal(merged.read(path, layer), t2v.teacher.read(path, layer) + 2 * change)


def test_an_adapter_of_the_patch_embedding(t2v, tmp_path):
    draw = np.random.default_rng(5).standard_normal
    down, up = draw((4, 16, 1, 2, 2), np.float32), draw((24, 4, 1, 1, 1), np.float32)
    name = "diffusion_model.patch_embedding"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(2)}
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / FILE)
    whole = np.einsum("rithw,or->oithw", down, up[:, :, 0, 0, 0]) / 2
    save_file({f"{name}.diff": whole}, tmp_path / "whole.safetensors")
    found, expected = (read_lora(tmp_path / file, t2v.config) for file in (FILE, "whole.safetensors"))
    assert found.differences.keys() == {("patch_embedding/kernel", 0)}
    key = ("patch_embedding/kernel", 0)
    np.testing.assert_allclose(found.differences[key], expected.differences[key], atol=1e-5)


def peft_config(**more) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_k", "ffn.net.2", "proj_out"]}
    patterns = {"rank_pattern": {"to_k": 6}, "alpha_pattern": {"attn2.to_k": 3, r"^proj_out": 5}}
    return peft.LoraConfig(init_lora_weights=False, **settings, **patterns, **more)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:peft.PeftWarning")  # of the biases
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_alphas_that_peft_keeps_apart(t2v, options, tmp_path):
    torch.manual_seed(1)
    module = diffusers.WanTransformer3DModel(**t2v.pipe.transformer.config)
    module.load_state_dict(t2v.pipe.transformer.state_dict())
    module.add_adapter(peft_config(**options))
    if options.get("lora_bias"):
        for name, weight in module.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                torch.nn.init.normal_(weight)
    tensors = peft.get_peft_model_state_dict(module)
    metadata = module.peft_config["default"].to_dict()
    type(t2v.pipe).save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=metadata)
    found = read_lora(tmp_path / FILE, t2v.config)
    beside = tmp_path / "beside"
    beside.mkdir()
    renamed = {f"base_model.model.{name}": value.numpy() for name, value in tensors.items()}
    save_file(renamed, beside / "adapter_model.safetensors")
    module.peft_config["default"].save_pretrained(beside)
    assert_same(read_lora(beside / "adapter_model.safetensors", t2v.config), found)
    module.fuse_lora()
    module.unload_lora()
    assert_merges_as(Merged(t2v.teacher, found), module, tmp_path)


# What is refused

PAIR = {
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight": np.ones((4, 24), np.float32),
    "diffusion_model.blocks.0.self_attn.q.lora_up.weight": np.ones((24, 4), np.float32),
}
DOWN, UP = PAIR
Q = "diffusion_model.blocks.0.self_attn.q"
ONES = np.ones((24,), np.float32)
BROKEN = {
    "no LoRA": (
        {"blocks.0.self_attn.q.weight": ONES},
        r"none of its 1 tensors is part of a LoRA; is it a whole model\?",
    ),
    "kind": (
        {**PAIR, f"{Q}.dora_scale": ONES},
        rf"tensor '{Q}.dora_scale' is of an unknown kind, expected one of lora_A",
    ),
    "layer": (
        {**PAIR, f"{Q}k.diff_b": ONES},
        rf"tensor '{Q}k.diff_b' is of a layer that this model does not have; is the",
    ),
    "number": (
        {k.replace("blocks.0", "blocks.2"): v for k, v in PAIR.items()},
        r"tensor 'diffusion_model.blocks.2.\S+' is of block 2, but the last of this model is 1",
    ),
    "kohya's number": (
        {"lora_unet_blocks_30_ffn_0.alpha": np.ones(1, np.float32)},
        r"'lora_unet_blocks_30_ffn_0.alpha' is of block 30, but the last of this model is 1",
    ),
    "no up": ({DOWN: PAIR[DOWN]}, rf"tensor '{DOWN}' has no lora_up \(or B\) beside it; the file is incomplete"),
    "no down": ({UP: PAIR[UP]}, rf"tensor '{UP}' has no lora_down \(or A\) beside it"),
    "alpha alone": ({f"{Q}.alpha": np.ones(1, np.float32)}, r"tensor '\S+.alpha' has no lora_down"),
    "width of A": (
        {**PAIR, DOWN: np.ones((4, 23), np.float32)},
        rf"tensor '{DOWN}' has shape \[4, 23\], expected \[4, 24\]; is the LoRA for another model\?",
    ),
    "width of B": ({**PAIR, UP: np.ones((20, 4), np.float32)}, rf"'{UP}' has shape \[20, 4\], expected \[24, 4\]"),
    "axes": ({**PAIR, DOWN: np.float32(1)}, rf"'{DOWN}' has shape \[\], expected \[1, 24\]"),
    "no rank": (
        {DOWN: np.ones((0, 24), np.float32), UP: np.ones((24, 0), np.float32), f"{Q}.alpha": np.float32(1)},
        rf"'{DOWN}' has shape \[0, 24\], expected \[1, 24\]",
    ),
    "ranks": (
        {**PAIR, UP: np.ones((24, 5), np.float32)},
        rf"'{UP}' has rank 5, but '{DOWN}' has 4; fetch the file again",
    ),
    "shape of a difference": ({f"{Q}.diff_b": np.ones(23, np.float32)}, r"has shape \[23\], expected \[24\]"),
    "NaN": ({**PAIR, UP: np.full((24, 4), np.nan, np.float32)}, rf"'{UP}' holds NaN or infinity; the file is damaged"),
    "integers": ({**PAIR, UP: np.ones((24, 4), np.int8)}, rf"'{UP}' is of int8, expected floating point; quantised"),
    "alpha of several": ({**PAIR, f"{Q}.alpha": ONES}, r"alpha' of shape \[24\] is not one finite number"),
    "infinite alpha": ({**PAIR, f"{Q}.alpha": np.float32(np.inf)}, r"alpha' of shape \[\] is not one finite number"),
    "twice": (
        {**PAIR, "transformer.blocks.0.attn1.to_q.lora_A.weight": PAIR[DOWN]},
        r"tensor '\S+' and '\S+' are for the same layer; remove one",
    ),
    "product and difference": (
        {**PAIR, f"{Q}.diff": np.ones((24, 24), np.float32)},
        rf"'{Q}.\S+' and .* change one parameter, expected one kind of change; remove one",
    ),
    "adapter of a norm": (
        {"blocks.0.norm3.lora_A.weight": ONES, "blocks.0.norm3.lora_B.weight": ONES},
        "is half an adapter, but blocks/norm2/scale is no linear layer",
    ),
    "bias without adapter": ({f"{Q}.lora_B.bias": ONES}, r"lora_B.bias' has no adapter beside it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_reading_refuses(case, t2v, tmp_path):
    tensors, message = BROKEN[case]
    save_file({name: np.asarray(value) for name, value in tensors.items()}, tmp_path / FILE)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / FILE, t2v.config)
    assert str(caught.value).startswith(str(tmp_path / FILE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"transformer.lora_alpha": ', "its PEFT configuration is not valid JSON"),
        ('{"transformer.use_dora": true}', "is a DoRA, .* expected a LoRA"),
        ('{"transformer.lora_alpha": [1]}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 1}}', "PEFT's alphas cannot be read"),
        (
            '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(.|.|.)+X": 1}}',
            r"alpha_pattern has '\(\.\|\.\|\.\)\+X', expected the name of a layer",
        ),
        ('{"transformer.lora_alpha": NaN}', "PEFT's alphas cannot be read .nan is not a finite float32"),
        ('{"transformer.lora_alpha": -Infinity}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1e300}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"q": "NaN"}}', "PEFT's alphas cannot be read"),
    ],
)
def test_reading_refuses_a_configuration(metadata, message, t2v, tmp_path):
    save_file(PAIR, tmp_path / FILE, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / FILE, t2v.config)


def test_reading_refuses_a_configuration_beside(t2v, tmp_path):
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"adapter_config.json: not valid JSON: .utf-8. codec"):
        read_lora(tmp_path / "adapter_model.safetensors", t2v.config)


@pytest.mark.filterwarnings("error")
def test_reading_refuses_what_overflows_float32(t2v, tmp_path):
    for name, value, message in (
        (f"{Q}.alpha", np.asarray(1e300), r"alpha' of shape \[\] is not one finite number"),
        (f"{Q}.alpha", np.asarray(3e38, np.float32), r"lora_up.weight' times its scale 7.5e\+37 overflows float32"),
        (DOWN, np.full((4, 24), 1e300), "lora_down.weight' holds NaN or infinity"),
    ):
        save_file({**PAIR, UP: np.full((24, 4), 100, np.float32), name: value}, tmp_path / FILE)
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / FILE, t2v.config)


@pytest.mark.parametrize(
    "pattern, applies",
    [
        ("to_q", True),
        ("attn1.to_q", True),
        (r"attn1\\.to_q", True),
        ("^blocks.0.attn1.to_q$", True),
        ("to_q$", True),
        ("o_q", False),
        ("^attn1.to_q", False),
        ("to_k", False),
    ],
)
def test_patterns_of_alphas_are_names(pattern, applies, t2v, tmp_path):
    tensors = {k.replace(Q, "transformer.blocks.0.attn1.to_q"): v for k, v in PAIR.items()}
    text = f'{{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {{"{pattern}": 8}}}}'
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    assert read_lora(tmp_path / FILE, t2v.config).adapters["blocks/attn1/to_q", 0].b[0, 0] == (2 if applies else 1)


def test_a_checkpoint_of_pytorch_reads_too(t2v, tmp_path):
    torch.save({name: torch.tensor(value) for name, value in PAIR.items()}, tmp_path / "lora.pt")
    assert read_lora(tmp_path / "lora.pt", t2v.config).adapters.keys() == {("blocks/attn1/to_q", 0)}
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / FILE, t2v.config)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError):
        read_lora(tmp_path / FILE, t2v.config)
