"""A table of a run's roles for its log."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from clu.parameter_overview import make_table
from jax import ShapeDtypeStruct

from vpae_jax.train.blueprint import Blueprint


@dataclass
class _Row:
    """One role; the fields are the columns of the table."""

    role: str
    start: str
    weights: str
    parameters: int
    dtype: str
    memory: str
    averages: str


def overview(blueprint: Blueprint) -> str:
    """Returns a table with a row for each role: where its weights start, whether they are trained, their number, their
    total size in GiB over all devices, and which averages are kept."""
    rows = []
    for name, role in blueprint.models.roles.items():
        leaves: list[ShapeDtypeStruct] = jax.tree.leaves(blueprint.held[name])
        rows.append(
            _Row(
                role=name,
                start=role.start,
                weights=("trained" if role.trains else "frozen")
                + (f", rank {role.adapters.rank} on {role.adapters.on}" if role.adapters else ""),
                parameters=sum(leaf.size for leaf in leaves),
                dtype=", ".join(sorted({str(leaf.dtype) for leaf in leaves})),
                memory=f"{sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**30:.3g} GiB",
                averages=", ".join(role.averages) or "-",
            )
        )
    return make_table(rows)
