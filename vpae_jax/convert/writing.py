"""A model's parts, written: in the layout of diffusers, of Wan, or our own; whole or not at all.

Weights come from files or from memory; either way one layer of one parameter is in hand at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped
from tqdm import tqdm

from vpae_jax.convert import entries, orbax
from vpae_jax.convert.files import write_json
from vpae_jax.convert.parts import PARTS, config_json, flat, wan_config_json
from vpae_jax.convert.pickles import write_pickle
from vpae_jax.convert.reading import Weights, read_part
from vpae_jax.convert.source import CONFIG, EXTRAS, PARAMS, Model, PartSource, PartTensors
from vpae_jax.convert.stream import widest
from vpae_jax.convert.table import Layout, Shape
from vpae_jax.convert.tensors import SHARD_BYTES, Tensors, write_safetensors
from vpae_jax.types import UserError

HostArray = Shaped[np.ndarray, "..."]
Format = Literal["diffusers", "wan", "orbax"]


@runtime_checkable
class Values(Protocol):
    """A part's weights, one layer at a time."""

    @property
    def config(self) -> Any: ...
    def shapes(self) -> Mapping[str, Shape]: ...
    def dtype(self, path: str, layer: int) -> np.dtype: ...
    def read(self, path: str, layer: int) -> HostArray: ...
    def extras(self, layout: Layout) -> Iterator[tuple[str, HostArray]]: ...


@dataclass(frozen=True)
class FromTree:
    """Weights in memory: nested dicts of arrays, on devices or on the host."""

    config: Any
    params: Mapping[str, Any]
    stacked: frozenset[str]

    def shapes(self) -> Mapping[str, Shape]:
        return {path: tuple(value.shape) for path, value in self.params.items()}

    def dtype(self, path: str, layer: int) -> np.dtype:
        return np.dtype(self.params[path].dtype)

    def read(self, path: str, layer: int) -> HostArray:
        value = self.params[path]
        return np.asarray(value[layer] if path in self.stacked else value)

    def extras(self, layout: Layout) -> Iterator[tuple[str, HostArray]]:
        return iter(())


@dataclass(frozen=True)
class FromFiles:
    """Weights in open files.

    Attributes:
      source: the part.
      tensors: its tensors.
      kept: what else of a wan file is kept beside them.
    """

    source: PartSource
    tensors: PartTensors
    kept: Tensors | None

    @property
    def config(self) -> Any:
        return self.source.config

    def shapes(self) -> Mapping[str, Shape]:
        return {entry.path: entry.full_shape for entry in self.tensors.entries}

    def dtype(self, path: str, layer: int) -> np.dtype:
        return self.tensors.stored(self._entry(path).names[layer]).dtype

    def read(self, path: str, layer: int) -> HostArray:
        entry = self._entry(path)
        value = self.tensors.read(entry.names[layer], entry.op.their_index(entry.shape))
        if not finite(value):
            stored = self.tensors.stored(entry.names[layer])
            name = self.tensors.names[entry.names[layer]]
            raise UserError(f"{stored.file}: tensor {name!r} holds NaN or infinity; the weights are damaged")
        return entry.op.to_ours(value)

    def extras(self, layout: Layout) -> Iterator[tuple[str, HostArray]]:
        if self.source.layout == layout:
            yield from ((name, self.tensors.read(name)) for name in self.tensors.extras)
        elif layout == "wan" and self.kept is not None:
            yield from ((name, self.kept.read(name)) for name in self.kept)

    def _entry(self, path: str) -> entries.Entry:
        return next(entry for entry in self.tensors.entries if entry.path == path)


def from_tree(part: str, config: Any, params: Weights) -> FromTree:
    """Weights in memory as values to write."""
    rows = PARTS[part].rows(config)
    values = flat(params)
    layers = frozenset(path for path in values if "{i}" in entries.template(rows, path, "diffusers")[0])
    return FromTree(config, values, layers)


@contextmanager
def open_values(model: Model, part: str) -> Iterator[Values]:
    """A part's weights where they lie. Raises `UserError` as `source.PartSource.open`."""
    source = model.part(part)
    with ExitStack() as stack:
        if source.layout == "orbax":
            yield from_tree(part, *read_part(model, part, None))
        else:
            tensors = stack.enter_context(source.open())
            yield FromFiles(source, tensors, stack.enter_context(source.open_extras()))


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
      folder: the model directory; made if it is not there. The part's own folder in it appears whole or not at all.
      part: a key of `parts.PARTS`.
      values: config and weights.
      form: the layout.
      dtype: dtype to store; None keeps the weights' own.
      shard_bytes: largest size of one safetensors file.
    """
    spec, config = PARTS[part], values.config
    stored = None if dtype is None else np.dtype(dtype)
    if form == "orbax":
        with replacing(folder / part) as temporary:
            temporary.mkdir(parents=True)
            write_json(temporary / CONFIG, config_json(config, part))
            orbax.save(temporary / PARAMS, _tree(part, values, stored))
        return
    plan = entries.plan(spec.rows(config), values.shapes(), form)
    prefix = spec.prefix[form]
    tensors = _tensors(part, plan, values, prefix, stored)
    extras = values.extras(form)
    if form == "wan" and part != "transformer":
        write_pickle(folder / spec.wan_file, (*tensors, *extras))
        return
    infos = _infos(plan, values, prefix, stored)
    more = list(extras)
    infos += [(name, value.dtype, value.shape) for name, value in more]
    arrays = (value for pairs in (tensors, more) for _, value in pairs)
    if form == "wan":
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, wan_config_json(config))
        write_safetensors(folder, spec.stem, infos, arrays, shard_bytes)
        return
    with replacing(folder / part) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / CONFIG, config_json(config, part))
        write_safetensors(temporary, spec.stem, infos, arrays, shard_bytes)
        if kept := list(values.extras("wan")):
            infos = [(name, value.dtype, value.shape) for name, value in kept]
            write_safetensors(temporary, EXTRAS.removesuffix(".safetensors"), infos, (value for _, value in kept))


def verify_part(written: Model, part: str, values: Values, dtype: DTypeLike | None) -> int:
    """Reads a written part back and compares it bit for bit; returns the number of parameters and layers compared.

    Raises:
      UserError: a value that is not what was written.
    """
    count, layout = 0, written.part(part).layout
    with open_values(written, part) as found:
        if found.config != values.config:
            raise UserError(f"{written.path}: {part} has another config than was written: {found.config}")
        for path, layer in _layers(part, values):
            expected, value = values.read(path, layer), found.read(path, layer)
            if dtype is not None:
                expected = expected.astype(dtype)
            elif layout == "orbax" and value.dtype == widest({value.dtype, expected.dtype}):
                value = value.astype(expected.dtype)  # one dtype a parameter: some layers were widened, without loss
            if not _same(expected, value):
                raise UserError(f"{written.path}: {part}'s {path} does not read back as it was written")
            count += 1
    return count


def finite(value: HostArray) -> bool:
    """Whether no number is NaN or infinity."""
    if value.dtype.itemsize == 2 and value.size:  # sixteen bits of which the exponent's are all set: ten times faster
        exponent = np.uint16(0x7C00 if value.dtype == np.float16 else 0x7F80)
        bits = np.ascontiguousarray(value).view(np.uint16)
        return not bool(((bits & exponent) == exponent).any())
    return bool(np.isfinite(value).all())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success; removed on any failure, with `path` as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.is_dir():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _infos(
    plan: Iterable[entries.Entry], values: Values, prefix: str, dtype: np.dtype | None
) -> list[tuple[str, np.dtype, Shape]]:
    """Names, dtypes and shapes of the tensors, in the order in which `_tensors` brings them."""
    infos = []
    for name, holders in entries.tensors(tuple(plan)).items():
        entry, layer = holders[0]
        infos.append((prefix + name, dtype or values.dtype(entry.path, layer), entry.op.their_shape(entry.shape)))
    return infos


def _tensors(
    part: str, plan: Iterable[entries.Entry], values: Values, prefix: str, dtype: np.dtype | None
) -> Iterator[tuple[str, HostArray]]:
    """Their tensors, one after the other."""
    holders_of = entries.tensors(tuple(plan))
    for name, holders in tqdm(holders_of.items(), desc=f"writing {part}", unit="tensor", leave=False, disable=None):
        pieces = [entry.op.to_theirs(values.read(entry.path, layer)) for entry, layer in holders]
        value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        yield prefix + name, np.ascontiguousarray(value if dtype is None else value.astype(dtype))


def _layers(part: str, values: Values) -> Iterator[tuple[str, int]]:
    """Every parameter and layer."""
    for entry in entries.plan(PARTS[part].rows(values.config), values.shapes(), "diffusers"):
        for layer in range(len(entry.names)):
            yield entry.path, layer


def _tree(part: str, values: Values, dtype: np.dtype | None) -> dict[str, Any]:
    """Nested dicts of whole parameters on the host."""
    tree: dict[str, Any] = {}
    for entry in entries.plan(PARTS[part].rows(values.config), values.shapes(), "diffusers"):
        layers = [values.read(entry.path, layer) for layer in range(len(entry.names))]
        kind = widest(layer.dtype for layer in layers) if dtype is None else dtype
        layers = [layer.astype(kind, copy=False) for layer in layers]
        value = np.stack(layers) if entry.stacked else layers[0]
        *parents, last = entry.path.split("/")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return tree


def _same(expected: HostArray, found: HostArray) -> bool:
    """Whether two arrays are equal to the bit."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    kind = f"u{expected.dtype.itemsize}"
    return np.array_equal(np.ascontiguousarray(expected).view(kind), np.ascontiguousarray(found).view(kind))
