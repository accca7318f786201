"""V-PAE phase one, stability priming (2508.21019v2, section 3.1).

    python -m vpae_jax.main --config=configs/phase1.py --workdir=runs/tiny/phase1                # tiny, CPU
    python -m vpae_jax.main --config=configs/phase1.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=synthetic=1,koala=1,intern4k=1

Paper: batch 32, Adam (0.9, 0.999), learning rate 1e-6, 500 steps on Wan2.1-I2V-14B at 720p; on clips that
Wan2.1-T2V-14B generates for captions of OpenVID-1M, "for the distributional alignment", and on Koala-36M and Intern4K,
to raise the upper bound. The proportions are not stated: those above are equal, to be adjusted by a run's metrics. The
presets for 1.3B and 14B use these values; the ranges of t are translated to the size of the clips (`docs/methods.md`).
The learning rate of the fake score is 2e-5, since adapters at 1e-6 hardly move in 500 steps (the paper gives one rate
for both). The tiny preset has its own values, with reasons in the comments. `method.clips=generator` saves 15% of a
step at 14B (`docs/methods/less_work.md`).
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import TINY_TIMES, adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else paper(preset)


def paper(preset: str) -> ConfigDict:
    return experiment(
        **wan(preset),
        name="phase1",
        # Every default of the method is the paper's, or `docs/methods/vpae.md` explains why it is not.
        method={"name": "vpae_phase1"},
        optimizers={
            "generator": adam(1e-6, b1=0.9),
            "fake_score": adam(2e-5, b1=0.9),
        },
        steps=500,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="phase1",
        preset="tiny",
        method={
            "name": "vpae_phase1",
            # The student is sampled with one evaluation from pure noise, and a clip of 1,728 values is already
            # unreadable at the paper's t = 0.9, so it is primed where it will be used.
            "input": "pure_noise",
            "matching": {
                # This teacher meets its goals from 3 to 5, and is nearest to real clips at 3 (docs/tiny.md).
                "guidance": 3.0,
                "t": TINY_TIMES,
            },
            "fake_t": TINY_TIMES,
            "fake_rank": 16,  # of a width of 192
            "fake_updates": 2,  # at the fake score's high rate, 2 work as well as 5 (measured)
            "image_dropout": 0.5,  # the tiny model also generates from text alone
            "ema": 0.99,
        },
        optimizers={
            # 100 times the paper's rates, for a model of 3.8 million parameters.
            "generator": adam(1e-4, b1=0.0),
            "fake_score": adam(3e-3, b1=0.0),
        },
        steps=800,
        batch_size=16,
        log_every=10,
        sample_every=200,
        checkpoint_every=200,
        sample_guidance=3.0,
        model={"remat": "dots"},  # faster on a CPU, since less is written to memory
        data={"clips": 4096},
    )
