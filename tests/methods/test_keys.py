"""No random key serves two draws of a loss, or a draw and a split: in every registered method that trains on clips,
whatever it draws."""

import jax
import jax.numpy as jnp
import pytest
from networks import BATCH, B, drawn_keys, made, nets_of, weights_of

from vpae_jax.methods import METHODS
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Context
from vpae_jax.types import Batch

VARIANTS = {
    "as it stands": {},
    "withheld pictures": {"image_dropout": 0.5},
    "pure noise": {"input": "pure_noise"},
    "the figure's noise": {"noise": DiscriminatorNoise(kind="fig_literal")},
    "a relative loss": {"adversarial": "rpgan"},
    "a penalty": {"penalty": DifferencePenalty(1.0, "both", 0.1, 0.1)},
}
CASES = [
    pytest.param(cls, options, number, id=f"{name}, {variant}, update {number}")
    for name, cls in METHODS.items()
    # All but what draws from its clips' seeds, and what makes no clips of conditions.
    if cls.batch is Batch and not cls.known_noise and "image_dropout" in cls.__dataclass_fields__
    for variant, options in VARIANTS.items()
    if options.keys() <= cls.__dataclass_fields__.keys()
    for number in range(len(cls().updates))
]


@pytest.mark.filterwarnings("ignore:.*noise.kind is .fig_literal.:UserWarning")
@pytest.mark.parametrize(("cls", "options", "number"), CASES)
def test_no_key_serves_two_draws(cls, options, number, monkeypatch):
    used, method = drawn_keys(monkeypatch), made(cls, **options)
    context = Context(jnp.int32(0), jax.random.split(jax.random.key(5), B), jax.random.key(6))
    if hasattr(cls, "last"):  # one draw, however often a loss asks for it
        chosen = method.last(context)
        monkeypatch.setattr(cls, "last", lambda self, context: chosen)
        used.clear()
    with jax.disable_jit():  # loops then run with keys that can be looked at
        method.updates[number].loss(nets_of(method, weights_of(method)), BATCH, context)
    assert used and len(set(used)) == len(used)
