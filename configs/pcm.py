"""PCM, phased consistency distillation (2405.18407), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/pcm.py --workdir=runs/tiny/pcm                        # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/pcm.py --config.method.phases=1 --workdir=runs/tiny/pcm1
    python -m vpae_jax.main --config=configs/pcm.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines, and PCM's authors give none for Wan. The presets for 1.3B and 14B use
those of their code for SD3 (rank 32 at 5e-6 with Adam (0.9, 0.999), heads on every block at 1e-5 with Adam (0, 0.999),
weight decay 0.001, gradient norms clipped at 1, 100 points, w = 4, adversarial weight 0.1) at Wan's own shift, with the
paper's batch of 32, and 1,500 steps, the sum of its two phases, whereas the authors use 10,000 of small batches. The
width of a head is DCM's, 1,024; the authors' heads are as wide as their transformer. `method.phases` sets the number of
evaluations with which the student is sampled. The tiny preset has its own values, with reasons in the comments.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, every_block, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="pcm",
        method={"name": "pcm", "t": {"kind": "grid", "points": 100, "shift": shared["sample_shift"]}},
        networks={"heads": {"kind": "conv", "taps": every_block(shared["model"]["preset"]), "hidden": 1024}},
        optimizers={
            "generator": adam(5e-6, b1=0.9, weight_decay=1e-3, clip_norm=1.0),
            "heads": adam(1e-5, b1=0.0, weight_decay=1e-3, clip_norm=1.0),
        },
        steps=1500,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="pcm",
        preset="tiny",
        method={
            "name": "pcm",
            # A clip of 1,728 values is unreadable at the timesteps that matter at 720p, so the grid is not shifted.
            "t": {"kind": "grid", "points": 100},
            "guidance": 3.0,  # as in phase one
            "generator": "full",  # a model of 3.8 million parameters needs no adapters
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        networks={"heads": {"kind": "conv", "taps": every_block("tiny")}},
        optimizers={
            "generator": adam(1e-4, b1=0.9),  # 100 times the rate at which 14B is trained in full
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
