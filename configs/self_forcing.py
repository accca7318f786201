"""Self-Forcing (2506.08009): a causal student of four evaluations a chunk, trained on its own roll-outs.

    python -m vpae_jax.main --config=configs/self_forcing.py --workdir=runs/tiny/self_forcing \\
        --config.previous.workdir=runs/tiny/causal_init                                             # tiny, CPU
    python -m vpae_jax.main --config=configs/self_forcing.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.previous.workdir=... --config.data.records=...

It starts from the causal model of `configs/causal_init.py`. The presets of 1.3B and 14B hold the source's settings:
2e-6 for the generator and 4e-7 for the fake score, Adam (0, .999) with decay .01, five updates of the fake score for
one of the generator, batch 64, times shifted by 5, average .99, guidance 3 (1.3B), 5 (14B) or 6 (image-to-video).

    --config.method.steps=1                                                     one evaluation a chunk
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
            "matching": {"guidance": 3.0, "t": TINY_TIMES},  # as phase one's
            "fake_t": TINY_TIMES,
            "fake_updates": 2,  # as phase one's
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the times that matter at 720p
            "image_dropout": 0.5,  # the tiny model makes videos from text alone too
        },
        networks={"heads": {"kind": "ca"}},
        optimizers={
            "generator": adam(1e-4, b1=0.0),  # as phase one's
            "fake_score": adam(3e-4, b1=0.0),
            "heads": adam(1e-3, b1=0.0),  # as phase two's
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
