"""Sphinx configuration: `make docs` builds the site from these pages and from the package's docstrings."""

import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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

html_math_renderer = "mathml"  # which browsers show without a script from elsewhere

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100  # a longer one has a line for each parameter
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
highlight_language = "text"

HERE = Path(__file__).parent
UNBROKEN = 32  # characters of inline code that is not broken into lines


def inline_code(match):
    """A page of the documentation that a docstring names becomes a link; other code stays code."""
    text = " ".join(match[1].split())
    page = re.fullmatch(r"docs/([\w/]+)\.md", text)
    if page and (HERE / f"{page[1]}.md").is_file():
        return f":doc:`{text} </{page[1]}>`"
    return f"``{text}``" + ("\\ " if match[2] else "")


def markdown_docstring(app, what, name, obj, options, lines):
    """Docstrings have Markdown's inline code and indented commands; reStructuredText spells both differently."""
    paragraphs = "\n".join(lines).split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        if not all(line.startswith("    ") for line in paragraph.splitlines()):  # else it is a block of code
            paragraph = re.sub(r"\((docs/[\w/]+\.md)\)", r"(`\1`)", paragraph)
            paragraphs[number] = re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w)?)", inline_code, paragraph)
    text = "\n\n".join(paragraphs)
    # In Markdown, a block that is indented after a paragraph is code.
    sections = "Args:|Returns:|Raises:|Attributes:|Yields:"
    text = re.sub(rf"(?m)^(?![ -]|{sections})(.*[^:\s]):?\n\n(?= {{4}})", r"\1::\n\n", text)
    text = re.sub(r"(?m)\.::$", ".\n\n::", text)
    lines[:] = text.split("\n")


def plain_signature(app, what, name, obj, options, signature, returned):
    """Types by the names that the source gives them; a protocol is not constructed."""
    if getattr(obj, "_is_protocol", False):
        return "", None
    return tuple(None if text is None else shortened(text) for text in (signature, returned))


def shortened(text):
    """A signature without the modules of its types, and without the fields of defaults that are dataclasses."""
    text = text.replace("jaxlib._jax.Array", "Array").replace("<factory>", "...")
    text = re.sub(r"~?\b(?:jaxtyping|numpy|typing|collections\.abc|vpae_jax(?:\.[a-z_]+)+)\.", "", text)
    fields = r"(?:[^()]|\([^()]*\))*"  # brackets in brackets
    nested = re.compile(rf"(= [A-Z]\w*)\((?!\.\.\.\))(?:[^()]|\({fields}\))+\)")
    text = nested.sub(r"\1(...)", text)
    return re.sub(r"= \((?:-?[\d.]+, ){4,}[^()]*\)", "= (...)", text)


def mark_short_code(app, tree, page):
    """Short inline code, such as an option, stays on one line (`site.css`)."""
    for node in tree.findall(nodes.literal):
        if len(node.astext()) <= UNBROKEN:
            node["classes"].append("short")


def math(visitor, node):
    """Writes an equation, inline or in a line of its own, as MathML."""
    shown = isinstance(node, nodes.math_block)
    made = tex2mathml(node.astext(), as_block=shown)
    visitor.body.append(f'<div class="math">{made}</div>' if shown else made)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("autodoc-process-docstring", markdown_docstring, priority=100)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("doctree-resolved", mark_short_code)
