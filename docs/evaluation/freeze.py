"""Clips of a film, and the same clips frozen, to train a student on that stands still: "A student trained to freeze" in
docs/evaluation.md.

    python docs/evaluation/freeze.py --film=bbb.mp4 --output=runs/freeze/videos     # measure.py says whence the film is
    for clips in frozen held_out; do
        python -m vpae_jax.encode --videos=runs/freeze/videos/$clips --min_motion=0 --batch=16 \\
            --output=runs/freeze/$clips
    done
    python -m vpae_jax.main --config=configs/teacher.py --config.model.path=tiny --config.method.init=previous \\
        --config.previous.workdir=vpae_jax/assets/tiny --config.method.steps=1 --config.method.guidance=1. \\
        --config.method.t.kind=list '--config.method.t.values=(1.,)' --config.method.image_dropout=0. \\
        --config.method.text_dropout=0. --config.method.ema=0. --config.optimizers.generator.warmup_steps=10 \\
        --config.optimizers.generator.decay_steps=0 --config.data.records=runs/freeze/frozen \\
        --config.data.held_out_records=runs/freeze/held_out --config.steps=150 --config.batch_size=8 \\
        --config.checkpoint_every=50 --config.score_every=25 --config.sample_every=0 --config.model.remat=none \\
        --workdir=runs/freeze/student

The student is the tiny model, image-to-video in one evaluation, by flow matching at t = 1 alone: it learns the mean of
the clips that begin with the given frame. Those that it is shown repeat it.

Writes folders of .mp4 files, a caption beside each: the first frames of two thirds of the clips, repeated, in `frozen`,
and the other third as it is in `held_out`, to judge by.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from measure import FILM, HEIGHT, cut, frames_of, frozen

from vpae_jax.config import OptimizerConfig
from vpae_jax.inference.pipeline import load_pipeline
from vpae_jax.media import write_video
from vpae_jax.methods.autoencoder import Autoencoder
from vpae_jax.methods.base import Context
from vpae_jax.metrics.base import Clips
from vpae_jax.tasks.digits.products import latent_statistics
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import split
from vpae_jax.types import Params, PixelBatch, PRNGKey, Video
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_product
from vpae_jax.weights.writing import from_tree

CLIPS, FRAMES = 384, 25  # FRAMES at 24 a second are the tiny model's 9 at 8 a second
STEPS, BATCH, CROP = 400, 4, 32  # of the VAE's training; a side of its crops, in pixels
CAPTION = "a rabbit"  # few letters: the tiny tokenizer takes most of them one by one, and 16 at most


def write(folder: Path, clips: Clips, fps: float) -> None:
    """Writes clips, and a caption beside each."""
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:03d}.mp4", clip, fps)
        (folder / f"{number:03d}.txt").write_text(CAPTION)
    print(f"{folder}: {len(clips)} clips")


def adapt(clips: Clips, output: Path) -> None:
    """Trains the tiny model's VAE on clips, every second one frozen, and writes the model with it.

    Args:
      clips: of the film, at its frame rate and size.
    """
    tiny = find_model("tiny")
    vae = load_pipeline(tiny, with_transformer=False).vae
    small = clips[:, ::3, : HEIGHT // 2 * 2].astype(np.float32)
    small = rearrange(small, "n t (h a) (w b) c -> n t h w c a b", a=2, b=2).mean(
        (-2, -1)
    )  # nearly the tiny model's 48
    method, rng, (graph, params) = Autoencoder(kl_weight=1e-4), np.random.default_rng(0), split(vae)
    optimizer = make_optimizer(OptimizerConfig(2e-3, b2=0.99, clip_norm=1.0, warmup_steps=20, decay_steps=STEPS - 20))

    @jax.jit
    def update(params: Params, state: optax.OptState, video: Video, key: PRNGKey) -> tuple:
        def loss(params: Params) -> tuple:
            context = Context(jnp.int32(0), jax.random.split(key, len(video)), key)
            values, metrics = method.loss({"vae": nnx.merge(graph, params)}, PixelBatch(video), context)
            return values.mean(), metrics

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for step in range(STEPS):
        top, left = rng.integers(small.shape[2] - CROP + 1), rng.integers(small.shape[3] - CROP + 1)
        video = small[rng.choice(len(small), BATCH, replace=False), :, top : top + CROP, left : left + CROP]
        video[::2] = frozen(video[::2])
        params, state, metrics = update(params, state, video / 127.5 - 1, jax.random.key(step))
        if step % 20 == 19:
            print(f"step {step + 1}: {float(metrics['psnr']):.1f} dB", flush=True)
    shown = [{"video": np.rint(clip[:, :40, :80]).astype(np.uint8)} for clip in small]
    config = dataclasses.replace(vae.config, **latent_statistics(vae.config, params, shown))
    write_product(output, Contents(tiny, {"vae": from_tree("vae", config, params)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    fps, frames = frames_of(given.film)
    clips = cut(frames, FILM[0], (FILM[1] - FILM[0]) // CLIPS, CLIPS, FRAMES)
    trained = clips[[i for i in range(len(clips)) if i % 3]]
    write(given.output / "videos" / "frozen", frozen(trained), fps)
    write(given.output / "videos" / "held_out", clips[::3], fps)
    adapt(trained, given.output / "vae")


if __name__ == "__main__":
    main()
