"""Turns a teacher into a causal model, from which Self-Forcing and ASD start (CausVid, 2412.07772).

    python -m vpae_jax.main --config=configs/causal_init.py --workdir=runs/tiny/causal_init         # tiny, CPU
    python -m vpae_jax.main --config=configs/causal_init.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

With `--config.method.kind=diffusion_forcing` a chunk sees the earlier ones with their own noise.
`configs/causal_ode.py` is the other initialisation, without clips.

The presets for 1.3B and 14B use Self-Forcing's learning rate (2e-6), batch (64) and chunks (3 latent frames), with
timesteps shifted by 5. The tiny clip has three latent frames, each of which is a chunk.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **{**wan(preset), "batch_size": 64},
        name="causal_init",
        method={"name": "causal_init", "ema": 0.99},
        optimizers={"generator": adam(2e-6, b1=0.0, weight_decay=0.01)},
        steps=3000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="causal_init",
        preset="tiny",
        method={
            "name": "causal_init",
            "chunks": {"size": 1},  # three latent frames
            "t": TINY_TIMES,
            "steps": 20,
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "guidance": 3.0,  # as in phase one
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        optimizers={"generator": adam(3e-4, b1=0.9)},
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=400,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
