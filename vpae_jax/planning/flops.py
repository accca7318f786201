"""The arithmetic of a program, counted from its jaxpr, including how much of it is recomputation.

Matrix products, convolutions and attention kernels are counted, with 2 FLOPs per multiply-add; everything else is small
in comparison. A scan's body is multiplied by its length; of several branches the most expensive counts; a term that
runs every n-th step counts 1/n. `recomputed` is what `jax.checkpoint` repeats in the backward pass, and what attention
kernels repeat: the backward pass needs four products (dV, dP, dQ, dK), and a kernel that computes all of them has a
fifth, the logits again (FlashAttention, arXiv 2205.14135); two kernels, one for dQ with three products and one for dK
and dV with four, repeat the logits twice and dP once.

The compiler's own count (`cost_analysis`) is not usable here: it counts a loop's body once, and ignores kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from vpae_jax.models.kernels import tiled

# How `jax.checkpoint` marks recomputation in the backward pass.
RECOMPUTED = "rematted_computation"
# Products of an attention kernel's forward pass: logits, and weights times values.
FORWARD = 2
# How `methods.common.lazily` marks terms that run every n-th step.
RARE = re.compile(r"every_(\d+)_steps")
# Repeated products of an attention kernel, by its number of products: backward kernels for dQ, for dK and dV, for all.
REPEATED = {3: 2, 4: 1, 5: 1}


@dataclass(frozen=True)
class Work:
    """The work of a program, over all devices unless stated otherwise.

    Attributes:
      flops: of all products.
      recomputed: the part of them that repeats earlier computation.
      attention: the part of them in the forward passes of attention kernels.
      attention_backward: the part of them in the backward passes of attention kernels.
      tiled: the part of them in attention by plain tiles, without a kernel.
      activation_bytes: operands and results of the products, except weights, each read or written once.
      weight_bytes: the same for weights (operands with at most two axes), per device, since each device uses them all.
      unknown_loops: number of loops with products whose trip count is unknown; counted as one iteration.
    """

    flops: float = 0.0
    recomputed: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    tiled: float = 0.0
    activation_bytes: float = 0.0
    weight_bytes: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def times(self, turns: int | float, devices: int = 1) -> Work:
        """The same work `turns` times on each of `devices`; `turns` may be below 1 for terms not in every step."""
        everywhere = turns * devices
        return Work(
            self.flops * everywhere,
            self.recomputed * everywhere,
            self.attention * everywhere,
            self.attention_backward * everywhere,
            self.tiled * everywhere,
            self.activation_bytes * everywhere,
            self.weight_bytes * turns,
            self.unknown_loops,
        )

    @property
    def model_flops(self) -> float:
        """FLOPs with nothing counted twice."""
        return self.flops - self.recomputed


def count(jaxpr: Jaxpr | ClosedJaxpr, again: bool = False) -> Work:
    """Counts the work of a jaxpr, such as `jax.jit(f).trace(...).jaxpr`.

    Args:
      jaxpr: the program.
      again: whether everything in it counts as recomputation.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = Work()
    for equation in inner.eqns:
        scopes = str(equation.source_info.name_stack)
        work = _equation(equation, again or RECOMPUTED in scopes)
        total += replace(work, tiled=work.flops) if tiled.SCOPE in scopes else work
    return total


def _equation(equation: Any, again: bool) -> Work:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation, _dot_flops(equation), again)
    if name == "conv_general_dilated":
        return _product(equation, _conv_flops(equation), again)
    if name.startswith("dot_product_attention_fwd"):
        return _cudnn(equation, FORWARD, FORWARD, again)
    if name.startswith("dot_product_attention_bwd"):
        return _cudnn(equation, 5, 4, again)
    if name == "cond":
        dearest = max((count(branch, again) for branch in params["branches"]), key=lambda work: work.flops)
        rare = RARE.search(str(equation.source_info.name_stack))
        return dearest.times(1 / int(rare[1])) if rare else dearest
    inside = Work()
    for jaxpr in _inner(params):
        inside += count(jaxpr, again)
    if not inside.flops:
        return Work()
    if name == "scan":
        return inside.times(params["length"])
    if name == "while":
        return inside + Work(unknown_loops=1)
    if name == "shard_map":
        # The name differs between JAX before and after 0.10.
        manual = next(value for key, value in params.items() if key.endswith("manual_axes"))
        return inside.times(1, math.prod(params["mesh"].shape[axis] for axis in manual))
    if name == "pallas_call":
        return _kernel(equation, inside, again)
    return inside


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item


def _product(equation: Any, flops: float, again: bool) -> Work:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    weights = sum((_bytes(a) for a in arrays if a.ndim <= 2), 0.0)
    activations = sum((_bytes(a) for a in arrays if a.ndim > 2), 0.0)
    return Work(flops, flops if again else 0.0, activation_bytes=activations, weight_bytes=weights)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _conv_flops(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_features


def _cudnn(equation: Any, products: int, needed: int, again: bool) -> Work:
    """cuDNN's attention on queries [b, n, heads, d] and keys [b, m, heads, d], or [b, heads, n, d] with layout 1."""
    q, k = (variable.aval.shape for variable in equation.invars[:2])
    one = 2.0 * math.prod(q) * k[1 + int(equation.params.get("layout", 0))]
    flops = products * one
    moved = sum(_bytes(variable.aval) for variable in (*equation.invars, *equation.outvars))
    return _attention(flops, flops if again else (products - needed) * one, products, moved)


def _kernel(equation: Any, body: Work, again: bool) -> Work:
    """A Pallas kernel: its body runs at every point of its grid; operands and results pass through memory once."""
    grid = equation.params["grid_mapping"].grid
    turns = math.prod(size for size in grid if isinstance(size, int))
    unknown = sum(not isinstance(size, int) for size in grid)
    flops = body.flops * turns
    products = sum(_products(jaxpr) for jaxpr in _inner(equation.params))
    repeated = flops * (1 if again else REPEATED.get(products, 0) / max(products, 1))
    moved = sum(_bytes(variable.aval) for variable in (*equation.invars, *equation.outvars))
    made = _attention(flops, repeated, products, moved)
    return replace(made, unknown_loops=body.unknown_loops + unknown)


def _attention(flops: float, repeated: float, products: int, moved: float) -> Work:
    """The work of an attention kernel: two products are a forward pass, more a backward pass."""
    forward, backward = (flops if products == FORWARD else 0.0), (flops if products > FORWARD else 0.0)
    return Work(flops, repeated, forward, backward, activation_bytes=moved)


def _products(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Number of products in a kernel's body, with the maximum over branches."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in inner.eqns:
        inside = [_products(item) for item in _inner(equation.params)]
        total += max(inside, default=0) if equation.primitive.name == "cond" else sum(inside)
        total += equation.primitive.name == "dot_general"
    return total


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * aval.dtype.itemsize) if hasattr(aval, "shape") else 0.0
