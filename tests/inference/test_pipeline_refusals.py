"""What a pipeline makes no video of: tokens without embeddings, numbers that are not finite, sizes beyond memory."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest
import random_model
from transformers import AutoTokenizer

from vpae_jax.inference.loading import load_pipeline
from vpae_jax.types import UserError
from vpae_jax.weights.settings import Defaults, Scheduler

PROMPT = "a three moves up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=False)
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(5, 32, 48, 8.0))))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(Scheduler("euler", 3.0, 1, 1.0).to_json()))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_pipeline(folder)


def test_a_video_that_is_not_finite_is_no_video(ours):
    for value in (jnp.nan, jnp.inf):
        noise = jnp.full(ours.latent_shape(1), value)
        with pytest.raises(UserError, match=r"the video is not finite .NaN or infinity.: the weights are damaged, or"):
            ours(PROMPT, noise=noise)


def test_a_tokenizer_of_another_text_encoder(ours, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    larger = AutoTokenizer.from_pretrained(model / "tokenizer")
    larger.add_tokens([f"more{i}" for i in range(400)])
    larger.save_pretrained(model / "tokenizer")
    size = ours.text_encoder.config.vocab_size
    with pytest.raises(UserError, match=rf"has a token \d+, but the text encoder's vocab_size is {size}; use"):
        load_pipeline(model)
    odd = dataclasses.replace(ours, tokenizer=larger)
    with pytest.raises(UserError, match="has a token"):
        odd.encode_prompt(["a more399"])


def test_videos_that_fill_the_memory_are_refused(ours):
    with pytest.raises(
        UserError, match=r"1000000001 frames of 32x48 are more than 1.1e\+09 pixels; give a smaller clip"
    ):
        ours(PROMPT, num_frames=10**9 + 1)
    with pytest.raises(UserError, match="steps is 1000000000000, expected at most 1000"):
        ours(PROMPT, steps=10**12)
