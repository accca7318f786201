"""Dependencies point down: no room imports one above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vpae_jax"
# From the ground up; a module may import its own room and those before it.
ROOMS = (
    (
        "types",
        "config",
        "config_files",
        "sharding",
        "files",
        "placeholders",
        "media",
        "pages",
        "cli",
        "flow",
        "runtime",
    ),
    ("models", "methods"),
    ("train",),
    ("weights", "data", "metrics"),
    ("inference",),
    ("encoding",),
    ("tasks",),
    ("run", "planning", "suites", "evaluation", "serving", "converting"),
    ("configs", "main", "encode", "sample", "convert", "evaluate", "plan", "vote", "serve"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(module: str) -> str:
    return module if module in LEVEL else module.split(".")[0]


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpae_jax"):
            found |= (
                {f"{node.module}.{a.name}" for a in node.names} if node.module == "vpae_jax" else {str(node.module)}
            )
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("vpae_jax.")}
    return {name.removeprefix("vpae_jax.") for name in found if name != "vpae_jax"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    assert room(module) in LEVEL, f"{module} is in no room; add it to ROOMS and docs/architecture.md"
    for name in imports(path):
        assert LEVEL[room(name)] <= LEVEL[room(module)], f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_methods_and_models_do_not_know_each_other(path):
    top = path.relative_to(PACKAGE).parts[0]
    other = {"methods": ("models", "optax", "train"), "models": ("methods", "optax", "train")}.get(top, ())
    assert not {name.split(".")[0] for name in imports(path)} & set(other)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_over_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500
