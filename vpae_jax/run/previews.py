"""Previews during training: real clips (if any), teacher, student and its average side by side, from the same noise.

The conditions are those of held-out clips. They and the noise are the same every time, so that the previews of a run
can be compared by flipping through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from einops import rearrange

from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.media import write_contact_sheet, write_video
from vpae_jax.metrics.base import Clips
from vpae_jax.run.generation import Generation
from vpae_jax.runtime.processes import broadcast_from_0, is_first
from vpae_jax.tasks.base import Task
from vpae_jax.train.state import TrainState

FOLDER = "previews"
CLIPS = 4  # per mode
# Clips with more latent positions (frames x rows x columns) than POINTS are large, and fewer are shown.
POINTS, LARGE_CLIPS = 4096, 1

# Returns the networks of a train state to be sampled, by name.
Networks = Callable[[TrainState], Mapping[str, Denoiser]]


class Previews:
    """Writes one row of clips each for the data, the teacher, and the trained networks.

    Args:
      task: provides held-out clips.
      pipeline: encodes conditions, decodes latents.
      workdir: the run's folder.
      networks: returns the networks of a train state to be sampled.
      sampler: how these are sampled.
      teacher: the teacher, and how it is sampled; None to leave it out.

    Raises:
      TooFew: there are no held-out clips.
    """

    def __init__(
        self,
        task: Task,
        pipeline: Pipeline,
        workdir: Path,
        networks: Networks,
        sampler: Sampler,
        teacher: tuple[Denoiser, Sampler] | None = None,
    ) -> None:
        held_out = task.held_out(pipeline, "preview", CLIPS)
        if math.prod(held_out.shape[:3]) > POINTS:
            held_out = task.held_out(pipeline, "preview", LARGE_CLIPS)
        held_out = task.with_real(held_out, pipeline)
        self.generation, self.fps = Generation(pipeline, held_out), pipeline.defaults.fps
        self.folder, self.networks, self.sampler = workdir / FOLDER, networks, sampler
        self.rows = {}
        if held_out.clips:  # prompts alone have none
            self.rows["data"] = np.concatenate([held_out.clips[part.name] for part in held_out.parts])
        if teacher is not None:
            denoiser, how = teacher
            self.rows[f"teacher, {how.evaluations} evaluations"] = self.generation(denoiser, how)

    def done(self, step: int) -> bool:
        """Whether the previews of a step exist."""
        return broadcast_from_0(f"previews of step {step}", _stem(self.folder, step).with_suffix(".png").exists())

    def __call__(self, step: int, state: TrainState) -> Mapping[str, Path]:
        made = {name: self.generation(denoiser, self.sampler) for name, denoiser in self.networks(state).items()}
        if not is_first():
            return {}
        return {"previews": write_previews(self.folder, step, {**self.rows, **made}, self.fps).with_suffix(".mp4")}


def write_previews(folder: Path, step: int, rows: Mapping[str, Clips], fps: float) -> Path:
    """Writes `step_000100.mp4` and `.png`, with one row of clips for each entry; returns the path of the PNG.

    The PNG shows each clip's first, middle and last frame.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(folder, step)
    stack = np.stack(list(rows.values()))
    _, b, t, _, _, _ = stack.shape
    write_video(stem.with_suffix(".mp4"), rearrange(stack, "row b t h w c -> t (row h) (b w) c"), fps)
    moments = rearrange(stack[:, :, [0, t // 2, t - 1]], "row b t h w c -> (row b t) h w c")
    write_contact_sheet(stem.with_suffix(".png"), moments, columns=b * 3)
    return stem.with_suffix(".png")


def latest_previews(workdir: Path) -> tuple[Path, ...]:
    """The pictures and the video of a run's latest previews; none where it has made none."""
    last = max((workdir / FOLDER).glob("step_*.png"), default=None)
    return () if last is None else tuple(path for path in (last, last.with_suffix(".mp4")) if path.is_file())


def _stem(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"
