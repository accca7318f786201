"""Phase two of V-PAE's first version, POSE (2508.21019v1): a discriminator that is told t = 1.

    python -m vpae_jax.main --config=configs/pose2.py --workdir=runs/tiny/pose2                  # tiny, CPU
    python -m vpae_jax.main --config=configs/pose2.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

Starts from `configs/pose1.py`, by default in the folder `pose1` next to this run's workdir. Version 1's figure shows
the discriminator x_t = (1 - t) x0 + t eps' with t = 1, and real clips without noise. Taken literally, that is pure
noise: it does not depend on the generator, which then learns from the distance to the teacher alone
(--config.method.noise.kind=shared --config.method.noise.real=clean, which prints a warning). Our reading: both clips
without noise, and a backbone that is told t = 1, the only timestep at which a one-step generator is trained. Everything
else, including the heads and the distance to the teacher, is as in version 2, `configs/phase2.py`.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import phase2
from vpae_jax.configs.common import check

PREVIOUS = "python -m vpae_jax.main --config=configs/pose1.py:{preset}"


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = phase2.get_config(preset)
    config.name = "pose2"
    noise = config.method.noise
    noise.kind, noise.t.low, noise.t.high = "clean", 1.0, 1.0
    config.previous.workdir, config.previous.command = "{workdir}/../pose1", PREVIOUS.format(preset=preset)
    return config
