"""MagicDistillation, weak-to-strong distribution matching (W2SVD, 2503.13319), a baseline of the paper's tables.

    python -m vpae_jax.main --config=configs/magic.py --workdir=runs/tiny/magic                  # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/magic.py --config.method.steps=1 --workdir=runs/tiny/magic1
    python -m vpae_jax.main --config=configs/magic.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

Its rank, learning rates and loss weights are unstated, and V-PAE's paper gives none for its baselines. The presets for
1.3B and 14B use the values of V-PAE's phase one where the two agree (generator 1e-6, adapters of rank 128 at 2e-5, Adam
(0.9, 0.999)), FastGen's learning rate for the heads (1e-5), and 1,000 steps. The heads read one block, at a third of
the depth: HunyuanVideo's last double block is its 20th of 60.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, experiment, wan
from vpae_jax.models import presets


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def tap(preset: str) -> tuple[int, ...]:
    """The block at a third of a transformer's depth, rounded up."""
    return (-(-presets.find(preset).transformer.num_layers // 3),)


def paper(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="magic",
        method={"name": "magic", "shift": shared["sample_shift"]},
        networks={"heads": {"taps": tap(shared["model"]["preset"])}},
        optimizers={
            "generator": adam(1e-6, b1=0.9),
            "fake_score": adam(2e-5, b1=0.9),
            "heads": adam(1e-5, b1=0.9),
        },
        steps=1000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="magic",
        preset="tiny",
        method={
            "name": "magic",
            "matching": {"guidance": 3.0, "t": TINY_TIMES},  # as in phase one
            "fake_t": TINY_TIMES,
            "fake_rank": 16,  # of a width of 192
            "fake_updates": 2,  # as in phase one
            "noise": {"t": TINY_TIMES},
            "shift": 1.0,  # a clip of 1,728 values is unreadable at the timesteps that matter at 720p
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        networks={"heads": {"taps": tap("tiny")}},
        optimizers={
            "generator": adam(1e-4, b1=0.0),  # these two as in phase one
            "fake_score": adam(3e-3, b1=0.0),
            "heads": adam(1e-3, b1=0.0),  # as in phase two
        },
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},
        data={"clips": 4096},
    )
