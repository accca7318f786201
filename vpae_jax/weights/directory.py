"""The parts of a model in files: which tensors belong to a part, and their names in the conversion table."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from vpae_jax.types import HostArray, UserError
from vpae_jax.weights import dialects, matching
from vpae_jax.weights.filenames import CONFIG
from vpae_jax.weights.matching import Parameter
from vpae_jax.weights.names import Index, Layout, vae_rows
from vpae_jax.weights.parts import LOW, PARTS, abstract, flat
from vpae_jax.weights.spiece import write_tokenizer
from vpae_jax.weights.tensors import StoredTensor, Tensors, finite, open_shards, open_tensors

NEEDED = ("transformer", "vae", "text_encoder")
EXTRAS = "wan_extras.safetensors"  # tensors of a wan file that no Wan model reads, stored with a diffusers part
COMPARED_BYTES = 64 * 2**20  # bytes of a tensor to compare at a time


@dataclass(frozen=True)
class PartTensors:
    """A part's tensors, by their names in the conversion table.

    Attributes:
      parameters: our parameters and the tensors that they are made of.
      names: the name of each tensor in the files.
      extras: names of tensors that no Wan model reads.
    """

    parameters: tuple[Parameter, ...]
    names: Mapping[str, str]
    extras: tuple[str, ...]
    _tensors: Tensors

    def stored(self, name: str) -> StoredTensor:
        """A tensor's entry in the file."""
        return self._tensors[self.names.get(name, name)]

    def read(self, name: str, index: Index = ()) -> HostArray:
        """Reads a tensor, or the slices of it given by `index`. Raises `UserError` for values that are not finite."""
        theirs = self.names.get(name, name)
        value = self._tensors.read(theirs, index)
        if not finite(value):
            raise UserError(
                f"{self.stored(name).file}: tensor {theirs!r} holds NaN or infinity; the weights are damaged"
            )
        return value

    @property
    def bytes_read(self) -> int:
        """Number of bytes read so far."""
        return self._tensors.bytes_read


@dataclass(frozen=True)
class StoredPart:
    """The location and config of one part of a model.

    Attributes:
      part: a key of `parts.PARTS`.
      layout: the layout of its tensor names; "orbax" for our own arrays.
      files: a file or an index, or shards without one; the checkpoint's folder in the orbax layout.
      prefix: of its tensors' names.
      config: an instance of the part's config class.
      notes: notes for the user.
      tokenizer: the tensor that holds the tokenizer of a text encoder; None if there is none.
    """

    part: str
    layout: Layout | Literal["orbax"]
    files: tuple[Path, ...]
    prefix: str
    config: Any
    notes: tuple[str, ...] = ()
    tokenizer: str | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    @contextmanager
    def open(self) -> Iterator[PartTensors]:
        """Opens the files and checks every tensor against the conversion table.

        Raises:
          UserError: a file that cannot be read; a tensor that is missing, unknown, duplicated, or of the wrong shape or
            kind of dtype.
        """
        if self.layout == "orbax":
            raise ValueError(f"{self.files[0]} holds our own arrays: restore them")
        spec, layout = PARTS[self.part], self.layout
        with open_files(self.files) as tensors:
            names, extras = canonical(tensors, self.part, layout, self.prefix)
            _drop_repeated(tensors, names, self.part)
            found = {name: tensors[theirs] for name, theirs in names.items()}
            shapes = {path: leaf.shape for path, leaf in flat(abstract(self.part, self.config)[1]).items()}
            parameters = matching.match(spec.rows(self.config), shapes, layout)
            for name in (name for parameter in parameters for name in parameter.names if name in found):
                _check_dtype(found[name])
            matching.check(parameters, found, str(self.files[0]), (self.folder / CONFIG).is_file())
            yield PartTensors(parameters, names, extras, tensors)

    @contextmanager
    def open_extras(self) -> Iterator[Tensors | None]:
        """Opens the tensors of a wan file that are stored with a part in another layout; None if there are none."""
        path = self.folder / EXTRAS
        if self.layout == "wan" or not path.is_file():
            yield None
        else:
            with open_tensors(path) as tensors:
                yield tensors


@dataclass(frozen=True)
class ModelDirectory:
    """A model's parts and the files that accompany them.

    Attributes:
      path: as given by the user.
      folder: where its settings are.
      parts: those that were found.
      tokenizer, image_processor: their folders; None if missing.
      more_tokenizers: other folders with a tokenizer (Wan has one for its image encoder).
      passed_over: files that might have been weights but could not be read, each with the reason.
      unreadable: parts that exist but cannot be read, or exist more than once; with reasons.
      boundary: timestep in (0, 1) from which upwards the transformer is evaluated, and below which `transformer_2`;
        None for a model with one transformer.
    """

    path: Path
    folder: Path
    parts: Mapping[str, StoredPart]
    tokenizer: Path | None = None
    image_processor: Path | None = None
    more_tokenizers: tuple[Path, ...] = field(default=())
    passed_over: tuple[tuple[Path, str], ...] = field(default=())
    unreadable: Mapping[str, str] = field(default_factory=dict)
    boundary: float | None = None

    def part(self, name: str) -> StoredPart:
        """One part. Raises `UserError` if the model does not have it, or it cannot be read."""
        if name not in self.parts:
            raise self._no(name)
        return self.parts[name]

    def lacks(self, given: Container[str] = ()) -> list[str]:
        """The parts that a Wan pipeline needs and this model does not have, apart from those that are given."""
        needed = (*NEEDED, *([] if self.boundary is None else [LOW]), *self.unreadable)
        parts = [name for name in dict.fromkeys(needed) if name not in given and name not in self.parts]
        return parts + ["tokenizer"] * (not self.has_tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer, in a folder or stored with the text encoder's weights."""
        return self.tokenizer is not None or self._tokenizer_within is not None

    @property
    def _tokenizer_within(self) -> StoredPart | None:
        source = self.parts.get("text_encoder")
        return None if source is None or source.tokenizer is None else source

    @contextmanager
    def open_tokenizer(self) -> Iterator[Path]:
        """The folder of the text encoder's tokenizer: the model's, or a temporary one if it is stored with the weights.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        source = self._tokenizer_within
        if self.tokenizer is not None:
            yield self.tokenizer
        elif source is None or source.tokenizer is None:
            raise self._no("tokenizer")
        else:
            with open_files(source.files) as tensors, TemporaryDirectory() as folder:
                raw = tensors.read(source.tokenizer).tobytes()
                write_tokenizer(raw, f"{source.files[0]}: tensor {source.tokenizer!r}", Path(folder))
                yield Path(folder)

    def require_whole(self, given: Container[str] = ()) -> None:
        """Raises `UserError` if the model lacks something that a Wan pipeline needs; see `lacks`."""
        if lacking := self.lacks(given):
            raise self._no(next((name for name in lacking if name in self.unreadable), lacking[0]))

    def _no(self, name: str) -> UserError:
        if name in self.unreadable:
            return UserError(self.unreadable[name])
        has = ", ".join(self.parts) or "no part of a Wan model"
        line = f"{self.path}: no {name} (found: {has}); expected a complete model (convert takes the rest from --base)"
        if self.passed_over:
            file, reason = self.passed_over[0]
            line += f"; could not read {file}: {reason}"
        return UserError(line)


@contextmanager
def open_files(files: Sequence[Path]) -> Iterator[Tensors]:
    with open_tensors(files[0]) if len(files) == 1 else open_shards(files) as tensors:
        yield tensors


def marks(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, Layout, str]]:
    """Part, layout and prefix of every part whose mark is among the tensors."""
    marks = {}
    for part, spec in PARTS.items():
        if part == LOW:  # a transformer; the folder tells which expert a file holds
            continue
        rows = vae_rows(1, 1) if part == "vae" else spec.rows(None)
        for layout in get_args(Layout):
            marks[part, layout] = matching.template(rows, spec.mark, layout)[0].replace("{i}", "0")
    found = []
    for name in tensors:
        for (part, layout), mark in marks.items():
            prefix = name[: len(name) - len(mark)]
            # The mark of a part may have the same name in both layouts.
            known = any((part, prefix) == (one, other) for one, _, other in found)
            if (name == mark or name.endswith("." + mark)) and not known:
                found.append((part, layout, prefix))
    return found


def canonical(
    tensors: Mapping[str, StoredTensor], part: str, layout: Layout, prefix: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The names of a part's tensors in the files, by their names in the table, and the tensors that nothing reads.
    Tensors without the part's prefix belong to other parts."""
    spec = PARTS[part]
    within = [other for _, _, other in marks(tensors) if other != prefix and other.startswith(prefix)]
    names, extras = {}, []
    for theirs in tensors:
        if any(theirs.startswith(other) for other in within):
            continue
        if spec.is_extra(layout, theirs):
            extras.append(theirs)
        elif theirs.startswith(prefix) and not dialects.is_tokenizer(theirs):
            names[theirs.removeprefix(prefix)] = theirs
    for alias, name in spec.aliases.items() if layout == "diffusers" else ():
        if alias in names and name not in names:
            names[name] = names.pop(alias)
    return names, tuple(extras)


def _check_dtype(stored: StoredTensor) -> None:
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise UserError(
            f"{stored.file}: tensor {stored.name!r} has dtype {stored.dtype}, expected floating point; "
            "quantised weights cannot be loaded"
        )


def _drop_repeated(tensors: Tensors, names: dict[str, str], part: str) -> None:
    """Drops a tensor that repeats another. Raises `UserError` if the two differ."""
    for alias, name in PARTS[part].aliases.items():
        if alias in names and name in names:
            theirs = names.pop(alias)
            if not _equal(tensors, theirs, names[name]):
                raise UserError(
                    f"{tensors[theirs].file}: tensor {theirs!r} differs from {names[name]!r}, which it should repeat"
                )


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors are equal; holds at most `COMPARED_BYTES` bytes of each at a time, or one row."""
    stored, expected = tensors[one], tensors[other]
    if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
        return False
    count = stored.shape[0] if stored.shape else 1
    rows = max(1, count * COMPARED_BYTES // max(1, stored.nbytes))
    blocks = [(slice(i, i + rows),) for i in range(0, count, rows)] if stored.shape else [()]
    return all(np.array_equal(tensors.read(one, block), tensors.read(other, block)) for block in blocks)
