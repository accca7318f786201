"""Small folders of records, written without any model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpae_jax.encoding.units import Units

SMALL, WIDE = (2, 4, 6, 16), (3, 4, 4, 16)
TOKENS, WIDTH = 6, 8
NULL = {"text": np.zeros((TOKENS, WIDTH), np.float32), "text_mask": np.arange(TOKENS) < 1}
FACTS = {"text_tokens": TOKENS, "takes_image": True}


def arrays_of(number: int, shape: tuple[int, ...] = SMALL) -> dict[str, np.ndarray]:
    """A clip's arrays, of which the first latent is its number."""
    rng = np.random.default_rng(number)
    tokens = 1 + number % TOKENS
    text = np.zeros((TOKENS, WIDTH), np.float32)
    text[:tokens] = rng.standard_normal((tokens, WIDTH))
    frames = np.zeros((*shape[:-1], 4 + shape[-1]), np.float32)
    frames[..., 4:] = rng.standard_normal(shape)
    frames[0, ..., :4] = 1
    latents = rng.standard_normal(shape).astype(np.float32)
    latents.flat[0] = number
    image = rng.standard_normal((5, 3)).astype(np.float32)
    return {"latents": latents, "text": text, "text_mask": np.arange(TOKENS) < tokens, "frames": frames, "image": image}


def write_folder(
    folder: Path,
    units: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    encoders: str | None = None,
    seed: int | None = None,
) -> Path:
    """A finished folder; a unit is a list of clips, each a number and its shape of latents. With `seed` they are said
    to be a teacher's, each of noise of the seed plus its number."""
    identity = {"clips": "numbers"} if encoders is None else {"encoders": encoders}
    identity |= {} if seed is None else {"recipe": {"seed": seed}}
    made = Units(folder, identity, len(units))
    for unit in made.pending():
        with made.write(unit) as writer:
            for number, shape in units[unit]:
                about = {"caption": f"number {number}"} | ({} if seed is None else {"seed": seed + number})
                writer.add(f"clip {number}", arrays_of(number, shape), about)
    assert made.finish(NULL, FACTS)
    return folder


def number_of(latents: np.ndarray) -> int:
    return int(np.asarray(latents).flat[0])
