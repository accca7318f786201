"""Communication of a compiled program, read from its HLO text: bytes sent, mesh axes, and counts.

The text of a large program has tens of megabytes and lines of many kilobytes. It is read line by line, and a line is
parsed only if a plain substring search finds something of interest.

Bytes are those that one device sends, for the usual ring algorithms on a group of g devices (V: bytes of the whole
array that is gathered, reduced or exchanged, as one device holds it):

    all-gather, reduce-scatter, all-to-all    V (g - 1) / g
    all-reduce                                2 V (g - 1) / g
    collective-permute                        V

An asynchronous instruction's type includes operand and result: V (1 + 1/g) for a gather or a reduce-scatter, 2 V for an
exchange or a permutation, only V for an all-reduce.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Spelling of each kind of instruction; "-start" is the asynchronous form, whose "-done" moves nothing.
_SPELT = tuple((f" {kind}{tail}(", kind, bool(tail)) for kind in COLLECTIVES for tail in ("", "-start"))
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_BITS = re.compile(r"[0-9]+")
_CONSTANT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)")
_SIZE = re.compile(r"'([^']+)'=(\d+)")
_NAMED = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_TRIPS = '"known_trip_count":{"n":"'
# XLA's names for instructions that it rematerialises by itself to save memory: "fusion.12.remat", "dot.remat2".
_AGAIN = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+\.remat[\d.]* = ")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: the mesh axes that a group spans, in the mesh's order.
      group: positions in the mesh (row-major) of one group's devices.
      count: number of times that a device takes part.
      bytes: total bytes that a device sends.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    count: int
    bytes: float


@dataclass
class _Computation:
    """The relevant contents of one computation of the module."""

    found: list[tuple[str, tuple[int, ...], float, str]] = field(default_factory=list)  # kind, group, bytes, channel
    fused: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, str, int | None]] = field(default_factory=list)  # body, condition, trips
    constants: dict[str, int] = field(default_factory=dict)
    limit: str = ""  # operand that a loop's condition compares its counter to


@dataclass(frozen=True)
class Communication:
    """All communication of a program.

    Attributes:
      collectives: by kind and axes, most bytes first.
      unknown_loops: number of loops that communicate and whose trip count is unknown; counted as one iteration.
      rematerialised: number of instructions that XLA rematerialises by itself to save memory; such a program is close
        to the memory limit.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int
    rematerialised: int = 0

    @property
    def bytes(self) -> float:
        """Bytes that one device sends."""
        return sum((c.bytes for c in self.collectives), 0.0)


def communication(text: str, mesh: Mapping[str, int]) -> Communication:
    """Finds the collectives of a compiled module.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      mesh: sizes of the mesh's axes, in order; its devices in row-major order are the module's.
    """
    lines = text.splitlines()
    parts, entry = _read(lines)
    times: dict[str, int] = defaultdict(int)
    times[entry] = 1
    totals: dict[tuple[str, tuple[str, ...]], list] = {}
    unknown = 0
    for name in reversed(parts):  # a computation is printed before those that call it
        part, turns = parts[name], times[name]
        if not turns:
            continue
        for callee in part.calls:
            times[callee] += turns
        for body, condition, trips in part.loops:
            trips = trips if trips is not None else _trips(parts.get(condition))
            if trips is None and _communicates(body, parts):
                unknown += 1
            times[body] += turns * (1 if trips is None else trips)
        for kind, group, sent, _ in [*part.found, *_fused(part, parts)]:
            axes = axes_of(group, mesh)
            total = totals.setdefault((kind, axes), [group, 0, 0.0])
            total[1] += turns
            total[2] += turns * sent
    result = [Collective(kind, axes, *total) for (kind, axes), total in totals.items()]
    again = sum(1 for line in lines if ".remat" in line and _AGAIN.match(line))
    return Communication(tuple(sorted(result, key=lambda c: -c.bytes)), unknown, again)


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    coordinates = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    return tuple(axis for axis, where in zip(mesh, coordinates, strict=True) if len(set(where.tolist())) > 1)


def _fused(part: _Computation, parts: Mapping[str, _Computation]) -> list[tuple[str, tuple[int, ...], float, str]]:
    """Collectives in the fusions of a computation. On a TPU, a collective may be split over several fusions (its start,
    steps overlapped with other work, its end), which share a channel: it is counted once."""
    found: dict[str, tuple[str, tuple[int, ...], float, str]] = {}
    todo = list(part.fused)
    while todo:
        child = parts.get(todo.pop())
        if child is not None:
            found |= {item[3]: item for item in child.found}
            todo += child.fused
    return list(found.values())


def _communicates(name: str, parts: Mapping[str, _Computation]) -> bool:
    part = parts[name]
    inside = [*part.calls, *part.fused, *(body for body, _, _ in part.loops)]
    return bool(part.found) or any(_communicates(child, parts) for child in inside if child in parts)


def _trips(condition: _Computation | None) -> int | None:
    """Trip count of a loop that counts up from 0 by 1, as made by `jax.lax.scan`, from its condition."""
    return None if condition is None else condition.constants.get(condition.limit)


def _read(lines: Iterable[str]) -> tuple[dict[str, _Computation], str]:
    parts: dict[str, _Computation] = {}
    entry, part, scattering = "", _Computation(), False
    for line in lines:
        if not line or line[0] in "}#":
            continue
        if line[0] != " ":
            if line[-1] == "{":
                words = line.split(" ", 2)
                name = (words[1] if words[0] == "ENTRY" else words[0]).lstrip("%")
                entry = name if words[0] == "ENTRY" else entry
                part = parts[name] = _Computation()
                scattering = name.startswith("all-reduce-scatter")  # a TPU's name for a reduce-scatter
            continue
        _read_line(line, part, scattering)
    return parts, entry


def _read_line(line: str, part: _Computation, scattering: bool) -> None:
    if " while(" in line:
        part.loops.append((_name(line, "body=") or "", _name(line, "condition=") or "", _known_trips(line)))
        return
    if " constant(" in line and (match := _CONSTANT.match(line)):
        part.constants[match[1]] = int(match[2])
        return
    if "direction=LT" in line and "ROOT " in line:
        operands = line[line.find(" compare(") + 9 :].split(")", 1)[0]
        part.limit = operands.split(",")[-1].split()[-1].lstrip("%")
        return
    for spelt, kind, started in _SPELT:
        at = line.find(spelt)
        if at >= 0:
            group = _group(line[at:])
            if len(group) > 1:
                sent = _sent(kind, started, line[:at], len(group))
                if scattering and kind == "all-reduce":
                    kind, sent = "reduce-scatter", sent / 2
                part.found.append(
                    (kind, group, sent, _after(line, "channel_id=", at) or line[:at].split("=")[0].strip())
                )
            return
    if " fusion(" in line:
        callee = _name(line, "calls=")
        if callee:
            part.fused.append(callee)
    elif " call(" in line:
        part.calls += [name for name in (_name(line, "to_apply="),) if name]
    elif " async-start(" in line:
        part.calls += [name for name in (_name(line, "calls="),) if name]
    elif " conditional(" in line:
        at = line.find("branch_computations={")
        branches = line[at + 21 :].split("}", 1)[0].split(",") if at >= 0 else []
        two = [_name(line, key) for key in ("true_computation=", "false_computation=")]
        part.calls += [b.strip().lstrip("%") for b in branches] or [name for name in two if name]


def _after(line: str, key: str, start: int = 0) -> str | None:
    """The text after `key`, up to the next comma or space."""
    at = line.find(key, start)
    if at < 0:
        return None
    return re.split(r"[,\s]", line[at + len(key) : at + len(key) + 200], maxsplit=1)[0]


def _name(line: str, key: str) -> str | None:
    found = _after(line, key)
    return None if found is None else found.lstrip("%")


def _known_trips(line: str) -> int | None:
    at = line.find(_TRIPS)
    return None if at < 0 else int(line[at + len(_TRIPS) :].split('"', 1)[0])


def _sent(kind: str, started: bool, result: str, g: int) -> float:
    """Bytes that a device sends, from the instruction's result type."""
    size = type_bytes(result[result.find("=") + 1 :])
    if started and kind in ("all-gather", "reduce-scatter"):
        size /= 1 + 1 / g
    elif started and kind != "all-reduce":
        size /= 2
    elif kind == "reduce-scatter":
        size *= g  # the result is one part
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * size * (g - 1) / g


def type_bytes(text: str) -> float:
    """Bytes of an HLO type, the arrays of a tuple added up: "(f32[2,3]{1,0}, bf16[4])" has 32."""
    total = 0.0
    for name, dims in _ARRAY.findall(text):
        bits = 8 if name == "pred" else int(_BITS.findall(name)[0]) if _BITS.search(name) else 0
        total += bits / 8 * np.prod([int(d) for d in dims.split(",") if d], dtype=np.float64)
    return float(total)


def _group(line: str) -> tuple[int, ...]:
    """Positions of the devices in an instruction's first group; for a permutation, of the first pair."""
    at = line.find("source_target_pairs={{")
    if at >= 0:
        pairs = [pair.split(",") for pair in line[at + 22 :].split("}}", 1)[0].split("},{")]
        return next(((int(a), int(b)) for a, b in pairs if a != b), ())
    at = line.find("replica_groups=")
    if at < 0:
        return ()
    groups = line[at + 15 :]
    if groups.startswith("{{"):
        return tuple(int(i) for i in groups[2:].split("}", 1)[0].split(",") if i.strip())
    if groups.startswith("mesh["):
        return _mesh_group(groups)
    if groups.startswith("["):  # [4,2]<=[2,4]T(1,0): an iota, reshaped, transposed and cut into rows
        shape, rest = groups[1:].split("]<=", 1)
        return tuple(_iota(rest).reshape([int(i) for i in shape.split(",")])[0].tolist())
    return ()


def _mesh_group(groups: str) -> tuple[int, ...]:
    """mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: the devices along the named axes of the given mesh."""
    axes, rest = groups[5:].split("]", 1)
    sizes = {name: int(size) for name, size in _SIZE.findall(axes)}
    head, named = rest.split("{", 1)
    ids = np.arange(int(np.prod(list(sizes.values()))))
    if "device_ids=(" in head:
        given = head.split("device_ids=(", 1)[1]
        ids = _iota(given) if given.startswith("[") else np.array([int(i) for i in given.split(")")[0].split(",")])
    shape, chosen = [], []
    wanted = {name: (int(before or 1), part) for name, before, part in _NAMED.findall(named.split("}", 1)[0])}
    for name, size in sizes.items():
        if name not in wanted:
            shape.append(size)
            continue
        before, part = wanted[name]  # 'a':(2)4 is the part of size 4 after a part of size 2 of the axis
        inner = int(part) if part else size
        shape += [before, inner, size // (before * inner)]
        chosen.append(len(shape) - 2)
    ids = np.moveaxis(ids.reshape(shape), chosen, range(len(chosen)))
    return tuple(ids.reshape(int(np.prod(ids.shape[: len(chosen)])), -1)[:, 0].tolist())


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0): numbers from 0, reshaped and transposed."""
    dims = [int(i) for i in text[1:].split("]", 1)[0].split(",")]
    ids = np.arange(int(np.prod(dims))).reshape(dims)
    after = text.split("]", 1)[1]
    if after.startswith("T("):
        ids = ids.transpose([int(i) for i in after[2:].split(")", 1)[0].split(",")])
    return ids
