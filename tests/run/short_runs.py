"""Runs of two steps on few clips of the embedded model."""

import jax
import numpy as np

from vpae_jax.config import parse
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.run import experiment
from vpae_jax.train.metrics import read_metrics


def small(module, records="", **method):
    """The config of such a run, without a guard; `method` sets keys of its method."""
    config = module.get_config()
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = 2, 2, 1, 0
    config.batch_size, config.data.clips, config.guard.enabled = 8, 16, False
    config.data.records = records
    for name, value in method.items():
        config.method[name] = value
    return config


def run(config, folder):
    """Metrics of the last step, all of them finite, and the model that is left."""
    experiment.run(parse(config), folder, jax.devices()[:1])
    records = read_metrics(folder)
    assert len(records) == 2 and all(np.isfinite(value) for record in records for value in record.values())
    return records[-1], load_pipeline(folder / "model")
