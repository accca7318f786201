import json

import numpy as np
import pytest
from PIL import Image

from vpae_jax import evaluate

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of eight prompts, and a folder of their first frames."""
    root = tmp_path_factory.mktemp("prompts")
    (root / "images").mkdir()
    for number, _ in enumerate(WORDS):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number + 1}.png")
    (root / "prompts.txt").write_text("".join(f"a {word} moves up\n" for word in WORDS))
    return root / "prompts.txt", root / "images"


@pytest.fixture(scope="session")
def run(models, prompts):
    """Evaluates the text-to-video model of random weights by the prompts, on one device."""

    def call(output, *more, **options):
        given = {"model": models["t2v"], "prompts": prompts[0], "batch": 4, "devices": 1, "output": output, **options}
        flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
        evaluate.main([*flags, *map(str, more)])

    return call


@pytest.fixture(scope="session")
def rows():
    """The rows of an evaluation's metrics.json, by name."""

    def read(output):
        return {row["name"]: row for row in json.loads((output / "metrics.json").read_text())["rows"]}

    return read
