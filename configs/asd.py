"""ASD, adversarial self-distillation of a causal student (2511.01419).

    python -m vpae_jax.main --config=configs/asd.py --workdir=runs/tiny/asd \\
        --config.previous.workdir=runs/tiny/causal_init                                             # tiny, CPU
    python -m vpae_jax.main --config=configs/asd.py:t2v-1.3b-480p --workdir=... --config.model.path=... \\
        --config.previous.workdir=... --config.data.records=...

The student can also be sampled with fewer evaluations per chunk, or with more for the first chunk (First-Frame
Enhancement):

    python -m vpae_jax.sample --model=runs/tiny/asd/model --steps=1 --prompt=... --output=...
    python -m vpae_jax.sample --model=runs/tiny/asd/model --steps=4,1 --prompt=... --output=...

Starts from the causal model of `configs/causal_init.py`. The paper states the adversarial weight (30), the penalty
(600, sigma 0.05) and the taps (12, 21 and 29 of 30 blocks, in proportion at 14B), but no learning rates or length: the
rest is Self-Forcing's (`configs/self_forcing.py`). Heads are of kind "ca", with an output for each n.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import self_forcing
from vpae_jax.configs.common import TINY_TIMES, check, experiment
from vpae_jax.models import presets

TAPS = (12, 21, 29)  # of 30 blocks


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    config = self_forcing.get_config(preset).to_dict()
    shared = {key: value for key, value in config["method"].items() if key not in ("name", "penalty")}
    method = {"name": "asd", **shared}
    if preset == "tiny":
        # The discriminator sees clips at the same timesteps as the scores do.
        method["noise"] = {"kind": "independent", "t": TINY_TIMES}
        method["alpha"] = 1.0
        heads = {"kind": "ca"}
    else:
        layers = presets.find(config["model"]["preset"]).transformer.num_layers
        heads = {"kind": "ca", "taps": tuple(-(-layers * tap // 30) for tap in TAPS)}
    return experiment(**{**config, "preset": preset, "name": "asd", "method": method, "networks": {"heads": heads}})
