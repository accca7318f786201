"""DCM's detail expert (2506.03123), the second of its two trainings; the model directory contains both experts.

    python -m vpae_jax.main --config=configs/dcm_detail.py --workdir=runs/tiny/dcm_detail           # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/dcm_detail.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

Starts from the semantic expert, by default in the folder `dcm_semantic` next to this run's workdir, which is left
unchanged and is read again when the run continues. The presets for 1.3B and 14B use the settings of the authors' code
for Wan (adapters of rank 128 and alpha 256 at 5e-6 with Adam (0.9, 0.999), heads on every second block at 1e-5 with
Adam (0, 0.999), weight decay 0.001, gradient norms clipped at 1, 1,000 steps), with the paper's batch of 32. The tiny
preset has its own values, with reasons in the comments.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, every_block, experiment, wan
from vpae_jax.configs.dcm_semantic import TINY, TINY_METHOD

PREVIOUS = "python -m vpae_jax.main --config=configs/dcm_semantic.py:{preset}"


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="dcm_detail",
        method={"name": "dcm_detail"},
        networks={"heads": {"kind": "conv", "taps": every_block(shared["model"]["preset"])[::2], "hidden": 1024}},
        optimizers={
            "generator": adam(5e-6, b1=0.9, weight_decay=1e-3, clip_norm=1.0),
            "heads": adam(1e-5, b1=0.0, weight_decay=1e-3, clip_norm=1.0),
        },
        steps=1000,
        previous={"workdir": "{workdir}/../dcm_semantic", "command": PREVIOUS.format(preset=preset)},
    )


def tiny() -> ConfigDict:
    return experiment(
        **TINY,
        name="dcm_detail",
        preset="tiny",
        method={"name": "dcm_detail", **TINY_METHOD, "generator_rank": 16},  # of a width of 192
        networks={"heads": {"kind": "conv", "taps": every_block("tiny")[::2]}},
        optimizers={
            "generator": adam(1e-3, b1=0.9),  # adapters; a third of the fake score's rate in phase one
            "heads": adam(1e-3, b1=0.0),  # as in phase two
        },
        steps=400,
        score_every=200,
        score_clips=128,
        previous={"workdir": "{workdir}/../dcm_semantic", "command": PREVIOUS.format(preset="tiny")},
    )
