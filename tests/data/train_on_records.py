"""A small training on latent records: everything of a real one but its networks.

Usage: train_on_records.py RECORDS WORKDIR STEPS PAUSE    PAUSE is seconds after each step
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from vpae_jax import cli
from vpae_jax.config import Experiment, OptimizerConfig
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.records import LatentRecords
from vpae_jax.methods.base import Method, Role, Update, all_views, averages
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, split
from vpae_jax.train.state import create
from vpae_jax.types import Batch

SIZE = 4


class Matrix(nnx.Module):
    """y = W x."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.eye(16))

    def __call__(self, x):
        return x @ self.kernel[...]


@dataclasses.dataclass(frozen=True)
class Denoise(Method):
    """A matrix that takes noise off a latent."""

    batch: ClassVar[type] = Batch

    @property
    def roles(self):
        return {"generator": Role("fresh", True, part="vae", averages=averages(0.9))}

    @property
    def updates(self):
        return (Update(("generator",), self.loss),)

    def loss(self, nets, batch, context):
        x = batch.latents[:, 1, 1, 1]
        noise = jax.vmap(lambda k: jax.random.normal(k, (16,)))(context.clips)
        number, text = batch.latents[:, 0, 0, 0, 0], batch.condition.text.sum((1, 2))
        return ((nets["generator"](x + noise) - x) ** 2).mean(-1), {"number": number, "square": number**2, "text": text}


def main(argv: list[str]) -> None:
    folder, workdir, steps, pause = Path(argv[0]), Path(argv[1]), int(argv[2]), float(argv[3])
    options = OptimizerConfig(0.01)
    experiment = Experiment("toy", {}, {"generator": options}, steps, batch_size=SIZE, log_every=1, checkpoint_every=3)
    method = Denoise()
    graph, params = split(Matrix())
    optimizers = {"generator": make_optimizer(options)}
    state = create(0, {"generator": params}, method.roles, optimizers)
    batches = latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=0, max_bad=0.2)
    workdir.mkdir(parents=True, exist_ok=True)
    wait = Hook(1, lambda step, state: time.sleep(pause) or {}, "waiting")
    models = RoleModels(method.roles, all_views(method), {"generator": graph})
    train(experiment, method, models, optimizers, state, {}, batches, lambda batch: batch, workdir, (wait,))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
