"""The templates of the pages that people look at. A page loads nothing from outside."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any

import jinja2


def page_template(name: str, **filters: Callable[[Any], str]) -> jinja2.Template:
    """A template of `assets/`, with more filters; all pages insert their `style | safe`."""
    assets = importlib.resources.files("vpae_jax") / "assets"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = (assets / "page.css").read_text()
    environment.filters.update(filters)
    return environment.from_string((assets / name).read_text())
