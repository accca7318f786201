"""The code that the contributor's tutorial shows is that of the files that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
SHOWN = BLOCK.findall((ROOT / "docs" / "tutorials" / "contributor.md").read_text())


def parts(code):
    """What a block shows without a gap; a line of three dots stands for one."""
    return [part.strip("\n") for part in re.split(r"^\.\.\.$", code, flags=re.MULTILINE)]


def whole(code, text):
    """Whether all parts are in a text, in their order."""
    place = 0
    for part in parts(code):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize(("path", "code"), SHOWN, ids=[path for path, _ in SHOWN])
def test_code_is_that_of_its_file(path, code):
    assert whole(code, (ROOT / path).read_text()), f"docs/tutorials/contributor.md shows other code than {path} has"


def test_a_difference_is_found():
    text = "a = 1\nb = 2\nc = 3\n"
    assert whole("a = 1\n...\nc = 3\n", text)
    assert not whole("a = 1\nc = 3\n", text) and not whole("c = 3\n...\na = 1\n", text)
    assert {path for path, _ in SHOWN} >= {"vpae_jax/methods/kd.py", "configs/kd.py"}
