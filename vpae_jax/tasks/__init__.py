"""Tasks: what a run trains on, and how its clips are scored. The digits task is imported only by a run on digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vpae_jax.config import DataConfig, Experiment
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.methods.base import Method
from vpae_jax.tasks.base import Mode, Task
from vpae_jax.types import Batch, UserError


def name_of(data: DataConfig) -> Literal["digits", "video"]:
    """Returns the task of a run: video if clips are given, else rendered digits."""
    return "video" if data.records or data.videos else "digits"


def encodes(data: DataConfig) -> bool:
    """Whether a run encodes clips or prompts itself, rather than using records, which are already encoded."""
    return not data.records


def check(experiment: Experiment, method: Method, pipeline: Pipeline | None, workdir: Path) -> None:
    """Checks what can be checked before anything is written. Raises `UserError` if method, model or number of clips do
    not fit the task, or if prompts alone are given to a method that needs clips."""
    name = experiment.method.get("name")
    if method.known_noise and not experiment.data.records:
        raise UserError(
            f"method {name} trains on a teacher's clips with known noise; make some with `python -m vpae_jax.encode "
            "--captions=...`, and give their folder in config.data.records"
        )
    if name_of(experiment.data) == "digits":
        from vpae_jax.tasks.digits import task as digits

        digits.check(experiment, pipeline)
    elif method.batch is not Batch:
        raise UserError(
            f"method {name} only trains on rendered digits; leave config.data.records and config.data.videos out"
        )
    elif experiment.data.records:
        from vpae_jax.tasks.video.sources import check_clips

        check_clips(experiment.data, workdir, experiment.name, method)


def digests(data: DataConfig, workdir: Path) -> dict[str, tuple[str, ...]]:
    """Returns digests of the clips that a run's config names, by config key. They depend on the contents of the
    folders, not on their location.

    Raises:
      UserError: a folder is missing, or contains no records or no videos.
    """
    if name_of(data) == "digits" and not data.held_out_records:
        return {}
    from vpae_jax.tasks.video import sources

    named = {key: names for key in ("records", "held_out_records") if (names := getattr(data, key))}
    found = {f"config.data.{key}": sources.digests(names, workdir) for key, names in named.items()}
    if data.videos:
        found["config.data.videos"] = (sources.open_videos(data, workdir).digest,)
    return found


def open_task(data: DataConfig, workdir: Path, model: str, method: Mapping[str, Any]) -> Task:
    """Opens the task of a run. Folders are read when clips are first requested.

    Args:
      data: the data config.
      workdir: the run's folder; paths may be relative to it.
      model: name of the model whose encoders made the clips.
      method: settings of the method.
    """
    if name_of(data) == "digits":
        from vpae_jax.tasks.digits.task import Digits

        return Digits(data, workdir)
    from vpae_jax.tasks.video.task import Video

    return Video(data, workdir, model, modes_of(method))


def modes_of(method: Mapping[str, Any]) -> tuple[Mode, ...] | None:
    """Returns the modes that a method trains, according to its settings; None for those of the model.

    A method that drops first frames in training produces one model for both modes. Any other model that takes a first
    frame requires it.
    """
    return ("t2v", "i2v") if method.get("image_dropout") else None
