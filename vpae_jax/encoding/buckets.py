"""Sizes that clips are brought to: a few aspect ratios at about one area."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from vpae_jax.types import UserError

Size = tuple[int, int]

# Height and width. Areas are within 4 % of 480 x 832 and of 720 x 1280, as Wan 2.1 is trained; sides are multiples of
# 16: 8 pixels to a latent, 2 latents to a patch.
FAMILIES: dict[str, tuple[Size, ...]] = {
    "480p": ((480, 832), (544, 736), (640, 640), (736, 544), (832, 480)),
    "720p": ((720, 1280), (832, 1104), (960, 960), (1104, 832), (1280, 720)),
}


def parse(text: str, multiple: int = 16) -> tuple[Size, ...]:
    """The sizes that a name or a list stands for.

    Args:
      text: "480p", "720p", or sizes as "480x832,832x480", height first.
      multiple: what both sides must be multiples of.

    Raises:
      UserError: neither a name nor a list of sizes, or a side that is no such multiple.
    """
    sizes = FAMILIES.get(text) or tuple(_size(part.strip(), text) for part in text.split(","))
    for height, width in sizes:
        if height % multiple or width % multiple or not height or not width:
            near = "x".join(str(max(round(side / multiple), 1) * multiple) for side in (height, width))
            raise UserError(f"bucket {height}x{width}: sides must be multiples of {multiple}; the nearest is {near}")
    if len(set(sizes)) < len(sizes):
        raise UserError(f"buckets {text!r}: a size is listed twice; list each once")
    return sizes


def choose(buckets: Sequence[Size], height: int, width: int) -> Size:
    """The bucket whose aspect ratio is nearest, as a factor; of equal ones the first."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def _size(part: str, text: str) -> Size:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", part)
    if not match:
        names = ", ".join(FAMILIES)
        raise UserError(f"buckets {text!r}: expected {names}, or HEIGHTxWIDTH with commas between, as 480x832,832x480")
    return int(match[1]), int(match[2])
