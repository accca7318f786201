"""Optimizers as specified in the papers, each built from one config."""

from __future__ import annotations

import optax

from vpae_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds an optimizer: clipping by global norm, Adam or RMSProp, decoupled weight decay, and the learning rate.

    RMSProp, which APT uses with a decay of 0.9 (arXiv 2501.08316), is PyTorch's: Adam with b1 = 0 and b2 = `rms_decay`,
    but without bias correction, so that the first update is 1 / sqrt(1 - 0.9) = 3.2 times the learning rate. `eps` is
    added to the square root, not inside it.
    """
    if config.algorithm == "adam":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        scale = optax.scale_by_rms(decay=config.rms_decay, eps=config.eps, eps_in_sqrt=False, bias_correction=False)
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]
    return optax.chain(*parts)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the schedule: linear warm-up to the peak, then constant or a cosine decay to zero."""
    peak = config.learning_rate
    after = (
        optax.cosine_decay_schedule(peak, config.decay_steps) if config.decay_steps else optax.constant_schedule(peak)
    )
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])
