"""DMD2-v, the video form of DMD2 that TMD compares with (2601.09881): the strongest simple one-step baseline.

    python -m vpae_jax.main --config=configs/kd.py --workdir=runs/tiny/kd --config.data.records=...
    python -m vpae_jax.main --config=configs/dmd2v.py --workdir=runs/tiny/dmd2v                  # tiny, CPU, 1 step
    python -m vpae_jax.main --config=configs/dmd2v.py --workdir=runs/tiny/dmd2v4 --config.method.init=pretrained \\
        --config.method.steps=4                                                                  # no warm-up for four
    python -m vpae_jax.main --config=configs/dmd2v.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.data.records=...

TMD states: heads of convolutions over space and time (VBench 83.24 at 1.3B and one step; attention 82.36, none 81.63),
a knowledge-distillation warm-up of the one-step student only (`configs/kd.py`, by default in the folder `kd` next to
this run's workdir), and shifts of 5 for t' and of 10 for the student's timesteps, which matter to students of several
steps. Everything else is as in `configs/dmd2.py`. The size of the heads is unstated: here one 3 x 3 x 3 convolution per
tap on a quarter of the transformer's width, which is FastGen's.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import dmd2
from vpae_jax.configs.common import check

WARM_UP = "python -m vpae_jax.main --config=configs/kd.py:{preset} --config.data.records=..."


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = dmd2.get_config(preset)
    config.name = "dmd2v"
    config.method.init, config.method.steps = "previous", 1
    if preset != "tiny":  # whose timesteps are not shifted
        config.method.shift = 10.0
    heads = config.networks.heads
    heads.kind, heads.hidden = "conv3d", heads.width // 4
    config.previous.workdir, config.previous.command = "{workdir}/../kd", WARM_UP.format(preset=preset)
    return config
