"""The tiny model's teacher: Wan's transformer at toy size, flow matching on latents of moving digits.

    python -m vpae_jax.main --config=configs/teacher.py --workdir=runs/tiny/teacher

Continue from the embedded weights instead of random ones with --config.method.init=pretrained --config.model.path=tiny.

Last of the three trainings behind the embedded model. One transformer serves both modes: half of the clips come with
their first frame (image-to-video), half without (text-to-video).
"""

from ml_collections import ConfigDict

from configs.common import adam, check, experiment


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset, ("tiny",))
    return experiment(
        name="teacher",
        preset=preset,
        method={
            "name": "flow_matching",
            # A clip here has 2,800 times fewer values than one at 720p; the same noise hides far more of it, so the
            # times that matter are lower than Wan's shifted ones.
            "t": {"kind": "logit_normal", "mean": 0.0, "std": 1.0},
            "text_dropout": 0.1,
            "image_dropout": 0.5,
            "ema": 0.999,
            "guidance": 4.0,
            "shift": 1.0,
        },
        optimizers={"generator": adam(1e-3, b1=0.9, b2=0.99, warmup_steps=200, decay_steps=20000, clip_norm=1.0)},
        steps=20000,
        batch_size=32,
        seed=0,
        log_every=50,
        sample_every=5000,
        checkpoint_every=1000,
        model={
            "preset": preset,
            "path": "{workdir}/../encoders/model",
            "remat": "dots",  # faster on a CPU: less is written to memory
            # Ten words stand among five hundred tokens of padding: cross-attention has to be able to single them out.
            "init_scale": {r"attn2/norm_[qk]/": 2.0},
        },
        data={"clips": 20480},
    )
