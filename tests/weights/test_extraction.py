"""LoRA from a student and its teacher: what adapters hold of the change, and what is told of it."""

import jax
import numpy as np
import pytest
from lora_models import layers

from vpae_jax.types import UserError
from vpae_jax.weights import extraction
from vpae_jax.weights.extraction import extract, format_energies, low_rank
from vpae_jax.weights.lora import Lora, Merged
from vpae_jax.weights.writing import from_tree


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
    assert "1 of 26 linear layers changed; the adapters retain 100.00% of their squared change" in text
    nothing = extract(t2v.teacher, t2v.teacher, 4)
    assert (nothing.retained, nothing.outside, nothing.lora) == (1.0, 0.0, Lora({}))
    assert "0 of 26 linear layers changed" in format_energies(nothing)


def test_energies_as_text(t2v):
    found = extract(t2v.student, t2v.teacher, 5)
    lines = format_energies(found).splitlines()
    of_layers = [line.split() for line in lines if line.startswith("blocks/attn1/to_q ")]
    first, second = [e for e in found.energies if e.path == "blocks/attn1/to_q"]
    low, mean = min(first.retained, second.retained), (first.retained + second.retained) / 2
    assert of_layers == [["blocks/attn1/to_q", "2", f"{low:.4f}", f"{mean:.4f}"]]
    assert any(line.split()[:2] == ["all", "26"] for line in lines)
    assert lines[-1].startswith(f"{found.outside:.2%} of the squared change")


def test_extraction_refuses(t2v, i2v):
    with pytest.raises(UserError, match="rank is 0, expected at least 1"):
        extract(t2v.student, t2v.teacher, 0)
    with pytest.raises(
        UserError, match=r"the student's in_channels is 16, the teacher's 36; give this student's teacher"
    ):
        extract(t2v.student, i2v.teacher, 4)
    params = jax.tree.map(np.array, t2v.params)
    params["blocks"]["ffn"]["proj_in"]["kernel"][1, 2, 3] = np.nan
    with pytest.raises(UserError, match=r"blocks/ffn/proj_in/kernel of layer 1: .* holds NaN"):
        extract(from_tree("transformer", t2v.config, params), t2v.teacher, 4)
