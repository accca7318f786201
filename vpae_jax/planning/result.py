"""What a plan says, as plain data; `as_json` is its stable form (documented in `vpae_jax/plan.py`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vpae_jax.planning.chips import Chip
from vpae_jax.planning.clips import ClipSize
from vpae_jax.planning.flops import Work
from vpae_jax.planning.hlo import Communication
from vpae_jax.planning.memory import Footprint
from vpae_jax.planning.programs import Setting
from vpae_jax.planning.roofline import Time

SCHEMA = 1


@dataclass(frozen=True)
class ProgramPlan:
    """One update.

    Attributes:
      name: the role that it trains.
      calls: how often it runs a step.
      work: its arithmetic.
      memory_bytes: its traffic through one device's memory.
      footprint: its memory; None when the compiler refused it.
      needed: bytes on one device that the compiler wanted when it refused; None if it did not say, or did not refuse.
      communication: what it sends; None when it was refused.
      time: of one run; None when it was refused.
      compile_seconds: how long tracing and compiling took.
    """

    name: str
    calls: float
    work: Work
    memory_bytes: float
    footprint: Footprint | None
    needed: int | None
    communication: Communication | None
    time: Time | None
    compile_seconds: float


@dataclass(frozen=True)
class Plan:
    """A phase on a topology.

    Attributes:
      phase: its name.
      topology: as it was given.
      chip: each device.
      devices: how many.
      setting: the mesh, accumulation and rematerialisation.
      clip: size of a clip.
      batch_size: clips a step.
      memory: bytes on one device by kind (`memory.KINDS`); "temporaries" is None if the compiler refused a program and
        did not say how much it wanted.
      host: bytes of one host's memory by what takes them (`memory.on_host`).
      programs: the updates.
    """

    phase: str
    topology: str
    chip: Chip
    devices: int
    setting: Setting
    clip: ClipSize
    batch_size: int
    memory: dict[str, int | None]
    host: dict[str, int]
    programs: tuple[ProgramPlan, ...]

    @property
    def peak(self) -> int | None:
        """Bytes on one device at the worst moment by XLA's own count of each program, with what else lies there; None
        where XLA has no count of some program."""
        kept = sum(size or 0 for kind, size in self.memory.items() if kind != "temporaries")
        peaks = [p.footprint.peak - p.footprint.arguments for p in self.programs if p.footprint and p.footprint.peak]
        return kept + max(peaks) if peaks and len(peaks) == len(self.programs) else None

    @property
    def rematerialised(self) -> int:
        """Instructions that XLA computes again by itself, over all programs."""
        return sum(p.communication.rematerialised for p in self.programs if p.communication)

    @property
    def total(self) -> int | None:
        """Bytes on one device; None if the compiler refused a program and did not say how much it wanted."""
        known = [size for size in self.memory.values() if size is not None]
        return sum(known) if len(known) == len(self.memory) else None

    @property
    def refused(self) -> tuple[str, ...]:
        """Programs that the compiler would not make for want of memory."""
        return tuple(p.name for p in self.programs if p.footprint is None)

    @property
    def fits(self) -> bool:
        """Whether the devices' memory holds it all, and the hosts' what goes there."""
        held = not self.refused and self.total is not None and self.total <= self.chip.capacity
        return held and sum(self.host.values()) <= self.chip.host.memory

    @property
    def tiled(self) -> bool:
        """Whether attention is computed by plain tiles, where the chip's kernel does not serve."""
        return any(p.work.tiled for p in self.programs)

    def step(self, serial: bool) -> float | None:
        """Seconds of one step, communication hidden or not; None when a program was refused."""
        times = [(p.calls, p.time) for p in self.programs if p.time is not None]
        if len(times) < len(self.programs):
            return None
        return sum((calls * (time.serial if serial else time.overlapped) for calls, time in times), 0.0)

    @property
    def model_flops(self) -> float:
        """FLOPs of a step over all devices, nothing counted twice."""
        return sum((p.calls * p.work.model_flops for p in self.programs), 0.0)

    @property
    def flops(self) -> float:
        """FLOPs of a step over all devices."""
        return sum((p.calls * p.work.flops for p in self.programs), 0.0)

    def mfu(self, serial: bool) -> float | None:
        """Model FLOPs over what the devices could do in the time of a step."""
        seconds = self.step(serial)
        return self.model_flops / (seconds * self.devices * self.chip.flops) if seconds else None

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "phase": self.phase,
            "topology": self.topology,
            "chip": {"name": self.chip.name, "memory": self.chip.memory, "capacity": self.chip.capacity},
            "devices": self.devices,
            "setting": dataclasses.asdict(self.setting),
            "flags": self.setting.flags,
            "clip": {**dataclasses.asdict(self.clip), "tokens": self.clip.tokens},
            "batch_size": self.batch_size,
            "memory": self.memory,
            "total": self.total,
            "peak": self.peak,
            "host": {**self.host, "capacity": self.chip.host.memory},
            "fits": self.fits,
            "programs": [_program(p) for p in self.programs],
            "step": {
                "flops": self.flops,
                "model_flops": self.model_flops,
                "seconds_overlapped": self.step(False),
                "seconds_serial": self.step(True),
                "mfu_overlapped": self.mfu(False),
                "mfu_serial": self.mfu(True),
            },
        }


def _program(program: ProgramPlan) -> dict[str, Any]:
    sent, time = program.communication, program.time
    return {
        "name": program.name,
        "calls": program.calls,
        "flops": program.work.flops,
        "model_flops": program.work.model_flops,
        "memory_bytes": program.memory_bytes,
        "footprint": None if program.footprint is None else dataclasses.asdict(program.footprint),
        "needed": program.needed,
        "communication": None
        if sent is None
        else [{"kind": c.kind, "axes": c.axes, "count": c.count, "bytes": c.bytes} for c in sent.collectives],
        "seconds": None if time is None else dataclasses.asdict(time),
        "rematerialised": 0 if sent is None else sent.rematerialised,
        "unknown_loops": program.work.unknown_loops + (sent.unknown_loops if sent else 0),
        "compile_seconds": round(program.compile_seconds, 1),
    }
