"""Small nonlinear networks, a batch, and records of every call, for the tests of all methods."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Metric

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.schedule import expand
from vpae_jax.methods.base import Context, all_views
from vpae_jax.types import Batch, Condition, Features, Memory

# Kinds of adversarial losses: of each method one in every run of the tests, and all in the long one.
ADVERSARIAL = ["rpgan", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("hinge", "ns_logistic"))]
B, C = 3, 4
SHAPE = (B, 2, 2, 2, C)
# This generator compiles three times faster than the default one; the draws only need to be independent.
KEY = jax.random.key(11, impl="unsafe_rbg")
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def make_batch(shape=SHAPE):
    b, *grid, c = shape
    condition = Condition(
        text=normal(b, 2, c), text_mask=jnp.ones((b, 2), bool), image=normal(b, 2, c), frames=normal(b, *grid, c)
    )
    return Batch(normal(*shape), condition, null_text=normal(2, c), null_mask=jnp.ones(2, bool))


BATCH = make_batch()


@dataclass(frozen=True)
class Net:
    """A nonlinear velocity network with hidden states; uses every part of the condition."""

    w: jax.Array

    def hidden(self, x, t, condition):
        c = x.shape[-1]
        mixed = jnp.tanh(x @ self.w[:c] + expand(t, x) * self.w[c])
        text, image = condition.text.mean(1), condition.image.mean((1, 2), keepdims=True)
        return mixed + text[:, None, None, None] + 0.1 * condition.frames + 0.1 * image[..., None, None]

    def __call__(self, x, t, condition):
        return self.hidden(x, t, condition) @ self.w[: x.shape[-1]]

    def features(self, x, t, condition, taps):
        tokens = self.hidden(x, t, condition).reshape(len(x), -1, x.shape[-1])
        grid = x.shape[1:4]
        return Features(taps=(tokens,) * len(taps), text=condition.text, text_mask=condition.text_mask, grid=grid)

    def velocity_and_features(self, x, t, condition, taps):
        return self(x, t, condition), self.features(x, t, condition, taps)

    def causal(self, chunks):
        return CausalNet(self, chunks)

    def readings(self, features, x, t):
        c = x.shape[-1]
        return tuple(jnp.tanh(tap @ self.w[:c] + t[:, None, None]).reshape(x.shape) for tap in features.taps)


@dataclass(frozen=True)
class CausalNet:
    """The same network for clips in chunks; its velocity also depends on the mean of what it remembers."""

    net: Net
    chunks: Chunks

    def seen(self, x, t, condition):
        """What is kept of each frame, [b, f, c]: of the frame and of how noisy it is."""
        return jnp.sin(2 * x.mean((2, 3)) @ self.net.w[: x.shape[-1]] - t[..., None]) + condition.text.mean(1)[:, None]

    def read(self, x, t, condition, before, count):
        """Velocity where sums over remembered frames are `before`, of so many."""
        c = x.shape[-1]
        mixed = jnp.tanh(x @ self.net.w[:c] + expand(t, x) * self.net.w[c]) + 0.1 * condition.frames
        text, image = condition.text.mean(1), condition.image.mean((1, 2))
        past = before / jnp.maximum(count, 1)
        mixed = mixed + text[:, None, None, None] + 0.1 * image.reshape(-1, 1, 1, 1, 1) + past[:, :, None, None]
        return mixed @ self.net.w[:c]

    def before(self, seen):
        """Sums over the frames that each frame's chunk remembers, and how many these are."""
        mask = np.zeros((seen.shape[1],) * 2, np.float32)
        for start, stop in self.chunks.spans(seen.shape[1]):
            for first, last, _ in self.chunks.remembered(start):
                mask[start:stop, first:last] = 1
        return jnp.einsum("fg,bgc->bfc", mask, seen), jnp.asarray(mask.sum(1))[None, :, None]

    def __call__(self, x, t, condition):
        return self.read(x, t, condition, *self.before(self.seen(x, t, condition)))

    def recall(self, x, t, condition, past):
        return self.read(x, t, condition, *self.before(past.keys[0, :, :, 0]))

    def remember(self, x, t, condition):
        kept = self.seen(x, t, condition)[None, :, :, None]
        return Memory(kept, kept, jnp.int32(x.shape[1]))

    def empty(self, x):
        zeros = jnp.zeros((1, *x.shape[:2], 1, x.shape[-1]))
        return Memory(zeros, zeros, jnp.int32(0))

    def step(self, x, t, condition, past):
        t = jnp.broadcast_to(t[:, None], x.shape[:2])
        kept = self.seen(x, t, condition)[None, :, :, None]
        before = jnp.broadcast_to(past.keys.sum((0, 2, 3))[:, None], (*x.shape[:2], x.shape[-1]))
        return self.read(x, t, condition, before, past.frames), (kept, kept)

    def memorize(self, past, pair, frames):
        keys = jax.lax.dynamic_update_slice(past.keys, pair[0], (0, 0, past.frames, 0, 0))
        return Memory(keys, keys, past.frames + frames)


@dataclass(frozen=True)
class Heads:
    """Nonlinear logits of a clip."""

    w: jax.Array
    logits: int = 1
    taps: tuple = (1,)

    def __call__(self, features):
        tokens = jnp.tanh(features.taps[0] @ self.w[: self.w.shape[1]])
        return tokens.mean(1)[:, : self.logits] * 3 + tokens.mean((1, 2))[:, None]


@dataclass(frozen=True)
class Decoder:
    """Latents to frames of their size: the first one, and one of the chosen latent frame."""

    w: jax.Array

    def decode_at(self, latents, frame):
        chosen = jax.lax.dynamic_index_in_dim(latents, frame, 1, keepdims=False)
        return jnp.tanh(jnp.stack([latents[:, 0], chosen], 1) @ self.w[: latents.shape[-1], :3])


@dataclass(frozen=True)
class Encoder:
    """Hidden states of frames, of which a token is a pixel."""

    w: jax.Array

    def features(self, video, place, taps):
        b, *grid, _ = video.shape
        tokens = jnp.sin(2 * video @ self.w[:3] + place).reshape(b, -1, self.w.shape[1])
        return Features((tokens,) * len(taps), None, None, grid=tuple(grid))


STAND_INS = {"heads": Heads, "vae": Decoder, "image_encoder": Encoder}


def made(cls, **fields):
    """A method whose clips may have any number of frames."""
    return cls(**fields, **({"chunks": Chunks(1)} if "chunks" in cls.__dataclass_fields__ else {}))


def weights_of(method, seed=0, c=C):
    """Random weights of every role, and of every average under `<role>_<average>`."""
    rng = np.random.default_rng(seed)
    names = [*method.roles, *(f"{name}_{kept}" for name, role in method.roles.items() for kept in role.averages)]
    return {name: jnp.asarray(0.6 * rng.normal(size=(c + 1, c)), jnp.float32) for name in names}


def nets_of(method, weights, logits=1):
    """Every view's network, as `train.roles` binds them: adapters add to what they sit on, constants are stopped."""
    result = {}
    for name, view in all_views(method).items():
        role = method.roles[view.role]
        w = weights[view.role if view.average is None else f"{view.role}_{view.average}"]
        if role.adapters is not None:
            w = weights[role.adapters.on] + view.scale * w
        w = jax.lax.stop_gradient(w) if view.constant else w
        made = STAND_INS.get(role.part, Net)
        result[name] = made(w, logits * role.outputs) if made is Heads else made(w)
    return result


def context(step=0, key=KEY):
    return Context(jnp.int32(step), key, jax.random.fold_in(key, 99))


def number(value):
    return float(value.compute() if isinstance(value, Metric) else jnp.mean(value))


def evaluate(method, loss, weights=None, batch=BATCH, key=KEY, step=0):
    """(loss of each clip, metrics, gradient of its mean with respect to all weights)."""
    weights = weights_of(method) if weights is None else weights

    def run(weights, step):
        values, metrics = loss(nets_of(method, weights), batch, context(step, key))
        return values.mean(), (values, metrics)

    grads, (values, metrics) = jax.jit(jax.grad(run, has_aux=True))(weights, jnp.int32(step))
    return np.asarray(values), {k: number(v) for k, v in metrics.items()}, jax.device_get(grads)


def touched(grads):
    return {name for name, grad in grads.items() if np.abs(grad).max() > 0}


def concrete(x):
    """The value of an array, also of one that is being differentiated."""
    return np.asarray(jax.lax.stop_gradient(x))


@dataclass
class Call:
    """One evaluation of a network.

    Attributes:
      net: the view's name.
      kind: "velocity", "features", "both", or "readings", of features that it gave before; "frames" of a decoder, and
        "looks" of an encoder of frames.
      x, t: what it was shown and told; a decoder is told a latent frame, and an encoder of frames a place.
      prompt: "own" or "negative"; "" for readings, frames and looks.
      picture: whether image and first frame were given, for each clip; empty likewise.
      v: the velocity that it gave, if it did.
    """

    net: str
    kind: str
    x: np.ndarray
    t: np.ndarray
    prompt: str
    picture: tuple
    v: np.ndarray | None

    def noise_from(self, x0):
        """The noise that makes this call's x of clean clips; t must be above 0."""
        t = expand(jnp.asarray(self.t), jnp.asarray(self.x))
        return np.asarray((self.x - (1 - t) * x0) / t)

    @property
    def x0(self):
        return np.asarray(self.x - expand(jnp.asarray(self.t), jnp.asarray(self.x)) * self.v)


@dataclass
class Recorder:
    """A network that writes down how it is called."""

    name: str
    net: Net
    batch: Batch
    calls: list

    def _note(self, kind, x, t, condition, v=None):
        texts = {"own": self.batch.condition.text, "negative": self.batch.unconditional.text}
        found = [name for name, text in texts.items() if np.array_equal(condition.text, text)]
        picture = tuple(
            bool(np.abs(np.asarray(f)).max() > 0 and np.abs(np.asarray(i)).max() > 0)
            for f, i in zip(condition.frames, condition.image, strict=True)
        )
        values = None if v is None else concrete(v)
        self.calls.append(Call(self.name, kind, concrete(x), concrete(t), *found, picture, values))

    def __call__(self, x, t, condition):
        v = self.net(x, t, condition)
        self._note("velocity", x, t, condition, v)
        return v

    def features(self, x, t, condition, taps):
        self._note("features", x, t, condition)
        return self.net.features(x, t, condition, taps)

    def velocity_and_features(self, x, t, condition, taps):
        self._note("both", x, t, condition, self.net(x, t, condition))
        return self.net.velocity_and_features(x, t, condition, taps)

    def causal(self, chunks):
        return CausalRecorder(self, chunks)

    def readings(self, features, x, t):
        self.calls.append(Call(self.name, "readings", concrete(x), concrete(t), "", (), None))
        return self.net.readings(features, x, t)


@dataclass
class CausalRecorder:
    """A causal network that writes down how it is called: "chunks" of whole clips, "recall", "remember", "step"."""

    recorder: Recorder
    chunks: Chunks

    @property
    def net(self):
        return self.recorder.net.causal(self.chunks)

    def __call__(self, x, t, condition):
        v = self.net(x, t, condition)
        self.recorder._note("chunks", x, t, condition, v)
        return v

    def recall(self, x, t, condition, past):
        v = self.net.recall(x, t, condition, past)
        self.recorder._note("recall", x, t, condition, v)
        return v

    def remember(self, x, t, condition):
        self.recorder._note("remember", x, t, condition)
        return self.net.remember(x, t, condition)

    def empty(self, x):
        return self.net.empty(x)

    def step(self, x, t, condition, past):
        v, pair = self.net.step(x, t, condition, past)
        self.recorder._note("step", x, t, condition, v)
        return v, pair

    def memorize(self, past, pair, frames):
        return self.net.memorize(past, pair, frames)


@dataclass
class PixelRecorder:
    """A decoder, or an encoder of frames, that writes down how it is called."""

    name: str
    net: Decoder | Encoder
    calls: list

    def decode_at(self, latents, frame):
        self.calls.append(Call(self.name, "frames", concrete(latents), concrete(frame), "", (), None))
        return self.net.decode_at(latents, frame)

    def features(self, video, place, taps):
        self.calls.append(Call(self.name, "looks", concrete(video), concrete(place), "", (), None))
        return self.net.features(video, place, taps)


@dataclass
class Record:
    """Every call of one evaluation of a loss.

    Attributes:
      calls: in their order.
      values: the loss of each clip.
      metrics: what it reports.
    """

    calls: list = field(default_factory=list)
    values: np.ndarray | None = None
    metrics: dict = field(default_factory=dict)

    @property
    def order(self):
        return [(call.net, call.kind, call.prompt) for call in self.calls]


def record(method, loss, batch=None, key=KEY, step=0, weights=None):
    """Evaluates a loss with concrete numbers and writes down every call. Inside `jax.vjp` a network is called with
    tracers, of which only the values are kept."""
    batch = make_batch((B, 3, 4, 4, C)) if batch is None else batch
    found, weights = Record(), weights_of(method) if weights is None else weights

    def recorded(name, net):
        if isinstance(net, Heads):
            return net
        if isinstance(net, Decoder | Encoder):
            return PixelRecorder(name, net, found.calls)
        return Recorder(name, net, batch, found.calls)

    nets = {name: recorded(name, net) for name, net in nets_of(method, weights).items()}
    values, *reported = loss(nets, batch, context(step, key))
    found.values = np.asarray(values)
    found.metrics = {name: number(value) for metrics in reported for name, value in metrics.items()}
    return found


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def logits_of(method, call, batch, output=1):
    """What the heads say, with `weights_of(method)`, of the hidden states that a call asked for: one of their outputs,
    counted from 1."""
    nets = nets_of(method, weights_of(method))
    seen = nets[call.net].features(jnp.asarray(call.x), jnp.asarray(call.t), batch.condition, nets["heads"].taps)
    return np.asarray(nets["heads"](seen))[:, output - 1]


def assert_independent(*noises):
    """Each is standard normal, differs between clips, and is unlike every other one."""
    flat = []
    for noise in noises:
        for clip in np.asarray(noise, np.float64):
            flat.append(clip.ravel())
    limit = 6 / np.sqrt(flat[0].size)
    for one in flat:
        assert abs(one.mean()) < limit and abs(one.std() - 1) < limit
    matrix = np.corrcoef(np.stack(flat))
    assert np.abs(matrix - np.eye(len(flat))).max() < limit


def batch_with(batch=BATCH, **changes):
    return replace(batch, **changes)


def assert_heads_learn(method, loss, clips):
    """One step of the heads, from logits near 0, raises real minus fake. There a logistic loss has the same slope for
    both, too."""
    for seed in range(3):
        weights = weights_of(method, seed)
        weights["heads"] *= 0.01

        def mean(heads, weights=weights):
            values, metrics = loss(nets_of(method, weights | {"heads": heads}), clips, context())
            return values.mean(), metrics["logit_gap"].mean()

        step = jax.jit(jax.value_and_grad(mean, has_aux=True))
        (_, before), grad = step(weights["heads"])
        (_, after), _ = step(weights["heads"] - 0.003 * grad)
        assert after > before


def drawn_keys(monkeypatch) -> list[bytes]:
    """The keys of everything that is drawn from now on, one after the other."""
    used = []

    def noted(draw):
        def call(key, *others):
            used.append(np.asarray(jax.random.key_data(draws.clip_keys(key, B))).tobytes())
            return draw(key, *others)

        return call

    # The others draw by the first two. A key that others come from by a split gives no numbers of its own.
    for name in ("normal", "uniform", "split"):
        monkeypatch.setattr(draws, name, noted(getattr(draws, name)))
    return used
