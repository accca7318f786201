"""PCM, phased consistency distillation (2405.18407), as the paper's tables compare with it.

    python -m vpae_jax.main --config=configs/pcm.py --workdir=runs/tiny/pcm                        # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/pcm.py --config.method.phases=1 --workdir=runs/tiny/pcm1
    python -m vpae_jax.main --config=configs/pcm.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines, and PCM's authors none for Wan. The presets of 1.3B and 14B hold
those of their code for SD3 (rank 32 at 5e-6 with Adam (.9, .999), heads on every block at 1e-5 with Adam (0, .999),
decay .001, norms clipped at 1, 100 points, w = 4, adversarial weight .1) at Wan's own shift, with the paper's batch of
32, and 1,500 steps, the sum of its two phases, where the authors take 10,000 of small batches. A head's width is DCM's,
1,024; the authors' is as wide as their transformer. The student is sampled in as many evaluations as `method.phases`
says. The tiny preset has its own values, with reasons beside them.
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
            # A clip of 1,728 values is unreadable at the times that matter at 720p, so the grid is not shifted.
            "t": {"kind": "grid", "points": 100},
            "guidance": 3.0,  # as phase one's
            "generator": "full",  # a model of 3.8 million parameters needs no adapters
            "image_dropout": 0.5,  # the tiny model makes videos from text alone too
            "ema": 0.99,
        },
        networks={"heads": {"kind": "conv", "taps": every_block("tiny")}},
        optimizers={
            "generator": adam(1e-4, b1=0.9),  # a hundred times the rate at which 14B is trained in full
            "heads": adam(1e-3, b1=0.0),  # as phase two's
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
