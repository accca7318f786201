"""The clip sizes that a model can generate: frames, height and width."""

from __future__ import annotations

from dataclasses import dataclass

from vpae_jax.flow.chunks import Chunks
from vpae_jax.inference.pictures import fitted
from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.types import UserError
from vpae_jax.weights.settings import Defaults, check_pixels


@dataclass(frozen=True)
class ClipSizes:
    """The clip sizes of one model.

    Attributes:
      defaults: the clip of a call without sizes.
      vae: the model's VAE config.
      patch: latent frames, rows and columns of the transformer's patch.
    """

    defaults: Defaults
    vae: WanVAEConfig
    patch: tuple[int, int, int]

    @property
    def units(self) -> tuple[int, int]:
        """What a video's height and width must be multiples of, in pixels."""
        return self.vae.scale_factor_spatial * self.patch[1], self.vae.scale_factor_spatial * self.patch[2]

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The video size for an image's height and width (`pictures.fitted`)."""
        return fitted(height, width, (self.defaults.height, self.defaults.width), self.units)

    def num_frames(self, latent_frames: int) -> int:
        """Number of video frames for a number of latent frames."""
        return 1 + (latent_frames - 1) * self.vae.scale_factor_temporal

    def latent_frames(self, num_frames: int | float | None) -> int:
        """Number of latent frames for a number of video frames, by default the model's. Raises `UserError` for a number
        that is not possible."""
        num_frames = self.defaults.num_frames if num_frames is None else num_frames
        time = self.vae.scale_factor_temporal
        frames = int(1 + (num_frames - 1) // time)
        if num_frames < 1 or (num_frames - 1) % time or frames % self.patch[0]:
            near = max(0, round((num_frames - 1) / time)) * time + 1
            raise UserError(f"num_frames is {num_frames}, expected 1 + a multiple of {time}, such as {near}")
        return frames

    def in_chunks(self, chunks: Chunks | None) -> int:
        """Number of video frames closest to the model's default that is a whole number of chunks."""
        frames = self.latent_frames(None)
        return self.num_frames(frames if chunks is None else chunks.nearest(frames))

    def check_chunks(self, chunks: Chunks, latent_frames: int) -> None:
        """Raises `UserError` for a clip that is not a whole number of chunks."""
        near = chunks.nearest(latent_frames)
        if near != latent_frames:
            size = chunks.size if chunks.first in (0, chunks.size) else f"{chunks.first} and then {chunks.size}"
            raise UserError(
                f"num_frames is {self.num_frames(latent_frames)}, or {latent_frames} latent frames, but this causal "
                f"model generates chunks of {size}; give a whole number of chunks, such as {self.num_frames(near)}"
            )

    def clip(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The video's frames, height and width, with the model's defaults filled in; raises `UserError` for sizes that
        are not possible."""
        num_frames = self.defaults.num_frames if num_frames is None else num_frames
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        self.latent_frames(num_frames)
        for name, size, unit in zip(("height", "width"), (height, width), self.units, strict=True):
            if size < unit or size % unit:
                near = max(1, round(size / unit)) * unit
                raise UserError(f"{name} is {size}, expected a multiple of {unit}, such as {near}")
        check_pixels(num_frames, height, width)
        return num_frames, height, width
