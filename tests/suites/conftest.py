import dataclasses
import json

import pytest
import random_model
import suite_checkouts

from vpae_jax.weights.settings import Defaults, Scheduler


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return suite_checkouts.write(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A text-to-video and an image-to-video model of two steps, whose clips are 5 frames of 32x32."""
    found = {}
    for name in ("t2v", "i2v"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        random_model.pipeline(folder, image=name == "i2v")
        (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(5, 32, 32, 8.0))))
        file = folder / "tokenizer" / "tokenizer_config.json"  # which spells most of the suites' words
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 32}))
        scheduler = Scheduler("euler", 3.0, steps=2, guidance=1.0)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.to_json()))
    return found
