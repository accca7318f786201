"""A toy method whose every number is known, and its training."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpae_jax.config import Experiment, OptimizerConfig
from vpae_jax.data.loader import Batches
from vpae_jax.data.order import ClipStream, Order
from vpae_jax.flow import draws
from vpae_jax.methods.base import Average, Method, Role, Update, all_views
from vpae_jax.runtime.preemption import never
from vpae_jax.train.loop import train
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, split
from vpae_jax.train.state import create


class Line(nnx.Module):
    """y = a x."""

    def __init__(self, slope: float):
        self.slope = nnx.Param(jnp.float32(slope))

    def __call__(self, x):
        return self.slope[...] * x


@dataclasses.dataclass(frozen=True)
class Follow(Method):
    """The follower's slope is drawn to the leader's, which is drawn to the frozen target's; noise makes keys matter."""

    batch: ClassVar[type] = np.ndarray

    noise: float = 0.0
    updates: tuple = dataclasses.field(init=False, default=())

    def __post_init__(self):
        object.__setattr__(
            self,
            "updates",
            (Update(("follower",), self.follow, repeats=2), Update(("leader",), self.lead, every=2, starts=1)),
        )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "leader": Role("fresh", True, part="vae", averages={"ema": Average(0.9), "late": Average(0.5, start=3)}),
            "follower": Role("fresh", True, part="vae"),
            "target": Role("fresh", part="vae"),
        }

    def follow(self, nets, batch, context):
        noise = self.noise * draws.normal(context.clips, batch.shape)
        return (nets["follower"](batch) - nets["leader"](batch) + noise) ** 2, {"seen": batch}

    def lead(self, nets, batch, context):
        return (nets["leader"](batch) - nets["target"](batch)) ** 2, {"step": context.step}

    def meet(self, nets, batch, context):
        """Each of two roles is drawn to the other."""
        return (nets["leader"](batch) - nets["follower"](batch)) ** 2, {}


RATE = 0.1
EXPERIMENT = Experiment(
    name="toy",
    method={},
    optimizers={name: OptimizerConfig(RATE, b1=0.0, clip_norm=0.0) for name in ("leader", "follower")},
    steps=8,
    batch_size=2,
    log_every=1,
    checkpoint_every=3,
)


def parts(noise: float = 0.0, slopes=(1.0, 2.0, 3.0)):
    method = Follow(noise)
    graphs, params = {}, {}
    for name, slope in zip(("leader", "follower", "target"), slopes, strict=True):
        graphs[name], params[name] = split(Line(slope))
    frozen = {"target": params.pop("target")}
    optimizers = {role: make_optimizer(options) for role, options in EXPERIMENT.optimizers.items()}
    state = create(0, params, method.roles, optimizers)
    return method, RoleModels(method.roles, all_views(method), graphs), optimizers, state, frozen


def batches(scale: float = 1.0):
    numbers = np.arange(1, 101, dtype=np.float32) * scale
    order = Order([[ClipStream(0, np.arange(100), 1.0)]], 2, seed=0)
    return Batches(order, lambda _, clip: {"number": numbers[clip]}, lambda batch: batch["number"], range(2))


def run(
    workdir,
    steps=8,
    noise=0.5,
    hooks=(),
    scale=1.0,
    checkpoint_every=3,
    checkpoint_minutes=30.0,
    given=None,
    put=lambda x: x,
    log_every=1,
    stop=never,
    profile="",
):
    workdir.mkdir(parents=True, exist_ok=True)
    due = {"checkpoint_every": checkpoint_every, "checkpoint_minutes": checkpoint_minutes}
    experiment = dataclasses.replace(EXPERIMENT, log_every=log_every, steps=steps, profile=profile, **due)
    method, models, optimizers, state, frozen = parts(noise)
    given = batches(scale) if given is None else given
    return train(experiment, method, models, optimizers, state, frozen, given, put, workdir, hooks, stop)


def slopes(state):
    return {name: float(tree["slope"]) for name, tree in state.params.items()}
