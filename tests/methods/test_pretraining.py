"""Flow matching, the autoencoder's and the encoders' losses."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import context

from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.autoencoder import Autoencoder
from vpae_jax.methods.base import Adapters, Average, Role
from vpae_jax.methods.common import drop_conditions, named_keys
from vpae_jax.methods.contrastive import Contrastive
from vpae_jax.methods.flow_matching import FlowMatching
from vpae_jax.types import Batch, CaptionedFrames, Condition, PixelBatch, UserError

B, F, H, W, C = 4, 2, 3, 3, 5


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    condition = Condition(
        text=normal(B, 6, 7),
        text_mask=jnp.ones((B, 6), bool),
        image=normal(B, 3, 8),
        frames=normal(B, F, H, W, 20),
    )
    return Batch(
        latents=normal(B, F, H, W, C),
        condition=condition,
        null_text=normal(6, 7),
        null_mask=jnp.arange(6) < 2,
    )


def test_named_keys_are_distinct():
    keys = named_keys(jax.random.key(0), "a", "b")
    assert (jax.random.key_data(keys.a) != jax.random.key_data(keys.b)).any()
    with pytest.raises(ValueError, match="repeated"):
        named_keys(jax.random.key(0), "a", "a")


def test_flow_matching_is_zero_for_the_right_velocity(batch):
    """For data that is always its batch's clip the exact velocity is (x - x0) / t."""
    method = FlowMatching(t=TimeDistribution(low=0.5))
    perfect = lambda x, t, condition: (x - batch.latents) / expand(t, x)  # noqa: E731
    loss, metrics = method.loss({"generator": perfect}, batch, context(key=jax.random.key(1)))
    assert loss.shape == (B,)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    off = lambda x, t, condition: perfect(x, t, condition) + 0.5  # noqa: E731
    np.testing.assert_allclose(
        method.loss({"generator": off}, batch, context(key=jax.random.key(1)))[0], 0.25, rtol=1e-5
    )
    assert float(metrics["x0_error"]) < 1e-9


@pytest.mark.parametrize(("text", "image"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_dropping_conditions(batch, text, image):
    got = drop_conditions(batch, jax.random.key(0), text, image)
    want = batch.unconditional if text else batch.condition
    np.testing.assert_array_equal(got.text, want.text)
    np.testing.assert_array_equal(got.text_mask, want.text_mask)
    for name in ("image", "frames"):
        np.testing.assert_array_equal(getattr(got, name), 0 if image else getattr(batch.condition, name))


def test_dropping_is_per_example_and_both_image_inputs_go_together(batch):
    dropped = [drop_conditions(batch, jax.random.key(i), 0.5, 0.5) for i in range(40)]
    gone = np.array([[(d.image[i] == 0).all() for i in range(B)] for d in dropped])
    frames = np.array([[(d.frames[i] == 0).all() for i in range(B)] for d in dropped])
    text = np.array([[(d.text[i] == batch.null_text).all() for i in range(B)] for d in dropped])
    np.testing.assert_array_equal(gone, frames)
    assert 0.35 < gone.mean() < 0.65 and 0.35 < text.mean() < 0.65
    assert abs(np.corrcoef(gone.ravel(), text.ravel())[0, 1]) < 0.3


@pytest.mark.parametrize(("text", "image"), [(1.0, 0.0), (0.0, 1.0)])
def test_flow_matching_drops_prompts_and_pictures_as_often_as_is_set_for_each(batch, text, image):
    seen = []

    def network(x, t, condition):
        seen.append(condition)
        return x

    FlowMatching(text_dropout=text, image_dropout=image).loss({"generator": network}, batch, context())
    ((found,), own) = seen, batch.condition
    np.testing.assert_array_equal(found.text, batch.unconditional.text if text else own.text)
    np.testing.assert_array_equal(found.image, 0 * own.image if image else own.image)
    np.testing.assert_array_equal(found.frames, 0 * own.frames if image else own.frames)


def test_text_to_video_conditions_stay_none(batch):
    plain = dataclasses.replace(batch, condition=dataclasses.replace(batch.condition, image=None, frames=None))
    got = drop_conditions(plain, jax.random.key(0), 1.0, 1.0)
    assert got.image is None and got.frames is None


@dataclass(frozen=True)
class Coder:
    """Moments and reconstruction fixed in advance; remembers nothing."""

    mean: float
    logvar: float
    offset: float

    def moments(self, video):
        shape = (video.shape[0], 1, 2, 2, 500)
        return jnp.full(shape, self.mean), jnp.full(shape, self.logvar)

    def decode_raw(self, z):
        return jnp.full((z.shape[0], 5, 8, 8, 3), 0.25 + self.offset)


def test_autoencoder_terms():
    batch = PixelBatch(video=jnp.full((2, 5, 8, 8, 3), 0.25))
    loss, _ = Autoencoder(kl_weight=1.0).loss({"vae": Coder(0.0, 0.0, 0.0)}, batch, context(key=jax.random.key(0)))
    np.testing.assert_allclose(loss, 0, atol=1e-7)
    loss, metrics = Autoencoder(l1=2.0, l2=3.0, kl_weight=0.1).loss(
        {"vae": Coder(1.0, 0.5, 0.5)}, batch, context(key=jax.random.key(0))
    )
    kl = 0.5 * (1 + np.exp(0.5) - 1 - 0.5)
    np.testing.assert_allclose(loss, 2 * 0.5 + 3 * 0.25 + 0.1 * kl, rtol=1e-5)
    assert float(metrics["psnr"]) == pytest.approx(10 * np.log10(4 / 0.25), rel=1e-5)


def test_autoencoder_reparameterises():
    class Sampler(Coder):
        def decode_raw(self, z):
            return jnp.broadcast_to(z.mean((1, 2, 3, 4)).reshape(-1, 1, 1, 1, 1), (z.shape[0], 5, 8, 8, 3))

    batch = PixelBatch(video=jnp.zeros((2, 5, 8, 8, 3)))

    def loss(mean, key):
        class Shifted(Sampler):
            def moments(self, video):
                m, s = super().moments(video)
                return m + mean, s

        return (
            Autoencoder(kl_weight=0.0, l1=0.0).loss({"vae": Shifted(0.0, 0.0, 0.0)}, batch, context(key=key))[0].mean()
        )

    a, b = (float(loss(jnp.float32(0.5), jax.random.key(i))) for i in (0, 1))
    assert a != b
    # d/dm mean (m + n)^2 is about 2 m: the gradient passes through the sample.
    assert float(jax.grad(loss)(jnp.float32(0.5), jax.random.key(0))) == pytest.approx(1.0, abs=0.2)


def frames_with(ids):
    ids = jnp.asarray(ids)
    frame = jnp.zeros((len(ids), 4, 4, 3))
    return CaptionedFrames(first=frame, last=frame, ids=ids, mask=jnp.ones(ids.shape, bool))


def test_contrastive_values():
    """Orthogonal embeddings: cross-entropy log(1 + (n - 1) e^-scale); equal embeddings: log n."""
    ids = [[1, 2], [1, 3], [4, 4]]
    scale = jnp.float32(np.log(2.0))
    sharp = lambda batch: (5.0 * jnp.eye(3), jnp.eye(3), scale)  # noqa: E731
    loss, metrics = Contrastive().loss({"encoders": sharp}, frames_with(ids), context())
    np.testing.assert_allclose(loss, np.log(1 + 2 * np.exp(-2.0)), rtol=1e-5)
    assert float(metrics["accuracy"]) == 1
    blind = lambda batch: (jnp.ones((3, 4)), jnp.ones((3, 4)), scale)  # noqa: E731
    loss, _ = Contrastive().loss({"encoders": blind}, frames_with(ids), context())
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-5)


def test_identical_captions_are_not_negatives():
    scale = jnp.float32(0.0)
    blind = lambda batch: (jnp.ones((3, 4)), jnp.ones((3, 4)), scale)  # noqa: E731
    loss, _ = Contrastive().loss({"encoders": blind}, frames_with([[1, 2], [1, 2], [3, 3]]), context())
    np.testing.assert_allclose(loss, [np.log(2), np.log(2), np.log(3)], rtol=1e-5)

    def mean_loss(embeddings):
        pair = lambda batch: (embeddings, embeddings, scale)  # noqa: E731
        return Contrastive().loss({"encoders": pair}, frames_with([[1, 2], [1, 2], [3, 3]]), context())[0].mean()

    grads = jax.grad(mean_loss)(jnp.eye(3))
    assert np.isfinite(grads).all()


def test_pairs_are_compared_over_the_whole_batch():
    """In parts a clip would meet fewer captions, so such a batch is not taken apart."""
    assert Contrastive.whole_batch and not FlowMatching.whole_batch and not Autoencoder.whole_batch


def test_the_teacher_is_sampled_as_its_method_says():
    method = FlowMatching(steps=4, shift=2.0, guidance=3.0)
    assert method.student.sampler == Sampler.even(4, 2.0, 3.0) and method.student.average == "ema"
    assert FlowMatching(ema=0.0).student.average is None
    for wrong in ({"steps": 0}, {"shift": 0.0}, {"guidance": 0.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            FlowMatching(**wrong)


def test_a_teacher_may_be_trained_by_adapters_alone(batch):
    method = FlowMatching(init="pretrained", generator="lora", generator_rank=4, generator_scale=2.0, ema=0.9)
    generator, teacher = method.roles["generator"], method.roles["teacher"]
    assert generator.adapters == Adapters("teacher", 4, 8.0) and generator.start == "fresh" and generator.trains
    assert teacher == Role("pretrained") and set(generator.averages) == {"ema"}
    assert method.updates[0].trains == ("generator",) and method.student.view == "generator"
    again = dataclasses.replace(method, init="previous")
    assert again.roles["generator"].start == "previous" and again.roles["teacher"] == Role("pretrained")
    for init in ("pretrained", "fresh", "previous"):
        assert FlowMatching(init=init).roles == {"generator": Role(init, True, averages={"ema": Average(0.999)})}


def test_scale_is_bounded():
    wide = lambda batch: (jnp.eye(2), jnp.eye(2), jnp.float32(50.0))  # noqa: E731
    _, metrics = Contrastive(max_scale=100.0).loss({"encoders": wide}, frames_with([[1], [2]]), context())
    assert float(metrics["scale"]) == 100


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FlowMatching(text_dropout=1.5), "text_dropout"),
        (lambda: FlowMatching(image_dropout=-0.1), "image_dropout"),
        (lambda: FlowMatching(ema=1.0), "ema"),
        (lambda: FlowMatching(generator_rank=0), "FlowMatching.generator_rank is 0"),
        (lambda: FlowMatching(generator="lora"), "generator is 'lora', but init is 'fresh', .*; set init='pretrained'"),
        (lambda: Autoencoder(kl_weight=-1.0), "kl_weight"),
        (lambda: Contrastive(max_scale=0.0), "max_scale"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(UserError, match=field):
        make()
