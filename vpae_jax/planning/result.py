"""A plan as plain data; `as_json` is its stable form (documented in `vpae_jax/plan.py`)."""

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
      name: the roles that it trains.
      calls: number of runs per step.
      work: its arithmetic.
      memory_bytes: its traffic through one device's memory.
      footprint: its memory; None if the compiler rejected it.
      needed: bytes on one device that a rejected program needs, according to the compiler; None if unknown, or if it
        was not rejected.
      communication: what it sends; None if it was rejected.
      time: of one run; None if it was rejected.
      compile_seconds: duration of tracing and compiling.
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
    """The plan of a phase on a topology.

    Attributes:
      phase: its name.
      topology: as given by the user.
      chip: the kind of device.
      devices: number of devices.
      setting: the mesh, accumulation and rematerialisation.
      clip: size of a clip.
      batch_size: clips per step.
      steps: of the whole run.
      memory: bytes on one device by kind (`memory.KINDS`); "temporaries" is None if the compiler rejected a program
        without saying how much it needs.
      host: bytes of one host's memory by use (`memory.on_host`).
      programs: the updates, and the preview.
    """

    phase: str
    topology: str
    chip: Chip
    devices: int
    setting: Setting
    clip: ClipSize
    batch_size: int
    steps: int
    memory: dict[str, int | None]
    host: dict[str, int]
    programs: tuple[ProgramPlan, ...]

    @property
    def peak(self) -> int | None:
        """Peak bytes on one device, from XLA's own count for each program plus what is resident; None if XLA has no
        count for some program."""
        kept = sum(size or 0 for kind, size in self.memory.items() if kind != "temporaries")
        peaks = [p.footprint.peak - p.footprint.arguments for p in self.programs if p.footprint and p.footprint.peak]
        return kept + max(peaks) if peaks and len(peaks) == len(self.programs) else None

    @property
    def rematerialised(self) -> int:
        """Number of instructions that XLA rematerialises by itself, over all programs."""
        return sum(p.communication.rematerialised for p in self.programs if p.communication)

    @property
    def total(self) -> int | None:
        """Bytes on one device; None if the compiler rejected a program without saying how much it needs."""
        known = [size for size in self.memory.values() if size is not None]
        return sum(known) if len(known) == len(self.memory) else None

    @property
    def refused(self) -> tuple[str, ...]:
        """Programs that the compiler rejected for lack of memory."""
        return tuple(p.name for p in self.programs if p.footprint is None)

    @property
    def fits(self) -> bool:
        """Whether everything fits into the memory of the devices and of the hosts."""
        held = not self.refused and self.total is not None and self.total <= self.chip.capacity
        return held and sum(self.host.values()) <= self.chip.host.memory

    @property
    def tiled(self) -> bool:
        """Whether attention is computed in plain tiles, because the chip's kernel does not support the setting."""
        return any(p.work.tiled for p in self.programs)

    def step(self, serial: bool) -> float | None:
        """Seconds of one step, with communication hidden or (`serial`) not; None if a program was rejected."""
        times = [(p.calls, p.time) for p in self.programs if p.time is not None]
        if len(times) < len(self.programs):
            return None
        return sum((calls * (time.serial if serial else time.overlapped) for calls, time in times), 0.0)

    def device_hours(self, serial: bool) -> float | None:
        """Hours of the whole run, `steps` steps, times the number of devices; None as `step`."""
        seconds = self.step(serial)
        return None if seconds is None else seconds * self.steps * self.devices / 3600

    @property
    def model_flops(self) -> float:
        """FLOPs of a step over all devices, with nothing counted twice."""
        return sum((p.calls * p.work.model_flops for p in self.programs), 0.0)

    @property
    def flops(self) -> float:
        """FLOPs of a step over all devices."""
        return sum((p.calls * p.work.flops for p in self.programs), 0.0)

    def mfu(self, serial: bool) -> float | None:
        """Model FLOPs divided by what the devices could do in the time of a step."""
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
            "run": {
                "steps": self.steps,
                "device_hours_overlapped": self.device_hours(False),
                "device_hours_serial": self.device_hours(True),
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
