"""`convert` with LoRA files: several merged, each at its strength, rounded once; extracted ones that lose nothing."""

import math

import numpy as np
import pytest
import torch
from folders import read, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vpae_jax import cli
from vpae_jax.convert import main

LAYER = "blocks.0.self_attn.q"
KERNEL = f"{LAYER}.weight"
TRANSFORMER = "diffusion_pytorch_model.safetensors"


def run(*arguments):
    cli.run(main, [str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit):
        run(*arguments)
    return capsys.readouterr().err


@pytest.fixture
def loras(tmp_path, wide):
    """Two LoRA files of one layer, and their changes, each a hundredth of the layer's norm."""
    draw, made = np.random.default_rng(0).standard_normal, []
    for name in ("a", "b"):
        down, up = draw((4, 128), np.float32), draw((128, 4), np.float32)
        up *= 0.01 * np.linalg.norm(wide[KERNEL]) / np.linalg.norm(up @ down)
        path = tmp_path / f"{name}.safetensors"
        save_file(
            {f"diffusion_model.{LAYER}.lora_down.weight": down, f"diffusion_model.{LAYER}.lora_up.weight": up}, path
        )
        made.append((path, up @ down))
    return made


def merged(tmp_path, state, *options):
    """The layer with LoRA files merged into a transformer."""
    source = write(tmp_path / "base" / "m.safetensors", state)
    run(source, tmp_path / "out", "--format=wan", "--verify", *options)
    return read(tmp_path / "out" / TRANSFORMER)[KERNEL]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_a_merge_is_rounded_once_to_the_dtype_that_is_written(tmp_path, wide, loras, kind):
    state = {name: value.to(kind) for name, value in wide.items()}
    (path, change), _ = loras
    found = merged(tmp_path, state, f"--lora={path}", "--dtype=float32")
    np.testing.assert_array_equal(found.numpy(), state[KERNEL].float().numpy() + change)


def test_what_float8_would_lose_is_kept(tmp_path, wide, loras, capsys):
    state = {name: value.to(torch.float8_e4m3fn) for name, value in wide.items()}
    (path, change), _ = loras
    found = merged(tmp_path, state, f"--lora={path}")
    assert found.dtype == torch.bfloat16
    kept = np.sum((found.float() - state[KERNEL].float()).numpy() * change) / np.sum(change**2)
    assert kept == pytest.approx(1, abs=0.01)
    assert "note: float8 weights that a LoRA changes are written in bfloat16\n" in capsys.readouterr().err
    others = read(tmp_path / "out" / TRANSFORMER)
    assert {value.dtype for name, value in others.items() if name != KERNEL} == {torch.float8_e4m3fn}


@pytest.mark.parametrize(
    "strengths, written", [((1, 1), ("", "")), ((0.8, -0.5), (":0.8", ":-0.5")), ((2, 1), (":2", ":1.0"))]
)
def test_several_files_are_added_each_at_its_strength(tmp_path, wide, loras, strengths, written):
    options = [f"--lora={path}{end}" for (path, _), end in zip(loras, written, strict=True)]
    found = merged(tmp_path, wide, *options).numpy()
    expected = wide[KERNEL].numpy() + sum(s * change for s, (_, change) in zip(strengths, loras, strict=True))
    np.testing.assert_allclose(found, expected, atol=1e-7)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{path}:{strength:g}" in card for (path, _), strength in zip(loras, strengths, strict=True))


def test_several_files_are_rounded_once(tmp_path, wide, loras):
    state = {name: value.bfloat16() for name, value in wide.items()}
    found = merged(tmp_path, state, *(f"--lora={path}" for path, _ in loras))
    expected = state[KERNEL].float().numpy() + loras[0][1] + loras[1][1]
    assert torch.equal(found, torch.tensor(expected).bfloat16())


@pytest.mark.parametrize("strength", ["nan", "inf", "much", ""])
def test_strengths_are_finite_numbers(tmp_path, loras, capsys, strength):
    path = loras[0][0]
    line = refused(capsys, path, tmp_path / "out", "--format=wan", f"--lora={path}:{strength}")
    assert (
        line
        == f"error: --lora={path}:{strength}: the strength is {strength!r}, expected a number, such as {path}:0.8\n"
    )


def test_a_name_with_a_colon_is_a_name(tmp_path, wide, loras):
    path, change = loras[0]
    found = merged(tmp_path, wide, f"--lora={path.rename(tmp_path / 'x:2')}").numpy()
    np.testing.assert_array_equal(found, wide[KERNEL].numpy() + change)


# Extraction


@pytest.fixture
def student(tmp_path, wide):
    """A file whose weights differ everywhere from those of another, the teacher's."""
    draw = np.random.default_rng(1).standard_normal
    teacher = {name: value.numpy() for name, value in wide.items()}
    changed = {name: value + 0.01 * draw(value.shape, np.float32) for name, value in teacher.items()}
    for name, state in (("teacher", teacher), ("student", changed)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "m.safetensors")
    return tmp_path / "student" / "m.safetensors", tmp_path / "teacher" / "m.safetensors", teacher, changed


def test_comfyuis_form_loses_nothing(tmp_path, student, capsys):
    source, base, teacher, changed = student
    run(source, tmp_path / "l.safetensors", "--format=wan", "--as-lora", "--rank=128", f"--base={base}")
    assert "modulation and the patch embedding: written in full" in capsys.readouterr().out
    run(base, tmp_path / "back", "--format=wan", f"--lora={tmp_path / 'l.safetensors'}")
    back = load_file(tmp_path / "back" / TRANSFORMER)
    for name, value in changed.items():
        change = np.linalg.norm(value - teacher[name])
        assert np.linalg.norm(back[name] - value) < 1e-3 * change, name
    keys = set(load_file(tmp_path / "l.safetensors"))
    for name in ("patch_embedding.diff", "blocks.0.modulation.diff", "blocks.1.norm3.diff_b", "head.head.diff_b"):
        assert f"diffusion_model.{name}" in keys


def test_diffusers_form_says_what_it_loses(tmp_path, student, capsys):
    source, base, teacher, changed = student
    run(source, tmp_path / "l.safetensors", "--format=diffusers", "--as-lora", "--rank=128", f"--base={base}")
    squares = {name: float(np.sum((value - teacher[name]) ** 2)) for name, value in changed.items()}
    linear = sum(s for name, s in squares.items() if changed[name].ndim == 2 and name.endswith("weight"))
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith(
        f"{1 - linear / sum(squares.values()):.2%} of the squared change of all parameters is in biases"
    )
    assert last.endswith("lost in Diffusers' form, and written in ComfyUI's (--format=wan)")


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_metadata_tells_rank_alpha_base_and_command(tmp_path, student, form):
    source, base, _, _ = student
    path = tmp_path / "l.safetensors"
    run(source, path, f"--format={form}", "--as-lora", "--rank=3", f"--base={base}")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("format", "rank", "alpha", "base")} == {
        "format": "pt",
        "rank": "3",
        "alpha": "3",
        "base": str(base),
    }
    assert metadata["command"] == (
        f"python -m vpae_jax.convert {source} {path} --format={form} --as-lora --rank=3 --base={base}"
    )
    alphas = [value for name, value in load_file(path).items() if name.endswith(".alpha")]
    assert all(math.isclose(value, 3) for value in alphas) and bool(alphas) == (form == "wan")


def test_one_of_several_sets_is_extracted(tmp_path, wide, student, capsys):
    _, base, _, _ = student
    torch.save({"generator": wide, "generator_ema": wide | {KERNEL: wide[KERNEL] + 1}}, tmp_path / "x.pt")
    options = ["--format=wan", "--as-lora", f"--base={base}", "--weights=generator_ema"]
    assert "give --rank=N" in refused(capsys, tmp_path / "x.pt", tmp_path / "l.safetensors", *options)
    run(tmp_path / "x.pt", tmp_path / "l.safetensors", "--rank=1", *options)
    keys = {f"diffusion_model.{LAYER}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert set(load_file(tmp_path / "l.safetensors")) == keys
