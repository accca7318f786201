"""A discriminator on pixels, in V-PAE's second phase and in ADD: every call of its losses, and what it trains."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    ADVERSARIAL,
    KEY,
    B,
    assert_heads_learn,
    assert_independent,
    context,
    evaluate,
    make_batch,
    nets_of,
    record,
    touched,
    weights_of,
)

from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.add import ADD, TEACHER
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Role, View
from vpae_jax.methods.common import named_keys
from vpae_jax.methods.pixels import look
from vpae_jax.methods.scores import ScoreDistillation
from vpae_jax.methods.vpae import PhaseTwo
from vpae_jax.types import UserError

ANY = TimeDistribution(low=0.2, high=0.9)
CLEAN = DiscriminatorNoise("clean")
TWO = PhaseTwo(backbone="image_encoder", noise=CLEAN, csds=ScoreDistillation(t=ANY), adversarial_weight=0.7)
METHODS = {
    "vpae": TWO,
    "add": ADD(
        backbone="image_encoder",
        noise=CLEAN,
        csds=replace(TEACHER, weight=10.0, time_weight="one", t=ANY),
        shift=2.0,
        early_steps=0,
        adversarial_weight=0.7,
        adversarial="hinge",
    ),
}
CLIPS = make_batch((B, 5, 4, 4, 4))
DATA = np.asarray(CLIPS.latents)
AXES = (1, 2, 3, 4)
LOOK = [("vae", "frames", ""), ("image_encoder", "looks", "")]
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def calls(method, loss, key=KEY):
    with jax.disable_jit():
        found = record(method, getattr(method, loss), batch=CLIPS, key=key)
    assert np.isfinite(found.values).all()
    return found


def logits(method, looked):
    """What the heads say of frames that the encoder was shown."""
    nets = nets_of(method, weights_of(method))
    features = nets["image_encoder"].features(jnp.asarray(looked.x), jnp.asarray(looked.t), (1,))
    return np.asarray(nets["heads"](features))[:, 0]


@each
def test_its_networks_are_the_model_directorys_and_frozen(method):
    roles = method.roles
    assert roles["vae"] == Role("pretrained", part="vae")
    assert roles["image_encoder"] == Role("pretrained", part="image_encoder")
    assert {name for name, role in roles.items() if role.trains} == {"generator", "heads"}
    assert "backbone" not in {**roles, **method.views} and method.sees_pixels and not method.trains_backbone
    assert [update.trains for update in method.updates] == [("heads",), ("generator",)]
    assert not PhaseTwo().sees_pixels and ADD().views["backbone"] == View("teacher")


@each
def test_the_discriminator_sees_clean_frames(method):
    """Of the real clip, of the generated one, and of either of them shaken in latents; all by one look."""
    found = calls(method, "discriminator_loss")
    assert found.order == [("generator", "velocity", "own")] + LOOK * 3
    made, *looked = found.calls
    real, fake, shaken = looked[::2]
    np.testing.assert_array_equal(real.x, DATA)
    np.testing.assert_allclose(fake.x, made.x0, atol=1e-5)
    assert len({int(call.t) for call in looked[::2]}) == len({float(call.t) for call in looked[1::2]}) == 1
    on = {"real": real, "fake": fake}[method.penalty.on]
    delta = shaken.x - on.x
    assert 0 < np.abs(delta).max() < 1
    r, f, s = (logits(method, call) for call in looked[1::2])
    before, norm = {"real": r, "fake": f}[method.penalty.on], (delta**2).mean(AXES)
    penalty = (s - before) ** 2 / (norm if method.penalty.norm == "mean" else 1)
    expected = np.maximum(1 - r, 0) + np.maximum(1 + f, 0) + method.penalty.weight * penalty
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


@each
def test_the_generator_is_judged_by_clean_frames(method):
    found = calls(method, "generator_loss")
    assert found.order == [("generator", "velocity", "own"), *LOOK, ("teacher", "velocity", "own")]
    made, frames, looked, told = found.calls
    np.testing.assert_allclose(frames.x, made.x0, atol=1e-5)
    assert_independent(told.noise_from(made.x0))
    distance = ((made.x0 - told.x0) ** 2).mean(AXES)
    np.testing.assert_allclose(found.values, -0.7 * logits(method, looked) + 10 * distance, rtol=1e-4)


@each
def test_gradients_reach_the_generator_or_the_heads_and_nothing_frozen(method):
    judged = replace(method, csds=replace(method.csds, weight=0.0))
    _, metrics, grads = evaluate(judged, judged.generator_loss, batch=CLIPS)
    assert touched(grads) == {"generator"} and metrics["adv_grad"] > 0
    assert touched(evaluate(method, method.discriminator_loss, batch=CLIPS)[2]) == {"heads"}


def test_the_gradient_at_x0_is_that_of_the_whole_chain():
    """Of the first latent frame and of the one that is looked at, by the chain rule written out."""
    nets, x0 = nets_of(TWO, weights_of(TWO)), CLIPS.latents
    term, _, _ = TWO.judged_term(nets, CLIPS, context(), x0, KEY)
    seen = look(nets, 5, context())

    def logit(z):
        video = jnp.tanh(jnp.stack([z[:, 0], z[:, int(seen.frame)]], 1) @ weights_of(TWO)["vae"][:4, :3])
        return nets["heads"](nets["image_encoder"].features(video, seen.place, (1,)))[:, 0]

    np.testing.assert_allclose(term.grad, -jax.grad(lambda z: logit(z).sum())(x0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(term.value, -logit(x0), rtol=1e-5)
    reached = np.abs(term.grad).max((0, 2, 3, 4)) > 0
    np.testing.assert_array_equal(np.flatnonzero(reached), [0, int(seen.frame)])


def test_looks_are_drawn_by_the_batchs_key():
    """Every latent frame but the first, equally often, and any place; one for all clips of an update."""
    nets = nets_of(TWO, weights_of(TWO))

    @jax.jit
    def drawn(number):
        own = replace(context(), batch=jax.random.fold_in(jax.random.key(0), number))
        seen = look(nets, 5, own)
        return seen.frame, seen.place, jax.random.uniform(named_keys(own.batch, "last").last)

    frames, places, last = (np.array(x) for x in zip(*(drawn(number) for number in range(400)), strict=True))
    shares = np.bincount(frames, minlength=5) / 400
    assert shares[0] == 0 and np.abs(shares[1:] - 0.25).max() < 0.1
    assert 0 <= places.min() < 0.05 < 0.95 < places.max() < 1
    assert np.abs(np.corrcoef([frames, places, last]) - np.eye(3)).max() < 0.2, "no key is used twice"
    assert int(look(nets, 1, context()).frame) == 1, "which a clip of one latent frame does not have, and does not need"


@each
@pytest.mark.parametrize("adversarial", ADVERSARIAL)
def test_a_step_of_the_heads_raises_real_minus_fake(method, adversarial):
    method = replace(method, adversarial=adversarial, penalty=DifferencePenalty(weight=0.0))
    clips = replace(CLIPS, latents=CLIPS.latents * 0 + 1.5)
    assert_heads_learn(method, method.discriminator_loss, clips)


@pytest.mark.parametrize(("name", "owner"), [("vpae_phase2", "PhaseTwo"), ("add", "ADD")])
def test_what_an_image_encoder_cannot_use_is_refused(name, owner):
    options = {"name": name, "backbone": "image_encoder"}
    with pytest.raises(UserError, match=rf"{owner}\.noise\.kind is 'shared', but .*; set noise\.kind='clean'"):
        make_method(options)
    clean = {**options, "noise": {"kind": "clean"}}
    with pytest.raises(UserError, match=rf"{owner}\.csds\.times is 'discriminator', but .*; set csds\.times='own'"):
        make_method({**clean, "csds": {"times": "discriminator"}})
    assert make_method({**clean, "csds": {"times": "discriminator", "weight": 0.0}}).sees_pixels
    with pytest.raises(UserError, match=r"config\.method\.backbone: 'dinov2' is not one of .*'image_encoder'"):
        make_method({**options, "backbone": "dinov2"})
