"""The tiny model's text and image encoders, trained against each other on captions of moving digits.

    python -m vpae_jax.main --config=configs/encoders.py --workdir=runs/tiny/encoders

Second of the three trainings behind the embedded model. UMT5 and CLIP at toy width: the pair (first frame, last frame)
must find its caption among the others of the batch, so text states must distinguish digits and directions.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset, ("tiny",))
    return experiment(
        name="encoders",
        preset=preset,
        method={"name": "contrastive"},
        optimizers={"encoders": adam(1e-3, b1=0.9, warmup_steps=50, decay_steps=1500, clip_norm=1.0)},
        steps=1500,
        batch_size=64,
        seed=0,
        log_every=20,
        checkpoint_every=500,
        model={"preset": preset, "path": "{workdir}/../vae/model"},
        data={"clips": 1 << 20},
    )
