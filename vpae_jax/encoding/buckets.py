"""Resolution buckets, the sizes to which clips are scaled and cropped: a few aspect ratios at about the same area."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from vpae_jax.types import UserError

Size = tuple[int, int]

# Height and width. Areas are within 4% of 480 x 832 and 720 x 1280, on which Wan 2.1 is trained; sides are multiples of
# 16: 8 pixels per latent, 2 latents per patch.
FAMILIES: dict[str, tuple[Size, ...]] = {
    "480p": ((480, 832), (544, 736), (640, 640), (736, 544), (832, 480)),
    "720p": ((720, 1280), (832, 1104), (960, 960), (1104, 832), (1280, 720)),
}


def parse(text: str, multiple: int = 16) -> tuple[Size, ...]:
    """Parses the name of a family of buckets, or a list of sizes.

    Args:
      text: "480p", "720p", or sizes such as "480x832,832x480", height first.
      multiple: number of pixels of which both sides must be multiples.

    Raises:
      UserError: neither a name nor a list of sizes, a side that is not such a multiple, or a repeated size.
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
    """Returns the bucket with the nearest aspect ratio (on a log scale); the first of several equally near ones."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def _size(part: str, text: str) -> Size:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", part)
    if not match:
        names = ", ".join(FAMILIES)
        raise UserError(f"buckets {text!r}: expected {names}, or HEIGHTxWIDTH separated by commas, as 480x832,832x480")
    return int(match[1]), int(match[2])
