"""Solvers: Euler, consistency re-noising, and UniPC as Wan uses it.

Each is a pure function of a `velocity(x, t)` callable (x `[b, ...]`, t `[b]` in [0, 1]) and of a list of timesteps that
falls from 1 to 0, with one evaluation per interval. All can be jitted; more than one step is a `lax.scan`, so that
compilation takes as long for fifty steps as for two.

UniPC (Zhao et al., 2302.04867; order 2, B(h) = e^h - 1, data prediction). With lambda = log((1 - t) / t), h the step in
lambda, m = x_t - t v the x0 prediction, and base(x, m) = (t' / t) x + (1 - t') (1 - e^-h) m:

    predictor, order 1   x' = base(x, m_i)
    predictor, order 2   x' = base(x, m_i) + (1 - t') (1 - e^-h) (m_{i-1} - m_i) / (2 r)
                         with r = (lambda_{i-1} - lambda_i) / h
    corrector            the same from the previous step, with m_{i+1} as one more point; its weights rho solve
                         [[1, 1], [r, 1]] rho = b

Both are linear in x and in three predictions, so the whole solver is one table of coefficients, computed on the host in
float64, and a scan with one evaluation per step. The first step is of order 1 because there is no history yet, and the
last for stability (`lower_order_final`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import Signal, add_noise, shift, velocity_to_x0
from vpae_jax.types import PRNGKey, UserError

VelocityFn = Callable[[Signal, Float[Array, "b"]], Signal]
TimeList = Float[Array, "n"] | Float[np.ndarray, "n"]


def _at(velocity: VelocityFn, x: Signal, t: Float[Array, ""]) -> Signal:
    """The velocity at one timestep for the whole batch, in the dtype of x."""
    return velocity(x, jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)).astype(x.dtype)


def euler(velocity: VelocityFn, x: Signal, times: TimeList) -> Signal:
    """x_{t'} = x_t + (t' - t) v(x_t, t) along the list; a single step from t = 1 is x0 = eps - v(eps, 1).

    Args:
      velocity: see the module's docstring.
      x: the state at `times[0]`: noise.
      times: falling, `times[-1]` = 0 for a clean result; length = evaluations + 1.
    """
    times = jnp.asarray(times)

    def step(x, pair):
        t, t_next = pair
        return x + (t_next - t).astype(x.dtype) * _at(velocity, x, t), None

    if len(times) == 2:
        return step(x, (times[0], times[1]))[0]
    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def consistency(velocity: VelocityFn, x: Signal, times: TimeList, key: PRNGKey) -> Signal:
    """Repeatedly predicts x0 and re-noises it to the next timestep, as consistency models and DMD2 are sampled.

    Args:
      velocity: see the module's docstring.
      x: noise, the state at `times[0]`.
      times: falling, `times[-1]` = 0; length = evaluations + 1.
      key: for the fresh noise: one for each clip, or one for all, which is then folded with the clip's index.
    """
    times = jnp.asarray(times)
    size = x.shape[0]

    def step(x, inputs):
        t, t_next, key = inputs
        x0 = velocity_to_x0(_at(velocity, x, t), x, jnp.broadcast_to(t, (size,)))
        noise = draws.normal(key, x.shape, x.dtype)
        return add_noise(x0, noise, jnp.broadcast_to(t_next, (size,))), None

    keys = draws.split(draws.clip_keys(key, size), len(times) - 1)
    if len(times) == 2:
        return step(x, (times[0], times[1], keys[0]))[0]
    return jax.lax.scan(step, x, (times[:-1], times[1:], keys))[0]


def unipc_levels(
    steps: int, flow_shift: float, grid: Literal["diffusers", "wan"] = "diffusers"
) -> Float[np.ndarray, "n"]:
    """UniPC's noise levels, `steps + 1` numbers that end in 0, float64.

    Neither library spaces 1 to 0 evenly. Diffusers (`use_flow_sigmas=True`) spaces the raw axis from 1 to 1/1000, drops
    the last, shifts, and lowers the first by 1e-6 if it is 1, since log(1 - t) must be finite. Wan 2.1's
    `FlowUniPCMultistepScheduler` spaces it from 0.999 to 0 and drops the last. Both append 0. Raises `UserError` for
    less than one step.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1")
    first, last = {"diffusers": (1.0, 1e-3), "wan": (0.999, 0.0)}[grid]
    sigmas = np.asarray(shift(np.linspace(first, last, steps + 1)[:-1], flow_shift))
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return np.append(sigmas, 0.0)


def unipc_times(levels: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """The timesteps that the network is told: all levels but the last, cut to thousandths as both libraries do."""
    return ((levels[:-1] * 1000).astype(np.int64) / 1000).astype(np.float32)


def unipc_coefficients(sigmas: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m 8"]:
    """The coefficients of UniPC, one row per step.

    A row has the weights of (x, x_last, m_i, m_{i-1}, m_{i-2}) in the corrected state, then those of
    (corrected, m_i, m_{i-1}) in the next one. Levels are rounded to float32, as Diffusers stores them.
    """
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    alphas = 1 - sigmas
    with np.errstate(divide="ignore"):
        lambdas = np.log(alphas) - np.log(sigmas)
    steps = len(sigmas) - 1
    orders = [min(2, i + 1, steps - i) for i in range(steps)]
    rows = np.zeros((steps, 8))
    for i in range(steps):
        if i == 0:
            rows[i, 0] = 1
        else:
            rows[i, 1:5] = _corrector(i, orders[i - 1], sigmas, alphas, lambdas)
        h = lambdas[i + 1] - lambdas[i]
        gain = -alphas[i + 1] * np.expm1(-h)
        rows[i, 5:7] = sigmas[i + 1] / sigmas[i], gain
        if orders[i] == 2:
            r = (lambdas[i - 1] - lambdas[i]) / h
            rows[i, 6:8] += gain * 0.5 / r * np.array([-1, 1])
    return rows.astype(np.float32)


def _corrector(
    i: int,
    order: int,
    sigmas: Float[np.ndarray, "n"],
    alphas: Float[np.ndarray, "n"],
    lambdas: Float[np.ndarray, "n"],
) -> Float[np.ndarray, "4"]:
    """Weights of (x_last, m_i, m_{i-1}, m_{i-2}) in the state at level i, corrected by m_i."""
    h = lambdas[i] - lambdas[i - 1]
    phi_1 = np.expm1(-h)
    gain = -alphas[i] * phi_1
    row = np.array([sigmas[i] / sigmas[i - 1], 0, gain, 0])
    if order == 1:
        return row + gain * 0.5 * np.array([0, 1, -1, 0])
    r = (lambdas[i - 2] - lambdas[i - 1]) / h
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi_2, 2 * phi_3]) / phi_1)
    return row + gain * (rho[0] / r * np.array([0, 0, -1, 1]) + rho[1] * np.array([0, 1, -1, 0]))


def unipc(
    velocity: VelocityFn,
    x: Signal,
    sigmas: Float[np.ndarray, "n"],
    times: Float[np.ndarray, "m"] | None = None,
) -> Signal:
    """UniPC of order 2 along fixed noise levels, with one evaluation per level.

    Equals diffusers' `UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=...)`
    with `sigmas = unipc_levels(steps, flow_shift)` and `times = unipc_times(sigmas)`.

    Args:
      velocity: see the module's docstring.
      x: noise.
      sigmas: falling noise levels below 1, the last one 0 (host numbers, from which the coefficients are computed).
      times: the timesteps that the network is told, by default `sigmas[:-1]`.
    """
    if times is None:
        times = sigmas[:-1]

    def step(carry, inputs):
        x, last, m1, m2 = carry
        sigma, t, row = inputs
        m0 = x - sigma * _at(velocity, x, t)
        now = row[0] * x + row[1] * last + row[2] * m0 + row[3] * m1 + row[4] * m2
        return (row[5] * now + row[6] * m0 + row[7] * m1, now, m0, m1), None

    inputs = (sigmas[:-1], times, unipc_coefficients(sigmas))
    zero = jnp.zeros_like(x)
    return jax.lax.scan(step, (x, zero, zero, zero), tuple(jnp.asarray(array, x.dtype) for array in inputs))[0][0]
