"""A small decoder that replaces that of the video autoencoder, distilled from it on your clips.

    python -m vpae_jax.main --config=configs/decoder.py --workdir=runs/decoder
    python -m vpae_jax.main --config=configs/decoder.py:t2v-14b-720p --config.data.records=DIR --workdir=runs/decoder
    python -m vpae_jax.sample --model=MODEL --decoder=runs/decoder/model --prompt=... --output=out.mp4

For one-step students, whose sampling time is in good part spent in the autoencoder. The records' latents are decoded
by the frozen autoencoder of the model directory, which is the same for all Wan 2.1 models, and the small decoder learns
to reproduce the result, on a piece of 6 latent frames of 32 x 32 (21 frames of 256 x 256 pixels) of each clip. TAEHV's
`taew2_1` is such a decoder, which `--decoder` accepts as well; train your own if your clips look unlike what others
trained on. docs/benchmarks.md has the results of the tiny preset; the larger presets have not been run.
"""

from ml_collections import ConfigDict

from vpae_jax.configs.common import PRESETS, adam, check, experiment, wan


def get_config(preset: str = "tiny") -> ConfigDict:
    check(preset, PRESETS)
    optimizer = {"b1": 0.9, "b2": 0.99, "clip_norm": 1.0, "warmup_steps": 100}
    if preset == "tiny":
        return experiment(
            name="decoder",
            preset=preset,
            method={"name": "decoder"},
            optimizers={"decoder": adam(1e-3, **optimizer, decay_steps=900)},
            steps=1000,
            batch_size=8,
            seed=0,
            log_every=20,
            checkpoint_every=500,
            model={"preset": preset},
        )
    shared = wan(preset)
    # Nothing is split over devices, and the decoder learns from the autoencoder at its own precision.
    shared |= {"mesh": {}, "accumulation": 1, "sample_every": 0, "log_every": 10, "checkpoint_every": 500}
    shared["model"] |= {"dtype": "float32", "frozen_dtype": "float32", "remat": "none"}
    return experiment(
        name="decoder",
        method={"name": "decoder", "frames": 6, "side": 32, "ema": 0.999},
        optimizers={"decoder": adam(3e-4, **optimizer)},
        steps=20000,
        seed=0,
        **shared,
    )
