"""Parameters of the heads in every config for 1.3B and 14B: as docs/methods/discriminators.md says, never a billion."""

import re
from pathlib import Path

import jax
import pytest
from config_files import CONFIGS
from flax import nnx

from vpae_jax.config import build
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig, even_taps
from vpae_jax.types import UserError

ROOT = Path(__file__).parents[2]
ROW = re.compile(
    r"^\| (?P<configs>`.*`) \| `(?P<kind>\w+)` \| .* \| (?P<small>\d+), (?P<large>\d+) "
    r"\| (?P<less>\d+) million, (?P<more>\d+) million \|$",
    re.M,
)
ROWS = {
    name: row
    for row in ROW.finditer((ROOT / "docs/methods/discriminators.md").read_text())
    for name in re.findall(r"`(\w+)`", row["configs"])
}


def millions(heads):
    shapes = nnx.eval_shape(lambda: DiscriminatorHeads(build(HeadsConfig, heads, "heads"), rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) / 1e6


def test_every_config_with_heads_is_in_the_table():
    made = {name: module.get_config() for name, module in CONFIGS.items()}
    assert {name for name, config in made.items() if config.networks} == set(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_sizes_are_those_of_the_table(name):
    module, row = CONFIGS[name], ROWS[name]
    for preset, width, count in (("t2v-1.3b-480p", "small", "less"), ("t2v-14b-720p", "large", "more")):
        heads = module.get_config(preset).networks.heads.to_dict()
        assert (heads["kind"], heads["hidden"]) == (row["kind"], int(row[width]))
        assert round(millions(heads)) == int(row[count])
    if "t2v" in preset:
        assert module.get_config("i2v-14b-720p").networks.heads.to_dict() == heads


@pytest.mark.parametrize(("layers", "taps"), [(12, (3, 6, 9, 12)), (32, (8, 16, 24, 32)), (3, (1, 2, 3)), (1, (1,))])
def test_even_taps(layers, taps):
    assert even_taps(layers) == taps


def test_no_taps_of_no_layers():
    with pytest.raises(UserError, match="num_layers is 0, expected at least 1"):
        even_taps(0)
