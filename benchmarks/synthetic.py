"""Writes a checkpoint of any size with random weights for benchmarks; all names and shapes are those of a real one.

    python benchmarks/synthetic.py FOLDER [--preset=t2v-1.3b] [--layers=N] [--format=diffusers|wan]

One layer of one parameter is drawn and written at a time, so the model may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16

from vpae_jax import cli
from vpae_jax.models.presets import PRESETS, find
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.types import UserError
from vpae_jax.weights.names import Layout, Shape
from vpae_jax.weights.parts import abstract, flat
from vpae_jax.weights.writing import Extra, from_tree, write_part

PART = "transformer"
SCALE = 0.02


@dataclass(frozen=True)
class Random:
    """Normal values with standard deviation `SCALE`, reproducible on every read; see `writing.Values`.

    Attributes:
      config: of the transformer.
      abstract: our parameters' paths and shapes.
      stacked: the paths of those with a leading layer axis.
    """

    config: WanTransformerConfig
    abstract: Mapping[str, Shape]
    stacked: frozenset[str]

    def shapes(self) -> Mapping[str, Shape]:
        return self.abstract

    def dtype(self, path: str, layer: int) -> np.dtype:
        return np.dtype(jnp.bfloat16)

    def read(self, path: str, layer: int) -> BFloat16[np.ndarray, "..."]:
        shape = self.abstract[path]
        draw = np.random.default_rng([zlib.crc32(path.encode()), layer])
        values = draw.standard_normal(shape[1:] if path in self.stacked else shape, np.float32)
        return (values * np.float32(SCALE)).astype(jnp.bfloat16)

    def extras(self, layout: Layout) -> Iterator[Extra]:
        return iter(())


def random_values(preset: str, layers: int | None = None) -> Random:
    """Random weights of a preset's transformer.

    Args:
      preset: a key of `presets.PRESETS`.
      layers: number of blocks; by default the preset's.

    Raises:
      UserError: no such preset.
    """
    config = find(preset).transformer
    config = config if layers is None else dataclasses.replace(config, num_layers=layers)
    state = abstract(PART, config)[1]
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(state).items()}
    return Random(config, shapes, from_tree(PART, config, state).stacked)


def main(argv: list[str]) -> None:
    parser = cli.Parser("python benchmarks/synthetic.py", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model directory to write; must not exist")
    parser.add_argument("--preset", default="t2v-1.3b", choices=PRESETS, help="preset that determines the sizes")
    parser.add_argument("--layers", type=int, help="number of blocks; by default the preset's")
    parser.add_argument("--format", default="diffusers", choices=get_args(Layout), help="the layout")
    given = parser.parse_args(argv)
    if given.folder.exists():
        raise UserError(f"{given.folder}: already exists; remove it or choose another destination")
    write_part(given.folder, PART, random_values(given.preset, given.layers), given.format)


if __name__ == "__main__":
    cli.run(main)
