"""What is trained on and judged by. Digits are imported only by a run on digits."""

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
    """The task of a run: video where clips are given, else rendered digits."""
    return "video" if data.records or data.videos else "digits"


def encodes(data: DataConfig) -> bool:
    """Whether a run encodes clips or prompts: records hold what encoders made of them."""
    return not data.records


def check(experiment: Experiment, method: Method, pipeline: Pipeline | None, workdir: Path) -> None:
    """Raises `UserError` for what shows before anything is written: a method, a model, or a number of clips that do not
    fit the task, or prompts alone for a method that needs clips."""
    name = experiment.method.get("name")
    if method.known_noise and not experiment.data.records:
        raise UserError(
            f"method {name} trains on clips that a teacher made of known noise; make some with `python -m "
            "vpae_jax.encode --captions=...`, and name their folder in config.data.records"
        )
    if name_of(experiment.data) == "digits":
        from vpae_jax.tasks.digits import task as digits

        digits.check(experiment, pipeline)
    elif method.batch is not Batch:
        raise UserError(
            f"method {name} trains on rendered digits alone; leave config.data.records and config.data.videos out"
        )
    elif experiment.data.records:
        from vpae_jax.tasks.video.sources import check_clips

        check_clips(experiment.data, workdir, experiment.name, method)


def digests(data: DataConfig, workdir: Path) -> dict[str, tuple[str, ...]]:
    """Digests of the clips that a run names, by the config's key: of what is in its folders, wherever they lie.

    Raises:
      UserError: a folder that is missing, or holds no records or no videos.
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
    """The task of a run. Folders are read when clips are first asked for.

    Args:
      data: what is trained on and held out.
      workdir: of the run; paths may be relative to it.
      model: name of the model whose encoders made the clips.
      method: its settings.
    """
    if name_of(data) == "digits":
        from vpae_jax.tasks.digits.task import Digits

        return Digits(data, workdir)
    from vpae_jax.tasks.video.task import Video

    return Video(data, workdir, model, modes_of(method))


def modes_of(method: Mapping[str, Any]) -> tuple[Mode, ...] | None:
    """The modes that a method trains, by its settings; None for the model's own.

    One that drops first frames in training makes one model for both. Any other model that takes a first frame needs it.
    """
    return ("t2v", "i2v") if method.get("image_dropout") else None
