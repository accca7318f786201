"""Knowledge distillation of a one-step student on a teacher's clips of known noise: the warm-up of DMD2-v.

    python -m vpae_jax.encode --captions=captions.txt --guidance=3 --output=data/pairs           # tiny, CPU
    python -m vpae_jax.main --config=configs/kd.py --workdir=runs/tiny/kd --config.data.records=data/pairs
    python -m vpae_jax.main --config=configs/kd.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

The records are a teacher's clips, made by `python -m vpae_jax.encode --captions=... --teacher=...`; DMD2-v uses 500,000
of Wan2.1-T2V-14B. Its learning rate and length are unstated; the presets for 1.3B and 14B use FastGen's for this
regression on Wan 1.3B: 7e-5, Adam (0.9, 0.999) with weight decay 0.01, 6,000 iterations. For the embedded model,
captions are lines such as "a three moves up and to the left".
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **wan(preset),
        name="kd",
        method={"name": "kd"},
        optimizers={"generator": adam(7e-5, b1=0.9, weight_decay=0.01)},
        steps=6000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="kd",
        preset="tiny",
        method={
            "name": "kd",
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        optimizers={"generator": adam(3e-4, b1=0.9)},  # a regression tolerates more than the 1e-4 of the other methods
        steps=400,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
    )
