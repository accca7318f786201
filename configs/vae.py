"""The tiny model's VAE: Wan's architecture at 1/12 of its width, trained on moving digits.

    python -m vpae_jax.main --config=configs/vae.py --workdir=runs/tiny/vae

First of the three trainings behind the embedded model (then `encoders.py`, `teacher.py`). L1 plus L2 reconstruction and
a small KL term; no perceptual or adversarial loss, which digits do not need.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset, ("tiny",))
    return experiment(
        name="vae",
        preset=preset,
        method={"name": "autoencoder"},
        optimizers={"vae": adam(2e-3, b1=0.9, b2=0.99, clip_norm=1.0, warmup_steps=50, decay_steps=2500)},
        steps=2500,
        batch_size=4,
        seed=0,
        log_every=20,
        checkpoint_every=250,
        model={"preset": preset},
        data={"clips": 1 << 20},
    )
