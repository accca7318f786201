"""The device mesh, and the rules that shard parameters and batches over it.

The mesh has four axes:

    data      clips; weights are replicated along it
    fsdp      clips; every weight, moment and average is sharded along it
    context   tokens of a clip; weights are sharded along it, too
    tensor    heads and hidden units

The sharding of a parameter is given by a list of (regex, PartitionSpec) rules on its path. Exactly one rule must match:
a parameter that no rule matches, or several do, is an error, and never silently replicated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vpae_jax.config import Experiment, MeshConfig
from vpae_jax.types import UserError

AXES = ("data", "fsdp", "context", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]
P = PartitionSpec

# Linear layers: in a block, from its features and back to them; of the conditions, before the blocks.
_IN = r"^blocks/(attn[12]/(to_[qkv]|add_[kv]_proj)|ffn/proj_in)"
_OUT = r"^blocks/(attn[12]/to_out|ffn/proj_out)"
_EMBEDDER = r"^condition_embedder/((text|time)_embedder/linear_[12]|time_proj|image_embedder/ff/proj_(in|out))"
# The axes that weights are sharded along, besides "tensor".
SPLIT = ("fsdp", "context")

# Paths as written by `param_path`. Blocks are stacked: their leading axis is the layer.
TRANSFORMER_RULES: Rules = (
    (rf"{_IN}/kernel$", P(None, SPLIT, "tensor")),
    # All axes on the rows: if columns, the minor axis, were sharded, a TPU would all-reduce gradients instead of
    # reduce-scattering them.
    (rf"{_OUT}/kernel$", P(None, ("tensor", *SPLIT), None)),
    (rf"({_IN}|{_OUT})/lora_a$", P(None, SPLIT, None)),
    (rf"({_IN}|{_OUT})/lora_b$", P(None, None, SPLIT)),
    (rf"({_IN}|{_OUT})/bias$", P()),
    (r"^blocks/attn[12]/norm_(q|k|added_k)/scale$", P()),
    (r"^blocks/norm2/(scale|bias)$", P()),
    (rf"{_EMBEDDER}/(kernel|lora_a)$", P(SPLIT, None)),
    (rf"{_EMBEDDER}/lora_b$", P(None, SPLIT)),
    (rf"{_EMBEDDER}/bias$", P()),
    (r"^condition_embedder/image_embedder/(norm[12]/(scale|bias)|pos_embed)$", P()),
    (r"^(patch_embedding|proj_out)/(kernel|bias|lora_[ab])$", P()),
    (r"^(blocks/)?scale_shift_table$", P()),
)
# Discriminator heads: the matrices are sharded, the few rows that they read and write are not.
HEADS_RULES: Rules = (
    (r"/attention/to_(q|k|v|out)/kernel$", P(SPLIT, None)),
    (r"^heads/mixer/(image|text)_proj/kernel$", P(SPLIT, None)),
    (r"^heads/(taps/\d+/|)proj_in/kernel$", P(SPLIT, None)),
    (r"^heads/(taps/\d+/proj_out|projs_in/\d+)/kernel$", P(SPLIT, None)),
    (r"^heads/convs/\d+/kernel$", P(None, None, None, SPLIT, None)),
    (r"^heads/(proj_out|projs_out/\d+)/kernel$", P()),
    (r"/(bias|scale)$", P()),
    (r"^heads/(query|mixer/type_embedding)$", P()),
)
REPLICATED: Rules = ((r"", P()),)
# Rules by the part of the pipeline that a role is.
RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "transformer": TRANSFORMER_RULES,
        "heads": HEADS_RULES,
        "vae": REPLICATED,
        "decoder": REPLICATED,
        "encoders": REPLICATED,
        "image_encoder": REPLICATED,
    }
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices along the four axes.

    On TPUs, neighbours along an axis are neighbours in the torus, as far as its shape allows. Several slices, which are
    connected by a slower network, are laid out along `data`, then `fsdp`. Other devices keep their order.

    Args:
      config: sizes of the axes; at most one may be -1.
      devices: by default all devices of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `context` or `tensor` would cross slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    fits = sizes.count(-1) <= 1 and known > 0 and len(devices) % known == 0
    filled = [len(devices) // known if s == -1 else s for s in sizes] if fits else [0]
    if int(np.prod(filled)) != len(devices):
        count = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
        raise UserError(
            f"config.mesh: {dict(zip(AXES, sizes, strict=True))} does not fit {count}: the sizes must multiply to it, "
            "and one may be -1 for the rest (--config.mesh.context=1 does not share clips between devices)"
        )
    sizes = filled
    return Mesh(_laid_out(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data = math.gcd(sizes[0], slices)
    between = (data, slices // data, 1, 1)
    if sizes[1] % between[1]:
        raise UserError(
            f"config.mesh: {dict(zip(AXES, sizes, strict=True))} does not fit {slices} TPU slices; make data x fsdp a "
            f"multiple of {slices}, since context and tensor must stay within a slice"
        )
    within = [size // outer for size, outer in zip(sizes, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def parts_of_batch(experiment: Experiment, mesh: Mesh) -> int:
    """Returns the number of parts into which a batch is split: `config.accumulation`, where -1 means parts of one clip
    per device.

    Raises:
      UserError: the batch is not divisible by mesh and parts.
    """
    devices, size = mesh.shape["data"] * mesh.shape["fsdp"], experiment.batch_size
    parts = max(1, size // devices) if experiment.accumulation == -1 else experiment.accumulation
    if size % (devices * parts):
        raise UserError(
            f"config.batch_size is {size}, expected a multiple of {devices * parts} (mesh.data x mesh.fsdp"
            f"{'' if parts == 1 else ' x accumulation'}); change it, or raise config.mesh.context"
        )
    return parts


def param_path(path: tuple[Any, ...]) -> str:
    """Formats a pytree key path as `a/b/0/kernel`, without NNX's trailing value attribute."""
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return "/".join(n for n in names if n != "value")


def find_rule(name: str, rules: Rules) -> PartitionSpec:
    """Returns the spec of a parameter by its path. Raises `UserError` if no rule matches, or several do."""
    found = [(regex, spec) for regex, spec in rules if re.search(regex, name)]
    if not found:
        raise UserError(f"no sharding rule matches parameter {name}")
    if len(found) > 1:
        raise UserError(f"parameter {name} is matched by {len(found)} sharding rules: {found[0][0]}, {found[1][0]}")
    return found[0][1]


def param_shardings(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns the shardings of a (possibly abstract) tree of parameters.

    Raises:
      UserError: a parameter that no rule or several rules match, or whose size is not divisible by the mesh axes.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = param_path(path)
        spec = find_rule(name, rules)
        for size, axes in zip(leaf.shape, spec, strict=False):
            names = () if axes is None else (axes,) if isinstance(axes, str) else axes
            parts = math.prod(mesh.shape[axis] for axis in names)
            if size % parts:
                named = " x ".join(names)
                raise UserError(f"parameter {name}: axis of size {size} is not divisible by {named}={parts}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def abstract(params: Any, shardings: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns shapes, dtypes and shardings of parameters without their values; `dtype` overrides theirs."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place), params, shardings
    )


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a (possibly abstract) batch: clips over `data` and `fsdp`; what all clips share,
    replicated."""
    clips, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
    return jax.tree_util.tree_map_with_path(lambda path, _: whole if _is_shared(path) else clips, batch)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the mesh (`batch_shardings`)."""
    return jax.tree.map(jax.device_put, batch, batch_shardings(batch, mesh))


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """Returns which clips of a batch of `size` lie on this process's devices, in order."""
    places = NamedSharding(mesh, P(("data", "fsdp"))).addressable_devices_indices_map((size,))
    return sorted({row for index in places.values() for row in range(size)[(index or (slice(None),))[0]]})


def put_rows(batch: Any, mesh: Mesh, size: int) -> Any:
    """Puts a batch of `size` clips on the mesh (`batch_shardings`); each process provides its `own_rows`."""
    rows = own_rows(mesh, size)
    if len(rows) == size and not mesh.is_multi_process:
        return put_batch(batch, mesh)

    def put(leaf: Any, place: NamedSharding) -> jax.Array:
        if place.spec == P():
            return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])
        shape = (size, *leaf.shape[1:])

        def piece(index: tuple[slice, ...]) -> Any:
            first = rows.index(range(size)[index[0]][0])
            return leaf[(slice(first, first + len(range(size)[index[0]])), *index[1:])]

        pieces = place.addressable_devices_indices_map(shape).items()
        arrays = [jax.device_put(piece(index or (slice(None),)), device) for device, index in pieces]
        return jax.make_array_from_single_device_arrays(shape, place, arrays)

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that parameters lie on; None if they are on one device."""
    place = jax.tree.leaves(params)[0].sharding
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Replicates arrays, which are equal in every process, on all devices of a mesh; without a mesh returns them as
    they are."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), tree)


def count_clips(batch: Any) -> int:
    """Returns the number of clips in a batch."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return next(leaf.shape[0] for path, leaf in leaves if not _is_shared(path))


def part_of(batch: Any, part: Any, parts: int) -> Any:
    """Returns one of `parts` parts of a batch: every `parts`-th clip, so that clips stay on their devices."""

    def choose(path: tuple[Any, ...], leaf: Any) -> Any:
        if _is_shared(path):
            return leaf
        grouped = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
        return jax.lax.dynamic_index_in_dim(grouped, part, 1, keepdims=False)

    return jax.tree_util.tree_map_with_path(choose, batch)


def _is_shared(path: tuple[Any, ...]) -> bool:
    """Whether an array is shared by all clips of a batch: the negative prompt of a `Batch`."""
    return param_path(path).split("/")[-1] in ("null_text", "null_mask")
