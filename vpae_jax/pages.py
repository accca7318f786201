"""The templates of the pages that people look at. A page loads nothing from outside."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any

import jinja2
from markupsafe import Markup


def page_template(name: str, **filters: Callable[[Any], str]) -> jinja2.Template:
    """A template of `assets/`, with the style that all pages share as `style`, and more filters."""
    assets = importlib.resources.files("vpae_jax") / "assets"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = Markup((assets / "page.css").read_text())
    environment.filters.update(filters)
    return environment.from_string((assets / name).read_text())
