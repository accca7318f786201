"""A lower bound on a program's time: the longest of its arithmetic, its memory traffic and its communication.

Assumptions, on the cautious side:

    compute         the chip's own fractions of its bf16 peak for products, attention forward and attention backward
                    (`chips.Rates`, with sources); work is spread evenly over the devices
    memory          80% of HBM bandwidth; every product's operands and results pass through it once, and the optimizer
                    reads and writes its state once; operations between products are fused into them
    communication   80% of link bandwidth; a group communicates along one axis of the torus, in both directions,
                    whatever the mesh; on a ring of g chips, an all-to-all takes g / 4 times as long as its bytes alone
                    would; groups of GPUs across hosts use as many network adapters as they have members in a host,
                    one per device for an all-to-all
    overlap         between all (`overlapped`) and none of the communication (`serial`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpae_jax.planning.chips import Chip
from vpae_jax.planning.flops import Work
from vpae_jax.planning.hlo import Collective

MEMORY, LINK = 0.8, 0.8


@dataclass(frozen=True)
class Time:
    """Seconds of one run of a program."""

    compute: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        """Time if communication is fully hidden."""
        return max(self.compute, self.memory, self.communication)

    @property
    def serial(self) -> float:
        """Time if no communication is hidden."""
        return max(self.compute, self.memory) + self.communication

    @property
    def bound(self) -> str:
        """The resource that the program waits for most."""
        parts = {"compute": self.compute, "memory": self.memory, "communication": self.communication}
        return max(parts, key=lambda name: parts[name])


def traffic(work: Work, devices: int, state_bytes: int) -> float:
    """Bytes through one device's memory.

    Args:
      work: of the program.
      devices: number of devices over which activations are spread.
      state_bytes: bytes of the trained roles' weights, moments and averages on one device, read and written once.
    """
    return work.activation_bytes / devices + work.weight_bytes + 2 * state_bytes


def estimate(
    chip: Chip, devices: int, work: Work, memory_bytes: float, collectives: Sequence[Collective], hosts: Sequence[int]
) -> Time:
    """Estimates the time of one run.

    Args:
      chip: the kind of device.
      devices: number of devices.
      work: of the program.
      memory_bytes: `traffic` of one device.
      collectives: of the program.
      hosts: the host of each device of the mesh, in the mesh's order.
    """
    sent = sum((c.bytes / (rate(chip, c, hosts) * LINK) for c in collectives), 0.0)
    return Time(arithmetic(chip, devices, work), memory_bytes / (chip.bandwidth * MEMORY), sent)


def arithmetic(chip: Chip, devices: int, work: Work) -> float:
    """Seconds for the products of the work."""
    kernels = work.attention + work.attention_backward + work.tiled
    full = (
        (work.flops - kernels) / chip.rates.products
        + work.attention / chip.rates.attention
        + work.attention_backward / chip.rates.attention_backward
        + work.tiled / chip.rates.tiled
    )
    return full / (devices * chip.flops)


def rate(chip: Chip, collective: Collective, hosts: Sequence[int]) -> float:
    """Rate in bytes/s at which a device sends its share of a collective."""
    g, exchange = len(collective.group), collective.kind.endswith("all-to-all")
    if chip.platform == "tpu":
        return chip.link / max(g / 4, 1) if exchange else chip.link
    outside = {hosts[position] for position in collective.group}
    if len(outside) == 1:
        return chip.link
    members = 1 if exchange or collective.kind == "collective-permute" else g / len(outside)
    return min(chip.link, members * chip.network)
