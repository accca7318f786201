"""Self-Forcing (2506.08009): a causal student of four evaluations per chunk, trained on its own roll-outs.

    python -m vpae_jax.main --config=configs/self_forcing.py --workdir=runs/tiny/self_forcing \\
        --config.previous.workdir=runs/tiny/causal_init                                             # tiny, CPU
    python -m vpae_jax.main --config=configs/self_forcing.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.previous.workdir=... --config.data.records=...

Starts from the causal model of `configs/causal_init.py`. The presets for 1.3B and 14B use the source's settings: 2e-6
for the generator and 4e-7 for the fake score, Adam (0, 0.999) with weight decay 0.01, five updates of the fake score
per update of the generator, batch 64, timesteps shifted by 5, average with decay 0.99, guidance 3 (1.3B), 5 (14B) or 6
(image-to-video).

    --config.method.steps=1                                                     one evaluation per chunk
    --config.method.adversarial_weight=.03 --config.method.disc_weight=.03      One-Forcing's discriminator
    --config.method.exits=cycled                                                every exit in turn
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    guidance = 3.0 if "1.3b" in preset else 6.0 if preset.startswith("i2v") else 5.0
    return experiment(
        **{**wan(preset), "batch_size": 64},
        name="self_forcing",
        method={"name": "self_forcing", "matching": {"guidance": guidance}},
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
        name="self_forcing",
        preset="tiny",
        method={
            "name": "self_forcing",
            "chunks": {"size": 1},  # three latent frames
            "matching": {"guidance": 3.0, "t": TINY_TIMES},  # as in phase one
            "fake_t": TINY_TIMES,
            "fake_updates": 2,  # as in phase one
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "image_dropout": 0.5,  # the tiny model also generates from text alone
        },
        networks={"heads": {"kind": "ca"}},
        optimizers={
            "generator": adam(1e-4, b1=0.0),  # as in phase one
            "fake_score": adam(3e-4, b1=0.0),
            "heads": adam(1e-3, b1=0.0),  # as in phase two
        },
        steps=400,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=100,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
