"""LCM, consistency distillation (2310.04378), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/lcm.py --workdir=runs/tiny/lcm                        # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/lcm.py --config.method.steps=1 --workdir=runs/tiny/lcm1
    python -m vpae_jax.main --config=configs/lcm.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

V-PAE's paper gives no settings for its baselines. The presets for 1.3B and 14B use those of FastVideo's and DCM's
consistency distillation of Wan (learning rate 1e-6, Adam (0.9, 0.999), pseudo-Huber c = 0.001, 50 points) at Wan's own
shift, with the paper's batch of 32 and guidance of 5, and 1,500 steps, the sum of its two phases. `method.steps` sets
the number of evaluations with which the student is sampled, 4 by default. The tiny preset has its own values, with
reasons in the comments.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="lcm",
        method={"name": "lcm", "shift": shared["sample_shift"]},
        optimizers={"generator": adam(1e-6, b1=0.9)},
        steps=1500,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="lcm",
        preset="tiny",
        method={
            "name": "lcm",
            # A clip of 1,728 values is unreadable at the timesteps that matter at 720p, so the grid is not shifted.
            "t": {"kind": "grid", "points": 50},
            "shift": 1.0,
            "guidance": 3.0,  # as in phase one
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        optimizers={"generator": adam(1e-4, b1=0.9)},  # 100 times the rate for 14B
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
