"""What a run trains and holds, as one table for its log."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from clu.parameter_overview import make_table
from jax import ShapeDtypeStruct

from vpae_jax.train.blueprint import Blueprint


@dataclass
class _Row:
    """One role; the fields are the table's columns."""

    role: str
    start: str
    weights: str
    parameters: int
    dtype: str
    memory: str
    averages: str


def overview(blueprint: Blueprint) -> str:
    """A line for each role: where its weights start, whether they are trained, how many they are, their size in GiB on
    all devices together, and which averages are kept of them."""
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
