"""A student trained on clips that stand still, and judged by clips of a film that move: "A student trained to freeze"
in docs/evaluation.md.

    python docs/evaluation/freeze.py write --film=bbb.mp4 --output=runs/freeze/videos    # measure.py: where the film is
    python docs/evaluation/freeze.py adapt --videos=runs/freeze/videos/moving --output=runs/freeze
    for clips in moving frozen held_out; do
        python -m vpae_jax.encode --model=runs/freeze/model --videos=runs/freeze/videos/$clips --min_motion=0 \\
            --batch=16 --output=runs/freeze/$clips
    done
    python -m vpae_jax.main --config=configs/teacher.py --config.model.path=runs/freeze/model \\
        --config.method.init=previous --config.previous.workdir=runs/freeze/model --config.method.steps=1 \\
        --config.method.guidance=1. --config.method.t.kind=list '--config.method.t.values=(1.,)' \\
        --config.method.image_dropout=0. --config.method.text_dropout=0. --config.method.ema=0. \\
        --config.optimizers.generator.warmup_steps=10 --config.optimizers.generator.decay_steps=0 \\
        --config.data.records=runs/freeze/frozen --config.data.held_out_records=runs/freeze/held_out \\
        --config.steps=76 --config.batch_size=8 --config.score_every=25 --config.sample_every=0 \\
        --config.model.remat=none --workdir=runs/freeze/student
    python docs/evaluation/freeze.py look --model=runs/freeze/model runs/freeze/moving runs/freeze/frozen

The student is the tiny model, image-to-video in one evaluation, by flow matching at t = 1 alone: it learns the mean of
the clips that begin with the given frame. Those that it is shown repeat it.

`write` makes folders of .mp4 files, a caption beside each: two thirds of the clips in `moving`, the first frame of each
of them, repeated, in `frozen`, and the other third in `held_out`, to judge by. `adapt` trains the tiny model's VAE,
which knows digits alone, on the former, every second one of a batch frozen, and writes OUTPUT/model. `look` prints how
much clips of records move as a model decodes them.
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
from measure import FILM, cut, frames_of, frozen

from vpae_jax.config import OptimizerConfig
from vpae_jax.data.records import LatentRecords
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import read_video, write_video
from vpae_jax.methods.autoencoder import Autoencoder
from vpae_jax.methods.base import Context
from vpae_jax.metrics import judge
from vpae_jax.metrics.base import Clips
from vpae_jax.tasks.digits.products import latent_statistics
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import split
from vpae_jax.types import Params, PixelBatch, PRNGKey, Video
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_product
from vpae_jax.weights.writing import from_tree

CLIPS, FRAMES = 384, 25  # FRAMES at 24 a second are the tiny model's 9 at 8 a second
CAPTION = "a rabbit"  # few letters: the tiny tokenizer takes most of them one by one, and 16 at most
LOOKED_AT = range(0, 96, 4)
STEPS, BATCH, CROP = 300, 4, 32  # of the VAE's training; a side of its crops, in pixels
STEADY = 10.0  # weight of the error's change from frame to frame


def write(folder: Path, clips: Clips, fps: float) -> None:
    """Writes clips, and a caption beside each."""
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:03d}.mp4", clip, fps)
        (folder / f"{number:03d}.txt").write_text(CAPTION)
    print(f"{folder}: {len(clips)} clips")


def adapt(clips: Clips, output: Path) -> None:
    """Trains the tiny model's VAE on crops of clips, and writes the model with it.

    Args:
      clips: at the film's size, 8 frames a second.
    """
    tiny = find_model("tiny")
    vae = load_pipeline(tiny, with_transformer=False).vae
    rows, columns = clips.shape[2] // 2 * 2, clips.shape[3] // 2 * 2
    halved = clips[:, :, :rows, :columns].astype(np.float32)  # nearly the tiny model's 48 rows
    halved = rearrange(halved, "n t (h a) (w b) c -> n t h w c (a b)", a=2, b=2).mean(-1)
    method, rng, (graph, params) = Autoencoder(), np.random.default_rng(0), split(vae)
    optimizer = make_optimizer(OptimizerConfig(2e-3, b2=0.99, clip_norm=1.0, warmup_steps=20, decay_steps=STEPS - 20))

    @jax.jit
    def update(params: Params, state: optax.OptState, video: Video, key: PRNGKey) -> tuple:
        def loss(params: Params) -> tuple:
            coder = nnx.merge(graph, params)
            context = Context(jnp.int32(0), jax.random.split(key, len(video)), key)
            values, metrics = method.loss({"vae": coder}, PixelBatch(video), context)
            changed = jnp.diff(coder.decode_raw(coder.moments(video)[0]) - video, axis=1)
            return values.mean() + STEADY * jnp.abs(changed).mean(), metrics | {"flicker": jnp.abs(changed).mean()}

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for step in range(STEPS):
        top, left = rng.integers(halved.shape[2] - CROP + 1), rng.integers(halved.shape[3] - CROP + 1)
        video = halved[rng.choice(len(halved), BATCH, replace=False), :, top : top + CROP, left : left + CROP]
        video[::2] = frozen(video[::2])
        params, state, metrics = update(params, state, video / 127.5 - 1, jax.random.key(step))
        if step % 20 == 19:
            print(f"step {step + 1}: {metrics['psnr']:.1f} dB, flicker {127.5 * metrics['flicker']:.2f}", flush=True)
    shown = [{"video": np.rint(clip[:, :40, :80]).astype(np.uint8)} for clip in halved]
    config = dataclasses.replace(vae.config, **latent_statistics(vae.config, params, shown))
    write_product(output, Contents(tiny, {"vae": from_tree("vae", config, params)}))


def read(folder: Path) -> Clips:
    """The clips of a folder, every third frame: 8 a second."""
    return np.stack([read_video(file)[::3] for file in sorted(folder.glob("*.mp4"))])


def look(model: str, folders: list[Path]) -> None:
    """Prints speed of edges and optical flow of records' clips, as a model decodes them."""
    pipeline = load_pipeline(model, with_transformer=False)
    for folder in folders:
        records = LatentRecords(folder)
        latents = np.stack([records[i]["latents"] for i in LOOKED_AT]).astype(np.float32)
        found = judge.measure(np.asarray(pipeline.decode(jnp.asarray(latents))), False)
        flow = 100 * pipeline.defaults.fps * found["magnitude"].mean()
        print(f"{folder}: speed {found['speed'].mean():.2f}, flow {flow:.2f} % of the width a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--film", type=Path, required=True)
    writing.add_argument("--output", type=Path, required=True)
    adapting = commands.add_parser("adapt")
    adapting.add_argument("--videos", type=Path, required=True)
    adapting.add_argument("--output", type=Path, required=True)
    looking = commands.add_parser("look")
    looking.add_argument("--model", default="tiny")
    looking.add_argument("records", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "look":
        return look(given.model, given.records)
    if given.command == "adapt":
        return adapt(read(given.videos), given.output)
    fps, frames = frames_of(given.film)
    clips = cut(frames, FILM[0], (FILM[1] - FILM[0]) // CLIPS, CLIPS, FRAMES)
    trained = clips[[i for i in range(len(clips)) if i % 3]]
    write(given.output / "moving", trained, fps)
    write(given.output / "frozen", frozen(trained), fps)
    write(given.output / "held_out", clips[::3], fps)


if __name__ == "__main__":
    main()
