"""What the guard decides, and previews show, on a task and a network that are plain arithmetic."""

import dataclasses
import json
import re
import types
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.config import parse
from vpae_jax.configs import dcm_detail, dcm_semantic, encoders, pcm, phase1, phase2, teacher, vae
from vpae_jax.flow.draws import normal
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference import samplers
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.media import read_image
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Role, all_views
from vpae_jax.methods.dcm import DCMDetail
from vpae_jax.methods.vpae import PhaseTwo
from vpae_jax.metrics.base import Metric
from vpae_jax.run.experiment import make_scorer
from vpae_jax.run.generation import Generation, scores_of
from vpae_jax.run.guard import Guard, doubt, obstacle
from vpae_jax.run.previews import Previews
from vpae_jax.run.scoring import Scorer
from vpae_jax.run.student import Maker
from vpae_jax.tasks.base import HeldOut, TooFew, mode_parts, rows_of
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Condition

SHAPE = (2, 4, 4, 3)


class Arithmetic(Pipeline):
    """Latents are noise times the network's weight plus the text; pixels are their means in grey. A sampler that draws
    fresh noise adds it."""

    def __init__(self):
        object.__setattr__(self, "defaults", types.SimpleNamespace(fps=8.0))
        object.__setattr__(self, "samplers", [])

    def without_encoders(self):
        return self

    def sample(self, noise, condition, unconditional=None, sampler=None, key=None, denoiser=None):
        self.samplers.append((sampler, unconditional is not None, len(noise)))
        if sampler.solver == "consistency":
            noise = noise + normal(key, noise.shape)
        return noise * denoiser.weights["scale"] + condition.text[:, :1, :1, None, None]

    def decode(self, latents):
        samplers.check_finite(jnp.isfinite(latents).all())  # as a pipeline's does
        x = np.clip(np.asarray(latents) * 20 + 128, 0, 255)
        return jnp.asarray(np.repeat(np.repeat(x, 4, 2), 4, 3)[:, [0, 1, 1]].astype(np.uint8))


class Far:
    """Scores clips by how far their latents' deviation is from 1."""

    name, compared = "far", "distance"
    metrics = (
        Metric("distance", "distance", "less", "From a deviation of 1."),
        Metric("mean", "mean", "real", "Of latents."),
    )
    least: ClassVar = {}

    def batches(self, kind, pipeline, feed):
        raise NotImplementedError

    def write_model(self, workdir, preset, params, source, scheduler):
        raise NotImplementedError

    def held_out(self, pipeline, purpose, count):
        if count > 100:
            raise TooFew("only 100 clips")
        again = 0 if purpose == "preview" else 2
        parts = mode_parts(("t2v", "i2v"), count, again)
        rows = 2 * (count + again)
        seeds = tuple([*range(count), 1000, 1001][: count + again] * 2)
        condition = Condition(np.zeros((rows, 3, 2), np.float32), np.ones((rows, 3), bool))
        null = np.zeros((1, 3, 2), np.float32), np.ones((1, 3), bool)
        return HeldOut(purpose, parts, ("a clip",) * rows, condition, *null, SHAPE, seeds, ("",) * rows, 8.0)

    def with_real(self, held_out, pipeline, shelf=None):
        count = min(held_out.count, 8)
        return dataclasses.replace(
            held_out, clips={name: np.full((count, 3, 16, 16, 3), 60, np.uint8) for name in ("t2v", "i2v")}
        )

    def measure(self, clips, latents, purpose):
        assert purpose == "guard"
        return {"deviation": latents.std((1, 2, 3, 4)), "mean": latents.mean((1, 2, 3, 4))}

    def scores(self, held_out, made):
        result = {}
        for part in held_out.parts:
            own = rows_of(made, part.rows)
            result[f"{part.name}/distance"] = float(abs(own["deviation"].mean() - 1))
            result[f"{part.name}/mean"] = float(own["mean"].mean())
        return result

    def real(self, held_out):
        return {
            f"{part.name}/{name}": value
            for part in held_out.parts
            for name, value in (("distance", 0.1), ("mean", 0.0))
        }

    def intervals(self, held_out, made):
        raise NotImplementedError

    def curves(self, held_out, made):
        raise NotImplementedError

    def each(self, held_out, made):
        raise NotImplementedError


GRAPH = nnx.graphdef(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def denoiser(scale):
    return Denoiser(GRAPH, {"scale": jnp.float32(scale)})


def scorer(folder, clips=6, sampler=None, task=None):
    return Scorer(task or Far(), Arithmetic(), folder, clips, sampler or Sampler())


def guard(folder, task=None, **scores):
    """A guard that knows these scores, by step: `s0={...}`."""
    made = Guard(scorer(folder, task=task), folder)
    made.scorer.known |= {name.removeprefix("s"): values for name, values in scores.items()}
    return made


def log(folder, step, values):
    """A record as `train.metrics` writes it."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def read(folder):
    return json.loads((folder / "guard.json").read_text())


def test_better_weights_are_kept_and_everything_is_written_down(tmp_path, capsys):
    made = guard(tmp_path)
    recorded = made.scorer(0, denoiser(3.0))
    assert recorded["held_out/t2v/distance"] == pytest.approx(2, abs=0.3)
    decided = made.decide(40, denoiser(1.2), lambda: pytest.fail("the first score is known"))
    found = read(tmp_path)
    assert decided.kept and found["kept"] and found["task"] == "far" and found["clips"] == 6
    assert set(found["scores"]) == {"0", "40"}
    assert set(found["scores"]["40"]) == {f"{mode}/{name}" for mode in ("t2v", "i2v") for name in ("distance", "mean")}
    halves = found["scores"]["0"]
    assert found["before"] == pytest.approx((halves["t2v/distance"] + halves["i2v/distance"]) / 2)
    assert found["after"] < found["before"] and found["floor"] == pytest.approx(0.1)
    assert found["real"]["i2v/distance"] == 0.1
    assert found["reason"] == decided.reason and re.fullmatch(
        r"held-out distance fell from [12]\.\d to 0\.\d \(real clips: 0\.1\): the trained weights are kept",
        found["reason"],
    )
    *scored, said = capsys.readouterr().out.splitlines()
    assert said == f"guard: {found['reason']}"
    assert [line.partition(":")[0] for line in scored] == ["step 0", "step 40"]
    assert scored[0].endswith(f"t2v {found['scores']['0']['t2v/distance']:.1f}, i2v {found['before']:.1f}")


def test_worse_weights_are_turned_down_with_the_reason(tmp_path, capsys):
    assert not guard(tmp_path).decide(40, denoiser(9.0), lambda: denoiser(1.0)).kept
    assert not read(tmp_path)["kept"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert "held-out distance rose from" in line and "the weights that it started from are kept" in line
    assert "FOLDER --format=diffusers --refused` exports them" in line


def test_weights_that_are_no_worse_are_kept(tmp_path):
    """The mean must not rise; as good as before is good enough."""
    decided = guard(tmp_path).decide(40, denoiser(1.5), lambda: denoiser(1.5))
    assert decided.kept and re.match(r"held-out distance stayed at \d\.\d \(real clips", decided.reason)


def distances(t2v, i2v, **more):
    return {"t2v/distance": t2v, "i2v/distance": i2v, **more}


def test_one_mode_does_not_pay_for_the_others_gain(tmp_path):
    at_steps = {"10": (10.0, 9.0), "20": (10.0, 5.0), "30": (10.0, 6.12), "40": (10.0, 6.08)}
    made = guard(tmp_path, s0=distances(30.0, 4.0), **{f"s{step}": distances(*one) for step, one in at_steps.items()})
    ten, twenty, thirty, forty = (made.decide(int(step), denoiser(1.0), pytest.fail) for step in at_steps)
    assert not ten.kept
    assert ten.reason == (
        "held-out distance fell from 17.0 to 9.5 (real clips: 0.1), but rose from 4.0 to 9.0 in i2v: "
        "the weights that it started from are kept"
    )
    assert twenty.kept and "but rose" not in twenty.reason
    # Half as far again as 4, and what real clips are apart: 6.1.
    assert not thirty.kept and forty.kept


class Moving(Far):
    """Says how much clips move, too."""

    metrics = (*Far.metrics, Metric("motion", "motion", "real", "Of real clips' motion."))
    least: ClassVar = {"motion": 0.5}

    def real(self, held_out):
        return {**super().real(held_out), "t2v/motion": 1.2, "i2v/motion": 1.2}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ((1.0, 1.0), (1.0, 0.59), False),
        ((1.0, 1.0), (0.61, 0.61), True),
        ((0.4, 0.4), (0.45, 0.4), True),
        ((0.4, 0.4), (0.45, 0.3), False),
        ((None, None), (0.1, 0.1), True),
        ((1.0, 1.0), (None, None), True),
    ],
    ids=["frozen", "slower", "never moved", "even slower", "unknown at first", "not measured any more"],
)
def test_a_student_that_comes_to_rest_is_refused_though_the_distance_fell(tmp_path, before, after, kept):
    """Under half of real clips' 1.2, in either mode, and lower than at the start."""
    scores = []
    for distance, moved in ((20.0, before), (5.0, after)):
        motion = {f"{mode}/motion": one for mode, one in zip(("t2v", "i2v"), moved, strict=True) if one is not None}
        scores.append(distances(distance, distance, **motion))
    made = guard(tmp_path, Moving(), s0=scores[0], s50=scores[1])
    assert made.decide(50, denoiser(1.0), pytest.fail).kept is kept
    reason = read(tmp_path)["reason"]
    assert reason.startswith("held-out distance fell from 20.0 to 5.0 (real clips: 0.1)")
    if not kept:
        was, now = (before[1], after[1])
        assert f", but motion fell from {was:.2f} to {now:.2f} in i2v, under 0.5 of real clips' 1.20: " in reason
        assert reason.endswith("the weights that it started from are kept")


@pytest.mark.parametrize("first, last, kept", [(1.0, np.nan, False), (np.nan, 1.0, True), (np.inf, np.inf, False)])
def test_what_is_not_finite_is_worse_than_anything(tmp_path, first, last, kept):
    assert guard(tmp_path).decide(3, denoiser(last), lambda: denoiser(first)).kept is kept
    found = read(tmp_path)
    assert "are not finite" in found["reason"]
    assert (found["before"] is None) == (not np.isfinite(first)) and (found["after"] is None) == (not np.isfinite(last))


def test_a_run_at_its_first_step_forgets_what_an_earlier_one_left(tmp_path):
    made = guard(tmp_path)
    log(tmp_path, 0, made.scorer(0, denoiser(3.0)))
    made.decide(40, denoiser(1.2), pytest.fail)
    again = guard(tmp_path)
    assert again.scorer.done(0)
    again.begin()
    again.scorer.begin()
    assert not again.scorer.done(0) and not (tmp_path / "guard.json").exists()
    again.begin()


def test_scores_outlive_a_kill_but_not_another_number_of_clips(tmp_path):
    """They are those of the log."""
    made = scorer(tmp_path)
    log(tmp_path, 0, made(0, denoiser(2.0)))
    log(tmp_path, 0, {"generator/loss": 1.0})
    log(tmp_path, 10, made(10, denoiser(np.nan)))
    log(tmp_path, 20, {"generator/loss": 0.5})
    again = scorer(tmp_path)
    assert again.known == made.known and set(again.known) == {"0", "10"} and again.known["10"] == {}
    assert again.done(0) and again.done(10) and not again.done(20)
    assert scorer(tmp_path, clips=5).known == {}


def test_a_record_of_scores_stands_by_itself(tmp_path):
    record = scorer(tmp_path)(0, denoiser(1.0))
    names = {f"{mode}/{name}" for mode in ("t2v", "i2v") for name in ("distance", "mean")}
    assert record.keys() == {f"{of}/{name}" for of in ("held_out", "real") for name in names} | {"held_out_clips"}
    assert record["real/t2v/distance"] == 0.1 and record["held_out_clips"] == 6


def test_scores_that_are_not_finite_are_left_out(tmp_path):
    class Sharp(Far):
        def scores(self, held_out, made):
            return {**super().scores(held_out, made), "t2v/mean": np.inf, "i2v/mean": np.nan}

        def real(self, held_out):
            return {**super().real(held_out), "t2v/mean": np.nan}

    made = guard(tmp_path, Sharp())
    record = made.scorer(0, denoiser(1.0))
    assert {name for name in record if name.startswith("held_out/")} == {
        "held_out/t2v/distance",
        "held_out/i2v/distance",
    }
    made.decide(40, denoiser(1.0), pytest.fail)

    def refused(name):
        raise AssertionError(f"{name} is no number of JSON's")

    found = json.loads((tmp_path / "guard.json").read_text(), parse_constant=refused)
    assert set(found["scores"]["0"]) == {"t2v/distance", "i2v/distance"} and "t2v/mean" not in found["real"]


@pytest.mark.parametrize(
    ("enabled", "found", "said"),
    [
        (True, '{"kept": false, "reason": "it rose"}', "its guard rejected these weights (it rose)"),
        (True, '{"kept": true, "reason": "it fell"}', ""),
        (True, '{"scores": {}}', ""),
        (True, '{"kept": fal', "guard.json: cannot be read, so the guard's decision is unknown"),
        (False, '{"kept": false, "reason": "it rose"}', ""),
        (True, None, ""),
    ],
)
def test_whoever_starts_from_weights_that_were_turned_down_is_told(tmp_path, enabled, found, said):
    (tmp_path / "config.json").write_text(json.dumps({"guard": {"enabled": enabled}}))
    if found is not None:
        (tmp_path / "guard.json").write_text(found)
    assert said in doubt(tmp_path) and bool(said) == bool(doubt(tmp_path))


def test_too_few_clips_are_one_line_and_the_run_goes_on(tmp_path, capsys):
    def made(module, **changes):
        config = module.get_config()
        config.update({"score_clips": 101, **changes})
        given = parse(config)
        method = make_method(given.method)
        maker = Maker(RoleModels(method.roles, all_views(method), {}), method.student, {})
        found = make_scorer(given, method, maker, tmp_path, Far(), Arithmetic())
        return found, capsys.readouterr().out

    nothing = (None, None)
    assert made(phase2) == (
        nothing,
        "scores and guard: off, because only 100 clips; the run's last weights will be exported\n",
    )
    assert made(phase2, guard={"enabled": False}) == (nothing, "scores: off, because only 100 clips\n")
    assert made(phase2, guard={"enabled": False}, score_every=0) == (nothing, "")
    found, said = made(phase1, score_every=10)
    assert found == nothing and said.splitlines()[1] == "scores: off, because only 100 clips"
    (scores, judge), said = made(phase1, score_every=10, score_clips=6)
    assert (
        scores.clips == 6 and judge is None and said.startswith("guard: off, because the student starts from a teacher")
    )
    (scores, judge), said = made(phase2, score_every=0, score_clips=6)
    assert judge.scorer is scores and not said


def test_it_samples_as_the_student_is_sampled(tmp_path):
    sampler = Sampler.even(4, 3.0, 2.0)
    made = scorer(tmp_path, sampler=sampler)
    made.score(0, denoiser(1.0))
    assert {(how, guided) for how, guided, _ in made.generation.pipeline.samplers} == {(sampler, True)}


@pytest.mark.parametrize(
    "config, reason",
    [
        (vae, "the method trains no student"),
        (encoders, "the method trains no student"),
        (teacher, "starts from random weights"),
        (phase1, "starts from a teacher"),
        (phase2, None),
        (pcm, "starts from a teacher"),
        (dcm_semantic, "starts from a teacher"),
        (dcm_detail, None),
    ],
)
def test_it_judges_students_of_students(config, reason):
    found = obstacle(make_method(parse(config.get_config()).method))
    assert found is None if reason is None else reason in found


def test_it_looks_at_both_experts():
    """Of adapters that are fresh, at what they sit on."""
    assert obstacle(DCMDetail()) is None and obstacle(DCMDetail(generator="full")) is None
    for method in (DCMDetail(init="pretrained"), DCMDetail(init="pretrained", generator="full")):
        assert "starts from a teacher" in obstacle(method)

    class Mixed(DCMDetail):
        @property
        def roles(self):
            return {**super().roles, "generator": Role("fresh", True)}

    assert "starts from random weights" in obstacle(Mixed())
    assert "starts from a teacher" in obstacle(PhaseTwo(init="pretrained", generator="lora"))
    assert obstacle(PhaseTwo(generator="lora")) is None


def test_clips_do_not_depend_on_how_many_are_made_at_once():
    held_out = Far().held_out(None, "guard", 7)
    whole, parts = Generation(Arithmetic(), held_out, 64), Generation(Arithmetic(), held_out, 4)
    for sampler in (Sampler.even(2, 1.0, solver="consistency"), Sampler()):
        one, other = whole(denoiser(1.0), sampler), parts(denoiser(1.0), sampler)
        assert one.shape == (18, 3, 16, 16, 3)
        np.testing.assert_array_equal(one, other)
    assert {size for *_, size in parts.pipeline.samplers} == {4}, "the last batch is filled up"
    assert np.array_equal(one[0], one[9]), "the same noise in both modes"
    assert not np.array_equal(one[0], one[7]), "and other noise the second time"
    assert scores_of(Far(), held_out, whole.batches(denoiser(np.nan), Sampler())) == {}
    for spoilt in range(5):  # whichever of the batches it is
        made = list(parts.batches(denoiser(1.0), Sampler()))
        made[spoilt] = dataclasses.replace(made[spoilt], clips=None)
        assert scores_of(Far(), held_out, made) == {}


def test_guidance_moves_away_from_the_negative_prompt_with_the_same_picture():
    seen = []

    class Noted(Arithmetic):
        def sample(self, noise, condition, unconditional=None, sampler=None, key=None, denoiser=None):
            seen.append((condition, unconditional))
            return super().sample(noise, condition, unconditional, sampler, key, denoiser)

    asked = Far().held_out(None, "guard", 2)
    rng, rows = np.random.default_rng(0), len(asked)
    text, mask = rng.normal(size=(rows, 3, 2)).astype(np.float32), np.arange(3) < rng.integers(1, 3, (rows, 1))
    pictures = rng.normal(size=(rows, 4, 2)).astype(np.float32), rng.normal(size=(rows, *SHAPE)).astype(np.float32)
    null = np.full((1, 3, 2), 0.5, np.float32), np.ones((1, 3), bool)
    asked = dataclasses.replace(asked, condition=Condition(text, mask, *pictures), null_text=null[0], null_mask=null[1])
    Generation(Noted(), asked)(denoiser(1.0), Sampler(guidance=2.0))
    ((own, other),) = seen
    assert not np.array_equal(own.text_mask, other.text_mask)
    for name, expected in (("text", null[0]), ("text_mask", null[1])):
        np.testing.assert_array_equal(getattr(other, name), np.broadcast_to(expected, getattr(own, name).shape))
    for name in ("image", "frames"):
        np.testing.assert_array_equal(getattr(other, name), getattr(own, name))


def test_previews_show_held_out_clips_and_each_network(tmp_path):
    def networks(state):
        return {"generator": denoiser(state.params["scale"]), "generator, average": denoiser(0.5)}

    sampler, slow = Sampler(), Sampler.even(50, 1.0, 2.0)
    pipeline = Arithmetic()
    made = Previews(Far(), pipeline, tmp_path, networks, sampler, (denoiser(2.0), slow))
    assert [how for how, *_ in pipeline.samplers] == [slow], "the teacher is sampled once"
    for step, scale in ((0, 1.0), (10, 0.1)):
        written = made(step, TrainState(step, None, {"scale": scale}, {}, {}))
    assert written == {"previews": tmp_path / "previews" / f"step_{step:06d}.mp4"}
    names = {path.name for path in (tmp_path / "previews").iterdir()}
    assert names == {f"step_{step}.{kind}" for step in ("000000", "000010") for kind in ("mp4", "png")}
    first, last = (read_image(tmp_path / "previews" / f"step_{step}.png") for step in ("000000", "000010"))
    assert first.shape == (4 * 17 - 1, 8 * 3 * 17 - 1, 3), "data, teacher, generator, average; three frames of 8 clips"
    assert np.all(first[:16, :16] == 60)
    np.testing.assert_array_equal(first[:33], last[:33], err_msg="data and teacher stay")
    assert np.ptp(first[34:50, :16]) > 3 * np.ptp(last[34:50, :16])
    np.testing.assert_array_equal(first[51:], last[51:])
