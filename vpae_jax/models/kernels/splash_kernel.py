"""JAX's Pallas kernels of splash attention as two passes, with tiles and vector memory for each kind of chip.

`jax.experimental.pallas.ops.tpu.splash_attention` has a differentiable attention, but no backward pass that takes the
log-sum-exp over more keys than it is given, and no argument for the vector memory that a kernel may use. So its two
passes are called by their private names, and the limit is written into their programs.

    forward    one kernel
    backward   one kernel for dQ, dK and dV: five products instead of the seven of two kernels. It writes the
               contribution to dQ of each tile of keys, which are summed afterwards: the size of the queries times the
               number of such tiles.

The kernels are mapped over heads, so that heads are a parallel axis of their grids. As an axis of the kernel itself
they would not be parallel in the backward pass, and one of the two cores of a TPU v4 or v5p would be idle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.extend as jex
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
    splash_attention_kernel,
)
from jaxtyping import Array, Float

MIB, GIB = 2**20, 2**30
# Head dimensions and tiles are multiples of this.
LANES = 128
# In whole tiles, heads first. Queries and keys may have channels that values do not have.
Wide = Float[Array, "b heads rows d"]
WideKeys = Float[Array, "b heads columns d"]
Values = Float[Array, "b heads columns head_dim"]
Result = Float[Array, "b heads rows head_dim"]
PerRow = Float[Array, "b heads rows"]


@dataclass(frozen=True)
class Tiles:
    """How the kernels tile queries and keys on one kind of chip.

    Attributes:
      sizes: possible tile sizes in tokens; the first of those with the least padding is used.
      parts: bytes of partial dQ in memory at once; more heads are processed in groups.
      vmem: bytes of vector memory that a kernel may use; None is the compiler's default, 16 MiB.
    """

    sizes: tuple[int, ...]
    parts: int
    vmem: int | None = None


SMALL, LARGE = (1024, 768, 512), (2048, 1920, 1792, 1536, 1280, 1024)
# By `pltpu.ChipVersion`. A step of a kernel's grid costs about 0.35 us in addition to its products, which take 1.2 us
# for 1024 x 1024 tokens on a TPU v5p: hence large tiles. MaxDiffusion runs Wan with 2048 x 2048 and fused backward
# kernels on TPU7x, 3024 x 2048 on v6e, and 64 MiB of vector memory on v5p, and its products have 1024 keys, as here. A
# v4 has 16 MiB in total (libtpu rejects larger tiles), v5p and TPU7x have 64 MiB, v5e and v6e 128 MiB
# (`pltpu.get_tpu_info`). docs/benchmarks.md lists what libtpu compiles. `parts` is about 1/16 of a chip's memory.
TILES: Mapping[str, Tiles] = MappingProxyType(
    {
        "v4": Tiles(SMALL, 2 * GIB),
        "v5e": Tiles(LARGE, 1 * GIB, 64 * MIB),
        "v5p": Tiles(LARGE, 6 * GIB, 48 * MIB),
        "v6e": Tiles(LARGE, 2 * GIB, 48 * MIB),
        "7x": Tiles(LARGE, 6 * GIB, 48 * MIB),
    }
)


def tiles() -> Tiles:
    """The tiles for the chip that is being compiled for, which Pallas knows from the mesh; small ones otherwise."""
    version = str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else ""
    return TILES.get(version, Tiles(SMALL, GIB))


def tile(n: int) -> int:
    """Tile size in tokens: a short sequence is one tile, a long one uses the size with the least padding."""
    sizes = tiles().sizes
    if n <= sizes[0]:
        return -(-n // LANES) * LANES
    return min(sizes, key=lambda size: -n % size)


def whole_tiles(n: int) -> int:
    """Number of tokens with padding."""
    return -(-n // tile(n)) * tile(n)


@dataclass(frozen=True)
class Splash:
    """The kernels for one mask. Logits are not scaled.

    Each pass is jitted separately: `jax.checkpoint` can then drop it if it is not needed again, which it cannot for a
    bare kernel, and equal passes are stored once.

    Attributes:
      mask: which keys queries see; in whole tiles.
      interpret: runs without a TPU, slowly; for tests.
    """

    mask: Mask
    interpret: bool = False

    @partial(jax.jit, static_argnums=0)
    def forward(self, q: Wide, k: WideKeys, v: Values, segments: SegmentIds | None) -> tuple[Result, PerRow]:
        """Result and log-sum-exp; the latter is about -2e38 if no key is visible."""
        kernel, blocks = self._kernel()

        def one_head(q: Array, k: Array, v: Array) -> Any:
            found: Any = splash_attention_kernel._splash_attention_forward(
                kernel.fwd_mask_info,
                q[None],
                k[None],
                v[None],
                segments,
                None,
                mask_value=kernel.kwargs["mask_value"],
                is_mqa=False,
                block_sizes=blocks,
                residual_checkpoint_name=None,
                save_residuals=True,
                mask_function=kernel.kwargs["mask_function"],
                interpret=self.interpret,
            )
            out, (lse,) = found
            return out[0], lse[0]

        return _each_head(jax.vmap(_with_vector_memory(one_head)), q, k, v)

    @partial(jax.jit, static_argnums=0)
    def backward(
        self,
        q: Wide,
        k: WideKeys,
        v: Values,
        segments: SegmentIds | None,
        out: Result,
        lse: PerRow,
        d_out: Result,
    ) -> tuple[Wide, WideKeys, Values]:
        """Gradients with respect to q, k and v."""
        kernel, blocks = self._kernel()

        def one_head(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array) -> Any:
            arrays = q[None], k[None], v[None], segments, None, out[None], lse[None]
            found = splash_attention_kernel._splash_attention_bwd(
                False,
                kernel.kwargs["mask_value"],
                False,
                blocks,
                None,
                kernel.kwargs["mask_function"],
                None,
                self.interpret,
                (*arrays, None, kernel.dkv_mask_info),
                d_out[None],
            )
            return tuple(x[0] for x in found[3:6])

        group = _at_once(q.shape[0] * q.shape[1], k.shape[2] // tile(k.shape[2]) * q[0, 0].size * q.dtype.itemsize)
        one_head = _with_vector_memory(one_head)
        if group == q.shape[0] * q.shape[1]:
            return _each_head(jax.vmap(one_head), q, k, v, out, lse, d_out)
        in_turn = partial(jax.lax.map, lambda arrays: one_head(*arrays), batch_size=group)
        return _each_head(lambda *arrays: in_turn(arrays), q, k, v, out, lse, d_out)

    def _kernel(self) -> tuple[Any, BlockSizes]:
        rows, columns = (tile(n) for n in self.mask.shape)
        blocks = BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_kv_compute=_product(columns),
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_kv_dkv_compute=_product(columns),
            use_fused_bwd_kernel=True,
        )
        return make_splash_mha(MultiHeadMask([self.mask]), block_sizes=blocks, head_shards=1, q_seq_shards=1), blocks


def _product(tile: int) -> int:
    """Number of keys per product: a part of a large tile, so that two products overlap in the pipeline."""
    if tile <= 512:
        return tile
    return next((tile // parts for parts in (2, 3) if tile % (parts * LANES) == 0), tile)


def _at_once(heads: int, bytes_of_one: int) -> int:
    """Number of heads whose partial dQ fits in memory: a divisor of their number."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n * bytes_of_one <= tiles().parts]
    return max(fitting, default=1)


def _each_head(mapped: Callable[..., Any], *arrays: Array) -> Any:
    b, heads = arrays[0].shape[:2]
    found = mapped(*(x.reshape(b * heads, *x.shape[2:]) for x in arrays))
    return jax.tree.map(lambda x: x.reshape(b, heads, *x.shape[1:]), found)


def _with_vector_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with kernels that may use the vector memory that the chip's tiles need."""
    limit = tiles().vmem
    if limit is None:
        return function

    def allowed(equation: Any) -> Any:
        if equation.primitive.name != "pallas_call":
            return equation
        params = replace(equation.params["compiler_params"], vmem_limit_bytes=limit)
        return equation.replace(params=equation.params | {"compiler_params": params})

    def run(*arrays: Array) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arrays)
        program = program.replace(jaxpr=program.jaxpr.replace(eqns=[allowed(e) for e in program.jaxpr.eqns]))
        return jax.tree.unflatten(jax.tree.structure(shapes), jex.core.jaxpr_as_fun(program)(*arrays))

    return run
