"""What of V-PAE's penalty survives bfloat16, on a transformer and heads of real kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.methods.adversarial import DifferencePenalty, Judged, judge
from vpae_jax.models import presets
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.train.roles import HeadsNetwork, TransformerNetwork, split
from vpae_jax.types import Condition

SIZES = WanTransformerConfig(
    num_attention_heads=4, attention_head_dim=16, in_channels=16, text_dim=16, freq_dim=16, ffn_dim=128, num_layers=4
)
CLIPS = 6


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def penalty():
    """The mean penalty by compute dtype and settings."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    condition = Condition(normal(CLIPS, 4, 16), jnp.ones((CLIPS, 4), bool))
    t = jnp.full(CLIPS, 0.5)
    shown = Judged(normal(CLIPS, 3, 8, 8, 16), t, normal(CLIPS, 3, 8, 8, 16), t)
    config = HeadsConfig(width=64, taps=(2, 4), num_heads=4)

    def value(dtype, **fields):
        graph, params = split(WanTransformer(SIZES, rngs=nnx.Rngs(0), dtype=dtype))
        backbone = TransformerNetwork(graph, params)
        heads = HeadsNetwork(*split(DiscriminatorHeads(config, rngs=nnx.Rngs(1), dtype=dtype)))

        @jax.jit
        def run(shown):
            judged = judge(backbone, heads, condition)
            real, fake = judged(shown.real, shown.real_t), judged(shown.fake, shown.fake_t)
            return DifferencePenalty(**fields)(judged, shown, real, fake, jax.random.key(3)).mean()

        return float(run(shown))

    return value


def test_the_penalty_keeps_its_size_in_bfloat16(penalty):
    """Its temporal half, ten times the spatial one, is large enough not to be rounding."""
    assert penalty(jnp.bfloat16) / penalty(jnp.float32) == pytest.approx(1, abs=0.35)


def test_the_spatial_half_survives_apart(penalty):
    """In float32 a tenfold amplitude changes little of it, D being nearly linear so near; in bfloat16 it is then not
    rounding any more."""
    exact = penalty(jnp.float32, sigma_t=0.0)
    assert penalty(jnp.float32, sigma_t=0.0, apart=0.1) / exact == pytest.approx(1, abs=0.1)
    apart, together = (penalty(jnp.bfloat16, sigma_t=0.0, apart=a) / exact for a in (0.1, 0.0))
    assert apart == pytest.approx(1, abs=0.1) and abs(apart - 1) < abs(together - 1)


def test_heads_of_14b_are_as_large_as_those_of_1_3b():
    """As wide as the transformer they would hold 1.18 billion parameters, more than the smaller transformer."""
    sizes = {}
    for name in ("t2v-1.3b", "t2v-14b"):
        config = presets.find(name).heads
        shapes = nnx.eval_shape(lambda config=config: DiscriminatorHeads(config, rngs=nnx.Rngs(0)))
        sizes[name] = count(split(shapes)[1])
    assert sizes["t2v-14b"] == pytest.approx(sizes["t2v-1.3b"], rel=0.1) == pytest.approx(113e6, rel=0.1)
    wide = dataclasses.replace(presets.find("t2v-14b").heads, hidden=None, num_heads=40)
    shapes = nnx.eval_shape(lambda: DiscriminatorHeads(wide, rngs=nnx.Rngs(0)))
    assert count(split(shapes)[1]) == pytest.approx(1.18e9, rel=0.02)
