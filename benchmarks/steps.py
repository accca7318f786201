"""Measures the two phases of V-PAE: time, model FLOPs and utilisation of every update of a step.

    python benchmarks/steps.py [--size=cpu|1.3b|14b|tiny] [--layers=N] [--rounds=N] [--json=FILE] [--markdown=FILE]

The programs are those of training (`train/step.py`) with the paper's settings, on random weights and one random clip
per device. Each update is timed alone, alternating with a large matrix product (`rounds.py`); a step's time is the sum
over its updates and their repeats. There is nothing to compare with, since no PyTorch code of the method is public.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from counting import step_flops
from jaxtyping import Array, Float
from report import machine, paste, progress, table
from rounds import Timed, measure, product, rate
from sizes import N_IMAGE, SIZES, Size, find

from vpae_jax import cli, sharding
from vpae_jax.config import Experiment, MeshConfig, parse
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Method
from vpae_jax.models.heads import HeadsConfig, default_taps
from vpae_jax.train.blueprint import draw_up
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.state import TrainState, create, places_of
from vpae_jax.train.step import make_update
from vpae_jax.types import Batch, Condition

BEGIN = "<!-- made by benchmarks/steps.py -->"
PHASES: Mapping[str, Mapping[str, Any]] = {
    "phase 1": {"name": "vpae_phase1"},
    "phase 2": {"name": "vpae_phase2", "init": "pretrained"},  # the time does not depend on where weights come from
}
PRODUCT = "matrix product"


@dataclass
class Phase:
    """One phase, ready to run.

    Attributes:
      method: its losses and updates.
      batch: what every update trains on.
      state: the training state, which every run of an update replaces.
      updates: each update's program, in order, given state and batch.
      flops: model FLOPs of each update.
    """

    method: Method
    batch: Batch
    state: TrainState
    updates: Sequence[Callable[[TrainState, Batch], tuple[TrainState, Any]]]
    flops: Sequence[float]

    def run(self, index: int) -> None:
        """Runs one update, and waits for its end."""
        self.state, metrics = self.updates[index](self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


def experiment(size: Size, options: Mapping[str, Any], clips: int) -> Experiment:
    """The config of a run at a size; `options` are the method's."""
    config = size.transformer
    taps = default_taps(config.num_layers)
    heads = HeadsConfig(width=config.width, taps=taps, num_heads=config.num_attention_heads)
    adam = {"learning_rate": 1e-6, "b1": 0.5}
    return parse(
        {
            "name": str(options["name"]),
            "method": options,
            "optimizers": {role: adam for role in ("generator", "fake_score", "heads")},
            "networks": {"heads": asdict(heads)},
            "steps": 1,
            "batch_size": clips,
            "model": {"dtype": size.dtype, "frozen_dtype": size.dtype, "remat": size.remat},
        }
    )


def random_batch(size: Size, clips: int) -> Batch:
    """Clips of normally distributed values, with prompts of full length."""
    config, tokens = size.transformer, size.tokens
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Float[Array, "..."]:
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    image, frames = None, None
    if config.image_dim is not None:
        image = normal(clips, N_IMAGE, config.image_dim)
        frames = normal(clips, *size.step_latents, config.in_channels - config.out_channels)
    text = normal(clips, tokens, config.text_dim)
    return Batch(
        latents=normal(clips, *size.step_latents, config.out_channels),
        condition=Condition(text, jnp.ones((clips, tokens), bool), image, frames),
        null_text=text[0],
        null_mask=jnp.ones(tokens, bool),
    )


def prepare(size: Size, options: Mapping[str, Any], mesh: Any) -> Phase:
    """Weights, state and programs of one phase on a mesh."""
    clips = mesh.shape["data"] * mesh.shape["fsdp"]
    run = experiment(size, options, clips)
    method = make_method(run.method)
    blueprint = draw_up(run, method, mesh, size.transformer)
    # Random weights for all roles, also for those that a training run would read from files.
    trained, frozen = (
        {
            role: jax.jit(blueprint.makers[role], out_shardings=places_of(tree))(jax.random.key(0))
            for role, tree in trees.items()
        }
        for trees in (blueprint.trained, blueprint.frozen)
    )
    optimizers = {role: make_optimizer(run.optimizers[role]) for role in trained}
    state = create(0, trained, method.roles, optimizers)
    batch = sharding.put_batch(random_batch(size, clips), mesh)
    programs = [
        make_update(update, index, blueprint.models, optimizers, places=places_of(state))
        for index, update in enumerate(method.updates)
    ]
    return Phase(
        method=method,
        batch=batch,
        state=state,
        updates=[partial(_update, program, frozen) for program in programs],
        flops=step_flops(method, blueprint, size.transformer, batch),
    )


def _update(program: Callable[..., Any], frozen: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    return program(state, frozen, batch, jnp.int32(0))


def measured(size: Size, options: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Times one phase.

    Returns:
      For each update its role, repeats, model FLOPs and times; the matrix product's FLOP/s, over all devices.
    """
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        phase = prepare(size, options, mesh)
        timed = {PRODUCT: product(size.product, size.dtype)}
        for index, update in enumerate(phase.method.updates):
            timed[update.name] = Timed(partial(phase.run, index), phase.flops[index])
        times = measure(timed, rounds)
    updates = [
        {
            "trains": update.name,
            "repeats": update.repeats,
            "flops": timed[update.name].flops,
            **asdict(times[update.name]),
        }
        for update in phase.method.updates
    ]
    return {"updates": updates, "product": mesh.size * rate(timed[PRODUCT], times[PRODUCT])}


def rows(name: str, facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table lines of a phase: its updates, and the whole step."""
    result, seconds, work = [], 0.0, 0.0
    for update in facts["updates"]:
        each = statistics.median(update["seconds"])
        seconds += update["repeats"] * each
        work += update["repeats"] * update["flops"]
        label = f"{name}, update of {update['trains'].replace('_', ' ')}"
        result.append(_row(label, str(update["repeats"]), each, update["flops"], facts["product"]))
    return [*result, _row(f"**{name}, step**", "", seconds, work, facts["product"])]


def _row(label: str, repeats: str, seconds: float, work: float, yardstick: float) -> tuple[str, ...]:
    return (label, repeats, f"{seconds:.2f}", f"{work / 1e9:,.0f}", f"{work / seconds / yardstick:.0%}")


HEAD = ("", "repeats", "seconds", "GFLOP", "utilisation")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("python benchmarks/steps.py", __doc__)
    add = parser.add_argument
    add("--size", default="cpu", choices=SIZES, help="model and input sizes; cpu sizes are float32, Wan's bfloat16")
    add("--layers", type=int, help="the transformer's number of blocks; by default the size's")
    add("--rounds", type=int, default=3, help="number of rounds")
    add("--json", type=Path, help="file for all measurements")
    add("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = _arguments(argv)
    size = find(given.size, given.layers)
    results = {}
    for name, options in PHASES.items():
        progress(f"{name}: {given.rounds} rounds")
        results[name] = measured(size, options, given.rounds)
    progress("")
    devices = jax.devices()
    about = (
        f"Size {given.size}, {size.transformer.num_layers} layers, {size.dtype}, latents of "
        f"{'x'.join(map(str, size.step_latents))}, one clip per device; {len(devices)} {devices[0].device_kind}; "
        f"{machine('jax')}; {given.rounds} rounds."
    )
    lines = [line for item in results.items() for line in rows(*item)]
    text = "\n".join(("", about, "", *table(HEAD, lines), ""))
    print(text)
    if given.json is not None:
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    if given.markdown is not None:
        paste(given.markdown, text, BEGIN)


if __name__ == "__main__":
    cli.run(main)
