"""ADD, adversarial diffusion distillation in latents (2311.17042, 2403.12015), as the paper's tables compare with it.

    python -m vpae_jax.main --config=configs/add.py --workdir=runs/tiny/add                      # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/add.py --config.method.steps=1 --workdir=runs/tiny/add1
    python -m vpae_jax.main --config=configs/add.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines, and its ADD of one step has the very numbers of its own second phase
from the raw teacher (tables 1 and 2), which is another command (`docs/methods.md`). This one is ADD's method. The
presets of 1.3B and 14B hold FastGen's values for Wan 1.3B: 2e-6, heads 4e-6, Adam (.9, .999) with decay .01, a head a
quarter as wide as the transformer; heads on every block are LADD's; the batch is V-PAE's, and so are 1,500 steps, the
sum of its two phases. The tiny preset has its own values, with reasons beside them.

LADD's own form, on clips that the teacher made: --config.method.csds.weight=0 --config.data.records=...
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
            # Clips are judged at the times for 720p, translated: in so small a clip logit-normal (-1.4, 1).
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the times that matter at 720p
            "early_steps": 100,  # of 800
            "csds": replace(TEACHER, guidance=3.0, t=TINY_TIMES),  # as phase one's
            "disc_warmup": 50,  # as phase two's: the heads start from random weights
            "image_dropout": 0.5,  # the tiny model makes videos from text alone too
            "ema": 0.99,
        },
        networks={"heads": {"kind": "conv", "taps": every_block("tiny")}},
        optimizers={
            "generator": adam(1e-4, b1=0.5),  # as phase one's
            "heads": adam(1e-3, b1=0.5),  # as phase two's
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
