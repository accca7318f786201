"""Finds a model's weights in a folder or file of any layout, recognised by its tensor names, not by file names.

    diffusers   model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  [image_encoder/ ...]
    wan         config.json  diffusion_pytorch_model*.safetensors  Wan2.1_VAE.pth  models_t5_*.pth  [models_clip_*.pth]
    experts     transformer/ and transformer_2/, or Wan 2.2's high_noise_model/ and low_noise_model/
    one file    one or several parts, with or without prefixes such as `model.diffusion_model.`
    orbax       the diffusers layout with our own arrays instead of safetensors

`find_model` reads only headers; weights are read after `StoredPart.open`. Files that are not Wan weights (such as an
optimizer's state) are skipped. If such a file is in a part's usual place, that part is rejected once it is needed.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vpae_jax.train.checkpoint import CONFIG_FILE, FOLDER
from vpae_jax.types import Note, UserError
from vpae_jax.weights import dialects, infer
from vpae_jax.weights.directory import EXTRAS, ModelDirectory, StoredPart, canonical, marks, open_files
from vpae_jax.weights.filenames import CAUSAL_PIPELINE, CONFIG, INDEX, PRODUCT, SETTINGS, read_json
from vpae_jax.weights.locate import locate
from vpae_jax.weights.names import Layout
from vpae_jax.weights.orbax import is_checkpoint
from vpae_jax.weights.parts import (
    LOW,
    PARTS,
    WAN_CLASSES,
    config_notes,
    is_wan_config,
    kind_of,
    make_config,
    makes_from_image,
    read_config,
)
from vpae_jax.weights.safetensors_file import one_line, quote
from vpae_jax.weights.spiece import find_tokenizer
from vpae_jax.weights.tensors import DISTRIBUTED, Tensors

PARAMS = "params"  # folder of a part's arrays in the orbax layout
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf", DISTRIBUTED)
DEPTH = 2
HIGH_FOLDER, LOW_FOLDER = "high_noise_model", "low_noise_model"  # Wan 2.2's experts
# Wan 2.2's boundaries for text-to-video and image-to-video, which are in its code but not in its folders.
_WAN_BOUNDARIES = (0.875, 0.9)
_SHARD = re.compile(r"(.*)-\d+-of-\d+(\.safetensors|\.bin)")
# Pipelines with Wan's parts, and notes for those that sample differently.
_PIPELINES = {
    "WanPipeline": None,
    "WanImageToVideoPipeline": None,
    CAUSAL_PIPELINE: None,  # ours; its scheduler specifies how it is sampled
    "WanDMDPipeline": "is FastVideo's WanDMDPipeline, whose three steps are not in any file: sample it with --steps=3 "
    "--guidance=1 --solver=consistency",
}
MAX_SETS = 64


class _Candidate(NamedTuple):
    """A possible source of a part; its fields are those of `StoredPart`."""

    part: str
    layout: Layout | Literal["orbax"]
    files: tuple[Path, ...]
    prefix: str


def find_model(
    name: ModelDirectory | Path | str | None, like: ModelDirectory | None = None, weights: str | None = None
) -> ModelDirectory:
    """Looks for the parts of a model in a folder and two levels of subfolders, or in one file.

    A program calls this once and passes the result on. Parts of the files that are left out are reported as a `Note`.

    Args:
      name: the folder or file, or anything else that `locate` accepts; a `ModelDirectory` is returned as it is.
      like: a model whose configs apply to parts of the same sizes that come without one.
      weights: which of several sets that training programs save in one file ("generator", "generator_ema").

    Raises:
      UserError: as `locate`; a single file that cannot be read; no such set of weights; a pipeline other than Wan's;
        the workdir of a training run. A part that cannot be read, or exists twice, is rejected by
        `ModelDirectory.part`.
    """
    if isinstance(name, ModelDirectory):
        return name
    path = locate(name)
    if is_workdir(path):
        there = "its model is" if (path / PRODUCT).is_dir() else "when it has finished, its model will be"
        raise UserError(f"{path}: is the workdir of a training run; {there} {path / PRODUCT}")
    folder = path if path.is_dir() else path.parent
    settings = folder / SETTINGS
    configs = (_json(settings) or {}).get("parts", {})
    if not isinstance(configs, Mapping) or not all(isinstance(c, Mapping) for c in configs.values()):
        raise UserError(f"{settings}: parts is {quote(configs)}, expected an object of objects")
    model = ModelDirectory(path, folder, {})
    if path.is_dir():
        found, boundary, model = _in_folder(model)
    else:
        found, boundary = _by_part(_candidates((path,))), None
    found = found if weights is None else _chosen(found, weights, path)
    parts, unreadable = {}, dict(model.unreadable)
    for part in PARTS:
        try:
            if part in found and part not in unreadable:
                parts[part] = _source(_only(found[part], path), configs, like)
        except UserError as error:
            unreadable[part] = str(error)
    if boundary is None and LOW in parts and not (path / INDEX).exists():
        boundary = _boundary(settings, {name: source.config for name, source in parts.items()})
    for note in dict.fromkeys(note for source in parts.values() for note in source.notes):
        warnings.warn(note, Note, stacklevel=2)
    return dataclasses.replace(model, parts=parts, unreadable=unreadable, boundary=boundary)


def is_workdir(folder: Path) -> bool:
    """Whether a folder is the workdir of a training run: it has checkpoints, and a config that is not a model's."""
    if not (folder / FOLDER).is_dir() or not (folder / CONFIG_FILE).is_file():
        return False
    try:
        return "method" in read_json(folder / CONFIG_FILE)
    except UserError:  # a damaged config; its reader reports it
        return True


def _in_folder(model: ModelDirectory) -> tuple[dict[str, list[_Candidate]], float | None, ModelDirectory]:
    """The candidates for each part in a folder, the boundary in its index, and the model without its parts."""
    path = model.path
    index = _json(path / INDEX)
    boundary = None if index is None else _check_index(index, path / INDEX)
    paths = list(_walk(path))
    candidates, passed_over = _look(paths)
    orbax, reason = _orbax(path, paths)
    found = _by_part([_expert(one, path) for one in candidates] + orbax)
    if index is not None and boundary is None:
        found.pop(LOW, None)
    usual = {str(place): part for part in reversed(list(PARTS)) for place in _places(part, path)}
    failed = [(usual.get(_SHARD.sub(r"\1\2", str(file))), file, why) for file, why in passed_over]
    tokenizers = _tokenizers(path, paths)
    processor = path / "image_processor"
    return (
        found,
        boundary,
        dataclasses.replace(
            model,
            unreadable={part: _with_file(file, why) for part, file, why in failed if part is not None},
            tokenizer=tokenizers[0] if tokenizers else None,
            image_processor=processor if processor.is_dir() else None,
            more_tokenizers=tuple(tokenizers[1:]),
            passed_over=tuple(passed_over + reason),
        ),
    )


def _with_file(file: Path, why: str) -> str:
    """A reason that names a file: the given one, or another in its folder."""
    return why if why.startswith(str(file.parent)) else f"{file}: {why}"


def _json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None if the path does not exist. Raises `UserError` for anything else."""
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file, expected a JSON file; remove it or fetch it again")
    return read_json(path)


def _check_index(index: Mapping[str, Any], path: Path) -> float | None:
    """The boundary between two experts; None for a single one. Raises `UserError` for a pipeline that is not Wan's."""
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in _PIPELINES:
        raise UserError(f"{path}: _class_name is {quote(found)}, expected 'WanPipeline' or 'WanImageToVideoPipeline'")
    if (note := _PIPELINES[found]) is not None:
        warnings.warn(f"{path} {note}", Note, stacklevel=4)
    if index.get("expand_timesteps"):
        raise UserError(f"{path}: expand_timesteps is set, as in Wan 2.2's 5B model, which is not supported")
    second = index.get(LOW) or [None]
    if isinstance(second, list) and second[0] is None:
        return None
    return _checked(index.get("boundary_ratio"), f"{path}: boundary_ratio")


def _boundary(settings: Path, configs: Mapping[str, Any]) -> float:
    """The boundary of a model without a model_index.json: from its settings, else Wan 2.2's own."""
    values = _json(settings) or {}
    if "boundary" in values:
        return _checked(values["boundary"], f"{settings}: boundary")
    return _WAN_BOUNDARIES[makes_from_image(configs)]


def _checked(boundary: object, where: str) -> float:
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise UserError(
            f"{where} is {quote(boundary)}, expected a number between 0 and 1, as there are two transformers"
        )
    return float(boundary)


def _walk(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The contents of a folder and its subfolders down to `depth`, without hidden files or the insides of models."""
    for path in sorted(folder.glob("*")):
        if path.name.startswith("."):
            continue
        yield path
        if depth and path.is_dir() and not any((path / name).exists() for name in (INDEX, SETTINGS)):
            yield from _walk(path, depth - 1)


def _look(paths: Sequence[Path]) -> tuple[list[_Candidate], list[tuple[Path, str]]]:
    """The candidates in the files of a folder, and the files that cannot be read, with reasons."""
    candidates, passed_over = [], []
    for files in _groups(paths):
        try:
            candidates += _candidates(files)
        except UserError as error:
            passed_over.append((files[0], str(error).removeprefix(f"{files[0]}: ")))
    return candidates, passed_over


def _places(part: str, folder: Path) -> list[Path]:
    """The usual places of a part in a model's folder, in all layouts."""
    spec = PARTS[part]
    files = [folder / part / f"{spec.stem}.safetensors", folder / spec.wan_file]
    if kind_of(part) == "transformer":
        files.append(folder / (LOW_FOLDER if part == LOW else HIGH_FOLDER) / spec.wan_file)
    return [*files, *(file.with_name(f"{file.name}.index.json") for file in files), folder / part / PARAMS]


def _groups(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Groups of files, each of which makes up one set of weights: an index, shards without one, or a single file."""
    files = [p for p in paths if p.suffix.lower() in WEIGHT_SUFFIXES and p.name != EXTRAS and p.is_file()]
    indexes = [p for p in paths if p.name.endswith(".safetensors.index.json")]
    groups: list[tuple[Path, ...]] = [(index,) for index in indexes]
    listed = {index.parent / name for index in indexes for name in _listed(index)}
    shards: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path in listed:
            continue
        if match := _SHARD.fullmatch(str(path)):
            shards[match[1] + match[2]].append(path)
        else:
            groups.append((path,))
    return groups + [tuple(paths) for paths in shards.values()]


def _listed(index: Path) -> set[str]:
    """Names of the shards in an index, which is checked only when it is opened."""
    try:
        listed = (_json(index) or {}).get("weight_map")
    except UserError:
        return set()
    return {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set()


def _candidates(files: tuple[Path, ...]) -> list[_Candidate]:
    """The candidates in one file, or in several that belong together."""
    with open_files(files) as tensors:
        found = [_Candidate(part, layout, files, prefix) for part, layout, prefix in marks(tensors)]
    if len(found) > MAX_SETS:
        raise UserError(f"{files[0]}: holds {len(found)} sets of weights, expected at most {MAX_SETS}")
    return found


def _expert(candidate: _Candidate, path: Path) -> _Candidate:
    """The same candidate, marked as the second expert if its folder in the model at `path` is that expert's."""
    folder = candidate.files[0].parent
    low = candidate.part == "transformer" and folder != path and folder.name in (LOW, LOW_FOLDER)
    return candidate._replace(part=LOW) if low else candidate


def _by_part(candidates: Sequence[_Candidate]) -> dict[str, list[_Candidate]]:
    found: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        found[candidate.part].append(candidate)
    return found


def _chosen(found: Mapping[str, list[_Candidate]], weights: str, path: Path) -> dict[str, list[_Candidate]]:
    """The candidates in a set of weights; for parts without any in it, all candidates.

    A set is named by the prefix of its tensors' names, or by a word of that: "ema" matches "net_ema".

    Raises:
      UserError: no part has such a set.
    """
    chosen, known = {}, {}
    for part, candidates in found.items():
        called = dialects.words(one.prefix for one in candidates)
        known |= dict.fromkeys(called)
        exact = [one for one, name in zip(candidates, called, strict=True) if name == weights]
        near = [one for one, name in zip(candidates, called, strict=True) if weights in re.split("[._]", name)]
        if exact or near:
            chosen[part] = exact or near
    if not chosen:
        raise UserError(
            f"--weights={weights}: {path} is not a training run's workdir, and has no such set of weights; it has "
            f"{one_line(', '.join(known) or 'none')}"
        )
    return {**found, **chosen}


def _source(chosen: _Candidate, settings: Mapping[str, Any], like: ModelDirectory | None) -> StoredPart:
    """The source of a part, with its config."""
    part, layout, files, prefix = chosen
    if layout == "orbax":
        path = files[0].parent / CONFIG
        fields = read_config(part, "diffusers", _json(path) or read_json(path), str(path))
        return StoredPart(*chosen, make_config(part, fields, {}, str(path)))
    with open_files(files) as tensors:
        config, notes = _config(tensors, files, part, layout, prefix, settings, like)
        tokenizer = find_tokenizer(tensors) if part == "text_encoder" else None
        return StoredPart(*chosen, config, (*tensors.notes, *notes), tokenizer)


def _config(
    tensors: Tensors,
    files: tuple[Path, ...],
    part: str,
    layout: Layout,
    prefix: str,
    settings: Mapping[str, Any],
    like: ModelDirectory | None,
) -> tuple[Any, tuple[str, ...]]:
    """A part's config: from the file next to it, else from a model like it, else from its shapes and Wan 2.1's
    constants; with notes about it."""
    names, _ = canonical(tensors, part, layout, prefix)
    found = {name: tensors[theirs] for name, theirs in names.items()}
    where = str(files[0])
    rows = infer.vae_table(layout, found, where) if part == "vae" else PARTS[part].rows(None)
    sizes = PARTS[part].infer(infer.Shapes(rows, layout, found, where))
    path = files[0].parent / CONFIG
    transformer = kind_of(part) == "transformer"
    values = _json(path) if layout == "diffusers" or transformer else None
    if values is not None and (transformer or values.get("_class_name") not in WAN_CLASSES):
        style: Layout = "wan" if layout == "wan" and is_wan_config(values) else "diffusers"
        fields = read_config(part, style, values, str(path))
        known = fields if style == "diffusers" else {**sizes, **fields, **settings.get(part, {})}
        return make_config(part, known, sizes, str(path)), config_notes(values, str(path))
    if like is not None and part in like.parts:
        config = like.parts[part].config
        if all(getattr(config, key) == size for key, size in sizes.items()):
            return config, ()
    known = {**sizes, **settings.get(part, {})}
    return make_config(part, {**infer.assumed(kind_of(part), known, where), **known}, sizes, where), ()


def _orbax(folder: Path, paths: Sequence[Path]) -> tuple[list[_Candidate], list[tuple[Path, str]]]:
    """Parts in the orbax layout: those of a model, or a single one if the folder belongs to one part.

    In the latter case, the config says which part it is; otherwise the arrays are skipped, with the reason.
    """
    found = [
        _Candidate(name, "orbax", (folder / name / PARAMS,), "")
        for name in PARTS
        if folder / name / PARAMS in paths and is_checkpoint(folder / name / PARAMS)
    ]
    arrays, path = folder / PARAMS, folder / CONFIG
    if not is_checkpoint(arrays):
        return found, []
    values = _json(path) or {}
    for name, spec in PARTS.items():
        keys = [key for key in ("_class_name", "model_type", "architectures") if key in values and key in spec.identity]
        if keys and values[keys[0]] == spec.identity[keys[0]]:
            return [*found, _Candidate(name, "orbax", (arrays,), "")], []
    return found, [(arrays, f"{path} does not say which part of a Wan model it is")]


def _only(candidates: Sequence[_Candidate], path: Path) -> _Candidate:
    """The only candidate for a part, or the one in its usual place.

    Pickles are ignored if the same folder has the part in safetensors.

    Raises:
      UserError: there are several.
    """
    part = candidates[0].part
    usual = _places(part, path)
    chosen = [one for one in candidates if one.files[0] in usual] if len(candidates) > 1 else []
    if not chosen:
        safe = {one.files[0].parent for one in candidates if _is_safetensors(one)}
        chosen = [one for one in candidates if _is_safetensors(one) or one.files[0].parent not in safe]
    if len(chosen) == 1:
        return chosen[0]
    if len({one.files for one in chosen}) == 1:
        names = dialects.words(one.prefix for one in chosen)
        count = "both" if len(names) == 2 else f"all {len(names)}"
        listed = one_line(f"{', '.join(names[:-1])} and {names[-1]}")
        raise UserError(
            f"{chosen[0].files[0]}: {listed} in it {count} hold the {part}; convert one of them "
            f"with --weights={names[0]}"
        )
    files = " and ".join(str(one.files[0].relative_to(path)) for one in chosen[:2])
    raise UserError(f"{path}: {files} both hold the {part}; name one of them, or remove one")


def _is_safetensors(candidate: _Candidate) -> bool:
    return candidate.files[0].name.endswith((".safetensors", ".safetensors.index.json"))


def _tokenizers(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Folders with a tokenizer, the text encoder's first."""
    usual = [folder / "tokenizer", folder / "google" / "umt5-xxl"]
    found = [path.parent for path in paths if path.name == "tokenizer_config.json" and path.parent != folder]

    def order(path: Path) -> tuple[int, bool, str]:
        if path in usual:
            return usual.index(path), False, ""
        try:
            kind = (_json(path / "tokenizer_config.json") or {}).get("tokenizer_class")
        except UserError:  # it is read again, and rejected, if it is used
            kind = None
        return len(usual), isinstance(kind, str) and kind.startswith("XLMRoberta"), str(path)

    return sorted(found, key=order)
