"""Which clips a model can make: their frames, height and width."""

from __future__ import annotations

from dataclasses import dataclass

from vpae_jax.flow.chunks import Chunks
from vpae_jax.inference.pictures import fitted
from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.types import UserError
from vpae_jax.weights.settings import Defaults, check_pixels


@dataclass(frozen=True)
class ClipSizes:
    """The clips of one model.

    Attributes:
      defaults: the clip that a call without sizes makes.
      vae: of the model.
      patch: latent frames, rows and columns of the transformer's patch.
    """

    defaults: Defaults
    vae: WanVAEConfig
    patch: tuple[int, int, int]

    @property
    def units(self) -> tuple[int, int]:
        """What a video's height and width are multiples of, in pixels."""
        return self.vae.scale_factor_spatial * self.patch[1], self.vae.scale_factor_spatial * self.patch[2]

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """A video's height and width for a picture's (`pictures.fitted`)."""
        return fitted(height, width, (self.defaults.height, self.defaults.width), self.units)

    def num_frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames."""
        return 1 + (latent_frames - 1) * self.vae.scale_factor_temporal

    def latent_frames(self, num_frames: int | float | None) -> int:
        """Latent frames of a video of so many, by default the model's. Raises `UserError` for a number that no video
        has."""
        num_frames = self.defaults.num_frames if num_frames is None else num_frames
        time = self.vae.scale_factor_temporal
        frames = int(1 + (num_frames - 1) // time)
        if num_frames < 1 or (num_frames - 1) % time or frames % self.patch[0]:
            near = max(0, round((num_frames - 1) / time)) * time + 1
            raise UserError(f"num_frames is {num_frames}, expected 1 + a multiple of {time}, such as {near}")
        return frames

    def in_chunks(self, chunks: Chunks | None) -> int:
        """Frames of the video next to the model's own that is a whole number of chunks."""
        frames = self.latent_frames(None)
        return self.num_frames(frames if chunks is None else chunks.nearest(frames))

    def check_chunks(self, chunks: Chunks, latent_frames: int) -> None:
        """Raises `UserError` for a clip that is no whole number of chunks."""
        near = chunks.nearest(latent_frames)
        if near != latent_frames:
            size = chunks.size if chunks.first in (0, chunks.size) else f"{chunks.first} and then {chunks.size}"
            raise UserError(
                f"num_frames is {self.num_frames(latent_frames)}, {latent_frames} latent frames, but this causal model "
                f"makes them in chunks of {size}; give a whole number of chunks, such as {self.num_frames(near)}"
            )

    def clip(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The video's frames, height and width, the model's own where they are not given; checked."""
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
