"""Flow matching: the tiny model's teacher, and fine-tunes of any teacher, in full or as a LoRA.

    python -m vpae_jax.main --config=configs/teacher.py --workdir=runs/tiny/teacher
    python -m vpae_jax.main --config=configs/teacher.py --config.model.path=tiny --config.method.init=pretrained \\
        --config.method.generator=lora --config.data.records=... --workdir=...     # a LoRA of the tiny model
    python -m vpae_jax.main --config=configs/teacher.py:t2v-1.3b-480p --config.model.path=... \\
        --config.data.records=... --workdir=...                                    # a LoRA of Wan's

The tiny preset is the last of the three trainings behind the embedded model: Wan's transformer at toy size, on latents
of moving digits. One transformer serves both modes: half of the clips come with their first frame (image-to-video),
half without (text-to-video). It starts from random weights, or with --config.method.init=pretrained from those of the
model directory; with --config.method.generator=lora as well, only low-rank adapters on these are trained. The model
directory that such a run leaves has them merged in, and next to it pytorch_lora_weights.safetensors, which
--config.model.lora accepts in a distillation.

The presets for 1.3B and 14B train a LoRA. Rank 32 and a learning rate of 1e-4 are starting points, not a recipe: no
such run has been made. To train the whole network, set --config.method.generator=full and a learning rate of about
1e-5.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset)
    return tiny() if preset == "tiny" else fine_tune(preset)


def fine_tune(preset: str) -> ConfigDict:
    shared = wan(preset)
    return experiment(
        **shared,
        name="teacher",
        method={
            "name": "flow_matching",
            "init": "pretrained",
            "generator": "lora",
            "generator_rank": 32,
            "generator_scale": 1.0,
            "t": {"shift": shared["sample_shift"]},
            "shift": shared["sample_shift"],
            "image_dropout": 0.0,  # each of Wan's models generates either from text or from a first frame
            "ema": 0.0,  # as usual for LoRAs
        },
        optimizers={"generator": adam(1e-4, b1=0.9)},
        steps=1000,
    )


def tiny() -> ConfigDict:
    return experiment(
        name="teacher",
        preset="tiny",
        method={
            "name": "flow_matching",
            # A clip here has 2,800 times fewer values than one at 720p; the same noise hides far more of it, so the
            # timesteps that matter are lower than Wan's shifted ones.
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
            "preset": "tiny",
            "path": "{workdir}/../encoders/model",
            "remat": "dots",  # faster on a CPU, since less is written to memory
            # Ten words among five hundred padding tokens: cross-attention has to be able to single them out.
            "init_scale": {r"attn2/norm_[qk]/": 2.0},
        },
        data={"clips": 20480},
    )
