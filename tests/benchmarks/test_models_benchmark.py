"""The benchmarks of models and steps run, and count right; how long they take is nobody's business here."""

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vpae_jax.config import MeshConfig
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.presets import TINY
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.sharding import make_mesh
from vpae_jax.types import Condition, Features, UserError

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CONFIG = TINY.transformer


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks as the command does: from their folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def condition_of(tokens):
    return Condition(
        text=jnp.zeros((2, tokens, CONFIG.text_dim)),
        text_mask=jnp.ones((2, tokens), bool),
        image=jnp.zeros((2, 17, CONFIG.image_dim)),
        frames=jnp.zeros((2, 3, 6, 6, 20)),
    )


def plain(q, k, v, bias=None):
    """Attention that is neither tiled nor a kernel: its products are those that count."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize(
    "name", ["vae-encode", *(pytest.param(n, marks=pytest.mark.long) for n in ("dit-backward", "vae-decode", "umt5"))]
)
def test_ours_equal_pytorchs_and_both_are_timed(module, tmp_path, capsys, name):
    file, page = tmp_path / "all.json", tmp_path / "page.md"
    page.write_text("before\n<!-- made by benchmarks/models.py -->\nold\n<!-- end -->\nafter\n")
    options = ["--size=tiny", "--layers=1", "--rounds=2", f"--only={name}", f"--json={file}", f"--markdown={page}"]
    module("models").main(options)
    facts = json.loads(file.read_text())["results"][name]
    assert facts["flops"] > 1e5 and facts["product"] > 0 and facts["utilisation"] > 0
    assert 0 < facts["difference"] < 1e-4
    for who in ("ours", "theirs", "matrix product"):
        assert [len(facts["times"][who][clock]) for clock in ("seconds", "cpu")] == [2, 2]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert re.search(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d-\d+\.\d\d\)", text)
    assert text.strip().splitlines()[-3] in capsys.readouterr().out


def test_a_difference_ends_the_program(module, monkeypatch):
    theirs, models = module("theirs"), module("models")
    right = theirs.array
    monkeypatch.setattr(theirs, "array", lambda x: 1.01 * right(x))
    with pytest.raises(SystemExit, match=r"error: DiT forward: ours and PyTorch's differ by 9\.9e-03, limit 1e-04"):
        models.main(["--size=tiny", "--layers=1", "--rounds=1", "--only=dit-forward"])
    with pytest.raises(UserError, match="--only: 'dit' is not one of dit-forward"):
        models.main(["--only=dit"])


@pytest.mark.parametrize("tokens", [16, 512])
def test_flops_of_the_transformer_are_its_products(module, tokens):
    """Of so few tokens attention is written out, and the traced products are what is counted from shapes."""
    flops = module("flops")
    graph, weights = nnx.split(nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0))))
    x = jnp.zeros((2, 3, 6, 6, 16))
    traced = flops.products(
        lambda w, *given: nnx.merge(graph, w)(*given), weights, x, jnp.zeros(2), condition_of(tokens)
    )
    assert flops.transformer(CONFIG, x.shape, condition_of(tokens)) == pytest.approx(traced, rel=1e-6)


def test_flops_of_the_text_encoder_are_its_products(module):
    flops, config = module("flops"), TINY.text_encoder
    graph, weights = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))
    ids, mask = jnp.zeros((3, 16), int), jnp.ones((3, 16), bool)
    traced = flops.products(lambda w, *given: nnx.merge(graph, w)(*given), weights, ids, mask)
    assert flops.text_encoder(config, (3, 16)) == pytest.approx(traced, rel=1e-6)


def test_products_of_loops_and_convolutions_are_counted(module):
    products = module("flops").products
    x, kernel = jnp.zeros((1, 8, 8, 6)), jnp.zeros((3, 3, 2, 12))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
        )

    assert products(convolve, x, kernel) == 2 * (4 * 4 * 12) * (3 * 3 * 2)
    a = jnp.zeros((4, 4))
    assert products(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], a) == 5 * 2 * 4**3
    with pytest.raises(ValueError, match="loop of unknown length"):
        products(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ a, a), a)
    q = jnp.zeros((2, 8, 3, 4))
    assert products(plain, q, q, q) == 2 * 2 * 2 * 3 * 8 * 8 * 4


def test_updates_are_counted_as_what_they_evaluate(module):
    """Evaluations, with twice as many for a backward pass to the weights and once as many for one to the inputs."""
    steps, flops, sizes = module("steps"), module("flops"), module("sizes")
    size = sizes.find("tiny", 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    phase = steps.prepare(size, steps.PHASES["phase 1"], mesh)
    shape, condition = (1, *size.step_latents, 16), phase.batch.condition
    once = flops.transformer(size.transformer, shape, condition)
    # The generator, then the fake score, whose adapters are trained; the trained generator, guided teacher, fake score.
    assert phase.flops == pytest.approx([(1 + 2) * once, (3 + 2 + 1) * once])
    phase = steps.prepare(size, steps.PHASES["phase 2"], mesh)
    tap = size.transformer.num_layers
    features = flops.transformer(size.transformer, shape, condition, tap)
    assert 0 < features < once
    rows = (1, 27, size.transformer.width)
    text, image = jnp.zeros((1, 16, rows[2])), jnp.zeros((1, 257, rows[2]))
    seen = Features((jnp.zeros(rows),), text, condition.text_mask, (3, 3, 3), image)
    config = HeadsConfig(width=rows[2], taps=(tap,), num_heads=size.transformer.num_attention_heads)
    graph, weights = nnx.split(nnx.eval_shape(lambda: DiscriminatorHeads(config, rngs=nnx.Rngs(0))))
    heads = flops.products(lambda w, seen: nnx.merge(graph, w)(seen), weights, seen)
    assert heads > 0
    # The heads are trained on a real, a generated and a perturbed clip; the generator by the heads and the teacher.
    expected = [once + 3 * features + 3 * 3 * heads, 3 * once + 2 * (features + heads) + once]
    assert phase.flops == pytest.approx(expected)


@pytest.mark.long
def test_both_phases_run(module, tmp_path):
    file = tmp_path / "all.json"
    module("steps").main(["--size=tiny", "--layers=1", "--rounds=1", f"--json={file}"])
    results = json.loads(file.read_text())["results"]
    trained = {name: [one["trains"] for one in facts["updates"]] for name, facts in results.items()}
    assert trained == {"phase 1": ["fake_score", "generator"], "phase 2": ["heads", "generator"]}
    for facts in results.values():
        assert facts["product"] > 0
        assert all(one["flops"] > 1e6 and min(one["seconds"]) > 0 for one in facts["updates"])
