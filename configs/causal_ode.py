"""Makes a causal student of four evaluations by regression on a teacher's paths, without clips (CausVid, 2412.07772).

    python -m vpae_jax.main --config=configs/causal_ode.py --workdir=runs/tiny/causal_ode           # tiny, CPU
    python -m vpae_jax.main --config=configs/causal_ode.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

The presets for 1.3B and 14B use CausVid's learning rate (2e-6), batch (64), length (3,000 steps), 48 steps of the
teacher and chunks of 3 latent frames; guidance is 5 and the student's timesteps are Self-Forcing's four, shifted by 5.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **{**wan(preset), "batch_size": 64},
        name="causal_ode",
        method={"name": "causal_ode", "ema": 0.99},
        optimizers={"generator": adam(2e-6, b1=0.9, weight_decay=0.01)},
        steps=3000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="causal_ode",
        preset="tiny",
        method={
            "name": "causal_ode",
            "chunks": {"size": 1},  # three latent frames
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "ode_steps": 20,
            "guidance": 3.0,  # as in phase one
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        optimizers={"generator": adam(3e-4, b1=0.9)},
        steps=400,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
