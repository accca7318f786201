"""Sphinx configuration: `make docs` builds the site from these pages and from the package's docstrings."""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import vpae_jax

project = "vpae_jax"
author = "The vpae_jax authors"
copyright = "2026, the vpae_jax authors"
version = release = vpae_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "vpae_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = []
nitpicky = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "off"  # the notebook's outputs are stored in it; a test runs it

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
highlight_language = "text"


def markdown_docstring(app, what, name, obj, options, lines):
    """Docstrings have Markdown's inline code and indented commands; reStructuredText spells both differently."""
    text = "\n".join(lines)
    code = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w)?)")
    text = code.sub(lambda m: f"``{' '.join(m[1].split())}``" + ("\\ " if m[2] else ""), text)
    # In Markdown, a block that is indented after a paragraph is code.
    sections = "Args:|Returns:|Raises:|Attributes:|Yields:"
    text = re.sub(rf"(?m)^(?![ -]|{sections})(.*[^:\s]):?\n\n(?= {{4}})", r"\1::\n\n", text)
    lines[:] = text.split("\n")


def plain_signature(app, what, name, obj, options, signature, returned):
    """Types by the names that the source gives them; a protocol is not constructed."""
    if getattr(obj, "_is_protocol", False):
        return "", None
    texts = (None if text is None else text.replace("jaxlib._jax.Array", "Array") for text in (signature, returned))
    return tuple(None if text is None else re.sub(r"\b(jaxtyping|numpy)\.", "", text) for text in texts)


def setup(app):
    app.connect("autodoc-process-docstring", markdown_docstring, priority=100)
    app.connect("autodoc-process-signature", plain_signature)
