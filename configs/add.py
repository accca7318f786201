"""ADD, adversarial diffusion distillation in latents (2311.17042, 2403.12015), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/add.py --workdir=runs/tiny/add                      # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/add.py --config.method.steps=1 --workdir=runs/tiny/add1
    python -m vpae_jax.main --config=configs/add.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines, and its one-step ADD has exactly the numbers of its own second phase
from the raw teacher (Tables 1 and 2), which is a different command (`docs/methods.md`). This config is ADD's method.
The presets for 1.3B and 14B use FastGen's values for Wan 1.3B: 2e-6, heads 4e-6, Adam (0.9, 0.999) with weight decay
0.01, heads a quarter as wide as the transformer. Heads on every block are LADD's. The batch is V-PAE's, and so are the
1,500 steps, the sum of its two phases. The tiny preset has its own values, with reasons in the comments.

LADD's own form, on clips that the teacher generated: --config.method.csds.weight=0 --config.data.records=...
"""

from dataclasses import replace

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, every_block, experiment, wan
from vpae_jax.methods.add import TEACHER


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = tiny() if preset == "tiny" else paper(preset)
    heads = config.networks.heads
    heads.hidden = heads.width // 4
    return config


def paper(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="add",
        method={"name": "add"},
        networks={"heads": {"kind": "conv", "taps": every_block(shared["model"]["preset"])}},
        optimizers={
            "generator": adam(2e-6, b1=0.9, weight_decay=0.01),
            "heads": adam(4e-6, b1=0.9, weight_decay=0.01),
        },
        steps=1500,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="add",
        preset="tiny",
        method={
            "name": "add",
            # The discriminator sees the timesteps for 720p, translated: for so small a clip logit-normal (-1.4, 1).
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "early_steps": 100,  # of 800
            "csds": replace(TEACHER, guidance=3.0, t=TINY_TIMES),  # as in phase one
            "disc_warmup": 50,  # as in phase two: the heads start from random weights
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        networks={"heads": {"kind": "conv", "taps": every_block("tiny")}},
        optimizers={
            "generator": adam(1e-4, b1=0.5),  # as in phase one
            "heads": adam(1e-3, b1=0.5),  # as in phase two
        },
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
