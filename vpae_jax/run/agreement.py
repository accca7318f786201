"""Before they build anything, the processes of a run check that they were all started with the same inputs.

Otherwise a difference would show up as a deadlock in a collective computation, or as weights that nobody intended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vpae_jax
from vpae_jax.config import Experiment
from vpae_jax.runtime import processes
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory

# Libraries that determine a run's programs and numbers.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings that may differ between processes: where a host keeps the clips, and how they are read.
OWN = ("data.folder", "data.records", "data.videos", "data.held_out_records", "data.workers")
PIECES, PIECE_BYTES = 64, 2**16  # pieces of a weight file that are compared, spread over the whole file

Facts = Mapping[str, Any]


def require_same(name: str, facts: Callable[[], Facts]) -> None:
    """Compares facts between all processes, which must all call this. With one process, it does nothing.

    Args:
      name: must be different for each call.
      facts: returns the facts of this process: plain JSON values by name.

    Raises:
      UserError: raised in every process if one differs from the first; the message names the fact and its values.
    """
    if processes.client() is None:
        return
    own: Facts = json.loads(json.dumps(facts()))
    first: Facts = processes.broadcast_from_0(f"{name} of the first", own)
    others = {key: own.get(key) for key in {**first, **own} if own.get(key) != first.get(key)}
    if wrong := processes.first_decides(name, others, partial(difference, first)):
        raise UserError(wrong)


def difference(first: Facts, others: Sequence[Facts]) -> str | None:
    """Describes the first fact that differs, in one line; None if there is none.

    Args:
      first: facts of process 0.
      others: for each process, the facts that differ from these; None stands for a missing fact.
    """
    keys = [key for key in dict.fromkeys([*first, *(key for one in others for key in one)])]
    differing = [key for key in keys if any(key in one for one in others)]
    if not differing:
        return None
    key, *more = differing
    who: dict[str, list[int]] = {}
    for index, one in enumerate(others):
        value = one[key] if key in one else first.get(key)
        who.setdefault("not given" if value is None else _shown(value), []).append(index)
    values = ", ".join(f"{value} in {_processes(indices)}" for value, indices in who.items())
    also = f" (and {len(more)} more difference{'s' if len(more) > 1 else ''})" if more else ""
    return (
        f"the processes of this run differ: {key} is {values}{also}; start all of them with the same command and code"
    )


def started_with(experiment: Experiment) -> Facts:
    """Returns what a process was started with: its code, its libraries, and its config except `OWN`."""
    versions = {name: version(name) for name in LIBRARIES}
    config = flat(dataclasses.asdict(experiment))
    return {
        "the version of vpae_jax": vpae_jax.__version__,
        "the digest of vpae_jax": digest_of_code(),
        **{f"the version of {name}": found for name, found in versions.items()},
        **{f"config.{key}": value for key, value in config.items() if key not in OWN},
    }


def reads(
    model: ModelDirectory | None, clips: Mapping[str, Sequence[str]], more: Mapping[str, Sequence[Path]] | None = None
) -> Facts:
    """Returns what a process reads, regardless of location.

    Args:
      model: the model directory.
      clips: digests of the clips, by config key.
      more: other files, by description.
    """
    stored = {} if model is None else {f"the model's {name}": part.files for name, part in model.parts.items()}
    files = {**stored, **(more or {})}
    return {
        **{f"the digest of {name}": _digest_of_files(found) for name, found in files.items()},
        **{f"the digest of {key}": " and ".join(found) for key, found in clips.items()},
    }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dict, joining keys with dots."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}{name}.").items()}


def digest_of_code() -> str:
    """Returns a hash (16 hexadecimal digits) of this package's source as installed, including local changes."""
    digest, folder = hashlib.sha256(), Path(vpae_jax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest_of_files(files: Sequence[Path]) -> str:
    """Hashes names, sizes and pieces spread over the files, since reading a whole model would take minutes."""
    digest = hashlib.sha256()
    for path in _within(files):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{path.name} {size} ".encode())
            last = max(0, size - PIECE_BYTES)
            for start in sorted({last * piece // (PIECES - 1) for piece in range(PIECES)}):
                file.seek(start)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def _within(files: Sequence[Path]) -> Iterator[Path]:
    for path in files:
        yield from sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _processes(indices: Sequence[int]) -> str:
    *some, last = map(str, indices)
    return f"processes {', '.join(some)} and {last}" if some else f"process {last}"
