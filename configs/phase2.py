"""V-PAE phase two, unified adversarial equilibrium (2508.21019v2, sections 3.2 to 3.4).

    python -m vpae_jax.main --config=configs/phase2.py --workdir=runs/tiny/phase2                # tiny, CPU
    python -m vpae_jax.main --config=configs/phase2.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=synthetic=1,koala=1,intern4k=1

Starts from phase one's checkpoint, by default in the folder `phase1` next to this run's workdir. Paper: batch 32, Adam
(0.5, 0.999), learning rate 2e-6, 1000 steps, EMA 0.995, lambda 10, sigma_s 0.01, sigma_t 0.1. The presets for 1.3B and
14B use these values; the ranges of t are translated to the size of the clips (`docs/methods.md`). The tiny preset has
its own, with reasons in the comments. `method.clips=generator`, `method.penalty.every=16` and `method.csds.every=2`
save 7.5%, 7% and 3.7% of a step at 14B (`docs/methods/less_work.md`). The paper's ablations (Table 3):

    --config.method.csds.weight=2.5            lambda of Eq. 5 and 6: 0, 2.5, 10 or 100
    --config.networks.heads.kind=ca            type of the discriminator's heads: conv, ca or ca_mm
    --config.method.backbone=frozen_teacher    what the heads read: frozen_teacher, full_copy or ema
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment, wan
from vpae_jax.flow.times import TimeDistribution

PREVIOUS = "python -m vpae_jax.main --config=configs/phase1.py:{preset}"


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **wan(preset),
        name="phase2",
        method={"name": "vpae_phase2"},
        optimizers={
            "generator": adam(2e-6, b1=0.5),
            "heads": adam(2e-6, b1=0.5),
            "backbone": adam(2e-6, b1=0.5),  # for method.backbone = full_copy
        },
        steps=1000,
        previous={
            "workdir": "{workdir}/../phase1",
            "weights": "online",  # as in the text; measured in docs/methods/vpae.md
            "command": PREVIOUS.format(preset=preset),
        },
    )


def tiny() -> ConfigDict:
    return experiment(
        name="phase2",
        preset="tiny",
        method={
            "name": "vpae_phase2",
            # The paper's [0.9, 0.999] hides everything in a clip of 1,728 values.
            "noise": {"t": TimeDistribution()},
            "penalty": {"weight": 0.05},  # at the paper's 1 the heads stay at chance over so few steps
            # With guidance it preserves the digits' classes, which the adversarial loss alone loses; a weight of 10
            # halves the speed of the adversarial gain (docs/tiny.md). The same noise hides more of so small a clip
            # than at 720p, so its timesteps are lower.
            "csds": {"weight": 5.0, "guidance": 4.0, "t": TimeDistribution(low=0.3, high=0.9)},
            "disc_updates": 2,
            "disc_warmup": 50,  # the heads start from random weights
            "image_dropout": 0.5,
        },
        optimizers={
            "generator": adam(2e-5, b1=0.5),
            "heads": adam(1e-3, b1=0.5),
            "backbone": adam(1e-4, b1=0.5),  # for method.backbone = full_copy
        },
        steps=1600,
        batch_size=16,
        log_every=20,
        sample_every=200,
        score_every=200,
        score_clips=128,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
        previous={"workdir": "{workdir}/../phase1", "command": PREVIOUS.format(preset="tiny")},
    )
