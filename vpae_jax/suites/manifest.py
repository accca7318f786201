"""`manifest.json`: what each clip of an export was made from, and the settings that all of them share.

It is written before the first clip. A later export into the same folder must have the same settings, and adds its own
clips: further dimensions, or more samples per prompt.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpae_jax.encoding.encoder import add_weights, dtype_of, fingerprint
from vpae_jax.encoding.identity import differences
from vpae_jax.files import write_text
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.suites.prompts import Clip
from vpae_jax.types import UserError

MANIFEST, VIDEOS = "manifest.json", "videos"
# Settings that all clips of a folder share; the paths of model and checkout, and the checkout's commit, may change.
SHARED = ("suite", "weights", "dtype", "sampler", "negative_prompt", "clip")


def weights_of(pipeline: Pipeline) -> str:
    """Fingerprint (16 hexadecimal digits) of all weights of a pipeline: `encoder.fingerprint` and the transformers."""
    digest = hashlib.sha256(fingerprint(pipeline).encode())
    for model in (pipeline.transformer, pipeline.transformer_2):
        if model is not None:
            add_weights(digest, model)
    return digest.hexdigest()[:16]


def made_with(pipeline: Pipeline, sampler: Sampler, clip: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all clips share, as plain JSON.

    Args:
      pipeline: with all weights.
      sampler: how clips are sampled.
      clip: size, frame rate and compression of a video.
    """
    return {
        "weights": weights_of(pipeline),
        "dtype": dtype_of(pipeline.transformer),
        "sampler": asdict(sampler),
        "negative_prompt": pipeline.defaults.negative_prompt if sampler.guidance > 1 else None,
        "clip": dict(clip),
    }


def checkout_of(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The version of a suite: its commit (None if git knows none) and the SHA-256 of each file that was read."""
    sums = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"folder": str(folder), "commit": commit_of(folder), "files": sums}


def commit_of(folder: Path) -> str | None:
    """The commit of a git checkout; None for any other folder, or without git."""
    asked = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    # Inside another repository, git would give that one's commit.
    return said[1] if len(said) == 2 and Path(said[0]).resolve() == folder.resolve() else None


def entry_of(clip: Clip, crop: str) -> dict[str, Any]:
    """What one clip is made from, as plain JSON.

    Args:
      clip: the clip.
      crop: of the first frames; "" if there are none.
    """
    prompt = clip.prompt
    return {
        "file": f"{VIDEOS}/{clip.file}",
        "prompt": prompt.text,
        "augmented_prompt": prompt.augmented,
        "seed": clip.seed,
        "image": prompt.image or None,
        "crop": crop or None,
        "dimensions": list(prompt.dimensions),
    }


def merged(output: Path, shared: Mapping[str, Any], clips: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of an export, including the clips that an earlier export into the same folder listed.

    Raises:
      UserError: the folder's clips were made with other settings, or from other inputs under the same name, or it holds
        clips without a manifest.
    """
    path, videos = output / MANIFEST, output / VIDEOS
    filled = videos.is_dir() and any(videos.iterdir())  # checked first: a manifest is written before any clip
    there = _read(path)
    if there is None and filled:
        raise UserError(f"{videos} holds files, but {path} is missing; choose another --output")
    here = json.loads(json.dumps({**shared, "clips": list(clips)}))
    listed = {entry["file"]: entry for entry in here["clips"]}
    if there is not None:
        one, other = ({key: found.get(key) for key in SHARED} for found in (there, here))
        if (differing := next(differences(one, other), None)) is not None:
            what = "the model has other weights" if differing.startswith("weights ") else differing
            raise UserError(f"{output} holds clips of another export: {what}; choose another --output")
        for entry in there["clips"]:
            own = listed.setdefault(entry["file"], entry)
            if (differing := next(differences(entry, own), None)) is not None:
                raise UserError(f"{output} holds other clips: {entry['file']}: {differing}; choose another --output")
    return {**here, "clips": sorted(listed.values(), key=lambda entry: entry["seed"])}


def write_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, complete or not at all."""
    write_text(output / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    """Reads a manifest; None if it is missing. Raises `UserError` if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"file", "seed"} <= set.intersection(*map(set, found["clips"])):
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged; choose another --output, or remove it if its clips are known to be complete")
