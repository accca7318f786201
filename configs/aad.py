"""The bidirectional recipe of AAD-1 (2606.03972): APT's method on noised clips, after distribution matching.

    python -m vpae_jax.main --config=configs/dmd2.py --config.method.steps=1 --config.method.adversarial_weight=0 \\
        --config.method.disc_weight=0 --workdir=runs/tiny/aad_init
    python -m vpae_jax.main --config=configs/aad.py --workdir=runs/tiny/aad                      # tiny, CPU, 1 step
    python -m vpae_jax.main --config=configs/aad.py:t2v-14b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

Starts from distribution matching without a discriminator, by default in the folder `aad_init` beside this run's
workdir: 100 updates of the generator, beyond which, AAD-1 says, videos lose their motion. The presets of 1.3B and 14B
hold AAD-1's values for Wan 14B: 200 steps, generator 4e-7, the discriminator's backbone 1e-6, its heads 2e-6 on blocks
19, 29 and 39, average .98, penalties of 20 at sigma .05 on both sides (0 collapses, 50 leaves a grid). The optimizer is
unstated: APT's. AAD-1's batch is 256 (--config.batch_size=256), here V-PAE's 32. All else is `configs/apt.py`'s.
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
    method.noise.t.shift, method.noise.t.stated_for = 1.0, None  # all times, for clips of any size
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
