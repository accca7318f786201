"""Clips that the generator's update makes and its learners are trained on, too (`method.clips=generator`)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    BATCH,
    KEY,
    B,
    context,
    drawn_keys,
    evaluate,
    made,
    make_batch,
    nets_of,
    record,
    touched,
    weights_of,
)

from vpae_jax.flow import draws
from vpae_jax.flow.draws import following_key
from vpae_jax.methods import METHODS
from vpae_jax.methods.base import Context
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo
from vpae_jax.types import UserError

LEARNING = {name: cls for name, cls in METHODS.items() if "clips" in cls.__dataclass_fields__}
CLIPS = make_batch((B, 3, 4, 4, 4))


def shared(cls, **fields):
    """A method, and its update that makes clips for others."""
    method = made(cls, clips="generator", **fields)
    (update,) = (update for update in method.updates if update.makes)
    return method, update


def with_clips(loss, clips):
    return lambda nets, batch, known: loss(nets, batch, replace(known, made=clips))


def test_who_learns_from_whom_is_data():
    assert set(LEARNING) >= {"vpae_phase1", "vpae_phase2", "dmd2", "add", "apt"}
    (one,) = PhaseOne(clips="generator").updates
    assert [(u.trains, u.repeats) for u in one.program] == [(("generator",), 1), (("fake_score",), 5)]
    heads, both = PhaseTwo(clips="generator", disc_updates=2, disc_warmup=7).updates
    assert (heads.trains, heads.ends, heads.makes) == (("heads",), 7, None) and both.starts == 7
    assert [(u.trains, u.repeats) for u in both.program] == [(("generator",), 1), (("heads",), 2)]
    assert len(PhaseTwo(clips="generator").updates) == 1
    with pytest.raises(UserError, match="set count='generator', or clips='own'"):
        PhaseOne(clips="generator", count="all")


@pytest.mark.parametrize("name", LEARNING)
def test_clips_are_made_once(name):
    """The generator is evaluated for no loss again, and pictures are withheld from all networks alike."""
    method, update = shared(LEARNING[name], image_dropout=0.5)
    with jax.disable_jit():
        clips, pictures = [], []

        def make(nets, batch, known):
            clips.append(update.makes(nets, batch, known))
            return clips[0].x0.mean((1, 2, 3, 4)), {}

        pictures += [call.picture for call in record(method, make, batch=CLIPS).calls]
        for number, one in enumerate(update.program):
            key = jax.random.fold_in(KEY, number)
            found = record(method, with_clips(one.loss, clips[0]), batch=CLIPS, key=key)
            others = {"generator", "simulator"} if name != "asd" else {"generator"}  # which compares with more steps
            assert not others & {call.net for call in found.calls if call.kind != "features"}
            pictures += [call.picture for call in found.calls if call.kind != "readings"]
    assert pictures == [pictures[0]] * len(pictures)


def test_the_fake_score_learns_the_clips_it_is_given():
    """Eq. 2 on these clips, with the time and noise of its own key."""
    method, update = shared(PhaseOne)
    clips = update.makes(nets_of(method, weights_of(method)), CLIPS, context())
    noises = []
    for seed in range(2):
        loss = with_clips(update.then[0].loss, clips)
        found = record(method, loss, batch=CLIPS, key=jax.random.key(seed))
        (call,) = found.calls
        noises.append(call.noise_from(clips.x0))
        error = call.v - (noises[-1] - np.asarray(clips.x0))
        np.testing.assert_allclose(found.values, (error**2).mean((1, 2, 3, 4)), rtol=1e-4)
    assert np.abs(noises[0] - noises[1]).max() > 1


@pytest.mark.parametrize("cls", [PhaseOne, PhaseTwo])
def test_clips_are_differentiated_in_the_generators_update_alone(cls):
    method, update = shared(cls)

    def generator_loss(nets, batch, known):
        return update.loss(nets, batch, replace(known, made=update.makes(nets, batch, known)))

    assert touched(evaluate(method, generator_loss)[2]) == {"generator"}
    clips = update.makes(nets_of(method, weights_of(method)), BATCH, context())
    (learner,) = update.then
    # The teacher is what the fake score's adapters sit on.
    assert touched(evaluate(method, with_clips(learner.loss, clips))[2]) - {"teacher"} == set(learner.trains)


@pytest.mark.parametrize("name", LEARNING)
def test_no_key_serves_two_draws_of_a_program(name, monkeypatch):
    """Withheld pictures aside, which are the same for all."""
    used = drawn_keys(monkeypatch)
    method, update = shared(LEARNING[name])

    def known(key):
        return Context(jnp.int32(0), draws.clip_keys(key, B), draws.batch_key(key))

    key, nets = jax.random.key(5), nets_of(method, weights_of(method))
    if hasattr(method, "last"):  # one draw, however often a loss asks for it
        chosen = method.last(known(key))
        monkeypatch.setattr(type(method), "last", lambda self, context: chosen)
        used.clear()
    with jax.disable_jit():
        clips = update.makes(nets, BATCH, known(key))
        update.loss(nets, BATCH, replace(known(key), made=clips))
        for number, one in enumerate(update.then):
            for repeat in range(2):
                one.loss(nets, BATCH, replace(known(following_key(key, number, repeat)), made=clips))
    assert used and len(set(used)) == len(used)
