"""The clip size of each preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vpae_jax.config import nearest
from vpae_jax.types import UserError

# Wan's VAE: pixels per latent row or column, video frames per latent frame, latent channels.
SIDE, FRAMES, CHANNELS = 8, 4, 16


@dataclass(frozen=True)
class ClipSize:
    """The size of a clip.

    Attributes:
      frames: video frames, one more than a multiple of four.
      height, width: in pixels, multiples of 16.
      text_tokens: number of tokens that a prompt's encoder states are padded to.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 512

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames - 1) % FRAMES:
            raise UserError(f"--frames is {self.frames}, expected one more than a multiple of {FRAMES} (such as 81)")

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Shape [f, h, w, c] of the clip's latents."""
        return 1 + (self.frames - 1) // FRAMES, self.height // SIDE, self.width // SIDE, CHANNELS

    @property
    def tokens(self) -> int:
        """Number of tokens of a transformer with Wan's patches of 1 x 2 x 2."""
        f, h, w, _ = self.latents
        return f * (h // 2) * (w // 2)


WAN_480P, WAN_720P = ClipSize(81, 480, 832), ClipSize(81, 720, 1280)
SIZES: Mapping[str, ClipSize] = MappingProxyType(
    {
        "tiny": ClipSize(9, 48, 48, text_tokens=16),
        "t2v-1.3b-480p": WAN_480P,
        "t2v-14b-480p": WAN_480P,
        "t2v-14b-720p": WAN_720P,
        "i2v-14b-480p": WAN_480P,
        "i2v-14b-720p": WAN_720P,
    }
)


def size_of(preset: str, frames: int | None = None) -> ClipSize:
    """The preset's clip size, with another number of frames if one is given.

    Raises:
      UserError: for a preset that does not exist, or a number of frames that Wan's VAE does not support.
    """
    if preset not in SIZES:
        raise UserError(f"preset {preset!r} does not exist{nearest(preset, SIZES)}")
    return SIZES[preset] if frames is None else dataclasses.replace(SIZES[preset], frames=frames)
