"""A small training on all processes that the environment names: everything of a real one but its networks.

Usage: toy.py WORKDIR STEPS MESH PAUSE    MESH is "data" or "fsdp"; PAUSE is seconds after each step

TOY_TIMEOUT is how long it waits for the others. TOY_FAILS="1 at 3" makes process 1 fail after step 3, and
TOY_HOLDS="1 at 3" makes it stay there for ever, once it has made the file WORKDIR/held.
"""

import dataclasses
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vpae_jax import cli, sharding
from vpae_jax.config import Experiment, MeshConfig, OptimizerConfig
from vpae_jax.methods.base import Method, Role, Update, all_views, averages
from vpae_jax.runtime import distributed, preemption
from vpae_jax.runtime.processes import say
from vpae_jax.tasks.digits.batches import pixel_batches
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, split
from vpae_jax.train.state import create
from vpae_jax.types import PixelBatch, UserError

WIDTH = 16


class Matrix(nnx.Module):
    """y = W x."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.linspace(-1, 1, WIDTH * WIDTH, dtype=jnp.float32).reshape(WIDTH, WIDTH))

    def __call__(self, x):
        return x @ self.kernel[...]


@dataclasses.dataclass(frozen=True)
class Denoise(Method):
    """A matrix that takes noise off the middle row of a clip's middle frame."""

    batch: ClassVar[type] = PixelBatch

    @property
    def roles(self):
        return {"vae": Role("fresh", True, part="vae", averages=averages(0.9))}

    @property
    def updates(self):
        return (Update(("vae",), self.loss, repeats=2),)

    def loss(self, nets, batch, context):
        row = batch.video[:, 2, 8, :, 0]
        noise = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(context.clips)
        return ((nets["vae"](row + noise) - row) ** 2).mean(-1), {"seen": batch.video.mean((1, 2, 3, 4))}


def main(argv: list[str]) -> None:
    workdir, steps, axis, pause = Path(argv[0]), int(argv[1]), argv[2], float(argv[3])
    where = distributed.find(os.environ)
    with distributed.joined(where, int(os.environ.get("TOY_TIMEOUT", 500))), preemption.on_sigterm() as stop:
        mesh = sharding.make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, axis: -1}))
        experiment = Experiment(
            name="toy",
            method={},
            optimizers={"vae": OptimizerConfig(0.01)},
            steps=steps,
            batch_size=8,
            log_every=1,
            checkpoint_every=4,
        )
        method = Denoise()
        graph, params = split(Matrix())
        place = NamedSharding(mesh, PartitionSpec("fsdp", None))
        params = {"vae": jax.jit(lambda: params, out_shardings=jax.tree.map(lambda _: place, params))()}
        optimizers = {"vae": make_optimizer(experiment.optimizers["vae"])}
        state = create(0, params, method.roles, optimizers)
        clips = MovingDigits("train", size=20, frames=5, resolution=16)
        batches = pixel_batches(clips, 8, seed=0, rows=sharding.own_rows(mesh, 8))
        put = partial(sharding.put_rows, mesh=mesh, size=8)
        workdir.mkdir(parents=True, exist_ok=True)

        def wait(step, state):
            here = f"{jax.process_index()} at {step}"
            if os.environ.get("TOY_FAILS") == here:
                raise UserError("the toy is broken")
            if os.environ.get("TOY_HOLDS") == here:
                (workdir / "held").touch()
                while True:
                    time.sleep(1)
            time.sleep(pause)
            return {}

        models = RoleModels(method.roles, all_views(method), {"vae": graph})
        last = train(
            experiment, method, models, optimizers, state, {}, batches, put, workdir, (Hook(1, wait, "waiting"),), stop
        )
        say(f"ended at step {int(last.step)} of {steps}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
