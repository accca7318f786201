"""Consistency distillation: what LCM, PCM and DCM share.

The student has to reach the same point from all points of a path of the teacher. With the timesteps t_n of a grid,
x_n = (1 - t_n) x0 + t_n eps, and v the velocity of the frozen teacher with guidance w:

    (1)  x^_{n-1}  = x_n + (t_{n-1} - t_n) v(x_n, t_n)                                  one Euler step of the teacher
    (2)  Phi(x, t) = x + (e - t) v_theta(x, t)                                          the student's jump to e
    (3)  L         = mean d(Phi_theta(x_n, t_n) - sg Phi_theta'(x^_{n-1}, t_{n-1}))
    (4)  d(z)      = sqrt(z^2 + c^2) - c                                                pseudo-Huber

e is the end of the path: 0, a clip, in LCM; the end of the phase that contains t_n in PCM. On a rectified flow
Phi(x, e) = x holds automatically, so no c_skip and c_out are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise, expand, velocity_to_x0
from vpae_jax.methods.base import Nets, Velocity
from vpae_jax.methods.common import (
    Ratio,
    Term,
    drift,
    example_mean,
    f32,
    guided_velocity,
    inject,
    real_clips,
    term_of,
)
from vpae_jax.types import Batch, Condition, Latents, Metrics, PerExample, PRNGKey, Times, UserError


def jump(network: Velocity, x: Latents, t: Times, end: Times, condition: Condition) -> tuple[Latents, Latents]:
    """Eq. 2, and the velocity that it uses, in float32."""
    v = f32(network(x, t, condition))
    return x + expand(end - t, x) * v, v


class Jumps(NamedTuple):
    """Two jumps that should reach the same point.

    Attributes:
      reached: Phi(x_n, t_n), attached to the student.
      target: Phi(x^_{n-1}, t_{n-1}), constant.
      metrics: distances of the student from the target and from the point that the teacher's velocity alone leads to,
        and `common.drift` of its clips.
    """

    reached: Latents
    target: Latents
    metrics: Metrics


def jumps(nets: Nets, batch: Batch, t: Times, before: Times, end: Times, guidance: float, key: PRNGKey) -> Jumps:
    """Eqs. 1 and 2 from noised clips of the batch.

    Args:
      nets: "teacher" makes the step; "target" jumps from there; "generator" is trained.
      batch: real clips.
      t, before, end: t_n, t_{n-1} and e of each clip.
      guidance: w of the teacher's step.
      key: for the noise.
    """
    data, condition = real_clips(batch), batch.condition
    x = add_noise(data, draws.normal(key, data.shape, data.dtype), t)
    v = guided_velocity(nets["teacher"], x, t, condition, batch.unconditional, guidance)
    stepped = stop_gradient(x + expand(before - t, x) * v)
    target = stop_gradient(jump(nets["target"], stepped, before, end, condition)[0])
    reached, own = jump(nets["generator"], x, t, end, condition)
    constant = stop_gradient(reached)
    metrics = {
        **drift(stop_gradient(velocity_to_x0(own, x, t)), batch.latents),
        "teacher_gap": example_mean(jnp.abs(constant - (x + expand(end - t, x) * v))),
        "consistency_gap": example_mean(jnp.abs(constant - target)),
    }
    return Jumps(reached, target, metrics)


def consistency_loss(found: Jumps, c: float, other: Term | None = None) -> tuple[PerExample, Metrics]:
    """Eqs. 3 and 4, plus an optional adversarial term.

    Args:
      found: both jumps.
      c: of Eq. 4.
      other: a weighted term in Phi_theta(x_n, t_n).

    Returns:
      The loss of each clip, and as metrics the distance, the L2 norms of both gradients with respect to Phi, and their
      ratio.
    """
    term, _ = term_of(lambda x: (example_mean(pseudo_huber(x - found.target, c)), None), stop_gradient(found.reached))
    metrics: dict[str, Any] = {"consistency": term.value, "consistency_grad": term.grad_norm}
    if other is None:
        return inject(found.reached, term), metrics
    ratio = Ratio(other.grad_norm.sum(), term.grad_norm.sum())
    metrics |= {"adv_grad": other.grad_norm, "adv_consistency_ratio": ratio}
    return inject(found.reached, term, other), metrics


def check_huber(owner: str, huber: float) -> None:
    """Raises UserError unless this is a valid c of Eq. 4."""
    if not huber > 0:
        raise UserError(f"{owner}.huber is {huber}, expected a positive number")


def pseudo_huber(z: Latents, c: float) -> Latents:
    """Eq. 4."""
    return jnp.sqrt(z**2 + c**2) - c
