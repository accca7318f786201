"""Memory of one device: what lies there between programs, by kind, and what a compiled program adds to it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from vpae_jax.planning.programs import Programs

# In the order in which they are shown.
KINDS = ("parameters", "optimizer", "averages", "frozen", "batch", "temporaries", "code")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu's refusals: "Used 21.5G of 15.75G hbm", "required for HLO temporaries (1.2T) exceeds available HBM (15.75G)".
_NEEDED = re.compile(r"(?:Used |memory required for [^()]*\()([0-9.]+)([KMGT]?)")


@dataclass(frozen=True)
class Footprint:
    """What a compiled program needs, bytes on one device.

    Attributes:
      arguments: of the state, the frozen weights and the batch, what it reads.
      temporaries: gradients, activations and all else that it makes, and results that do not take an argument's place.
      code: the program itself.
    """

    arguments: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.code


def tree_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings (without one: all of it)."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def persistent(programs: Programs) -> dict[str, int]:
    """Bytes on one device of what lies there between programs, by kind."""
    return {
        "parameters": tree_bytes(programs.state.params),
        "optimizer": tree_bytes(programs.state.opt),
        "averages": tree_bytes(programs.state.averages),
        "frozen": tree_bytes(programs.frozen),
        "batch": tree_bytes(programs.batch),
    }


def footprint(compiled: jax.stages.Compiled) -> Footprint:
    """What the compiler allots to a program on one device."""
    stats: Any = compiled.memory_analysis()
    made = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return Footprint(
        stats.argument_size_in_bytes, stats.temp_size_in_bytes + made, max(stats.generated_code_size_in_bytes, 0)
    )


def needed(message: str) -> int | None:
    """Bytes that a program needs, arguments and all, from the compiler's refusal; None if it does not say."""
    sizes = [float(number) * _UNITS[unit] for number, unit in _NEEDED.findall(message)]
    return int(max(sizes)) if sizes else None
