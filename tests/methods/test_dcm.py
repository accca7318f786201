"""Both experts of DCM on networks whose answers are known: who is trained, where, and towards what."""

import re
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    BATCH,
    KEY,
    SHAPE,
    B,
    assert_independent,
    context,
    evaluate,
    make_batch,
    record,
    touched,
    weights_of,
)
from oracles import Backbone, LinearHeads, constant

from vpae_jax.config import parse
from vpae_jax.configs import dcm_detail, dcm_semantic
from vpae_jax.configs.common import PRESETS
from vpae_jax.flow.schedule import expand, shift, unshift
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Adapters, Role, View
from vpae_jax.methods.common import named_keys
from vpae_jax.methods.consistency import pseudo_huber
from vpae_jax.methods.dcm import ADAPTED, DCMDetail, DCMSemantic, temporal_coherence
from vpae_jax.models.lora import Linear
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.types import UserError

SMALL = {"points": 10, "shift": 2.0, "split": 6}
SEMANTIC = DCMSemantic(**SMALL, coherence_frames=1)
DETAIL = DCMDetail(**SMALL, generator="full")
LARGE = make_batch((3, 4, 6, 6, 4))
DATA = np.asarray(LARGE.latents)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults_of_the_semantic_expert():
    method = DCMSemantic()
    assert method.roles == {"generator": Role("pretrained", trains=True), "teacher": Role("pretrained")}
    assert method.views == {"target": View("generator", constant=True)}
    assert [u.name for u in method.updates] == ["generator"]
    assert (method.guidance, method.huber, method.coherence_weight, method.coherence_frames) == (6.0, 0.001, 1.0, 3)
    assert (method.student.view, method.student.low, method.student.average) == ("generator", None, None)


def test_defaults_of_the_detail_expert():
    method = DCMDetail()
    assert method.roles == {
        "generator": Role("fresh", True, adapters=Adapters("semantic", 128, 256.0, ADAPTED)),
        "semantic": Role("previous:generator"),
        "teacher": Role("pretrained"),
        "heads": Role("fresh", True, part="heads"),
    }
    assert method.views == {"target": View("generator", constant=True)}
    assert [(u.name, u.repeats, u.starts) for u in method.updates] == [("generator", 1, 0), ("heads", 1, 0)]
    assert (method.adversarial, method.adversarial_weight, method.matching_weight) == ("pcm_hinge", 0.5, 1.0)
    student = method.student
    assert (student.view, student.low, student.average) == ("semantic", "generator", None)
    assert student.boundary == pytest.approx(0.977636, abs=1e-6)


@pytest.mark.parametrize("cls", [DCMSemantic, DCMDetail])
def test_the_grid_is_parted_at_the_split(cls):
    """The code's index 35 of 50 at shift 17: sigma_prev[35] = .97541 is where the semantic expert's jumps end."""
    method = cls()
    semantic = method.semantic_times.phased(KEY, (4000, 1))
    detail = method.detail_times.phased(KEY, (4000, 1))
    assert float(semantic.t.min()) == pytest.approx(0.977636, abs=1e-5) == pytest.approx(method.boundary, abs=1e-5)
    np.testing.assert_allclose(semantic.end, 0.975410, atol=1e-5)
    assert float(detail.t.max()) == pytest.approx(0.975410, abs=1e-5)
    np.testing.assert_array_equal(detail.end, 0)
    assert len(np.unique(semantic.t)) == 15 and len(np.unique(detail.t)) == 35
    assert float(detail.inside.min()) == 0 and float(detail.inside.max()) < float(detail.t.max())


@pytest.mark.parametrize("cls", [DCMSemantic, DCMDetail])
def test_every_step_of_the_student_ends_where_its_expert_was_trained_to(cls):
    method = cls()
    times = method.student.sampler.times
    assert times == pytest.approx((1, 0.989726, 0.975410, 0.901515, 0), abs=1e-6)
    for t, after in pairwise(times):
        end = method.semantic_times.ends()[-1] if t >= method.boundary else 0.0
        assert after >= end - 1e-9
    more = cls(semantic_steps=3, detail_steps=1).student.sampler.times
    assert more == pytest.approx((*shift(np.array([1, 0.9, 0.8]), 17.0), 0.975410, 0), abs=1e-6)


def test_times_of_its_own():
    """The code's six."""
    times = (1.0, 0.992, 0.982, 0.949, 0.905, 0.81, 0.0)
    method = DCMDetail(times=times)
    assert method.student.sampler.times == times
    assert [t >= method.boundary for t in times[:-1]] == [True] * 3 + [False] * 3


def test_other_ways_to_start_and_to_train():
    full = DCMDetail(generator="full", ema=0.9)
    assert full.roles["generator"].start == "previous" and full.roles["generator"].adapters is None
    assert full.student.average == "ema" and set(full.roles["generator"].averages) == {"ema"}
    alone = DCMDetail(init="pretrained")
    assert alone.roles["semantic"] == Role("pretrained") and alone.roles["generator"].start == "fresh"


def test_what_is_adapted():
    """Attention of every block, the embedders of time and text, and the last layer; no feed-forward layer."""
    config = WanTransformerConfig(num_attention_heads=2, attention_head_dim=8, num_layers=1, text_dim=8, freq_dim=8)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    linears = {"/".join(map(str, path)) for path, part in nnx.iter_modules(model) if isinstance(part, Linear)}
    assert {path for path in linears if re.search(ADAPTED, path)} == {
        *(f"blocks/attn{n}/to_{kind}" for n in (1, 2) for kind in ("q", "k", "v", "out")),
        *(f"condition_embedder/{kind}_embedder/linear_{n}" for kind in ("time", "text") for n in (1, 2)),
        "condition_embedder/time_proj",
        "proj_out",
    }


# Losses.


def test_each_step_trains_its_role_alone():
    values, metrics, grads = evaluate(SEMANTIC, SEMANTIC.loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    common = {"x0_mean_drift", "x0_std_ratio", "teacher_gap", "consistency_gap", "consistency", "consistency_grad"}
    assert set(metrics) == common | {"coherence"}
    values, metrics, grads = evaluate(DETAIL, DETAIL.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == common | {"adversarial", "matching", "fake_logit", "adv_grad", "adv_consistency_ratio"}
    assert touched(evaluate(DETAIL, DETAIL.discriminator_loss)[2]) == {"heads"}


def test_the_semantic_expert_is_not_asked_in_the_detail_experts_training():
    """It is what adapters sit on; a full detail expert does not even see it."""
    weights = weights_of(DETAIL)
    base = evaluate(DETAIL, DETAIL.generator_loss, weights)[0]
    moved = evaluate(DETAIL, DETAIL.generator_loss, weights | {"semantic": weights["semantic"] + 1})[0]
    np.testing.assert_array_equal(base, moved)
    low = replace(DETAIL, generator="lora")
    base, moved = (
        evaluate(low, low.generator_loss, weights | {"semantic": weights["semantic"] + d})[0] for d in (0, 1)
    )
    assert np.abs(base - moved).max() > 1e-3


@pytest.mark.parametrize("method", [SEMANTIC, DETAIL])
def test_no_gradient_through_the_target(method):
    """d L / d theta is that of the first jump alone, where a target of equal weights is a role of its own."""
    weights = weights_of(method)

    class Apart(type(method)):
        @property
        def roles(self):
            return {**super().roles, "target": Role("pretrained")}

        @property
        def views(self):
            return {}

    more = {"coherence_frames": 1} if method is SEMANTIC else {"generator": "full"}
    apart = Apart(**SMALL, **more)
    ours, theirs = (one.loss if method is SEMANTIC else one.generator_loss for one in (method, apart))
    grads = evaluate(method, ours, weights)[2]
    stopped = evaluate(apart, theirs, weights | {"target": weights["generator"]})[2]
    np.testing.assert_allclose(grads["generator"], stopped["generator"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", [SEMANTIC, replace(DETAIL, adversarial_weight=0.0)])
def test_data_that_is_one_clip_is_consistent(method):
    """Fact 12: every term is 0, that of coherence and of features too, since both jumps lead to one point."""
    clip = BATCH.latents
    exact = lambda x, t, condition: (x - clip) / jnp.maximum(expand(t, x), 1e-9)  # noqa: E731

    class Teacher(Backbone):
        def __call__(self, x, t, condition):
            return exact(x, t, condition)

    nets = {"generator": exact, "target": exact, "teacher": Teacher(), "heads": LinearHeads(1.0)}
    unguided = replace(method, guidance=1.0)
    loss = unguided.loss if isinstance(method, DCMSemantic) else unguided.generator_loss
    values, metrics = loss(nets, BATCH, context())
    np.testing.assert_allclose(values, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["consistency_gap"], 0, atol=1e-4)
    np.testing.assert_allclose(metrics.get("matching", metrics.get("coherence")), 0, atol=1e-6)


def test_temporal_coherence():
    """Errors that all frames share cost nothing; one that grows by d a frame costs (k d)^2; a short clip has none."""
    ramp = jnp.broadcast_to(jnp.arange(5.0).reshape(1, 5, 1, 1, 1), (2, 5, 2, 2, 3))
    same = jnp.ones((2, 5, 2, 2, 3))
    np.testing.assert_allclose(temporal_coherence(same, 1), 0)
    np.testing.assert_allclose(temporal_coherence(0.1 * ramp + same, 3), 0.09, rtol=1e-5)
    np.testing.assert_allclose(temporal_coherence(0.1 * ramp, 1), 0.01, rtol=1e-5)
    np.testing.assert_array_equal(temporal_coherence(ramp, 5), np.zeros(2))
    np.testing.assert_allclose(temporal_coherence(ramp, 4), 16.0, rtol=1e-6)


def test_the_semantic_loss_of_known_jumps():
    """y - y* = c on every value: d(c), and no coherence term; with a ramp over frames, both, by its weight."""

    def loss(velocity, weight):
        nets = {"generator": velocity, "target": constant(0.0), "teacher": constant(0.0)}
        method = replace(SEMANTIC, coherence_weight=weight)
        return method.loss(nets, BATCH, context())

    times = SEMANTIC.semantic_times.phased(named_keys(KEY, "images", "t", "noise").t, SHAPE)
    length = np.asarray(times.end - times.t)
    values, metrics = loss(constant(2.0), 1.0)
    np.testing.assert_allclose(values, np.sqrt(4 * length**2 + 1e-6) - 1e-3, rtol=1e-4)
    np.testing.assert_allclose(metrics["coherence"], 0, atol=1e-9)
    ramp = lambda x, t, condition: jnp.broadcast_to(jnp.arange(2.0).reshape(1, 2, 1, 1, 1), x.shape)  # noqa: E731
    values, metrics = loss(ramp, 3.0)
    np.testing.assert_allclose(metrics["coherence"], length**2, rtol=1e-4)
    np.testing.assert_allclose(values, metrics["consistency"] + 3 * length**2, rtol=1e-4)


def drawn(shape=SHAPE):
    """Times and judge's noise that the detail expert's losses draw."""
    keys = named_keys(KEY, "images", "t", "noise", "judged")
    return DETAIL.detail_times.phased(keys.t, shape), jax.random.key_data(keys.judged)


def detail(velocity, gain=1.0, weight=0.01, bias=0.0, **changes):
    nets = {
        "generator": velocity,
        "target": constant(0.0),
        "teacher": Backbone(gain),
        "heads": LinearHeads(weight, bias, taps=(1, 3)),
    }
    method = replace(DETAIL, **changes)

    def loss(scale):
        own = lambda x, t, condition: scale * velocity(x, t, condition)  # noqa: E731
        values, metrics = method.generator_loss({**nets, "generator": own}, BATCH, context())
        return values.sum(), (values, metrics)

    grad, (values, metrics) = jax.grad(loss, has_aux=True)(jnp.float32(1.0))
    return float(grad), np.asarray(values), metrics


def test_feature_matching_of_a_known_difference():
    """y - y* = -v t, noised alike, leaves (1 - a) of that; the last layer reads 3 times it: 9 (1 - a)^2 v^2 t^2."""
    times, _ = drawn()
    t, kept = np.asarray(times.t), 1 - np.asarray(times.inside)
    only = {"adversarial_weight": 0.0, "matching_weight": 2.0}
    grad, values, metrics = detail(constant(0.5), gain=3.0, **only)
    expected = 9 * kept**2 * 0.25 * t**2
    np.testing.assert_allclose(metrics["matching"], expected, rtol=1e-4)
    distance = np.sqrt(0.25 * t**2 + 1e-6) - 1e-3
    np.testing.assert_allclose(values, distance + 2 * expected, rtol=1e-4)
    # The gradient of scale s at 1: of s^2, and of |s|.
    slope = 0.25 * t**2 / np.sqrt(0.25 * t**2 + 1e-6)
    assert grad == pytest.approx(float((slope + 2 * 2 * expected).sum()), rel=1e-4)


@pytest.mark.parametrize(("bias", "inside"), [(0.0, True), (50.0, False)])
def test_the_adversarial_term_of_a_linear_judge(bias, inside):
    """alpha relu(1 - D) and its gradient -alpha w (1 - a) / N; beyond the hinge both are 0."""
    times, _ = drawn()
    kept = 1 - np.asarray(times.inside)
    _, values, metrics = detail(constant(0.5), bias=bias, matching_weight=0.0)
    expected = 0.5 * 0.01 * kept / np.sqrt(BATCH.latents[0].size) if inside else np.zeros(B)
    np.testing.assert_allclose(metrics["adv_grad"], expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(metrics["adversarial"], 1 - metrics["fake_logit"][:, 0] if inside else 0, rtol=1e-5)
    np.testing.assert_allclose(values, metrics["consistency"] + 0.5 * metrics["adversarial"], rtol=1e-5)


@pytest.mark.parametrize("adversarial", ["ns_logistic", "rpgan"])
def test_other_adversarial_losses(adversarial):
    """A relative one compares with the target's logit: equal clips under the same noise have none to compare."""
    _, _, metrics = detail(constant(0.0), adversarial=adversarial, matching_weight=0.0)
    logit = np.asarray(metrics["fake_logit"])[:, 0]
    expected = np.full(B, np.log(2)) if adversarial == "rpgan" else np.log1p(np.exp(-logit))
    np.testing.assert_allclose(metrics["adversarial"], expected, rtol=1e-5)


def test_a_step_of_the_discriminator_tells_targets_from_jumps():
    networks = {"generator": constant(0.0), "target": constant(-40.0), "teacher": Backbone()}

    def loss(weight):
        values, metrics = DETAIL.discriminator_loss({**networks, "heads": LinearHeads(weight)}, BATCH, context())
        return values.mean(), metrics["logit_gap"]

    (_, before), grad = jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.0))
    assert float(grad) < 0, "targets lie higher than jumps: their weight has to rise"
    assert float(loss(-0.1 * grad)[1]) > float(before)


# Calls.


def check_jumps(found, low, high, end):
    """The noised clips of a range, the guided step, and both jumps to its end."""
    told, unguided, target, student = found.calls[:4]
    assert found.order[:4] == [
        ("teacher", "velocity", "own"),
        ("teacher", "velocity", "negative"),
        ("target", "velocity", "own"),
        ("generator", "velocity", "own"),
    ]
    for call in (unguided, student):
        np.testing.assert_array_equal(call.x, told.x)
        np.testing.assert_array_equal(call.t, told.t)
    raw, before = (unshift(call.t, 2.0) * 10 for call in (told, target))
    np.testing.assert_allclose(raw - before, 1, atol=1e-4)
    assert ((np.round(raw) > low) & (np.round(raw) <= high)).all()
    v = unguided.v + 6.0 * (told.v - unguided.v)
    np.testing.assert_allclose(target.x, told.x + (target.t - told.t).reshape(-1, 1, 1, 1, 1) * v, atol=1e-5)
    y, y_target = (call.x + (end - call.t).reshape(-1, 1, 1, 1, 1) * call.v for call in (student, target))
    return told, y, y_target


def distance(error):
    return np.asarray(pseudo_huber(jnp.asarray(error), 0.001)).mean((1, 2, 3, 4))


def test_calls_of_the_semantic_expert():
    found = record(SEMANTIC, SEMANTIC.loss, batch=LARGE)
    assert len(found.calls) == 4
    told, y, target = check_jumps(found, 6, 10, shift(0.6, 2.0))
    assert_independent(told.noise_from(DATA))
    error = y - target
    coherence = ((error[:, 1:] - error[:, :-1]) ** 2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(found.values, distance(error) + coherence, rtol=1e-3)


def test_calls_of_the_detail_expert():
    """The judge sees the target and the jump at one time with the same noise, and its last layer reads both."""
    found = record(DETAIL, DETAIL.generator_loss, batch=LARGE)
    told, y, target = check_jumps(found, 0, 6, 0.0)
    assert found.order[4:] == [
        ("teacher", "features", "own"),
        ("teacher", "readings", ""),
        ("teacher", "features", "own"),
        ("teacher", "readings", ""),
    ]
    real, read_real, fake, read_fake = found.calls[4:]
    for seen, read in ((real, read_real), (fake, read_fake)):
        np.testing.assert_array_equal(seen.x, read.x)
        np.testing.assert_array_equal(seen.t, read.t)
    check_shown(real, fake, target, y, told)
    alone = replace(DETAIL, adversarial_weight=0.0, matching_weight=0.0)
    np.testing.assert_allclose(record(alone, alone.generator_loss, batch=LARGE).values, distance(y - target), rtol=1e-3)


def test_calls_of_the_discriminator():
    found = record(DETAIL, DETAIL.discriminator_loss, batch=LARGE)
    told, y, target = check_jumps(found, 0, 6, 0.0)
    assert found.order[4:] == [("teacher", "features", "own")] * 2
    check_shown(*found.calls[4:], target, y, told)


def check_shown(real, fake, target, y, told):
    np.testing.assert_array_equal(real.t, fake.t)
    inside = unshift(real.t, 2.0) * 10
    np.testing.assert_allclose(inside, np.round(inside), atol=1e-4)
    assert (np.round(inside) >= 0).all() and (np.round(inside) < 6).all()
    rows = real.t > 0
    t = real.t[rows].reshape(-1, 1, 1, 1, 1)
    noises = [(call.x[rows] - (1 - t) * x[rows]) / t for call, x in ((real, target), (fake, y))]
    np.testing.assert_allclose(noises[0], noises[1], atol=2e-3)
    assert_independent(told.noise_from(DATA), noises[0])


@pytest.mark.parametrize("loss", ["generator_loss", "discriminator_loss"])
def test_pictures_are_withheld_from_all_networks_alike(loss):
    method = replace(DETAIL, image_dropout=0.5)
    seen = set()
    for step in range(4):
        found = record(method, getattr(method, loss), batch=LARGE, key=jax.random.key(step))
        calls = [call for call in found.calls if call.kind != "readings"]
        seen |= {pictures := calls[0].picture}
        assert all(call.picture == pictures for call in calls)
    assert len({picture for pictures in seen for picture in pictures}) == 2


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (DCMSemantic, {"split": 0}, r"DCMSemantic\.split is 0, expected 1 to points - 1 = 49"),
        (DCMDetail, {"split": 50}, r"DCMDetail\.split is 50, expected 1 to points - 1 = 49"),
        (DCMDetail, {"shift": 0.0}, r"shift is 0.0"),
        (DCMDetail, {"semantic_steps": 0}, r"DCMDetail\.semantic_steps is 0"),
        (DCMSemantic, {"detail_steps": 0}, r"DCMSemantic\.detail_steps is 0"),
        (
            DCMDetail,
            {"times": (1.0, 0.98, 0.0)},
            r"DCMDetail\.times are .*, expected some above and some below 0\.977636",
        ),
        (DCMDetail, {"times": (1.0, 0.5)}, r"times are \(1\.0, 0\.5\), expected numbers that fall from 1 to 0"),
        (DCMDetail, {"split": 49, "times": (0.995, 0.5, 0.0)}, r"expected some above and some below 1,"),
        (DCMSemantic, {"generator": "lora"}, r"DCMSemantic\.generator is 'lora', but .* set generator='full'"),
        (DCMSemantic, {"coherence_frames": 0}, r"DCMSemantic\.coherence_frames"),
        (DCMSemantic, {"coherence_weight": -1.0}, r"DCMSemantic\.coherence_weight"),
        (DCMSemantic, {"huber": -1.0}, r"DCMSemantic\.huber"),
        (DCMSemantic, {"guidance": -1.0}, r"DCMSemantic\.guidance"),
        (DCMDetail, {"matching_weight": -1.0}, r"DCMDetail\.matching_weight"),
        (DCMDetail, {"adversarial_weight": -1.0}, r"DCMDetail\.adversarial_weight"),
        (DCMDetail, {"ema": 1.0}, r"DCMDetail\.ema"),
    ],
)
def test_bad_fields_are_named(cls, fields, message):
    with pytest.raises(UserError, match=message):
        cls(**fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    """The code's values for Wan; both configs agree on what they share, and the second starts from the first."""
    first, second = (parse(module.get_config(preset)) for module in (dcm_semantic, dcm_detail))
    semantic, detail_ = make_method(first.method), make_method(second.method)
    for name in ("points", "shift", "split", "guidance", "times", "semantic_steps", "detail_steps", "image_dropout"):
        assert getattr(semantic, name) == getattr(detail_, name)
    assert semantic.student.sampler == detail_.student.sampler
    assert (
        second.previous.workdir == "{workdir}/../dcm_semantic"
        and f"dcm_semantic.py:{preset}" in second.previous.command
    )
    layers = {"tiny": 6, "t2v-1.3b-480p": 30}.get(preset, 40)
    heads = second.networks["heads"]
    assert heads["kind"] == "conv" and heads["taps"] == tuple(range(1, layers + 1, 2)) and not first.networks
    if preset != "tiny":
        assert semantic == DCMSemantic() and detail_ == DCMDetail()
        rates = [first.optimizers["generator"], second.optimizers["generator"], second.optimizers["heads"]]
        assert [(o.learning_rate, o.b1, o.b2) for o in rates] == [
            (1e-6, 0.9, 0.999),
            (5e-6, 0.9, 0.999),
            (1e-5, 0, 0.999),
        ]
        assert {(o.weight_decay, o.clip_norm) for o in rates} == {(1e-3, 1.0)}
        assert (first.steps, second.steps) == (1000, 1000)
