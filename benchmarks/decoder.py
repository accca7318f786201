"""Compares the quality and speed of a small decoder with those of the autoencoder's.

    python benchmarks/decoder.py --decoder=runs/decoder/model [--model=tiny] [--count=32] [--rounds=9]
        [--markdown=docs/benchmarks.md]

Rendered digits that were not used for training are encoded, and decoded by both. PSNR and LPIPS are against the
rendered frames and, for the small decoder, also against the autoencoder's output. FLOPs are counted from shapes; times
are for whole clips, compiled, alternately, up to frames on the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from report import machine, paste, progress, ratios, table
from rounds import Timed, measure

from vpae_jax import cli
from vpae_jax.data.batches import to_float
from vpae_jax.inference import samplers
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.measures import psnr
from vpae_jax.metrics.networks import lpips
from vpae_jax.planning.flops import count
from vpae_jax.tasks.digits.clips import MovingDigits

BEGIN = "<!-- made by benchmarks/decoder.py -->"
SPLIT, SEED = "eval", 11


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks/decoder.py", description=__doc__)
    add = result.add_argument
    add("--decoder", required=True, help="TAEHV's file for Wan 2.1, or the model directory of a configs/decoder.py run")
    add("--model", default="tiny", help="model whose autoencoder is compared")
    add("--count", type=int, default=32, help="number of clips")
    add("--rounds", type=int, default=9, help="number of rounds")
    add("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    return result


def of_frames(clips: Clips, expected: Clips) -> list[str]:
    """PSNR in dB and LPIPS of all frames."""
    one, other = (x.reshape(-1, *x.shape[2:]) for x in (clips, expected))
    perceived = lpips(one, other)
    return [f"{psnr(one, other).mean():.1f} dB", "-" if perceived is None else f"{perceived.mean():.4f}"]


def main(argv: Sequence[str]) -> None:
    given = parser().parse_args(argv)
    pipe = load_pipeline(given.model, decoder=given.decoder)
    source = MovingDigits(SPLIT, given.count, SEED)
    rendered = np.stack([source[i]["video"] for i in range(given.count)])
    progress("encoding")
    graph, weights = nnx.split(pipe.vae)
    encode = jax.jit(lambda weights, video: nnx.merge(graph, weights).encode(video))
    latents = encode(weights, jnp.asarray(to_float(rendered)))
    decoders = {"autoencoder": pipe.vae, "small decoder": pipe.decoder}
    progress("decoding")
    frames = {name: np.asarray(samplers.decode(one, latents)[0]) for name, one in decoders.items()}
    one_clip = latents[:1]
    timed = {
        name: Timed(lambda one=one: np.asarray(samplers.decode(one, one_clip)[0]), flops(one, one_clip.shape))
        for name, one in decoders.items()
    }
    progress("timing")
    times = measure(timed, given.rounds)
    progress("")
    vae = times["autoencoder"]
    rows = []
    for name, took in times.items():
        row = [name, *of_frames(frames[name], rendered)]
        row += ["-", "-"] if name == "autoencoder" else of_frames(frames[name], frames["autoencoder"])
        row += [f"{timed[name].flops / 1e9:.3g}", ratios(took.seconds, vae.seconds), ratios(took.cpu, vae.cpu)]
        rows.append(row)
    _, t, height, width, _ = rendered.shape
    head = ["", "PSNR", "LPIPS", "PSNR, autoencoder", "LPIPS, autoencoder", "GFLOP", "time ratio", "CPU time ratio"]
    title = f"{given.model}, {given.count} clips of {t} frames of {height}x{width}, {given.rounds} rounds"
    text = "\n".join([f"{title}; {jax.default_backend()}; {machine('jax')}.", "", *table(head, rows)])
    print(text)
    if given.markdown is not None:
        paste(given.markdown, text, BEGIN)


def flops(model: nnx.Module, shape: tuple[int, ...]) -> float:
    """FLOPs of decoding latents of this shape."""
    graph, weights = nnx.split(model)
    decode = jax.jit(lambda weights, x: nnx.merge(graph, weights).decode(x))
    return count(decode.trace(weights, jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr).flops


if __name__ == "__main__":
    cli.run(main)
