"""Applies a conversion table: matches our parameters with the tensors of a layout, and checks both against a file.

Every parameter must be described by exactly one row, and every tensor by a parameter; otherwise `match` and `check`
raise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpae_jax.types import UserError
from vpae_jax.weights.names import Layout, NameRow, Op, Shape
from vpae_jax.weights.safetensors_file import StoredTensor

# A path and a layer; the layer is 0 for a parameter that is not stacked.
LayerKey = tuple[str, int]


@dataclass(frozen=True)
class Parameter:
    """One of our parameters and the tensors that it is made of.

    Attributes:
      path: our parameter's path.
      names: their tensors: one, or one per layer.
      shape: our parameter's shape, without the layer axis.
      op: see `names.Op`.
      stacked: whether our parameter has a leading layer axis.
    """

    path: str
    names: tuple[str, ...]
    shape: Shape
    op: Op
    stacked: bool

    @property
    def full_shape(self) -> Shape:
        """Our parameter's shape, including the layer axis if it is stacked."""
        return (len(self.names), *self.shape) if self.stacked else self.shape

    @property
    def layers(self) -> list[LayerKey]:
        """The keys of its layers; a single one for a parameter that is not stacked."""
        return [(self.path, layer) for layer in range(len(self.names))]


def rule(rows: Sequence[NameRow], path: str) -> tuple[NameRow, re.Match[str]]:
    """The only row that describes a parameter. Raises `ValueError` for none or several: a mistake in the table."""
    found = [(row, m) for row in rows if (m := re.fullmatch(row.ours, path))]
    if len(found) != 1:
        raise ValueError(f"conversion table: {len(found)} rows describe parameter {path!r}, expected 1")
    return found[0]


def template(rows: Sequence[NameRow], path: str, layout: Layout) -> tuple[str, Op]:
    """A parameter's name in a layout, with `{i}` for the layer if it is stacked, and the operation on the arrays."""
    row, found = rule(rows, path)
    return found.expand(row.name(layout)).replace("/", "."), row.operation(layout)


def match(rows: Sequence[NameRow], shapes: Mapping[str, Shape], layout: Layout) -> tuple[Parameter, ...]:
    """Matches our parameters with their tensors.

    Args:
      rows: the conversion table of a part.
      shapes: our parameters' paths and shapes.
      layout: the layout of the tensors.

    Raises:
      ValueError: a parameter described by no row or by several, or two that claim the same piece of a tensor: a mistake
        in the table, not in any file.
    """
    parameters, claimed = [], set()
    for path, shape in shapes.items():
        name, op = template(rows, path, layout)
        stacked = "{i}" in name
        names = tuple(name.replace("{i}", str(i)) for i in range(shape[0])) if stacked else (name,)
        for one in names:
            if (one, op.part) in claimed:
                raise ValueError(f"conversion table: two parameters claim tensor {one!r}")
            claimed.add((one, op.part))
        parameters.append(Parameter(path, names, tuple(shape[1:] if stacked else shape), op, stacked))
    return tuple(parameters)


def tensors(parameters: Sequence[Parameter]) -> dict[str, list[tuple[Parameter, int]]]:
    """The tensors in order, each with the parameters that it holds, ordered by part, and their layer."""
    result: dict[str, list[tuple[Parameter, int]]] = defaultdict(list)
    for parameter in parameters:
        for layer, name in enumerate(parameter.names):
            result[name].append((parameter, layer))
    for holders in result.values():
        holders.sort(key=lambda holder: holder[0].op.part)
    return dict(result)


def check(parameters: Sequence[Parameter], found: Mapping[str, StoredTensor], folder: str, config: bool = True) -> None:
    """Checks parameters against the tensors in files.

    Args:
      parameters: from `match`.
      found: the tensors, by their names in the table.
      folder: the location, for the message about a missing tensor.
      config: whether there is a config.json next to them, which may be another model's.

    Raises:
      UserError: a missing, unknown or misshapen tensor; the line names the first and counts the rest.
    """
    expected = {name: parameter.op.their_shape(parameter.shape) for parameter in parameters for name in parameter.names}
    if missing := [name for name in expected if name not in found]:
        shape = list(expected[missing[0]])
        raise UserError(f"{folder}: tensor {missing[0]!r} of shape {shape} is missing{_others(missing)}")
    doubt = "; does config.json belong to these weights?" if config else ""
    if unknown := [name for name in found if name not in expected]:
        one = found[unknown[0]]
        raise UserError(
            f"{one.file}: tensor {one.name!r} of shape {list(one.shape)} is unknown to this architecture"
            f"{_others(unknown)}{doubt}"
        )
    if misshapen := [name for name in expected if tuple(found[name].shape) != tuple(expected[name])]:
        one, wanted = found[misshapen[0]], list(expected[misshapen[0]])
        raise UserError(
            f"{one.file}: tensor {one.name!r} has shape {list(one.shape)}, expected {wanted}{_others(misshapen)}{doubt}"
        )


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
