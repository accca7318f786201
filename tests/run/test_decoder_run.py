"""A small decoder distilled from the embedded model's autoencoder, and a video that it decodes."""

import numpy as np
import pytest
from flax import nnx
from short_runs import run, small

from vpae_jax.configs import decoder
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.run import experiment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_it_learns_from_the_models_own_autoencoder_and_takes_its_place(tmp_path, monkeypatch):
    drawn, draw_up = [], experiment.draw_up
    monkeypatch.setattr(experiment, "draw_up", lambda *given: drawn.append(draw_up(*given)) or drawn[-1])
    metrics, left = run(small(decoder), tmp_path)
    assert {"decoder/loss", "decoder/l1", "decoder/psnr"} <= set(metrics)
    models = drawn[0].models
    taught = nnx.merge(models.graphs["vae"], drawn[0].frozen["vae"])
    assert taught.config == left.vae.config, "with the statistics of its latents"
    pipe = load_pipeline("tiny", decoder=tmp_path / "model")
    frames = pipe("a three moves up", steps=1, guidance=1.0)
    assert pipe.decoder is pipe.small_decoder and frames.shape == (9, 48, 48, 3)
    whole = left("a three moves up", steps=1, guidance=1.0)
    assert left.small_decoder is None and np.abs(frames.astype(int) - whole).max() > 20, "two steps teach little"
