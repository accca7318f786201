"""DMD2, distribution matching with a GAN on the fake score (2405.14867), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/dmd2.py --workdir=runs/tiny/dmd2                    # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/dmd2.py --config.method.steps=1 --workdir=runs/tiny/dmd2_1
    python -m vpae_jax.main --config=configs/dmd2.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines, and does not say whether its rows of 4 and of 1 evaluation are two
trainings; here they are. The presets for 1.3B and 14B use those of the Wan ports: Self-Forcing-Plus's for the generator
(2e-6), the fake score (4e-7, a full copy), Adam (0, 0.999) with weight decay 0.01, five updates of the fake score per
update of the generator, timesteps shifted by 5, and the average (0.99); FastGen's for the heads (1e-5), the GAN weights
of 0.03 and guidance of 5. Heads are of kind "ca" with one learned token per tap, as Self-Forcing's. 1,000 updates of
the generator correspond to FastGen's 5,000 iterations; the batch is the paper's.

Without a discriminator, as Self-Forcing trains: --config.method.adversarial_weight=0 --config.method.disc_weight=0.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **wan(preset),
        name="dmd2",
        method={"name": "dmd2"},
        networks={"heads": {"kind": "ca"}},
        optimizers={
            "generator": adam(2e-6, b1=0.0, weight_decay=0.01),
            "fake_score": adam(4e-7, b1=0.0, weight_decay=0.01),
            "heads": adam(1e-5, b1=0.0, weight_decay=0.01),
        },
        steps=1000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="dmd2",
        preset="tiny",
        method={
            "name": "dmd2",
            "matching": {"guidance": 3.0, "t": TINY_TIMES},  # as in phase one
            "fake_t": TINY_TIMES,
            "fake_updates": 2,  # as in phase one
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "image_dropout": 0.5,  # the tiny model also generates from text alone
        },
        networks={"heads": {"kind": "ca"}},
        optimizers={
            "generator": adam(1e-4, b1=0.0),  # as in phase one
            "fake_score": adam(3e-4, b1=0.0),  # trained in full, so a tenth of the adapters' rate in phase one
            "heads": adam(1e-3, b1=0.0),  # as in phase two
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
