"""Model folders with mutated JSON files and weights: read, or refused in one line that names a file of the folder."""

import copy
import json
import random
import shutil

import original_wan
import pytest
import random_model

from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.locate import locate
from vpae_jax.weights.settings import read_defaults, read_scheduler

BATCHES, MUTANTS = 4, 30
VALUES = (None, True, -1, 0, 1, 7, 1.5, 10**30, float("nan"), "", "x", "../..", [], [0], [None] * 3, {}, {"a": 1})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    random_model.pipeline(root / "diffusers", image=True)
    original_wan.save_folder(root / "wan", image=True)
    settings = {"num_frames": 9, "parts": {"image_encoder": {"num_attention_heads": 4}}, "scheduler": {"steps": 3}}
    (root / "wan" / "vpae_jax.json").write_text(json.dumps(settings))
    return root


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate_json(rng, value):
    """Replaces, removes or adds something somewhere."""
    value = copy.deepcopy(value)
    path = rng.choice([place for place in places(value) if place] or [()])
    if not path:
        return rng.choice(VALUES)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.random()
    if kind < 0.15:
        del inner[path[-1]]
    elif kind < 0.25 and isinstance(inner, dict):
        inner[f"{path[-1]}_x"] = inner.pop(path[-1])
    elif kind < 0.4 and isinstance(inner[path[-1]], int):
        inner[path[-1]] = inner[path[-1]] * rng.choice([-1, 2, 3, 10**6, 10**12]) + rng.choice([0, 1])
    else:
        inner[path[-1]] = rng.choice(VALUES)
    return value


def mutate(rng, folder):
    """Spoils one file of a folder; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "tokenizer.json")
    texts = [path for path in files if path.suffix == ".json"]
    if rng.random() < 0.8:
        path = rng.choice(texts)
        if rng.random() < 0.9:
            path.write_text(json.dumps(mutate_json(rng, json.loads(path.read_text()))))
            return f"{path.name}: {path.read_text()[:300]}"
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)] + rng.randbytes(3))
        return f"{path.name}: cut"
    path = rng.choice([path for path in files if path.suffix != ".json"])
    if rng.random() < 0.3:
        path.unlink()
        return f"{path.name}: removed"
    data = bytearray(path.read_bytes())
    start = rng.randrange(min(len(data), 4000))
    data[start : start + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
    path.write_bytes(data)
    return f"{path.name}: bytes at {start}"


def read(folder):
    """All that loading a model does but for compiling."""
    model = find_model(locate(folder))
    image = "image_encoder" in model.parts
    read_scheduler(model.folder, image)
    read_defaults(model.folder, image)
    for name in ("transformer", "vae", "text_encoder"):
        model.part(name)
    for source in model.parts.values():
        with source.open() as tensors:
            for parameter in tensors.parameters:
                for name in parameter.names:
                    tensors.read(name)


def test_unspoilt_models_are_read(folders):
    read(folders / "diffusers")
    read(folders / "wan")


@pytest.mark.parametrize("batch", range(BATCHES))
def test_mutants_are_read_or_refused_in_one_line(folders, tmp_path, batch):
    rng = random.Random(batch)
    refused = 0
    for number in range(MUTANTS):
        layout = rng.choice(("diffusers", "wan"))
        folder = tmp_path / "model"
        shutil.copytree(folders / layout, folder)
        done = mutate(rng, folder)
        try:
            read(folder)
        except UserError as error:
            line = str(error)
            assert "\n" not in line and str(folder) in line and len(line) < 600, f"{layout} {number} {done}: {line}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"{layout}, mutant {number} of batch {batch}: {done}") from error
        shutil.rmtree(folder)
    assert refused > MUTANTS // 4
