"""Compares our models with those of Diffusers and Transformers in PyTorch: times, ratios, utilisation.

    python benchmarks/models.py [--size=cpu|cpu-long|1.3b|14b|tiny] [--layers=N] [--only=NAME,...] [--rounds=N]
        [--json=FILE] [--markdown=FILE]

Both have the same random weights and inputs. Their outputs are compared first; if they differ, the program exits with
one line and status 1. Then they alternate for several rounds, together with one large matrix product of the same
precision (`rounds.py`): utilisation is the rate of a model's FLOPs (`flops.py`) relative to that product's rate.
Without PyTorch, or if it sees no accelerator but JAX does, only ours run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flops
import jax
import jax.numpy as jnp
import numpy as np
import theirs
from flax import nnx
from report import machine, paste, progress, ratios, table
from rounds import Timed, measure, product, rate
from sizes import N_IMAGE, SIZES, Size, find

from vpae_jax import cli
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.train.roles import split
from vpae_jax.types import Condition, Params, UserError

BEGIN = "<!-- made by benchmarks/models.py -->"
# Maximum relative difference of the outputs, in L2 norm.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
PRODUCT = "matrix product"


@dataclass(frozen=True)
class Case:
    """One model and its task.

    Attributes:
      ours: our function; returns arrays.
      flops: its model FLOPs.
      theirs: PyTorch's function; None if PyTorch does not run here.
      expected: converts PyTorch's result to arrays like ours.
    """

    ours: Callable[[], Any]
    flops: float
    theirs: Callable[[], Any] | None
    expected: Callable[[Any], Any]


def transformer(size: Size, both: bool, backward: bool = False) -> Case:
    """The diffusion transformer: its velocity, or the gradients of weights and latents for a given cotangent."""
    config, dtype = size.transformer, size.dtype
    model, graph, params = _models("transformer", WanTransformer, config, size, both, remat=size.remat)
    draw = np.random.default_rng(0).standard_normal
    shape = (1, *size.latents, config.out_channels)
    x, cotangent = (jnp.asarray(draw(shape), dtype) for _ in range(2))
    text = jnp.asarray(draw((1, config.text_len, config.text_dim)), dtype)
    image, frames = None, None
    if config.image_dim is not None:
        image = jnp.asarray(draw((1, N_IMAGE, config.image_dim)), dtype)
        frames = jnp.asarray(draw((1, *size.latents, config.in_channels - config.out_channels)), dtype)
    condition = Condition(text, jnp.ones(text.shape[:2], bool), image, frames)
    t = jnp.asarray([0.7])

    def velocity(params: Params, x: Any) -> Any:
        return nnx.merge(graph, params)(x, t, condition)

    count = flops.transformer(config, shape, condition)
    if not backward:
        ours = _jitted(velocity, params, x)
    else:
        ours = _jitted(lambda params, x: jax.vjp(velocity, params, x)[1](cotangent), params, x)
    if model is None:
        return Case(ours, count * (3 if backward else 1), None, lambda found: found)
    whole = x if frames is None else jnp.concatenate([x, frames], -1)
    given = {
        "hidden_states": theirs.tensor(whole, dtype),
        "timestep": theirs.tensor(1000 * t, "float32"),
        "encoder_hidden_states": theirs.tensor(text, dtype),
        "encoder_hidden_states_image": None if image is None else theirs.tensor(image, dtype),
    }
    if not backward:
        return Case(ours, count, lambda: model(**given, return_dict=False)[0], theirs.array)
    seed = theirs.tensor(cotangent, dtype)
    given["hidden_states"].requires_grad_(True)

    def both_ways() -> Any:
        model.zero_grad()
        given["hidden_states"].grad = None
        model(**given, return_dict=False)[0].backward(seed)
        return given["hidden_states"].grad

    def expected(of_latents: Any) -> Any:
        return theirs.gradients("transformer", model), theirs.array(of_latents)[..., : config.out_channels]

    return Case(ours, 3 * count, both_ways, expected)


def vae(size: Size, both: bool, decode: bool) -> Case:
    """The autoencoder, from latents to a video or back, in chunks of frames as in inference."""
    config, dtype = size.vae, size.dtype
    model, graph, params = _models("vae", WanVAE, config, size, both)
    frames, *side = size.video
    mean, deviation = (np.asarray(v, np.float32) for v in (config.latents_mean, config.latents_std))
    draw = np.random.default_rng(0)
    if not decode:
        video = jnp.asarray(draw.uniform(-1, 1, (1, *size.video, 3)), jnp.float32)
        ours = _jitted(lambda params, x: nnx.merge(graph, params).encode(x), params, video)
        # Counted over the whole clip, since chunks also process frames of earlier chunks.
        count = flops.products(lambda params, x: nnx.merge(graph, params).moments(x), params, video)
        given = theirs.tensor(video, dtype) if model is not None else None
        run = None if model is None else lambda: model.encode(given, return_dict=False)[0].mode()
        return Case(ours, count, run, lambda found: (theirs.array(found) - mean) / deviation)
    rows, columns = (one // config.scale_factor_spatial for one in side)
    shape = (1, 1 + (frames - 1) // config.scale_factor_temporal, rows, columns, config.z_dim)
    z = draw.standard_normal(shape).astype(np.float32)
    latents = jnp.asarray((z - mean) / deviation)
    ours = _jitted(lambda params, x: nnx.merge(graph, params).decode(x), params, latents)
    count = flops.products(lambda params, x: nnx.merge(graph, params).decode_raw(x), params, latents)
    given = theirs.tensor(z, dtype) if model is not None else None
    run = None if model is None else lambda: model.decode(given, return_dict=False)[0]
    return Case(ours, count, run, theirs.array)


def text_encoder(size: Size, both: bool) -> Case:
    """The UMT5 encoder on one prompt, with a quarter of the tokens padding."""
    config = size.text_encoder
    model, graph, params = _models("text_encoder", UMT5Encoder, config, size, both)
    shape = (1, size.tokens)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    mask = np.broadcast_to(np.arange(size.tokens) < 3 * size.tokens // 4, shape)
    ours = _jitted(
        lambda params, *x: nnx.merge(graph, params)(*x), params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    )
    run = None
    if model is not None:
        import torch

        given = torch.tensor(ids).to(theirs.device()), torch.tensor(mask.copy()).to(theirs.device())
        run = lambda: model(*given).last_hidden_state  # noqa: E731
    return Case(ours, flops.text_encoder(config, shape), run, theirs.array)


CASES: Mapping[str, Callable[[Size, bool], Case]] = {
    "dit-forward": transformer,
    "dit-backward": lambda size, both: transformer(size, both, backward=True),
    "vae-decode": lambda size, both: vae(size, both, decode=True),
    "vae-encode": lambda size, both: vae(size, both, decode=False),
    "umt5": text_encoder,
}
LABELS = {
    "dit-forward": "DiT forward",
    "dit-backward": "DiT forward and backward",
    "vae-decode": "VAE decode",
    "vae-encode": "VAE encode",
    "umt5": "UMT5",
}


def _models(part: str, kind: type, config: Any, size: Size, both: bool, **options: Any) -> tuple[Any, Any, Params]:
    """PyTorch's model, or None; our graph; our weights, which are PyTorch's if there are any."""
    dtype = jnp.dtype(size.dtype)

    def make() -> Any:
        return kind(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, **options)

    graph = nnx.graphdef(nnx.eval_shape(make))
    if not both:
        return None, graph, jax.jit(lambda: split(make())[1])()
    model = theirs.make(part, config, size.dtype)
    return model, graph, theirs.weights(part, model, dtype)


def _jitted(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def difference(found: Any, expected: Any) -> float:
    """Relative difference in L2 norm of two trees of arrays, all leaves together."""
    pairs = jax.tree.map(lambda *pair: [np.asarray(one, np.float64) for one in pair], found, expected)
    leaves = jax.tree.leaves(pairs, is_leaf=lambda one: isinstance(one, list))
    squares = sum(np.sum((one - other) ** 2) for one, other in leaves)
    return float(np.sqrt(squares / sum(np.sum(other**2) for _, other in leaves)))


def run(name: str, size: Size, rounds: int, both: bool) -> dict[str, Any]:
    """Compares and times one case.

    Returns:
      Times of every round for ours, PyTorch's ("theirs") and the matrix product; model FLOPs; the product's FLOP/s; our
      utilisation; the relative difference.
    """
    progress(f"{LABELS[name]}: preparing")
    case = CASES[name](size, both)
    timed = {"ours": Timed(case.ours, case.flops), PRODUCT: product(size.product, size.dtype)}
    facts: dict[str, Any] = {"flops": case.flops}
    if case.theirs is not None:
        import torch

        work = case.theirs

        def waited() -> Any:
            with torch.set_grad_enabled("backward" in name):
                result = work()
            theirs.synchronise()
            return result

        found, limit = difference(case.ours(), case.expected(waited())), TOLERANCE[size.dtype]
        if not found <= limit:
            sys.exit(f"error: {LABELS[name]}: ours and PyTorch's differ by {found:.1e}, limit {limit:.0e}")
        facts["difference"] = found
        timed["theirs"] = Timed(waited, case.flops)
    progress(f"{LABELS[name]}: {rounds} rounds")
    times = measure(timed, rounds)
    facts["product"] = rate(timed[PRODUCT], times[PRODUCT])
    facts["utilisation"] = rate(timed["ours"], times["ours"]) / facts["product"]
    return {**facts, "times": {name: asdict(one) for name, one in times.items()}}


def row(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    times = facts["times"]
    ours = times["ours"]
    other, compared = "", ("", "", "")
    if "theirs" in times:
        both = times["theirs"]
        other = f"{statistics.median(both['seconds']):.2f}"
        by_clock, by_processor = (ratios(ours[key], both[key]) for key in ("seconds", "cpu"))
        compared = (by_clock, by_processor, f"{facts['difference']:.0e}")
    work, yardstick = (f"{facts[key] / 1e9:,.0f}" for key in ("flops", "product"))
    mine = f"{statistics.median(ours['seconds']):.2f}"
    return (LABELS[name], mine, other, *compared, work, f"{facts['utilisation']:.0%}", yardstick)


HEAD = ("", "seconds", "PyTorch, s", "ratio", "CPU time ratio", "difference", "GFLOP", "utilisation", "matmul, GFLOP/s")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("python benchmarks/models.py", __doc__)
    add = parser.add_argument
    add("--size", default="cpu", choices=SIZES, help="model and input sizes; cpu sizes are float32, Wan's bfloat16")
    add("--layers", type=int, help="the transformer's number of blocks; by default the size's")
    add("--only", default=",".join(CASES), help="the cases to run, separated by commas")
    add("--rounds", type=int, default=5, help="number of rounds")
    add("--json", type=Path, help="file for all measurements")
    add("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = _arguments(argv)
    names = given.only.split(",")
    if unknown := set(names) - set(CASES):
        raise UserError(f"--only: {sorted(unknown)[0]!r} is not one of {', '.join(CASES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory on the same device
    size = find(given.size, given.layers)
    both = theirs.installed() and (jax.default_backend() == "cpu" or theirs.device() == "cuda")
    results = {}
    for name in names:
        results[name] = run(name, size, given.rounds, both)
        progress(" | ".join(row(name, results[name])))
    progress("")
    where = machine("jax", "torch", "diffusers", "transformers")
    layers = size.transformer.num_layers
    about = f"Size {given.size}, {layers} layers, {size.dtype}; {jax.devices()[0].device_kind}; {where}; "
    about += f"{given.rounds} rounds."
    text = "\n".join(("", about, "", *table(HEAD, [row(*item) for item in results.items()]), ""))
    print(text)
    if given.json is not None:
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    if given.markdown is not None:
        paste(given.markdown, text, BEGIN)


if __name__ == "__main__":
    cli.run(main)
