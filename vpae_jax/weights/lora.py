"""Changes to a transformer's weights as low-rank adapters (LoRA): taken from training, added to weights, written.

    diffusers   transformer.<module>.lora_A.weight [rank, in]  .lora_B.weight [out, rank]
    wan         diffusion_model.<module>.lora_down.weight      .lora_up.weight      .alpha  .diff  .diff_b

Module names come from the conversion table. The wan form, ComfyUI's, may also hold whole changes: `.diff` for a weight,
`.diff_b` for a bias. `lora_reading.py` reads both forms and others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32

from vpae_jax.types import HostArray, UserError
from vpae_jax.weights import matching
from vpae_jax.weights.loading import Weights
from vpae_jax.weights.matching import LayerKey
from vpae_jax.weights.names import TRANSFORMER_ROWS, Index, Layout, Op, Shape
from vpae_jax.weights.parts import flat
from vpae_jax.weights.safetensors_file import Info
from vpae_jax.weights.tensors import write_safetensors
from vpae_jax.weights.writing import Extra, Values

KERNEL_SUFFIX = "/kernel"
Change = Float32[np.ndarray, "..."]


@dataclass(frozen=True)
class Adapter:
    """The change of one linear layer as a product: `x W` becomes `x (W + scale a b)`.

    Attributes:
      a: A or "down" in LoRA files, transposed.
      b: B or "up" in LoRA files, transposed.
      scale: alpha divided by the rank.
    """

    a: Float32[np.ndarray, "d_in rank"]
    b: Float32[np.ndarray, "rank d_out"]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def product(self, index: Index = ()) -> Change:
        """The whole change, or a part of it, given by a slice for each leading axis."""
        rows, columns = (*index, slice(None), slice(None))[:2]
        return np.float32(self.scale) * (self.a[rows] @ self.b[:, columns])


@dataclass(frozen=True)
class Lora:
    """Changes to a transformer's parameters.

    Attributes:
      adapters: by the path of the linear layer ("blocks/attn1/to_q") and the layer index.
      differences: whole changes, by the path of the parameter ("blocks/norm2/bias") and the layer index.
    """

    adapters: Mapping[LayerKey, Adapter]
    differences: Mapping[LayerKey, Change] = field(default_factory=dict)

    def changes(self, path: str, layer: int) -> bool:
        """Whether anything is added to a parameter."""
        return (path, layer) in self.differences or self._adapter(path, layer) is not None

    def _adapter(self, path: str, layer: int) -> Adapter | None:
        return self.adapters.get((path.removesuffix(KERNEL_SUFFIX), layer)) if path.endswith(KERNEL_SUFFIX) else None

    def change(self, path: str, layer: int, index: Index = ()) -> Change | None:
        """The change of a parameter at full strength, or of a part of it; None if there is none.

        Args:
          path: of the parameter.
          layer: its layer index.
          index: a slice for each leading axis of the layer; axes without one are whole.
        """
        adapter, difference = self._adapter(path, layer), self.differences.get((path, layer))
        difference = None if difference is None else difference[index]
        if adapter is None:
            return difference
        product = adapter.product(index)
        return product if difference is None else product + difference

    def added(self, value: HostArray, scale: float, path: str, layer: int, index: Index = ()) -> HostArray:
        """A parameter, or the part of it given by `index`, plus `scale` times its change, in float32; the same array if
        it does not change."""
        with np.errstate(over="ignore", invalid="ignore"):  # callers check the sum for values that are not finite
            if (change := self.change(path, layer, index)) is None:
                return value
            return value.astype(np.float32) + np.float32(scale) * change

    def shapes(self) -> Iterator[tuple[str, int, Shape]]:
        """Path, layer and shape of every parameter that changes."""
        for (path, layer), adapter in self.adapters.items():
            yield path + KERNEL_SUFFIX, layer, (adapter.a.shape[0], adapter.b.shape[1])
        for (path, layer), value in self.differences.items():
            yield path, layer, value.shape


@dataclass(frozen=True)
class Merged:
    """Weights with changes added, to be written like any other weights (`writing.Values`).

    Sums are read in float32, and rounded once when they are written.

    Attributes:
      values: the weights; these may be merged already, to add several changes.
      lora: the changes.
      scale: their strength.
      changed_dtype: dtype of parameters that change; None keeps that of the weights, except for float8, in which most
        of a change would be lost: those become bfloat16. Training adds adapters in float32 to weights that may be
        stored in less.

    Raises:
      UserError: a change of a parameter that these weights do not have, or have in another shape.
    """

    values: Values
    lora: Lora
    scale: float = 1.0
    changed_dtype: np.dtype | None = None

    def __post_init__(self):
        parameters = matching.match(TRANSFORMER_ROWS, self.values.shapes(), "diffusers")
        shapes = {key: parameter.shape for parameter in parameters for key in parameter.layers}
        for path, layer, shape in self.lora.shapes():
            if (expected := shapes.get((path, layer))) != shape:
                has = "has no such parameter" if expected is None else f"has shape {list(expected)} there"
                raise UserError(
                    f"LoRA: changes {path} of layer {layer}, with shape {list(shape)}, but this model {has}; "
                    "give the model that the LoRA is for"
                )

    @property
    def config(self) -> Any:
        return self.values.config

    def shapes(self) -> Mapping[str, Shape]:
        return self.values.shapes()

    def dtype(self, path: str, layer: int) -> np.dtype:
        kind = self.values.dtype(path, layer)
        if not self.lora.changes(path, layer):
            return kind
        return self.changed_dtype or (np.dtype(jnp.bfloat16) if kind.itemsize == 1 else kind)

    @property
    def widens(self) -> bool:
        """Whether any changed parameter gets a different dtype."""
        return any(self.dtype(path, layer) != self.values.dtype(path, layer) for path, layer, _ in self.lora.shapes())

    def read(self, path: str, layer: int) -> HostArray:
        return self.lora.added(self.values.read(path, layer), self.scale, path, layer)

    def extras(self, layout: Layout) -> Iterator[Extra]:
        return self.values.extras(layout)


def from_adapters(params: Weights, alpha: float, rank: int) -> Lora:
    """Collects the adapters that training attached (`models.lora`).

    Args:
      params: nested dicts with `lora_a` and `lora_b` leaves, as in a training checkpoint; everything else is ignored.
      alpha, rank: of the `LoRASpec` that they were trained with.

    Raises:
      UserError: no adapters; half an adapter; another rank.
    """
    leaves = {path: np.asarray(value, np.float32) for path, value in flat(params).items() if "/lora_" in path}
    layers = sorted({path.rpartition("/")[0] for path in leaves})
    if not layers:
        raise UserError("no lora_a or lora_b among the weights; expected a role that trains adapters")
    adapters = {}
    for path in layers:
        a, b = leaves.get(f"{path}/lora_a"), leaves.get(f"{path}/lora_b")
        if a is None or b is None:
            raise UserError(f"{path}: has lora_{'b' if a is None else 'a'} only; the checkpoint is damaged")
        if a.shape[-1] != rank or b.shape[-2] != rank:
            raise UserError(f"{path}: adapters of rank {a.shape[-1]}, expected {rank}; give the rank of the training")
        if a.ndim == 2:
            a, b = a[None], b[None]
        adapters |= {(path, layer): Adapter(a[layer], b[layer], alpha / rank) for layer in range(len(a))}
    return Lora(adapters)


def write_lora(
    path: Path,
    lora: Lora,
    form: Layout,
    dtype: DTypeLike | None = None,
    about: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes one safetensors file, complete or not at all.

    ComfyUI reads everything in the wan form. diffusers' `load_lora_weights` loads either form, but reads only those
    differences that are biases of linear layers, and fails unless all adapters have one or none do: if any bias
    changes, the other adapters get a bias of zeros. It also rejects files in the wan form without any block, or with
    only one of a block's `add_k_proj` and `add_v_proj`.

    A, B and alpha are written as they are, except where a reader might ignore alpha: in the diffusers form, which has
    it in the file's metadata, and outside the blocks. There, the scale is multiplied into B, which is exact for powers
    of 2.

    Args:
      path: the file; its suffix is .safetensors.
      lora: what to write.
      form: the naming of the keys.
      dtype: of the tensors; None for float32.
      about: further entries for the file's metadata, which includes rank and alpha.

    Raises:
      UserError: another suffix; nothing to write; differences, which the diffusers form cannot hold; a value that is
        not finite.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA is one safetensors file; give it a name that ends with .safetensors")
    if not lora.adapters and not lora.differences:
        raise UserError(f"{path}: nothing to write, since no layer differs from the base model; is this the student?")
    if form == "diffusers" and lora.differences:
        one, count = next(iter(lora.differences))[0], len(lora.differences)
        raise UserError(
            f"{path}: the diffusers form cannot hold whole differences, but this LoRA has {count} (such as {one}); "
            "write the wan form"
        )
    kind = np.dtype(np.float32 if dtype is None else dtype)
    tensors = list(_tensors(lora, form, kind))
    infos = [(name, one, shape) for name, one, shape, _ in tensors]
    values = (_cast(value, one, name, path) for name, one, _, value in tensors)
    metadata = {"format": "pt", **_sizes(lora, form), **about}
    write_safetensors(path.parent, path.stem, infos, values, sys.maxsize, metadata)


def _sizes(lora: Lora, form: Layout) -> dict[str, str]:
    """The rank of the largest adapter, and the alpha that readers use with it, for a file's metadata."""
    if not lora.adapters:
        return {}
    largest = max(lora.adapters.values(), key=lambda adapter: adapter.rank)
    scale = largest.scale if form == "wan" else 1.0
    return {"rank": str(largest.rank), "alpha": f"{scale * largest.rank:g}"}


def _with_all_biases(lora: Lora) -> Mapping[LayerKey, Change]:
    """The differences; if any is the bias of an adapter's layer, with zero biases for all other adapters."""
    biases = {(f"{path}/bias", layer): adapter for (path, layer), adapter in lora.adapters.items()}
    if not lora.differences.keys() & biases.keys():
        return lora.differences
    zeros = {key: np.zeros(adapter.b.shape[1], np.float32) for key, adapter in biases.items()}
    return {**zeros, **lora.differences}


def _tensors(lora: Lora, form: Layout, dtype: np.dtype) -> Iterator[tuple[*Info, HostArray]]:
    """Name, dtype, shape and value of every tensor of a file."""
    for (path, layer), adapter in lora.adapters.items():
        name, _ = _their_name(path + KERNEL_SUFFIX, layer, form)
        with_alpha = form == "wan" and name.startswith("blocks.")
        a, b = adapter.a.T, adapter.b.T if with_alpha else np.float32(adapter.scale) * adapter.b.T
        if form == "diffusers":
            yield f"transformer.{name}.lora_A.weight", dtype, a.shape, a
            yield f"transformer.{name}.lora_B.weight", dtype, b.shape, b
        else:
            yield f"diffusion_model.{name}.lora_down.weight", dtype, a.shape, a
            yield f"diffusion_model.{name}.lora_up.weight", dtype, b.shape, b
            # diffusers rejects a file with an alpha elsewhere. Without an alpha, all readers use the rank.
            if with_alpha:
                alpha = np.asarray(adapter.scale * adapter.rank)
                yield f"diffusion_model.{name}.alpha", np.dtype(np.float32), (), alpha
    for (path, layer), value in _with_all_biases(lora).items():
        name, op = _their_name(path, layer, form)
        suffix = "diff_b" if path.endswith("/bias") else "diff"
        value = op.to_theirs(value)
        yield f"diffusion_model.{name}.{suffix}", dtype, value.shape, value


def _their_name(path: str, layer: int, layout: Layout) -> tuple[str, Op]:
    """A parameter's name in the table, without ".weight" or ".bias", and the operation between the arrays."""
    name, op = matching.template(TRANSFORMER_ROWS, path, layout)
    return name.replace("{i}", str(layer)).removesuffix(".weight").removesuffix(".bias"), op


def _cast(value: HostArray, dtype: np.dtype, name: str, path: Path) -> HostArray:
    with np.errstate(over="ignore"):  # infinities are caught below
        cast = value.astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(f"{path}: tensor {name!r} would hold NaN or infinity; write float32, or check the training run")
    return cast
