"""Phase one of V-PAE's first version, POSE (2508.21019v1): stability priming from high to low signal-to-noise ratios.

    python -m vpae_jax.main --config=configs/pose1.py --workdir=runs/tiny/pose1                  # tiny, CPU
    python -m vpae_jax.main --config=configs/pose1.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

In version 1's abstract, the priming adapts "from high to low signal-to-noise ratio regimes"; its figure has t in
[.9T, T], as version 2 does. We combine them: t is drawn from [a, T], and a rises to .9T during training. Where a begins
and how fast it rises is unstated; here from 0.5, over all 500 steps. Everything else is as in `configs/phase1.py`.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import phase1
from vpae_jax.configs.common import check


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = phase1.get_config(preset)
    config.name, config.method.input = "pose1", "anneal"
    if preset == "tiny":
        method = config.method
        # A clip of 1,728 values is already unreadable at 0.9, so the range begins where it is readable. The anneal ends
        # half-way, since the student is sampled from pure noise.
        method.t.stated_for, method.anneal_from, method.anneal_steps = None, 0.1, 400
    return config
