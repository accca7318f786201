"""How causal students begin: what the losses show the network, closed forms, and a teacher's path."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_independent, context, evaluate, make_batch, nets_of, record, touched, weights_of

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.solvers import euler
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.causal_init import CausalInit, CausalODE, of_frames
from vpae_jax.types import UserError

CLIPS = make_batch((3, 4, 6, 6, 4))
DATA = np.asarray(CLIPS.latents)
ANY = TimeDistribution(low=0.2, high=0.9)


def velocity(call, noise):
    """The flow-matching error of a call's velocity."""
    return ((call.v - (noise - DATA)) ** 2).mean((1, 2, 3, 4))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["teacher_forcing", "diffusion_forcing"])
def test_chunks_are_noised_each_to_a_time_of_its_own(kind, size):
    """The clean clip is remembered at t = 0 where it forces; in the other kind nothing but the noised clip is seen."""
    method = CausalInit(kind=kind, chunks=Chunks(size), t=ANY, text_dropout=0.0)
    found = record(method, method.loss, batch=CLIPS)
    *before, call = found.calls
    if kind == "teacher_forcing":
        (seen,) = before
        assert (seen.net, seen.kind, call.kind) == ("generator", "remember", "recall")
        np.testing.assert_array_equal(seen.x, DATA)
        np.testing.assert_array_equal(seen.t, 0)
    else:
        assert not before and call.kind == "chunks"
    assert call.t.shape == (3, 4) and call.t.min() > 0.2 and call.t.max() < 0.9
    chunks = call.t.reshape(3, -1, size)
    assert (chunks == chunks[:, :, :1]).all() and len(np.unique(call.t)) == 3 * 4 // size
    noise = call.noise_from(DATA)
    assert_independent(noise)
    np.testing.assert_allclose(found.values, velocity(call, noise), rtol=1e-4)


def test_a_network_that_knows_the_velocity_has_no_loss():
    """Of data that is one clip, v(x, t) = (x - c) / t, whatever is remembered."""

    class Exact:
        def causal(self, chunks):
            self.chunks = chunks
            return self

        def remember(self, x, t, condition):
            return None

        def recall(self, x, t, condition, past):
            return self(x, t, condition)

        def __call__(self, x, t, condition):
            return (x - CLIPS.latents) / t[..., None, None, None]

    for kind in ("teacher_forcing", "diffusion_forcing"):
        method = CausalInit(kind=kind, chunks=Chunks(2), t=ANY)
        values, _ = method.loss({"generator": Exact()}, CLIPS, context())
        np.testing.assert_allclose(values, 0, atol=1e-6)


def test_the_student_learns_the_end_of_the_teachers_path():
    """From one of its own times on the path, drawn for each chunk; the path is Euler's, guided."""
    method = CausalODE(chunks=Chunks(2), steps=2, shift=1.0, ode_steps=6, guidance=3.0)
    with jax.disable_jit():
        found = record(method, method.loss, batch=replace(CLIPS, latents=None, size=CLIPS.shape[1:]))
    *path, call = found.calls
    assert [(c.net, c.prompt) for c in path] == [("teacher", "own"), ("teacher", "negative")] * 6
    np.testing.assert_allclose([c.t[0] for c in path[::2]], np.linspace(1, 0, 7)[:-1], rtol=1e-6)
    noise = jnp.asarray(path[0].x)
    assert_independent(noise)
    teacher = nets_of(method, weights_of(method))["teacher"]

    def guided(x, t):
        own, other = (teacher(x, t, c) for c in (CLIPS.condition, CLIPS.unconditional))
        return other + 3.0 * (own - other)

    end = euler(guided, noise, np.linspace(1, 0, 7, dtype=np.float32))
    states = {1.0: path[0].x, 0.5: path[6].x}
    assert (call.net, call.kind) == ("generator", "chunks") and set(np.unique(call.t)) <= set(states)
    for clip in range(3):
        for frame in range(4):
            assert call.t[clip, frame] == call.t[clip, frame // 2 * 2]
            np.testing.assert_array_equal(call.x[clip, frame], states[float(call.t[clip, frame])][clip, frame])
    np.testing.assert_allclose(found.values, ((call.x0 - end) ** 2).mean((1, 2, 3, 4)), rtol=1e-4)


def test_its_times_are_drawn_evenly():
    method, drawn = CausalODE(chunks=Chunks(1), steps=2, shift=1.0, ode_steps=2), []
    for key in map(jax.random.key, range(20)):
        with jax.disable_jit():
            drawn += list(record(method, method.loss, batch=CLIPS, key=key).calls[-1].t.ravel())
    assert np.mean(np.asarray(drawn) == 1.0) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("method", [CausalInit(chunks=Chunks(2), t=ANY), CausalODE(chunks=Chunks(2), ode_steps=4)])
def test_gradients_reach_the_generator_alone(method):
    assert touched(evaluate(method, method.loss, batch=CLIPS)[2]) == {"generator"}


def test_how_the_results_are_sampled():
    init, ode = CausalInit(steps=20, shift=3.0, guidance=4.0), CausalODE(shift=1.0)
    assert init.student.sampler.chunks == Chunks() and init.student.sampler.evaluations == 40
    assert ode.student.sampler == Sampler("consistency", (1.0, 0.75, 0.5, 0.25, 0.0), chunks=Chunks())
    assert "teacher" not in init.roles and CausalInit(generator="lora").roles["teacher"].start == "pretrained"
    assert init.needs_clips and not ode.needs_clips


def test_what_chunks_have_frames_have():
    values = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(of_frames(Chunks(2, first=1), values, 5), [[1, 2, 2, 3, 3]])


def test_the_students_times_lie_on_the_path():
    with pytest.raises(UserError, match=r"CausalODE.ode_steps is 10, not a multiple of steps \(4\)"):
        CausalODE(ode_steps=10)
