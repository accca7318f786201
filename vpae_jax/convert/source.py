"""Where a model's weights are: a folder or file in any layout, recognised by the tensors in it, not by names of files.

    diffusers   model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  [image_encoder/ ...]
    wan         config.json  diffusion_pytorch_model*.safetensors  Wan2.1_VAE.pth  models_t5_*.pth  [models_clip_*.pth]
    one file    one or several parts, with or without prefixes such as `model.diffusion_model.`
    orbax       the diffusers layout with arrays of ours in place of safetensors

`find_model` looks; nothing but headers is read before `PartSource.open`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from vpae_jax.convert import entries, infer
from vpae_jax.convert.entries import Entry, Found
from vpae_jax.convert.files import read_json
from vpae_jax.convert.orbax import is_checkpoint
from vpae_jax.convert.parts import PARTS, abstract, flat, is_wan_config, make_config, read_config
from vpae_jax.convert.table import Array, Index, Layout, vae_rows
from vpae_jax.convert.tensors import Stored, Tensors, open_shards, open_tensors
from vpae_jax.types import UserError

NEEDED = ("transformer", "vae", "text_encoder")
CONFIG, INDEX, SETTINGS = "config.json", "model_index.json", "vpae_jax.json"
EXTRAS = "wan_extras.safetensors"  # what of a wan file no Wan model reads, kept beside a part in the diffusers layout
PARAMS = "params"  # the folder of a part's arrays in the orbax layout
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
DEPTH = 2
_SHARD = re.compile(r"(.*)-\d+-of-\d+\.safetensors")
_SCALED = re.compile(r"(scaled_fp8|scale_weight|weight_scale(_\d)?|scale_input)$")


@dataclass(frozen=True)
class PartTensors:
    """A part's tensors, by their names in the table.

    Attributes:
      entries: our parameters and the tensors that they are made of.
      names: what each tensor is called in the files.
      extras: names of tensors that no Wan model reads.
    """

    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    extras: tuple[str, ...]
    _tensors: Tensors

    def stored(self, name: str) -> Stored:
        """What the file says of a tensor."""
        return self._tensors[self.names.get(name, name)]

    def read(self, name: str, index: Index = ()) -> Array:
        """A tensor, or the slices of it that `index` names."""
        return self._tensors.read(self.names.get(name, name), index)

    @property
    def bytes_read(self) -> int:
        """How much has been read."""
        return self._tensors.bytes_read


@dataclass(frozen=True)
class PartSource:
    """One part of a model, where it is and what it is.

    Attributes:
      part: a key of `parts.PARTS`.
      layout: whose names its tensors have; "orbax": ours.
      files: a file or an index, or shards without one; the checkpoint's folder in the orbax layout.
      prefix: what its tensors' names begin with.
      config: of the part's config class.
    """

    part: str
    layout: Layout | Literal["orbax"]
    files: tuple[Path, ...]
    prefix: str
    config: Any

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
        with _open(self.files) as tensors:
            names, extras = _canonical(tensors, self.part, layout, self.prefix)
            _drop_repeated(tensors, names, self.part)
            found = {name: _found(tensors, theirs) for name, theirs in names.items()}
            shapes = {path: leaf.shape for path, leaf in flat(abstract(self.part, self.config)[1]).items()}
            plan = entries.plan(spec.rows(self.config), shapes, layout)
            entries.check(plan, found, str(self.files[0]))
            for theirs in names.values():
                _check_dtype(theirs, tensors[theirs])
            yield PartTensors(plan, names, extras, tensors)

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
class Model:
    """A model's parts and the files beside them.

    Attributes:
      path: what was given.
      folder: where its settings are looked for.
      parts: those that were found.
      tokenizer, image_processor: their folders, where there are such.
      more_tokenizers: other folders with a tokenizer (Wan keeps one beside its image encoder), relative to `folder`.
    """

    path: Path
    folder: Path
    parts: Mapping[str, PartSource]
    tokenizer: Path | None = None
    image_processor: Path | None = None
    more_tokenizers: tuple[Path, ...] = field(default=())

    def part(self, name: str) -> PartSource:
        """One part. Raises `UserError` when the model has none."""
        if name not in self.parts:
            raise self._no(name)
        return self.parts[name]

    def lacks(self, given: Container[str] = ()) -> list[str]:
        """What a Wan pipeline needs and this model has not, beside the parts that are given."""
        parts = [name for name in NEEDED if name not in given and name not in self.parts]
        return parts + ["tokenizer"] * (self.tokenizer is None)

    def require_whole(self, given: Container[str] = ()) -> None:
        """Raises `UserError` when a Wan pipeline lacks something; see `lacks`."""
        if lacking := self.lacks(given):
            raise self._no(lacking[0])

    def _no(self, name: str) -> UserError:
        has = ", ".join(self.parts) or "no part of a Wan model"
        return UserError(
            f"{self.path}: no {name} (found: {has}); expected a whole model (convert takes the rest from --base)"
        )


def find_model(path: Path, like: Model | None = None) -> Model:
    """Looks for the parts of a model in a folder, its folders and theirs, or in one file.

    Args:
      path: the folder or file.
      like: a model whose configs hold for parts of the same sizes that come without one.

    Raises:
      UserError: nothing there; files that cannot be read; a part found twice; a pipeline other than Wan 2.1's.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; expected a model directory")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / INDEX).is_file():
        _check_index(path / INDEX)
    settings = folder / SETTINGS
    configs = read_json(settings).get("parts", {}) if settings.is_file() else {}
    if not isinstance(configs, Mapping) or not all(isinstance(c, Mapping) for c in configs.values()):
        raise UserError(f"{settings}: parts is {configs!r}, expected an object of objects")
    found: dict[str, list[PartSource]] = defaultdict(list)
    for files in _groups(path) if path.is_dir() else [(path,)]:
        for source in _parts_of(files, configs, like):
            found[source.part].append(source)
    if not path.is_dir():
        return Model(path, folder, {name: _only(sources, path) for name, sources in found.items()})
    for name in PARTS:
        if is_checkpoint(path / name / PARAMS):
            found[name].append(_orbax_part(name, path / name))
    tokenizers = _tokenizers(path)
    processor = path / "image_processor"
    return Model(
        path,
        folder,
        {name: _only(found[name], path) for name in PARTS if name in found},
        tokenizers[0] if tokenizers else None,
        processor if processor.is_dir() else None,
        tuple(tokenizers[1:]),
    )


def _check_index(path: Path) -> None:
    """Raises `UserError` for a pipeline that is not Wan 2.1's."""
    index = read_json(path)
    found = index.get("_class_name")
    if found not in ("WanPipeline", "WanImageToVideoPipeline"):
        raise UserError(f"{path}: _class_name is {found!r}, expected 'WanPipeline' or 'WanImageToVideoPipeline'")
    second = index.get("transformer_2") or [None]
    if not isinstance(second, list) or second[0] is not None or index.get("expand_timesteps"):
        raise UserError(f"{path}: this is a Wan 2.2 pipeline (transformer_2 or expand_timesteps); only Wan 2.1 works")


def _groups(folder: Path) -> list[tuple[Path, ...]]:
    """The files of a folder that make up one set of weights each: an index, shards without one, single files."""
    paths = sorted(p for depth in range(DEPTH + 1) for p in folder.glob("/".join(["*"] * (depth + 1))))
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = [p for p in paths if p.suffix in SUFFIXES and p.name != EXTRAS and p.is_file()]
    indexes = [p for p in paths if p.name.endswith(".safetensors.index.json")]
    groups: list[tuple[Path, ...]] = [(index,) for index in indexes]
    listed = {index.parent / name for index in indexes for name in _listed(index)}
    shards: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path in listed:
            continue
        if match := _SHARD.fullmatch(str(path)):
            shards[match[1]].append(path)
        else:
            groups.append((path,))
    return groups + [tuple(paths) for paths in shards.values()]


def _listed(index: Path) -> set[str]:
    """Names of the shards in an index; whether they are right is seen when it is opened."""
    listed = read_json(index).get("weight_map")
    return {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set()


@contextmanager
def _open(files: Sequence[Path]) -> Iterator[Tensors]:
    with open_tensors(files[0]) if len(files) == 1 else open_shards(files) as tensors:
        yield tensors


def _parts_of(files: tuple[Path, ...], settings: Mapping[str, Any], like: Model | None) -> Iterator[PartSource]:
    """The parts in one set of weights."""
    with _open(files) as tensors:
        for part, layout, prefix in _marks(tensors):
            yield PartSource(part, layout, files, prefix, _config(tensors, files, part, layout, prefix, settings, like))


def _marks(tensors: Mapping[str, Stored]) -> list[tuple[str, Layout, str]]:
    """Part, layout and prefix of every part whose mark is among the tensors."""
    marks = {}
    for part, spec in PARTS.items():
        rows = vae_rows(1, 1) if part == "vae" else spec.rows(None)
        for layout in get_args(Layout):
            marks[part, layout] = entries.template(rows, spec.mark, layout)[0].replace("{i}", "0")
    found = []
    for name in tensors:
        for (part, layout), mark in marks.items():
            if name == mark or name.endswith("." + mark):
                found.append((part, layout, name[: len(name) - len(mark)]))
    return found


def _canonical(
    tensors: Mapping[str, Stored], part: str, layout: Layout, prefix: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Table names of a part's tensors with the names that they have in the files, and the tensors nobody reads."""
    spec = PARTS[part]
    others = [(p, o) for p, _, o in _marks(tensors) if (p, o) != (part, prefix)]
    names, extras = {}, []
    for theirs in tensors:
        if any(theirs.startswith(other) and len(other) > len(prefix) for _, other in others):
            continue
        if spec.is_extra(layout, theirs):
            extras.append(theirs)
        elif _SCALED.search(theirs):
            file = tensors[theirs].file
            raise UserError(f"{file}: tensor {theirs!r} scales float8 weights; fetch the bfloat16 or float16 file")
        elif theirs.startswith(prefix):
            names[theirs.removeprefix(prefix)] = theirs
        elif not any(theirs.startswith(other) or PARTS[p].is_extra(layout, theirs) for p, other in others):
            names[theirs] = theirs
    for alias, name in spec.aliases.items() if layout == "diffusers" else ():
        if alias in names and name not in names:
            names[name] = names.pop(alias)
    return names, tuple(extras)


def _found(tensors: Mapping[str, Stored], name: str) -> Found:
    return Found(name, str(tensors[name].file), tensors[name].shape)


def _check_dtype(name: str, stored: Stored) -> None:
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise UserError(
            f"{stored.file}: tensor {name!r} is of {stored.dtype}, expected floating point; "
            "quantised weights do not load"
        )


def _drop_repeated(tensors: Tensors, names: dict[str, str], part: str) -> None:
    """Forgets a tensor that repeats another. Raises `UserError` when it does not repeat it."""
    for alias, name in PARTS[part].aliases.items():
        if alias in names and name in names:
            theirs = names.pop(alias)
            if not np.array_equal(tensors.read(theirs), tensors.read(names[name])):
                raise UserError(
                    f"{tensors[theirs].file}: tensor {theirs!r} differs from {names[name]!r}, which it should repeat"
                )


def _config(
    tensors: Tensors,
    files: tuple[Path, ...],
    part: str,
    layout: Layout,
    prefix: str,
    settings: Mapping[str, Any],
    like: Model | None,
) -> Any:
    """A part's config: of the file beside it, else of a model like it, else from its shapes and Wan 2.1."""
    names, _ = _canonical(tensors, part, layout, prefix)
    found = {name: _found(tensors, theirs) for name, theirs in names.items()}
    where = str(files[0])
    rows = infer.vae_table(layout, found, where) if part == "vae" else PARTS[part].rows(None)
    sizes = PARTS[part].infer(infer.Shapes(rows, layout, found, where))
    path = files[0].parent / CONFIG
    values = read_json(path) if path.is_file() and (layout == "diffusers" or part == "transformer") else None
    if values is not None and (part == "transformer" or values.get("_class_name") != "WanModel"):
        style: Layout = "wan" if layout == "wan" and is_wan_config(values) else "diffusers"
        fields = read_config(part, style, values, str(path))
        known = fields if style == "diffusers" else {**sizes, **fields, **settings.get(part, {})}
        return make_config(part, known, sizes, str(path))
    if like is not None and part in like.parts:
        config = like.parts[part].config
        if all(getattr(config, key) == size for key, size in sizes.items()):
            return config
    known = {**sizes, **settings.get(part, {})}
    return make_config(part, {**infer.assumed(part, known, where), **known}, sizes, where)


def _orbax_part(part: str, folder: Path) -> PartSource:
    path = folder / CONFIG
    fields = read_config(part, "diffusers", read_json(path), str(path))
    return PartSource(part, "orbax", (folder / PARAMS,), "", make_config(part, fields, {}, str(path)))


def _only(sources: Sequence[PartSource], path: Path) -> PartSource:
    """The one source of a part, or the one at the place where its layout has it.

    Raises:
      UserError: there are several.
    """
    spec = PARTS[sources[0].part]
    usual = [path / sources[0].part / f"{spec.stem}.safetensors", path / spec.wan_file, path / sources[0].part / PARAMS]
    usual += [path / sources[0].part / f"{spec.stem}.safetensors.index.json", path / f"{spec.wan_file}.index.json"]
    chosen = [source for source in sources if source.files[0] in usual] if len(sources) > 1 else sources
    if len(chosen) != 1:
        files = " and ".join(str(source.files[0].relative_to(path)) for source in sources[:2])
        raise UserError(f"{path}: {files} both hold the {sources[0].part}; name one of them, or remove one")
    return chosen[0]


def _tokenizers(folder: Path) -> list[Path]:
    """Folders with a tokenizer, the text encoder's first."""
    found = {p.parent for depth in (1, 2) for p in folder.glob("/".join(["*"] * depth) + "/tokenizer_config.json")}

    def other(path: Path) -> tuple[bool, str]:
        kind = read_json(path / "tokenizer_config.json").get("tokenizer_class")
        return isinstance(kind, str) and kind.startswith("XLMRoberta"), str(path)

    return sorted(found, key=other)
