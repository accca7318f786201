"""The bidirectional recipe of AAD-1 (2606.03972): APT's method on noised clips, after distribution matching.

    python -m vpae_jax.main --config=configs/dmd2.py --config.method.steps=1 --config.method.adversarial_weight=0 \\
        --config.method.disc_weight=0 --workdir=runs/tiny/aad_init
    python -m vpae_jax.main --config=configs/aad.py --workdir=runs/tiny/aad                      # tiny, CPU, 1 step
    python -m vpae_jax.main --config=configs/aad.py:t2v-14b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

Starts from distribution matching without a discriminator, by default in the folder `aad_init` next to this run's
workdir: 100 updates of the generator, beyond which, according to AAD-1, videos lose their motion. The presets for 1.3B
and 14B use AAD-1's values for Wan 14B: 200 steps, learning rates of 4e-7 for the generator, 1e-6 for the
discriminator's backbone and 2e-6 for its heads on blocks 19, 29 and 39, average with decay 0.98, penalties of 20 at
sigma 0.05 on both sides (0 collapses, 50 leaves a grid pattern). The optimizer is unstated and is APT's. AAD-1's batch
is 256 (--config.batch_size=256), here it is V-PAE's 32. Everything else is as in `configs/apt.py`.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import apt
from vpae_jax.configs.common import check

START = (
    "python -m vpae_jax.main --config=configs/dmd2.py:{preset} --config.method.steps=1 "
    "--config.method.adversarial_weight=0 --config.method.disc_weight=0"
)


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = apt.get_config(preset)
    config.name = "aad"
    method, heads, command = config.method, config.networks.heads, START.format(preset=preset)
    method.noise.kind = "shared"
    method.noise.t.shift, method.noise.t.stated_for = 1.0, None  # all timesteps, for clips of any size
    method.penalty.on, method.penalty.sigma_s = "both", 0.05
    if preset == "tiny":
        method.ema = 0.99
    else:
        method.penalty.weight, method.ema, config.steps = 20.0, 0.98, 200
        for role, rate in {"generator": 4e-7, "backbone": 1e-6, "heads": 2e-6}.items():
            config.optimizers[role].learning_rate = rate
        if "14b" in preset:
            heads.taps = (19, 29, 39)
        command += " --config.steps=100"
    config.previous.workdir, config.previous.command = "{workdir}/../aad_init", command
    return config
