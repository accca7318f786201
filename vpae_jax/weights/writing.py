"""Writes a model's parts in the layout of diffusers, of Wan, or our own; complete or not at all.

Weights come from files or from memory, one layer of one parameter at a time, and go into safetensors files one tensor
at a time. PyTorch's files, which `torch.save` writes at once, and Orbax's checkpoints need a whole part in memory.
A value that is not finite, or not finite in the stored dtype, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from vpae_jax.files import refused_writes, replacing
from vpae_jax.types import HostArray, UserError
from vpae_jax.weights import matching, orbax
from vpae_jax.weights.directory import EXTRAS, ModelDirectory, PartTensors, StoredPart
from vpae_jax.weights.filenames import CONFIG, write_json
from vpae_jax.weights.find import PARAMS
from vpae_jax.weights.loading import Weights, read_part
from vpae_jax.weights.matching import LayerKey
from vpae_jax.weights.names import Layout, Shape
from vpae_jax.weights.parts import PARTS, config_json, flat, kind_of, wan_config_json
from vpae_jax.weights.pickles import write_pickle
from vpae_jax.weights.safetensors_file import Info
from vpae_jax.weights.stream import widest
from vpae_jax.weights.tensors import SHARD_BYTES, Tensors, blocks, finite, write_safetensors

Format = Literal["diffusers", "wan", "orbax"]
# The layouts whose extras a format keeps: a diffusers part is stored with those of a wan file, too.
_EXTRAS_OF: Mapping[Format, tuple[Layout, ...]] = {"diffusers": ("diffusers", "wan"), "wan": ("wan",), "orbax": ()}
LayerDtypes = dict[LayerKey, np.dtype]


@dataclass(frozen=True)
class Extra:
    """A tensor that no Wan model reads, kept unchanged.

    Attributes:
      name: its name in files.
      file: the file that holds it.
      dtype, shape: as in the file.
      read: reads it.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: Shape
    read: Callable[[], HostArray]


@runtime_checkable
class Values(Protocol):
    """A part's weights, one layer at a time.

    `dtype` is the dtype in which a layer is stored by default. `read` may return a wider one: computed values are
    rounded only when they are written.
    """

    @property
    def config(self) -> Any: ...
    def shapes(self) -> Mapping[str, Shape]: ...
    def dtype(self, path: str, layer: int) -> np.dtype: ...
    def read(self, path: str, layer: int) -> HostArray: ...
    def extras(self, layout: Layout) -> Iterator[Extra]: ...


@dataclass(frozen=True)
class FromTree:
    """Weights in memory: nested dicts of arrays, on devices or on the host.

    Attributes:
      config: of the part's config class.
      params: the arrays, by path.
      stacked: the paths of those with a leading layer axis.
      source: the checkpoint that they were read from, for messages; None if there is none.
    """

    config: Any
    params: Mapping[str, Any]
    stacked: frozenset[str]
    source: Path | None = None

    def shapes(self) -> Mapping[str, Shape]:
        return {path: tuple(value.shape) for path, value in self.params.items()}

    def dtype(self, path: str, layer: int) -> np.dtype:
        return np.dtype(self.params[path].dtype)

    def read(self, path: str, layer: int) -> HostArray:
        value = self.params[path]
        return np.asarray(value[layer] if path in self.stacked else value)

    def extras(self, layout: Layout) -> Iterator[Extra]:
        return iter(())


@dataclass(frozen=True)
class FromFiles:
    """Weights in open files.

    Attributes:
      source: the part.
      tensors: its tensors.
      kept: further tensors of a wan file that are stored with them.
    """

    source: StoredPart
    tensors: PartTensors
    kept: Tensors | None

    @property
    def config(self) -> Any:
        return self.source.config

    def shapes(self) -> Mapping[str, Shape]:
        return {parameter.path: parameter.full_shape for parameter in self.tensors.parameters}

    def dtype(self, path: str, layer: int) -> np.dtype:
        return self.tensors.stored(self._parameter(path).names[layer]).dtype

    def read(self, path: str, layer: int) -> HostArray:
        parameter = self._parameter(path)
        return parameter.op.to_ours(
            self.tensors.read(parameter.names[layer], parameter.op.their_index(parameter.shape))
        )

    def extras(self, layout: Layout) -> Iterator[Extra]:
        if self.source.layout == layout:
            for name in self.tensors.extras:
                stored = self.tensors.stored(name)
                yield Extra(name, stored.file, stored.dtype, stored.shape, partial(self.tensors.read, name))
        elif layout == "wan" and self.kept is not None:
            for name, stored in self.kept.items():
                yield Extra(name, stored.file, stored.dtype, stored.shape, partial(self.kept.read, name))

    def _parameter(self, path: str) -> matching.Parameter:
        return next(parameter for parameter in self.tensors.parameters if parameter.path == path)


def from_tree(part: str, config: Any, params: Weights, source: Path | None = None) -> FromTree:
    """Weights in memory as values to write; `source` is their origin, for messages."""
    rows = PARTS[part].rows(config)
    values = flat(params)
    layers = frozenset(path for path in values if "{i}" in matching.template(rows, path, "diffusers")[0])
    return FromTree(config, values, layers, source)


@contextmanager
def open_values(model: ModelDirectory, part: str) -> Iterator[Values]:
    """Opens a part's weights as values to write. Raises `UserError` as `directory.StoredPart.open`."""
    source = model.part(part)
    with ExitStack() as stack:
        if source.layout == "orbax":
            yield from_tree(part, *read_part(model, part, None), source.files[0])
        else:
            tensors = stack.enter_context(source.open())
            yield FromFiles(source, tensors, stack.enter_context(source.open_extras()))


def is_pickled(part: str, form: Format) -> bool:
    """Whether a layout stores a part in a PyTorch checkpoint."""
    return form == "wan" and kind_of(part) != "transformer"


def write_part(
    folder: Path,
    part: str,
    values: Values,
    form: Format = "diffusers",
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes one part's config and weights.

    Args:
      folder: the model directory; created if missing. The part's own folder in it appears complete or not at all.
      part: a key of `parts.PARTS`.
      values: config and weights.
      form: the layout.
      dtype: dtype to store; None keeps the weights' own, the widest of those that share a tensor.
      shard_bytes: maximum size of one safetensors file.

    Raises:
      UserError: a value that is not finite, or not finite in `dtype`; writing fails.
    """
    spec, config = PARTS[part], values.config
    stored = _stored(part, values, form, dtype)
    if form == "orbax":
        with replacing(folder / part) as temporary:
            temporary.mkdir(parents=True)
            write_json(temporary / CONFIG, config_json(config, part))
            orbax.save(temporary / PARAMS, _tree(part, values, stored))
        return
    parameters = matching.match(spec.rows(config), values.shapes(), form)
    prefix = spec.prefix[form]
    tensors = _tensors(part, parameters, values, prefix, stored)
    extras = tuple(values.extras(form))
    if is_pickled(part, form):
        write_pickle(folder / spec.wan_file, chain(tensors, _read(extras)))
        return
    infos = _infos(parameters, prefix, stored) + _announced(extras)
    arrays = (value for _, value in chain(tensors, _read(extras)))
    if form == "wan":
        with refused_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / CONFIG, wan_config_json(config))
        write_safetensors(folder, spec.stem, infos, arrays, shard_bytes)
        return
    with replacing(folder / part) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / CONFIG, config_json(config, part))
        write_safetensors(temporary, spec.stem, infos, arrays, shard_bytes)
        if kept := tuple(values.extras("wan")):
            arrays = (value for _, value in _read(kept))
            write_safetensors(temporary, EXTRAS.removesuffix(".safetensors"), _announced(kept), arrays, sys.maxsize)


def tensors_of(
    part: str, values: Values, form: Layout, prefix: str, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, HostArray]]:
    """A part's tensors under the names of a layout, one after the other.

    Args:
      part: a key of `parts.PARTS`.
      values: config and weights.
      form: the layout of the names.
      prefix: of every name.
      dtype: of the tensors; None keeps the weights' own, as in `write_part`.

    Raises:
      UserError: a value that is not finite, or not finite in `dtype`.
    """
    parameters = matching.match(PARTS[part].rows(values.config), values.shapes(), form)
    return _tensors(part, parameters, values, prefix, _stored(part, values, form, dtype))


def verify_part(written: ModelDirectory, part: str, values: Values, dtype: DTypeLike | None) -> int:
    """Reads a written part back and checks that it is bit-identical, including tensors that no Wan model reads.

    Returns:
      The number of parameters and layers that were compared.

    Raises:
      UserError: a value that differs from what was written.
    """
    count, stored = 0, _stored(part, values, written.part(part).layout, dtype)
    with open_values(written, part) as found:
        if found.config != values.config:
            raise UserError(f"{written.path}: {part} has a different config from the one written: {found.config}")
        for path, layer in _layers(part, values):
            expected = _cast(values.read(path, layer), stored[path, layer])
            if not _same(expected, found.read(path, layer)):
                raise UserError(f"{written.path}: {part}'s {path} does not read back as it was written")
            count += 1
        for form in _EXTRAS_OF[written.part(part).layout]:
            _verify_extras(written, part, form, values, found)
    return count


def _stored(part: str, values: Values, form: Format, dtype: DTypeLike | None) -> LayerDtypes:
    """The stored dtype of every parameter and layer: its own, or the widest of those that share a tensor."""
    form_of_names: Layout = "diffusers" if form == "orbax" else form
    parameters = matching.match(PARTS[part].rows(values.config), values.shapes(), form_of_names)
    if form == "orbax":
        tensors = {
            parameter.path: [(parameter, layer) for layer in range(len(parameter.names))] for parameter in parameters
        }
    else:
        tensors = matching.tensors(parameters)
    result: LayerDtypes = {}
    for holders in tensors.values():
        keys = [(parameter.path, layer) for parameter, layer in holders]
        kind = widest(values.dtype(*key) for key in keys) if dtype is None else np.dtype(dtype)
        result |= dict.fromkeys(keys, kind)
    return result


def _infos(
    parameters: Iterable[matching.Parameter], prefix: str, stored: LayerDtypes
) -> list[tuple[str, np.dtype, Shape]]:
    """Names, dtypes and shapes of the tensors, in the order of `_tensors`."""
    infos = []
    for name, holders in matching.tensors(tuple(parameters)).items():
        parameter, layer = holders[0]
        infos.append((prefix + name, stored[parameter.path, layer], parameter.op.their_shape(parameter.shape)))
    return infos


def _tensors(
    part: str, parameters: Iterable[matching.Parameter], values: Values, prefix: str, stored: LayerDtypes
) -> Iterator[tuple[str, HostArray]]:
    """The tensors in their layout, one after the other."""
    holders_of = matching.tensors(tuple(parameters))
    for name, holders in tqdm(holders_of.items(), desc=f"writing {part}", unit="tensor", leave=False, disable=None):
        pieces = []
        for parameter, layer in holders:
            value = _final(part, prefix + name, values, (parameter.path, layer), stored)
            pieces.append(parameter.op.to_theirs(value))
        yield prefix + name, np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


def _final(part: str, name: str, values: Values, key: LayerKey, stored: LayerDtypes) -> HostArray:
    """A parameter's layer as stored in the tensor `name`. Raises `UserError` if it is not finite."""
    value = values.read(*key)
    cast = _cast(value, stored[key])
    if finite(cast):
        return cast
    if cast.dtype != value.dtype and finite(value):
        raise UserError(
            f"{part}: tensor {name!r} overflows {cast.dtype} to NaN or infinity; "
            f"keep its own dtype, {value.dtype}, or choose one with a wider range"
        )
    where = f" in {values.source}" if isinstance(values, FromTree) and values.source is not None else ""
    raise UserError(
        f"{part}: tensor {name!r} holds NaN or infinity{where}; "
        f"are the weights damaged, or is an added LoRA too large for {cast.dtype}?"
    )


def _cast(value: HostArray, dtype: np.dtype) -> HostArray:
    with np.errstate(over="ignore", invalid="ignore"):  # checked in `_final`
        return value.astype(dtype, copy=False)


def _announced(extras: Iterable[Extra]) -> list[Info]:
    return [(extra.name, extra.dtype, extra.shape) for extra in extras]


def _read(extras: Iterable[Extra]) -> Iterator[tuple[str, HostArray]]:
    """Extras by name, one in memory at a time."""
    for extra in extras:
        value = extra.read()
        if not finite(value):
            raise UserError(f"{extra.file}: tensor {extra.name!r} holds NaN or infinity; the weights are damaged")
        yield extra.name, value


def _verify_extras(written: ModelDirectory, part: str, form: Layout, values: Values, found: Values) -> None:
    """Raises `UserError` unless a written part has exactly the extras that it was written with."""
    expected, given = ({extra.name: extra for extra in side.extras(form)} for side in (values, found))
    for name in {**expected, **given}:
        if name not in expected or name not in given or not _same(expected[name].read(), given[name].read()):
            raise UserError(f"{written.path}: {part}'s extra tensor {name!r} does not read back as it was written")


def _layers(part: str, values: Values) -> Iterator[LayerKey]:
    """Every parameter and layer."""
    for parameter in matching.match(PARTS[part].rows(values.config), values.shapes(), "diffusers"):
        yield from parameter.layers


def _tree(part: str, values: Values, stored: LayerDtypes) -> dict[str, Any]:
    """The part as nested dicts of whole parameters on the host."""
    tree: dict[str, Any] = {}
    for parameter in matching.match(PARTS[part].rows(values.config), values.shapes(), "diffusers"):
        layers = [_final(part, parameter.path, values, key, stored) for key in parameter.layers]
        *parents, last = parameter.path.split("/")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = np.stack(layers) if parameter.stacked else layers[0]
    return tree


def _same(expected: HostArray, found: HostArray) -> bool:
    """Whether two arrays are bit-identical."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    if expected.strides != found.strides:  # with equal strides, memory order is the same, and no copy is needed
        expected, found = np.ascontiguousarray(expected), np.ascontiguousarray(found)
    kind = f"u{expected.dtype.itemsize}"
    pairs = zip(blocks(expected), blocks(found), strict=True)
    return all(np.array_equal(one.view(kind), other.view(kind)) for one, other in pairs)
