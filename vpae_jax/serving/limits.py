"""What a page may ask for. Whatever arrives over HTTP is checked here, before it reaches the queue.

Every error is one line that names the culprit and the remedy; the page shows it as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vpae_jax.flow.draws import SEEDS, check_seed
from vpae_jax.flow.sampler import MAX_GUIDANCE, Sampler, Steps, parse_steps
from vpae_jax.media import IMAGE_FORMATS, Picture, read_image
from vpae_jax.serving.models import Model
from vpae_jax.types import UserError

MAX_BODY = 2**16  # bytes of a request
MAX_PROMPT = 2000  # characters; a model's own limit, in tokens, comes on top
MAX_STEPS = 100  # unless the model's own are more
MAX_IMAGE_BYTES = 2**24  # 16 MiB
MAX_IMAGE_PIXELS = 2**25  # 8192x4096
PAGE = re.compile(r"[0-9A-Za-z-]{1,64}")


class TooLarge(UserError):
    """An upload with too many bytes or pixels."""


@dataclass(frozen=True)
class Asked:
    """A valid request: one prompt, and how each model samples it.

    Attributes:
      page: random name of the browser page that asks. A newer request from one page supersedes an older one.
      prompt: what the clips show.
      seed: decides the noise, from 0 to 2^32 - 1.
      image: name of an uploaded first frame; None for text-to-video.
      samplers: by model, in the order in which the page shows the models.
    """

    page: str
    prompt: str
    seed: int
    image: str | None
    samplers: Mapping[str, Sampler]


def parse_request(body: bytes, models: Sequence[Model]) -> Asked:
    """Reads a request.

    Args:
      body: a JSON object with `page`, `prompt`, `seed`, and optionally `image` (a name that an upload returned) and
        `models`: for each model, by name, `steps` and `guidance`. What is left out is the model's own.
      models: that are served.

    Raises:
      UserError: it is not such an object, or a value is outside its limits.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON; send an object such as {...}") from error
    given = _fields(found, "the request", ("page", "prompt", "seed", "image", "models"))
    page = _text(given, "page")
    if not PAGE.fullmatch(page):
        raise UserError(f"page is {page[:80]!r}; expected 1 to 64 letters, digits and hyphens")
    prompt = check_prompt(_text(given, "prompt"), models)
    image = None if given.get("image") is None else _text(given, "image")
    if image is not None and not any(model.takes_image for model in models):
        raise UserError("image: no model here takes a first frame; remove the image")
    settings = _fields(given.get("models", {}), "models", [model.name for model in models])
    samplers = {model.name: _sampler(model, settings.get(model.name, {})) for model in models}
    return Asked(page, prompt, _seed(given.get("seed", 0)), image, samplers)


def check_prompt(prompt: str, models: Sequence[Model]) -> str:
    """Returns the prompt. Raises `UserError` if it is empty, too long, or not understood by a model's tokenizer."""
    if not prompt.strip():
        raise UserError("prompt is empty; describe what the clip shows")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"prompt has {len(prompt)} characters, expected at most {MAX_PROMPT}; shorten it")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("prompt holds half of a surrogate pair; remove it")
    for model in models:
        try:
            model.check_prompt(prompt)
        except UserError as error:
            raise UserError(f"prompt ({model.name}): {error}") from error
    return prompt


def read_upload(file: Path, models: Sequence[Model]) -> Picture:
    """Reads an uploaded first frame: RGB, upright, of any size that the models' clips can be fitted to.

    Raises:
      TooLarge: more pixels than `MAX_IMAGE_PIXELS`.
      UserError: it is not an image, or no clip can have its aspect ratio.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        pixels = 0  # `read_image` says what is wrong
    if pixels > MAX_IMAGE_PIXELS:
        raise TooLarge(f"image has {pixels} pixels, expected at most {MAX_IMAGE_PIXELS}; make it smaller")
    try:
        picture = read_image(file)
    except UserError as error:
        raise UserError(str(error).replace(f"image {file}: ", "image: ").replace(str(file), "image")) from error
    for model in models:
        if model.takes_image:
            model.pipeline.fit(*picture.shape[:2])
    return picture


def _sampler(model: Model, found: Any) -> Sampler:
    given = _fields(found, f"models.{model.name}", ("steps", "guidance"))
    try:
        own = model.sampler
        steps, guidance = _steps(given.get("steps"), model), given.get("guidance", own.guidance)
        if not _is_number(guidance) or not 1 <= guidance <= MAX_GUIDANCE:
            raise UserError(f"guidance is {_shown(guidance)}; expected a number from 1 (none) to {MAX_GUIDANCE:g}")
        return model.pipeline.sampler(own.asked if steps is None else steps, float(guidance), own.solver)
    except UserError as error:
        raise UserError(f"{model.name}: {error}") from error


def _steps(found: Any, model: Model) -> Steps | None:
    if found is None:
        return None
    steps = parse_steps(found[:20], "steps") if isinstance(found, str) else found
    most = max(MAX_STEPS, *model.own_steps)
    for number in steps if isinstance(steps, tuple) else (steps,):
        if not _is_whole(number) or not 1 <= number <= most:
            raise UserError(f"steps is {_shown(found)}; expected a whole number from 1 to {most}")
    return steps


def _seed(found: Any) -> int:
    if not _is_whole(found):
        raise UserError(f"seed is {_shown(found)}; expected a whole number from 0 to {SEEDS - 1}")
    check_seed(found)
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _fields(found: Any, name: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{name} is {_shown(found)}; expected an object")
    for key in found:
        if key not in known:
            raise UserError(f"{name} has an unknown field {_shown(key)}; expected {', '.join(known)}")
    return found


def _text(given: Mapping[str, Any], name: str) -> str:
    if not isinstance(given.get(name), str):
        raise UserError(f"{name} is {_shown(given.get(name))}; expected text")
    return given[name]


def _shown(value: Any) -> str:
    """A value as JSON, cut to what fits in a line."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
