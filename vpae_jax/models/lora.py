"""Low-rank adapters for linear layers (LoRA, arXiv 2106.09685).

A `Linear` computes `y = x W + b`, and with adapters `y = x W + b + (alpha / rank) (x A) B`. Attaching them adds
`lora_a` and `lora_b` (`nnx.LoRAParam`) next to `kernel` and changes no other path, so that

    graph, adapters, base = nnx.split(model, nnx.LoRAParam, nnx.Param)

separates them (in this order, since a LoRAParam is also a Param), and the same model built without a `LoRASpec` and
applied to `base` is the model without its adapters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vpae_jax.types import UserError

XAVIER_UNIFORM = nnx.initializers.xavier_uniform()
PRODUCT = "product"  # checkpoint name of a linear layer's result, for policies of `jax.checkpoint`
BLOCK_LINEARS = r"^blocks/(attn1|attn2|ffn)/"


@dataclass(frozen=True)
class LoRASpec:
    """Which linear layers get adapters, and how large.

    Attributes:
      rank: columns of A and rows of B, at least 1.
      alpha: the adapters' output is multiplied by alpha / rank.
      targets: regular expression searched in each linear layer's path ("blocks/attn1/to_q"); the default selects
        every attention and feed-forward layer of the blocks.
    """

    rank: int
    alpha: float
    targets: str = BLOCK_LINEARS


class Linear(nnx.Module):
    """`x W + b` over the last axis, in the compute dtype; Xavier-uniform kernel `[in, out]` and zero bias by default.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      rngs: source of the initial kernel.
      dtype: compute dtype; weights and input are cast to it.
      param_dtype: dtype in which the weights are stored.
      kernel_init: initializer of the kernel.
      use_bias: whether there is a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: jax.nn.initializers.Initializer = XAVIER_UNIFORM,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        if x.ndim > 2 and x.shape[0] == 1:
            # XLA's CPU compiler copies the operands of a product that sums over several axes, as the kernel's gradient
            # does.
            return self(x[0])[None]
        x = x.astype(self.dtype)
        y = checkpoint_name(x @ self.kernel[...].astype(self.dtype), PRODUCT)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = x @ self.lora_a[...].astype(self.dtype)
            y = y + (low * self.lora_scale) @ self.lora_b[...].astype(self.dtype)
        return y


def attach_lora(model: nnx.Module, spec: LoRASpec, *, rngs: nnx.Rngs) -> None:
    """Adds zero-initialised adapters to the `Linear` layers of `model` that `spec` selects, in place.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5), as PEFT does) and B is zero, so the
    model's output is unchanged. Both are float32 for any dtype of the base, since they are trained and the base is not.
    Leading axes of a stacked kernel `[L, in, out]` are leading axes of A `[L, in, rank]` and B `[L, rank, out]`.

    Raises:
      UserError: the rank is below 1, the expression is malformed, or it matches no linear layer.
    """
    if spec.rank < 1:
        raise UserError(f"LoRA rank is {spec.rank}, expected at least 1; set lora rank to a positive number")
    try:
        targets = re.compile(spec.targets)
    except re.error as error:
        raise UserError(f"LoRA targets {spec.targets!r} is not a regular expression ({error}); correct it") from error
    linears = {
        "/".join(str(part) for part in path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    chosen = {path: module for path, module in linears.items() if targets.search(path)}
    if not chosen:
        some = ", ".join(sorted(linears)[:4])
        raise UserError(f"LoRA targets {spec.targets!r} match no linear layer; expected paths such as {some}")
    for path in sorted(chosen):
        linear = chosen[path]
        *stack, d_in, d_out = linear.kernel[...].shape
        bound = 1 / math.sqrt(d_in)
        draw = jax.random.uniform(rngs.params(), (*stack, d_in, spec.rank), jnp.float32, -bound, bound)
        linear.lora_a = nnx.LoRAParam(draw)
        linear.lora_b = nnx.LoRAParam(jnp.zeros((*stack, spec.rank, d_out), jnp.float32))
        linear.lora_scale = spec.alpha / spec.rank
