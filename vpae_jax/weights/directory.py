"""A part of a model in files: which of their tensors are its own, and what they are called in the table."""

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
EXTRAS = "wan_extras.safetensors"  # what of a wan file no Wan model reads, kept beside a part in the diffusers layout
COMPARED_BYTES = 64 * 2**20  # bytes of a tensor that are compared with another at a time


@dataclass(frozen=True)
class PartTensors:
    """A part's tensors, by their names in the table.

    Attributes:
      parameters: our parameters and the tensors that they are made of.
      names: what each tensor is called in the files.
      extras: names of tensors that no Wan model reads.
    """

    parameters: tuple[Parameter, ...]
    names: Mapping[str, str]
    extras: tuple[str, ...]
    _tensors: Tensors

    def stored(self, name: str) -> StoredTensor:
        """What the file says of a tensor."""
        return self._tensors[self.names.get(name, name)]

    def read(self, name: str, index: Index = ()) -> HostArray:
        """A tensor, or the slices of it that `index` names. Raises `UserError` for what is not finite in it."""
        theirs = self.names.get(name, name)
        value = self._tensors.read(theirs, index)
        if not finite(value):
            raise UserError(
                f"{self.stored(name).file}: tensor {theirs!r} holds NaN or infinity; the weights are damaged"
            )
        return value

    @property
    def bytes_read(self) -> int:
        """How much has been read."""
        return self._tensors.bytes_read


@dataclass(frozen=True)
class StoredPart:
    """One part of a model, where it is and what it is.

    Attributes:
      part: a key of `parts.PARTS`.
      layout: whose names its tensors have; "orbax": ours.
      files: a file or an index, or shards without one; the checkpoint's folder in the orbax layout.
      prefix: what its tensors' names begin with.
      config: of the part's config class.
      notes: what a user is to know of it.
      tokenizer: the tensor that holds the tokenizer of a text encoder; None for none.
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
        """Opens the files and compares every tensor with the table.

        Raises:
          UserError: a file that cannot be read; a tensor that is missing, unknown, misshapen, there twice, or of a
            kind that holds no weights.
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
        """What of a wan file lies beside a part in another layout; None if nothing does."""
        path = self.folder / EXTRAS
        if self.layout == "wan" or not path.is_file():
            yield None
        else:
            with open_tensors(path) as tensors:
                yield tensors


@dataclass(frozen=True)
class ModelDirectory:
    """A model's parts and the files beside them.

    Attributes:
      path: what was given.
      folder: where its settings are looked for.
      parts: those that were found.
      tokenizer, image_processor: their folders, where there are such.
      more_tokenizers: other folders with a tokenizer (Wan keeps one beside its image encoder).
      passed_over: files that might have been weights but could not be read, each with the reason.
      unreadable: parts that are there but cannot be read, or of which several are; with reasons.
      boundary: time in (0, 1) from which on the transformer is evaluated and below which `transformer_2`; None for a
        model of one transformer.
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
        """One part. Raises `UserError` when the model has none that can be read."""
        if name not in self.parts:
            raise self._no(name)
        return self.parts[name]

    def lacks(self, given: Container[str] = ()) -> list[str]:
        """What a Wan pipeline needs and this model has not, beside the parts that are given."""
        needed = (*NEEDED, *([] if self.boundary is None else [LOW]), *self.unreadable)
        parts = [name for name in dict.fromkeys(needed) if name not in given and name not in self.parts]
        return parts + ["tokenizer"] * (not self.has_tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one, in a folder or with the text encoder's weights."""
        return self.tokenizer is not None or self._tokenizer_within is not None

    @property
    def _tokenizer_within(self) -> StoredPart | None:
        source = self.parts.get("text_encoder")
        return None if source is None or source.tokenizer is None else source

    @contextmanager
    def open_tokenizer(self) -> Iterator[Path]:
        """The folder of the text encoder's tokenizer: the model's, or a temporary one of the tokenizer in its weights.

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
        """Raises `UserError` when a Wan pipeline lacks something; see `lacks`."""
        if lacking := self.lacks(given):
            raise self._no(next((name for name in lacking if name in self.unreadable), lacking[0]))

    def _no(self, name: str) -> UserError:
        if name in self.unreadable:
            return UserError(self.unreadable[name])
        has = ", ".join(self.parts) or "no part of a Wan model"
        line = f"{self.path}: no {name} (found: {has}); expected a whole model (convert takes the rest from --base)"
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
        if part == LOW:  # a transformer; which expert a file holds is told by its folder
            continue
        rows = vae_rows(1, 1) if part == "vae" else spec.rows(None)
        for layout in get_args(Layout):
            marks[part, layout] = matching.template(rows, spec.mark, layout)[0].replace("{i}", "0")
    found = []
    for name in tensors:
        for (part, layout), mark in marks.items():
            prefix = name[: len(name) - len(mark)]
            # A part may be called the same in both layouts.
            known = any((part, prefix) == (one, other) for one, _, other in found)
            if (name == mark or name.endswith("." + mark)) and not known:
                found.append((part, layout, prefix))
    return found


def canonical(
    tensors: Mapping[str, StoredTensor], part: str, layout: Layout, prefix: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Table names of a part's tensors with the names that they have in the files, and the tensors nobody reads. Tensors
    without the part's prefix are others'."""
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
            f"{stored.file}: tensor {stored.name!r} is of {stored.dtype}, expected floating point; "
            "quantised weights do not load"
        )


def _drop_repeated(tensors: Tensors, names: dict[str, str], part: str) -> None:
    """Forgets a tensor that repeats another. Raises `UserError` when it does not repeat it."""
    for alias, name in PARTS[part].aliases.items():
        if alias in names and name in names:
            theirs = names.pop(alias)
            if not _equal(tensors, theirs, names[name]):
                raise UserError(
                    f"{tensors[theirs].file}: tensor {theirs!r} differs from {names[name]!r}, which it should repeat"
                )


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors are equal; never holds more of either than `COMPARED_BYTES` bytes, or one row."""
    stored, expected = tensors[one], tensors[other]
    if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
        return False
    count = stored.shape[0] if stored.shape else 1
    rows = max(1, count * COMPARED_BYTES // max(1, stored.nbytes))
    blocks = [(slice(i, i + rows),) for i in range(0, count, rows)] if stored.shape else [()]
    return all(np.array_equal(tensors.read(one, block), tensors.read(other, block)) for block in blocks)
