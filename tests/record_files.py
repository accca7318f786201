"""Small folders of records, written without any model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.encoding.units import Units

SMALL, WIDE = (2, 4, 6, 16), (3, 4, 4, 16)
FITTING, HIGH = (3, 6, 8), (3, 8, 6)
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
    seed: int | None = None,
) -> Path:
    """A finished folder; a unit is a list of clips, each a number and its shape of latents. With `seed` they are said
    to be a teacher's, each of noise of the seed plus its number."""
    identity = {"clips": "numbers", **({} if seed is None else {"recipe": {"seed": seed}})}
    made = Units(folder, identity, len(units))
    for unit in made.pending():
        with made.write(unit) as writer:
            for number, shape in units[unit]:
                about = {"caption": f"number {number}"} | ({} if seed is None else {"seed": seed + number})
                writer.add(f"clip {number}", arrays_of(number, shape), about)
    assert made.finish(NULL, FACTS)
    return folder


def write_fitting(
    pipeline: Any,
    folder: Path,
    clips: int,
    first: int = 0,
    shapes: Mapping[str, tuple[int, ...] | None] = MappingProxyType({}),
) -> Path:
    """A finished folder of noise, of the model's encoders by its own account, and with arrays of their shapes but for
    `shapes` (None leaves one out). Of each clip, the first latent is its number."""
    image = pipeline.image_encoder.config
    made = Units(folder, {"encoders": fingerprint(pipeline), "clips": f"{first} {clips}"}, 1)
    text_shape = shapes.get("text") or (pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.d_model)
    with made.write(0) as writer:
        for number in range(first, first + clips):
            rng = np.random.default_rng(number)
            size = HIGH if number % 6 == 0 else FITTING
            fitting = {
                "latents": (*size, 16),
                "frames": (*size, 20),
                "text": text_shape,
                "image": (image.num_tokens, image.hidden_size),
            }
            given = {name: shape for name, shape in {**fitting, **shapes}.items() if shape is not None}
            arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in given.items()}
            arrays["latents"].flat[0] = number
            if "frames" in arrays:
                arrays["frames"][..., :4] = 0
                arrays["frames"][0, ..., :4] = 1
            arrays["text_mask"] = np.arange(text_shape[0]) < 3
            writer.add(f"clip {number}", arrays, {"caption": f"number {number}"})
    null = {"text": np.zeros(text_shape, np.float32), "text_mask": np.arange(text_shape[0]) < 1}
    assert made.finish(null, {"text_tokens": text_shape[0], "takes_image": True})
    return folder


def number_of(latents: np.ndarray) -> int:
    return int(np.asarray(latents).flat[0])
