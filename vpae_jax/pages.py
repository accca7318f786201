"""Templates of the HTML pages, and images in them. The pages are self-contained: they load nothing from elsewhere."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image


def page_template(name: str, **filters: Callable[[Any], str]) -> jinja2.Template:
    """Loads a template from `assets/`, with additional filters; every page inserts `style | safe`."""
    assets = importlib.resources.files("vpae_jax") / "assets"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = (assets / "page.css").read_text()
    environment.filters.update(filters)
    return environment.from_string((assets / name).read_text())


def jpeg(picture: UInt8[np.ndarray, "height width 3"]) -> str:
    """Encodes an image as JPEG in base64, for `src="data:image/jpeg;base64,..."`."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
