"""Memory of one device: what is resident between programs, by kind, and what a compiled program adds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from vpae_jax.planning.chips import Chip
from vpae_jax.planning.clips import ClipSize
from vpae_jax.planning.programs import Programs, Setting

# In display order.
KINDS = ("parameters", "optimizer", "averages", "frozen", "decoder", "batch", "temporaries", "workspace", "code")
# Batches on the devices at once: the current one, and the next one in transfer.
BATCHES = 2
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu's errors: "Used 21.5G of 15.75G hbm", "required for HLO temporaries (1.2T) exceeds available HBM (15.75G)".
_NEEDED = re.compile(r"(?:Used |memory required for [^()]*\()([0-9.]+)([KMGT]?)")


@dataclass(frozen=True)
class Footprint:
    """Memory of a compiled program, in bytes on one device.

    Attributes:
      arguments: the parts of the state, the frozen weights and the batch that it reads.
      temporaries: gradients, activations and other intermediates, and results that do not reuse an argument's buffer.
      code: the program itself.
      peak: XLA's own count of the most memory in use at once, including arguments, without `code`; 0 if unavailable.
      offloaded: temporaries in host memory.
    """

    arguments: int
    temporaries: int
    code: int
    peak: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.code


def tree_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings (a leaf without one counts in full)."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def persistent(programs: Programs) -> dict[str, int]:
    """Bytes on one device of what is resident between programs, by kind."""
    return {
        "parameters": tree_bytes(programs.state.params),
        "optimizer": tree_bytes(programs.state.opt),
        "averages": tree_bytes(programs.state.averages),
        "frozen": tree_bytes(programs.frozen),
        "decoder": tree_bytes(programs.preview.arguments[1]),  # for previews and scores; the weights
        "batch": BATCHES * tree_bytes(programs.batch),
    }


def workspace(chip: Chip, clip: ClipSize, width: int, batch_size: int, setting: Setting) -> int:
    """Bytes on one device that the chip's attention kernels use in addition to the program's own count.

    cuDNN's backward pass sums the queries' gradient in float32, in a workspace whose size it reports only on a GPU
    (FlashAttention-3, arXiv 2407.08608, section 3; a program compiled without a GPU does not include it).
    """
    if chip.platform != "cuda":
        return 0
    clips = batch_size / (setting.data * setting.fsdp * setting.accumulation)
    return round(4 * max(clips, 1) * clip.tokens * width / (setting.context * setting.tensor))


def on_host(chip: Chip, devices: int, programs: Programs, offloaded: int) -> dict[str, int]:
    """Bytes of one host's memory, by use.

    A checkpoint is copied to the host before it is written. Offloaded activations are there while an update runs.
    """
    state = programs.state
    each = min(chip.host.devices, devices)
    return {
        "checkpoint": each * sum(map(tree_bytes, (state.params, state.opt, state.averages))),
        "offloaded": each * offloaded,
    }


def footprint(compiled: jax.stages.Compiled) -> Footprint:
    """The memory that the compiler allocates for a program on one device."""
    stats: Any = compiled.memory_analysis()
    made = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return Footprint(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes + made,
        max(stats.generated_code_size_in_bytes, 0),
        stats.peak_memory_in_bytes,
        stats.host_temp_size_in_bytes,
    )


def needed(message: str) -> int | None:
    """Bytes that a rejected program needs, including arguments, from the compiler's message; None if it has none."""
    sizes = [float(number) * _UNITS[unit] for number, unit in _NEEDED.findall(message)]
    return int(max(sizes)) if sizes else None
