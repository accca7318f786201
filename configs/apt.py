"""APT, adversarial post-training (2501.08316), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/lcm.py --config.method.distance=squared --workdir=runs/tiny/apt_init
    python -m vpae_jax.main --config=configs/apt.py --workdir=runs/tiny/apt                      # tiny, CPU, 1 step
    python -m vpae_jax.main --config=configs/lcm.py:i2v-14b-720p --config.method.distance=squared \\
        --config.method.guidance=7.5 --config.steps=500 --workdir=.../apt_init --config.model.path=... ...
    python -m vpae_jax.main --config=configs/apt.py:i2v-14b-720p --workdir=.../apt --config.model.path=... \\
        --config.data.records=...

Starts from a consistency distillation, by default in the folder `apt_init` next to this run's workdir. APT's own uses
the squared distance and guidance of 7.5 (`configs/lcm.py` with these two keys; the embedded teacher is sampled at 3).
V-PAE's paper gives no settings for its baselines, and its APT has the numbers of its own second phase after LCM, which
is a different command (`docs/methods.md`). This config is APT's method. The presets for 1.3B and 14B use APT's values
for video: RMSProp of 0.9 at 3e-6 without clipping, average with decay 0.995, penalty 100 at sigma 0.1, timesteps
shifted by 12. The batch of 32 and the steps, 500 and 1,000, are those of V-PAE's phases. APT's own are 300 updates of
2,048 clips, on 1,024 GPUs, and it saw modes collapse at 256: --config.batch_size=2048 --config.steps=300. The tiny
preset has its own values, with reasons in the comments.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from vpae_jax.configs.common import check, experiment, wan
from vpae_jax.methods.apt import R1

START = "python -m vpae_jax.main --config=configs/lcm.py:{preset} --config.method.distance=squared"


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def rmsprop(learning_rate: float) -> dict:
    """RMSProp's options: Adam (0, 0.9) without bias correction."""
    return {"learning_rate": learning_rate, "algorithm": "rmsprop", "rms_decay": 0.9, "clip_norm": 0.0}


def paper(preset: str) -> ConfigDict:
    command = f"{START.format(preset=preset)} --config.method.guidance=7.5 --config.steps=500"
    return experiment(
        **wan(preset),
        name="apt",
        method={"name": "apt"},
        networks={"heads": {"kind": "ca"}},
        optimizers={name: rmsprop(3e-6) for name in ("generator", "heads", "backbone")},
        steps=1000,
        previous={"workdir": "{workdir}/../apt_init", "command": command},
    )


def tiny() -> ConfigDict:
    return experiment(
        name="apt",
        preset="tiny",
        method={
            "name": "apt",
            # Equivalent to phase two's; at 100 the heads stay at chance over so few steps.
            "penalty": replace(R1, weight=5.0),
            "disc_updates": 2,  # these two as in phase two: the heads start from random weights
            "disc_warmup": 50,
            "image_dropout": 0.5,  # the tiny model also generates from text alone
        },
        networks={"heads": {"kind": "ca"}},
        # As in phase two.
        optimizers={"generator": rmsprop(2e-5), "heads": rmsprop(1e-3), "backbone": rmsprop(1e-4)},
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=200,
        score_every=200,
        score_clips=128,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
        previous={"workdir": "{workdir}/../apt_init", "command": START.format(preset="tiny")},
    )
