"""ASD, adversarial self-distillation (2511.01419): a causal student with few evaluations follows itself with one more.

G^n is the student with n evaluations per chunk (`self_forcing`: one network serves all n), x^1 = G^n(z^1) and x^2 =
G^{n+1}(z^2) are clips of independent noise, Psi noises a clip to a timestep of its own, and D_n is the n-th logit of
heads on the hidden states of the fake score, which are constants to them:

    (1)  L_G = L_DMD(x^1) + alpha softplus(-(D_n(Psi(x^1)) - D_n(Psi(sg x^2))))
    (2)  L_D = softplus(-(D_n(Psi(x^2)) - D_n(Psi(x^1)))) + lambda (R1 + R2)

R1 and R2 are (D_n(y + sigma n) - D_n(y))^2 at y = Psi(x^2) and at y = Psi(x^1) (`DifferencePenalty`). The gradient of
(1) passes only through x^1. Generator, fake score and heads are trained in turn. n is the exit of Self-Forcing's
roll-out plus one, so for n = N there is no student to follow, and (1) is L_DMD.

First-Frame Enhancement, the paper's other contribution, samples the first chunk with more evaluations than the later
ones (`flow.sampler.Sampler.first`).

    alpha              30 (of 0, 10, 20, 30 in its ablation); 0 is Self-Forcing
    lambda, sigma      600, .05
    D's features       of the fake score, after blocks 12, 21 and 29 of 30
    Psi                independent t and noise for both clips, t distributed as in L_DMD (the distribution is unstated)
    n                  uniform in 1 ... N (unstated)
    sign               the paper writes f(D_n(x^1) - D_n(x^2)) with f(u) = -log(1 + e^-u) for a discriminator that
                       maximises it, which therefore scores x^1 high; here, as everywhere in this package, D scores the
                       better clip, x^2, high
    D's updates        one per update of the generator (unstated)
    logits             the heads have N - 1 outputs and are not told the timestep

One-Forcing reports that the gap between the logits stays near 0; see the metric `heads/logit_gap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vpae_jax.methods.adversarial import (
    ConstantFeatures,
    DifferencePenalty,
    DiscriminatorNoise,
    Judge,
    Logits,
    adversarial_term,
    discriminator_loss,
    judge,
)
from vpae_jax.methods.base import Context, Nets, Role, Update
from vpae_jax.methods.common import Term, check_at_least, named_keys
from vpae_jax.methods.distillation import Step
from vpae_jax.methods.scores import SCORE_TIMES
from vpae_jax.methods.self_forcing import SelfForcing
from vpae_jax.types import Batch, Condition, Latents, Metrics, PerExample, PRNGKey, Times, UserError

INDEPENDENT = DiscriminatorNoise("independent", SCORE_TIMES)
R1_R2 = DifferencePenalty(weight=600.0, on="both", sigma_s=0.05, sigma_t=0.0, norm="fixed")


@dataclass(frozen=True)
class ASD(SelfForcing):
    """Self-Forcing with adversarial self-distillation.

    Attributes:
      alpha: weight of the adversarial term of Eq. 1; 0 is Self-Forcing.
      noise: Psi.
      penalty: of Eq. 2; its defaults here are the paper's R1 + R2.
      disc_updates: updates of the heads per update of the generator.
    """

    alpha: float = 30.0
    noise: DiscriminatorNoise = INDEPENDENT
    penalty: DifferencePenalty = R1_R2
    disc_updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("ASD", 0, alpha=self.alpha)
        check_at_least("ASD", 1, disc_updates=self.disc_updates)
        if self.steps < 2:
            raise UserError("ASD.steps is 1, but the student follows itself with one more step; set at least 2")
        if self.judged:
            raise UserError("ASD's heads compare the student with itself; leave adversarial_weight=0 and disc_weight=0")

    @property
    def roles(self) -> Mapping[str, Role]:
        heads = {"heads": Role("fresh", True, part="heads", outputs=self.steps - 1)}
        return dict(super().roles) | (heads if self.alpha else {})

    @property
    def updates(self) -> tuple[Update, ...]:
        *others, generator = super().updates
        heads = Update(("heads",), self.heads_loss, repeats=self.disc_updates)
        return (*others, heads, generator) if self.alpha else (*others, generator)

    def judged_term(
        self, nets: Nets, batch: Batch, context: Context, x0: Latents, key: PRNGKey
    ) -> tuple[Term | None, Metrics]:
        """The adversarial term of Eq. 1, weighted; `x0` is G^n's clip."""
        if not self.alpha:
            return None, {}
        keys = named_keys(key, "other", "noise")
        last, final = self.last(context), self.steps - 2
        other, _, _ = self.rolled_out(nets, batch, jnp.minimum(last, final) + 1, keys.other)
        judged = self.judge(nets, batch.condition, jnp.minimum(last, final))
        term, metrics, _ = adversarial_term(judged, self.noise, "rpgan", x0, jax.lax.stop_gradient(other), keys.noise)
        weighted = term.scaled(self.alpha * jnp.float32(last <= final))
        return weighted, {"adversarial": term.value, "adv_grad": weighted.grad_norm, **metrics}

    def heads_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2."""
        keys = named_keys(context.clips, "images", "own", "other", "noise", "penalty")
        batch = self.drop_images(batch, keys.images)
        drawn = jax.random.randint(named_keys(context.batch, "pair").pair, (), 0, self.steps - 1)
        last = context.step % (self.steps - 1) if self.exits == "cycled" else drawn
        own, other = (
            jax.lax.stop_gradient(self.rolled_out(nets, batch, last + more, key)[0])
            for more, key in ((0, keys.own), (1, keys.other))
        )
        judged = self.judge(nets, batch.condition, last, constant=True)
        return discriminator_loss(
            judged, self.noise(own, other, keys.noise), "rpgan", self.penalty, keys.penalty, context.step
        )

    def judge(self, nets: Nets, condition: Condition, last: Step, constant: bool = False) -> Judge:
        """D_n with n - 1 = `last`.

        Args:
          constant: whether hidden states are constants, as in the loss of the heads.
        """
        backbone = ConstantFeatures(nets["fake_score"]) if constant else nets["fake_score"]
        whole = judge(backbone, nets["heads"], condition)

        def own(x: Latents, t: Times) -> Logits:
            return jnp.take(whole(x, t).reshape(len(x), -1, self.steps - 1), last, axis=2)

        return own
