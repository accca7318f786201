"""How a model is sampled, as a file: Diffusers' schedulers take from it the very steps that ours takes."""

import dataclasses
import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vpae_jax.flow import draws, solvers
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import shifted_times
from vpae_jax.types import UserError
from vpae_jax.weights import grids
from vpae_jax.weights.settings import Defaults, Scheduler, read_defaults, read_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
CLASSES = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "consistency": diffusers.FlowMatchLCMScheduler,
}
SHAPE = (1, 2, 4)


def write(folder, values):
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return folder


def drawn(steps):
    """The consistency sampler's fresh noise, one a step."""
    keys = draws.split(draws.clip_keys(jax.random.key(7), len(start())), steps)
    return [np.asarray(draws.normal(key, SHAPE)) for key in keys]


def theirs_sample(monkeypatch, scheduler, steps, x):
    """What a Wan pipeline does with a scheduler of Diffusers."""
    noise = iter(drawn(steps))
    module = "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: torch.tensor(next(noise)))
    scheduler.set_timesteps(steps, device="cpu")
    x = torch.tensor(x)
    for t in scheduler.timesteps:
        v = torch.sin(3 * x) + t / 1000
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x.numpy()


def our_sample(sampler, x):
    def velocity(x, t):
        return jnp.sin(3 * x) + t[0]

    x, times = jnp.asarray(x), np.asarray(sampler.times)
    if sampler.solver == "unipc":
        return np.asarray(solvers.unipc(velocity, x, times, solvers.unipc_times(times)))
    if sampler.solver == "consistency":
        return np.asarray(solvers.consistency(velocity, x, times, jax.random.key(7)))
    return np.asarray(solvers.euler(velocity, x, times))


def start():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


EVEN = [
    *(Sampler.even(steps, shift, 1.0, "unipc") for steps, shift in [(1, 3.0), (4, 5.0), (50, 3.0)]),
    *(Sampler.even(steps, shift) for steps, shift in [(1, 1.0), (1, 5.0), (2, 8.0), (4, 1.0), (50, 5.0)]),
    *(Sampler.even(steps, shift) for steps, shift in [(3, 0.4), (8, 17.0), (100, 12.0)]),
    *(Sampler.even(steps, shift, 1.0, "consistency") for steps, shift in [(1, 3.0), (2, 1.0), (4, 5.0), (8, 8.0)]),
]
# Lists that are not even, but that fields of Diffusers' schedulers make.
BENT = [Sampler("euler", (1.0, 0.6, 0.3, 0.0)), Sampler("consistency", (1.0, 0.9, 0.2, 0.0))]
# Lists that they do not.
BOUND = [
    Sampler("euler", (1.0, 0.9, 0.4, 0.3, 0.0)),
    Sampler("consistency", (1.0, 0.75, 0.3, 0.2, 0.0)),
    Sampler("unipc", (0.999, 0.7, 0.5, 0.1, 0.0)),
    Sampler.even(50, 40.0),
]


def name(sampler):
    return f"{sampler.solver}-{sampler.steps}"


@pytest.mark.parametrize("sampler", [*EVEN, *BENT], ids=name)
def test_diffusers_takes_our_steps_by_itself(tmp_path, monkeypatch, sampler):
    scheduler = Scheduler.of(sampler, 3.0)
    folder = write(tmp_path / "model", scheduler.to_json())
    assert read_scheduler(folder) == scheduler and scheduler.bound_times == ()
    assert scheduler.sampler().solver == sampler.solver and scheduler.guidance == sampler.guidance == 1
    np.testing.assert_allclose(scheduler.sampler().times, sampler.times, atol=1e-6)
    theirs = CLASSES[sampler.solver].from_pretrained(folder / "scheduler")
    found = theirs_sample(monkeypatch, theirs, sampler.steps, start())
    np.testing.assert_allclose(theirs.sigmas.numpy(), sampler.times, atol=1e-6)
    if sampler.solver != "unipc":
        np.testing.assert_allclose(theirs.timesteps.numpy(), 1000 * np.asarray(sampler.times[:-1]), atol=1e-3)
    np.testing.assert_allclose(found, our_sample(scheduler.sampler(), start()), atol=1e-5)


@pytest.mark.parametrize("sampler", BOUND, ids=name)
def test_other_times_are_kept_and_can_be_bound(tmp_path, monkeypatch, sampler):
    scheduler = Scheduler.of(sampler, 3.0)
    folder = write(tmp_path / "model", scheduler.to_json())
    assert read_scheduler(folder) == scheduler
    np.testing.assert_allclose(scheduler.sampler().times, sampler.times, atol=1e-6)
    theirs = CLASSES[sampler.solver].from_pretrained(folder / "scheduler")
    by_itself = theirs_sample(monkeypatch, theirs, sampler.steps, start())
    bound = np.array(scheduler.bound_times)
    theirs.set_timesteps = functools.partial(theirs.set_timesteps, sigmas=bound)
    found, expected = theirs_sample(monkeypatch, theirs, sampler.steps, start()), our_sample(sampler, start())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(by_itself - expected).max() > 1e-3


def test_shifts_are_found_in_times():
    assert Scheduler.of(Sampler.even(4, 5.0)) == Scheduler("euler", 5.0, 4, 1.0)
    assert Scheduler.of(Sampler.even(40, 3.0, 6.0, "unipc"), 7.0) == Scheduler("unipc", 3.0, 40, 6.0)
    for solver in ("euler", "unipc", "consistency"):  # of one step there is nothing to see
        assert Scheduler.of(Sampler.even(1, 3.0, 1.0, solver), 7.0) == Scheduler(solver, 7.0, 1, 1.0)
    listed = Scheduler.of(BOUND[0], 7.0)
    assert listed == Scheduler("euler", 7.0, 4, 1.0, BOUND[0].times)
    # Wan's own grid starts from .999: nearer to the even one than a whole thousandth, which is what UniPC tells.
    wan = tuple(0.999 * float(t) for t in shifted_times(4, 1.0))
    near = Scheduler.of(Sampler("euler", wan))
    assert near.times == () and np.allclose(near.sampler().times, wan, atol=1.01e-3)
    far = tuple(0.996 * float(t) for t in shifted_times(4, 1.0))
    assert Scheduler.of(Sampler("euler", far)).times == far


def test_a_sampler_that_differs_in_what_is_given():
    even, listed = Scheduler("euler", 3.0, 4, 1.0), Scheduler.of(BOUND[1], 5.0)
    assert even.sampler() == Sampler.even(4, 3.0)
    assert even.sampler(8, 2.0) == Sampler.even(8, 3.0, 2.0)
    assert even.sampler(shift=7.0) == Sampler.even(4, 7.0)
    assert even.sampler(solver="unipc") == Sampler.even(4, 3.0, 1.0, "unipc")
    assert listed.sampler() == BOUND[1] == listed.sampler(4)
    assert listed.sampler(guidance=2.0) == Sampler("consistency", BOUND[1].times, 2.0)
    assert listed.sampler(solver="euler") == Sampler("euler", BOUND[1].times)
    assert listed.sampler(8) == Sampler.even(8, 5.0, 1.0, "consistency")
    assert listed.sampler(shift=2.0) == Sampler.even(4, 2.0, 1.0, "consistency")
    assert listed.sampler(solver="unipc") == Sampler.even(4, 5.0, 1.0, "unipc")


def test_one_step_of_a_student_for_several_in_diffusers(tmp_path, monkeypatch):
    """As the docstring has it."""
    made = CLASSES["consistency"].from_config(Scheduler("consistency", 5.0, 4, 1.0).to_json())
    made = type(made).from_config(made.config, shift_terminal=None)
    found = theirs_sample(monkeypatch, made, 1, start())
    np.testing.assert_allclose(found, our_sample(Sampler(), start()), atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        Scheduler("unipc", 5.0, 40, 6.0),
        Scheduler("euler", 3.0, 4, 1.5),
        Scheduler("consistency", 3.0, 2, 1.0),
        Scheduler("consistency", 3.0, 4, 1.0, BOUND[1].times),
    ],
    ids=name,
)
def test_it_goes_through_diffusers_without_a_remark(tmp_path, caplog, scheduler):
    folder = write(tmp_path / "ours", scheduler.to_json())
    assert read_scheduler(folder) == scheduler
    diffusers.utils.logging.enable_propagation()
    theirs = CLASSES[scheduler.solver].from_pretrained(folder / "scheduler")
    assert not caplog.records
    CLASSES[scheduler.solver].from_config({**scheduler.to_json(), "num_inference_steps": 4})  # not private
    diffusers.utils.logging.disable_propagation()
    assert "num_inference_steps" in caplog.text
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    assert read_scheduler(tmp_path / "theirs") == scheduler


def test_a_file_that_does_not_say_has_the_defaults_of_diffusers_pipelines(tmp_path, monkeypatch):
    wan = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    diffusers.UniPCMultistepScheduler(**wan).save_pretrained(tmp_path / "wan" / "scheduler")
    assert read_scheduler(tmp_path / "wan") == Scheduler("unipc", 5.0, 50, 5.0) == Scheduler("unipc", 5.0)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.save_pretrained(tmp_path / "euler" / "scheduler")
    euler = read_scheduler(tmp_path / "euler")
    assert dataclasses.replace(euler, times=()) == Scheduler("euler", 3.0, 50, 5.0)
    # Its times, which are shifted twice and not even, are taken as they are.
    found = theirs_sample(monkeypatch, theirs, 50, start())
    np.testing.assert_allclose(found, our_sample(euler.sampler(), start()), atol=1e-5)
    again = CLASSES["euler"].from_config(euler.to_json())
    np.testing.assert_allclose(theirs_sample(monkeypatch, again, 50, start()), found, atol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(steps=-1), "steps is -1, expected at least 1"),
        (dict(guidance=0.5), "guidance is 0.5, expected at least 1"),
        (dict(shift=0.0), "shift is 0.0, expected a positive number"),
        (dict(steps=2, times=(1.0, 0.0)), "times are 2 numbers, expected 3: one per step, and 0"),
        (dict(steps=2, times=(1.0, 1.0, 0.0)), "expected numbers that fall from 1 to 0"),
    ],
)
def test_numbers_have_ranges(values, message):
    with pytest.raises(UserError, match=message):
        Scheduler(**values)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_num_inference_steps": "50"}, "steps: expected int"),
        ({"_guidance_scale": 0.5}, "guidance is 0.5, expected"),
        ({"_times": [1.0, 0.5]}, "times are 2 numbers, expected 5"),
        ({"_times": [1.0, "a", 0.3, 0.2, 0.0]}, r"times\[1\]: expected float"),
        ({"_shift": -1.0, "_times": [1.0, 0.9, 0.3, 0.2, 0.0]}, "shift is -1.0, expected a positive number"),
        ({"shift": None}, "shift: expected float"),
        ({"shift_terminal": 1.5}, "shift_terminal is 1.5, expected null or a number between 0 and 1"),
        ({"_num_inference_steps": 1}, "shift_terminal is 0.5.*, expected null for one step"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, changes, message):
    folder = write(tmp_path / "model", {**Scheduler("euler", 3.0, 4, 1.0).to_json(), **changes})
    with pytest.raises(UserError, match=message) as error:
        read_scheduler(folder)
    assert "scheduler_config.json" in str(error.value) and "\n" not in str(error.value)


def test_settings_of_a_folder_without_a_scheduler(tmp_path):
    """Wan's own layout: Wan's code decides, or `vpae_jax.json`."""
    assert read_scheduler(tmp_path) == Scheduler("unipc", 5.0, 50, 5.0)
    assert read_scheduler(tmp_path, image=True) == Scheduler("unipc", 3.0, 40, 5.0)
    path, clip = tmp_path / "vpae_jax.json", Defaults(9, 32, 48, 8.0, "a three")
    for student in (Scheduler("consistency", 5.0, 2, 1.0), Scheduler.of(BOUND[0], 3.0)):
        told = {**dataclasses.asdict(clip), "scheduler": dataclasses.asdict(student), "parts": {"vae": {}}}
        path.write_text(json.dumps(told))
        assert read_scheduler(tmp_path, image=True) == student and read_defaults(tmp_path) == clip
    for wrong, message in (([], "expected a JSON object"), ({"solver": "heun"}, "'heun' is not one of")):
        path.write_text(json.dumps({"scheduler": wrong}))
        with pytest.raises(UserError, match=rf"vpae_jax.json.scheduler.*{message}"):
            read_scheduler(tmp_path)


# What else a file of Diffusers' may say.

FLOW_MATCH = [
    dict(num_train_timesteps=500),
    dict(use_karras_sigmas=True),
    dict(use_exponential_sigmas=True),
    dict(use_beta_sigmas=True),
    dict(use_dynamic_shifting=True),
    dict(invert_sigmas=True),
]
REFUSED = {
    "unipc": [
        dict(num_train_timesteps=500),
        dict(prediction_type="epsilon"),
        dict(use_flow_sigmas=False),
        dict(use_karras_sigmas=True),
        dict(use_exponential_sigmas=True),
        dict(use_beta_sigmas=True),
        dict(final_sigmas_type="sigma_min"),
        dict(solver_order=1),
        dict(solver_order=3),
        dict(solver_type="bh1"),
        dict(predict_x0=False),
        dict(lower_order_final=False),
        dict(disable_corrector=[0]),
        dict(thresholding=True),
        dict(use_dynamic_shifting=True),
        dict(shift_terminal=0.1),
    ],
    "euler": [*FLOW_MATCH, dict(stochastic_sampling=True)],
    "consistency": [*FLOW_MATCH, dict(scale_factors=[2.0])],
}
PARTS_OF_DYNAMIC_SHIFTING = [
    dict(base_shift=2.0, max_shift=3.0, base_image_seq_len=2, max_image_seq_len=3),
    dict(time_shift_type="linear"),
]
WITHOUT_EFFECT = {
    "unipc": [
        dict(beta_start=0.001, beta_end=0.5, beta_schedule="scaled_linear"),
        dict(timestep_spacing="trailing", steps_offset=1),
        dict(rescale_betas_zero_snr=True),
        dict(dynamic_thresholding_ratio=0.5, sample_max_value=0.1),
        dict(sigma_min=0.1, sigma_max=0.9),
    ],
    "euler": PARTS_OF_DYNAMIC_SHIFTING,
    "consistency": [*PARTS_OF_DYNAMIC_SHIFTING, dict(upscale_mode="nearest")],
}


def cases(settings):
    return [pytest.param(name, c, id=f"{name}-{next(iter(c))}") for name, changes in settings.items() for c in changes]


def changed_sample(monkeypatch, solver, changes):
    """Six steps of Diffusers' scheduler with some settings changed; None where it refuses them."""
    settings = {k: v for k, v in Scheduler(solver, 3.0, 6, 1.0).to_json().items() if not k.startswith("_")}
    try:
        return theirs_sample(monkeypatch, CLASSES[solver](**{**settings, **changes}), 6, start())
    except (ValueError, NotImplementedError):
        return None


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("solver, changes", cases(REFUSED))
def test_settings_that_change_diffusers_steps_are_refused(tmp_path, monkeypatch, solver, changes):
    ours = Scheduler(solver, 3.0, 6, 1.0)
    theirs = changed_sample(monkeypatch, solver, changes)
    assert theirs is None or not np.allclose(theirs, our_sample(ours.sampler(), start()), atol=1e-3)
    folder = write(tmp_path / "model", {**ours.to_json(), **changes})
    (key, value), *_ = changes.items()
    with pytest.raises(UserError) as error:
        read_scheduler(folder)
    assert f"scheduler_config.json: {key} is {value!r}, only " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("solver, changes", [*((solver, {}) for solver in CLASSES), *cases(WITHOUT_EFFECT)])
def test_settings_without_effect_are_accepted(tmp_path, monkeypatch, solver, changes):
    ours = Scheduler(solver, 3.0, 6, 1.0)
    found = changed_sample(monkeypatch, solver, changes)
    np.testing.assert_allclose(found, our_sample(ours.sampler(), start()), atol=1e-5)
    assert read_scheduler(write(tmp_path / "model", {**ours.to_json(), **changes})) == ours


@pytest.mark.parametrize(
    "key, value", [("prediction_type", "epsilon"), ("use_flow_sigmas", False), ("flow_shift", 1.0)]
)
def test_settings_left_out_have_diffusers_values(tmp_path, key, value):
    assert getattr(diffusers.UniPCMultistepScheduler().config, key) == value
    values = Scheduler("unipc", 3.0).to_json()
    folder = write(tmp_path / "model", {k: v for k, v in values.items() if k != key})
    if key == "flow_shift":
        assert read_scheduler(folder).shift == value
        return
    with pytest.raises(UserError, match=f"{key} is {value!r}.*default for a missing key"):
        read_scheduler(folder)


def test_grids():
    assert grids.fit((1.0, 0.75, 0.5, 0.25, 0.0)) == (1.0, 0.25)
    assert grids.fit((1.0, 0.9, 0.4, 0.3, 0.0)) is None
    assert grids.Grid(1.0, None).times(2) == (1.0, 0.001, 0.0)
