"""Placement of a clip's tokens on a mesh, and attention across its `context` axis.

Each of the axis's `c` devices holds a run of tokens. Self-attention needs all of them:

    Ulysses (2309.14509)   devices exchange tokens for heads, so that each holds all tokens of some heads
    ring (2310.01889)      keys and values travel around a ring; partial results are combined by their log-sum-exp

If `c` divides the heads, only Ulysses is used. Otherwise the largest common divisor `u` of both is used for Ulysses,
and rings of `c / u` devices do the rest. Cross-attention needs no exchange: text and image are on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from vpae_jax.models import kernels
from vpae_jax.models.kernels.reference import Count, LogSumExp
from vpae_jax.sharding import SPLIT, Rules, find_rule, param_path
from vpae_jax.types import Params, Tokens, UserError

CLIP_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"
# XLA pads the operands of 16-bit products on a GPU to a multiple of this, which copies them.
ALIGNED = 8
P = PartitionSpec
Queries = Float[Array, "b n heads head_dim"]
Keys = Float[Array, "b m heads head_dim"]
# Keys and values of earlier frames, and of a block's own tokens.
Pair = tuple[Keys, Keys]
OwnPair = tuple[Queries, Queries]
Tables = tuple[Float[Array, "places half"], Float[Array, "places half"]]


@runtime_checkable
class CausalAttention(Protocol):
    """Attention of a causal model among the tokens of one device's heads (`models.wan_causal`)."""

    def __call__(
        self, q: Queries, k: Queries, v: Queries, past: Pair | None, tables: Tables, platform: str | None
    ) -> Queries: ...


@dataclass(frozen=True)
class MeshLayout:
    """Placement of a transformer's arrays.

    Attributes:
      mesh: axes as in `sharding`; None keeps everything on the devices of the arguments.
      heads: attention heads of the transformer.

    Raises:
      UserError: the mesh's `tensor` axis does not divide the heads.
    """

    mesh: Mesh | None
    heads: int

    def __post_init__(self) -> None:
        if self.heads % self._size("tensor"):
            raise UserError(
                f"config.mesh.tensor is {self._size('tensor')}, which does not divide the transformer's {self.heads} "
                "heads; choose a divisor"
            )

    @property
    def ulysses(self) -> int:
        """Number of devices that exchange tokens for heads."""
        return math.gcd(self._size(CONTEXT_AXIS), self.heads // self._size("tensor"))

    @property
    def ring(self) -> int:
        """Number of devices around which keys and values travel."""
        return self._size(CONTEXT_AXIS) // self.ulysses

    @property
    def platform(self) -> str | None:
        """Platform of the mesh's devices, which need not be present."""
        return None if self.mesh is None else self.mesh.devices.flat[0].platform

    def padded(self, tokens: int, aligned: bool = True) -> int:
        """Number of tokens to which a clip is padded, so that `context` divides it.

        Args:
          aligned: also pad so that GPUs need not copy a device's tokens to pad them themselves (`ALIGNED`).
        """
        unit = self._size(CONTEXT_AXIS) * (ALIGNED if aligned and self.platform in ("gpu", "cuda") else 1)
        return -(-tokens // unit) * unit

    def place(self, x: Tokens) -> Tokens:
        """Hidden states: clips over `data` and `fsdp`, tokens over `context`."""
        return self._constrain(x, self._clips(x), CONTEXT_AXIS)

    def place_clips(self, x: Float[Array, "b *shape"]) -> Float[Array, "b *shape"]:
        """Arrays that every token of a clip reads: clips over `data` and `fsdp`, other axes unsharded."""
        return self._constrain(x, self._clips(x))

    def self_attention(self, q: Queries, k: Queries, v: Queries, tokens: int) -> Queries:
        """Attention among a clip's tokens; those from index `tokens` on are padding, which is masked."""
        if self.mesh is None:
            return kernels.attention(q, k, v, platform=self.platform)
        spec = P(self._clips(q), CONTEXT_AXIS, "tensor", None)
        local = partial(self._self_attention, tokens=tokens, padded=q.shape[1])
        return self._map(local, (spec, spec, spec), spec)(q, k, v)

    def all_tokens(
        self, attend: CausalAttention, own: tuple[Queries, Queries, Queries], past: Pair | None, tables: Tables
    ) -> tuple[Queries, Queries, Queries]:
        """Attention in which tokens see different keys: each device holds all tokens of some heads.

        Args:
          attend: the attention that each device computes for its heads.
          own: queries, keys and values, each before its rotary embedding.
          past: keys and values of earlier frames; each device holds those of its heads.
          tables: of the rotary embedding, complete on every device.

        Returns:
          The result, and the given keys and values with the placement of `past`.
        """
        if self.mesh is None:
            return attend(*own, past, tables, self.platform), own[1], own[2]
        size, clips = self._size(CONTEXT_AXIS), self._clips(own[0])
        by_tokens, by_heads = P(clips, CONTEXT_AXIS, "tensor", None), P(clips, None, ("tensor", CONTEXT_AXIS), None)
        exchange = partial(jax.lax.all_to_all, axis_name=CONTEXT_AXIS, tiled=True)

        def local(own: Any, past: Any, tables: Any) -> Any:
            q, k, v = own if size == 1 else (exchange(x, split_axis=2, concat_axis=1) for x in own)
            out = attend(q, k, v, past, tables, self.platform)
            return exchange(out, split_axis=1, concat_axis=2) if size > 1 else out, k, v

        return self._map(local, (by_tokens, by_heads, P()), (by_tokens, by_heads, by_heads))(own, past, tables)

    def check_causal(self, tokens: int) -> None:
        """Raises `UserError` unless `context` divides a device's heads and these tokens, as `all_tokens` requires."""
        size, heads = self._size(CONTEXT_AXIS), self.heads // self._size("tensor")
        if self.ring > 1 or tokens % size:
            what = f"{heads} heads of a device" if self.ring > 1 else f"{tokens} tokens of these latents"
            raise UserError(
                f"config.mesh.context is {size}, which does not divide the {what}: a causal model exchanges tokens for "
                "heads; choose a divisor of both"
            )

    def place_memory(self, x: Float[Array, "layers b m heads head_dim"]) -> Float[Array, "layers b m heads head_dim"]:
        """Keys or values of earlier frames: clips over `data` and `fsdp`, heads over `tensor` and `context`."""
        return self._constrain(x, None, self._clips(x[0]), None, ("tensor", CONTEXT_AXIS))

    def cross_attention(self, q: Queries, k: Keys, v: Keys, bias: Float[Array, "1 m"] | None = None) -> Queries:
        """Attention of a clip's tokens to text or image; `bias` as in `kernels.attention`."""
        attend = partial(kernels.attention, platform=self.platform)
        if self.mesh is None:
            return attend(q, k, v, bias)
        queries, keys = P(self._clips(q), CONTEXT_AXIS, "tensor", None), P(self._clips(q), None, "tensor", None)
        if bias is None:
            return self._map(attend, (queries, keys, keys), queries)(q, k, v)
        return self._map(attend, (queries, keys, keys, P()), queries)(q, k, v, bias)

    def _self_attention(self, q: Queries, k: Queries, v: Queries, tokens: int, padded: int) -> Queries:
        """Self-attention on one device, with its own tokens and heads."""
        exchange = partial(jax.lax.all_to_all, axis_name=CONTEXT_AXIS, tiled=True, axis_index_groups=self._groups())
        if self.ulysses > 1:
            q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        if self.ring > 1:
            ring = Ring(self.ulysses, self.ring, tokens, padded)
            out: Any = ring_attention(q, k, v, ring, kernels.passes(self.platform, q.shape, k.shape, q.dtype))
        else:
            out = kernels.attention(q, k[:, :tokens], v[:, :tokens], platform=self.platform)
        return exchange(out, split_axis=1, concat_axis=2) if self.ulysses > 1 else out

    def _groups(self) -> list[list[int]]:
        """Groups of neighbours along `context` that exchange tokens for heads."""
        return [[r * self.ulysses + u for u in range(self.ulysses)] for r in range(self.ring)]

    def _map(self, function: Any, given: tuple[PartitionSpec, ...], made: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False)

    def _constrain(self, x: Float[Array, "b *shape"], *axes: Any) -> Float[Array, "b *shape"]:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def _clips(self, x: Float[Array, "b *shape"]) -> tuple[str, ...] | None:
        """Mesh axes along which the clips are sharded; None if there are too few of them, as in a preview."""
        return None if x.shape[0] % math.prod(map(self._size, CLIP_AXES)) else CLIP_AXES

    def _size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.shape[axis]


def gather(params: Params, rules: Rules, mesh: Mesh | None, prefix: str = "", stacked: bool = False) -> Params:
    """Weights unsharded except along `tensor`, as a device needs them to run a layer.

    Args:
      params: some of a model's parameters.
      rules: of the whole model.
      mesh: None leaves the parameters unchanged.
      prefix: prefix of their paths in the model.
      stacked: whether they are one layer of parameters whose rules have a layer axis.
    """
    if mesh is None:
        return params

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        spec = find_rule(prefix + param_path(path), rules)[1 if stacked else 0 :]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(*map(_without_split, spec))))

    return jax.tree_util.tree_map_with_path(one, params)


def _without_split(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The mesh axes of an array axis that remain when weights are gathered."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if name not in SPLIT) or None


@dataclass(frozen=True)
class Ring:
    """Rings along `context`.

    Attributes:
      stride: distance along the axis from one device of a ring to the next.
      size: number of devices of a ring.
      tokens: number of a clip's tokens; keys from there on are masked.
      padded: number of a clip's tokens with padding.
    """

    stride: int
    size: int
    tokens: int
    padded: int

    def visible(self, turn: int) -> Count | None:
        """Number of unmasked keys that this device holds after `turn` turns; None if no key is masked."""
        if self.tokens == self.padded:
            return None
        length = self.padded // self.size
        chunk = (jax.lax.axis_index(CONTEXT_AXIS) // self.stride - turn) % self.size
        return jnp.clip(self.tokens - chunk * length, 0, length)

    def turn(self, *arrays: Array) -> Sequence[Array]:
        """Sends arrays to the next device of the ring."""
        count = self.stride * self.size
        return jax.lax.ppermute(arrays, CONTEXT_AXIS, [(i, (i + self.stride) % count) for i in range(count)])

    def meanwhile(self, found: Any, turn: int, k: Keys, v: Keys) -> tuple[Any, Sequence[Array]]:
        """The result of this turn's attention, and the keys and values of the next turn, which travel while it runs.

        The barrier delays the next turn's attention until this one is done; otherwise a compiler may begin with the
        attention that has to wait for its keys.
        """
        if turn + 1 == self.size:
            return found, (k, v)
        return jax.lax.optimization_barrier((found, self.turn(k, v)))


def ring_attention(q: Queries, k: Queries, v: Queries, ring: Ring, passes: kernels.Passes) -> Queries:
    """Attention of this device's queries to the keys of all devices of its ring, one device's keys at a time.

    Memory is that of one device's keys; nothing of size tokens x tokens is kept for the backward pass.

    Args:
      q: queries.
      k, v: keys and values of the same tokens.
      ring: the ring along which keys and values travel.
      passes: of the kernel, which run for each device's keys. Keys are masked by their number.
    """
    return kernels.Passes(partial(_ring_forward, ring, passes), partial(_ring_backward, ring, passes)).attend(q, k, v)


def _ring_forward(
    ring: Ring, passes: kernels.Passes, q: Queries, k: Queries, v: Queries, hidden: None
) -> tuple[Queries, LogSumExp]:
    out, lse = None, None
    for turn in range(ring.size):
        (part, part_lse), (k, v) = ring.meanwhile(passes.forward(q, k, v, ring.visible(turn)), turn, k, v)
        part = part.astype(jnp.float32)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            total = jnp.logaddexp(lse, part_lse)
            out = out * _share(lse, total) + part * _share(part_lse, total)
            lse = total
    assert out is not None and lse is not None
    return out.astype(q.dtype), lse


def _share(part: LogSumExp, total: LogSumExp) -> Float[Array, "b n heads 1"]:
    """Weight of a part in the total. Parts without a visible key may come before the first part that has one."""
    seen = jnp.where(total == -jnp.inf, 0, jnp.exp(part - total))
    return jnp.swapaxes(seen, 1, 2)[..., None]


def _ring_backward(
    ring: Ring,
    passes: kernels.Passes,
    q: Queries,
    k: Queries,
    v: Queries,
    hidden: None,
    out: Queries,
    lse: LogSumExp,
    d_out: Queries,
) -> tuple[Queries, Queries, Queries]:
    d_q = jnp.zeros(q.shape, jnp.float32)
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for turn in range(ring.size):
        found = passes.backward(q, k, v, ring.visible(turn), out, lse, d_out)
        (of_q, of_k, of_v), (k, v) = ring.meanwhile(found, turn, k, v)
        d_q, d_k, d_v = d_q + of_q, d_k + of_k, d_v + of_v
        # After the last turn the gradients are back on the device of their keys and values.
        d_k, d_v = ring.turn(d_k, d_v)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
