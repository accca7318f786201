"""Whole model directories: written from pieces, loaded by diffusers; schedulers, defaults and refusals."""

import dataclasses
import functools
import hashlib
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vpae_jax.flow import solvers
from vpae_jax.flow.schedule import shifted_times
from vpae_jax.types import UserError
from vpae_jax.weights import layout
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import ImageProcessor, read_image_processor
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.settings import (
    IMAGE_NEGATIVE_PROMPT,
    NEGATIVE_PROMPT,
    Defaults,
    Scheduler,
    read_defaults,
    read_scheduler,
)
from vpae_jax.weights.writing import from_tree

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
PARTS = ("transformer", "vae", "text_encoder", "image_encoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=True)
    return folder


def write_model(folder, source, parts, **options):
    """`layout.write_model` from folders and trees."""
    given = {name: from_tree(name, *part) for name, part in parts.items()}
    layout.write_model(folder, find_model(source), given, **options)


def test_written_from_pieces_it_loads_in_diffusers(source, tmp_path):
    pieces = tmp_path / "pieces"
    random_model.build_tokenizer(pieces / "tokenizer")
    parts = {name: read_part(source, name) for name in PARTS}
    clip = Defaults(num_frames=9, height=32, width=48, fps=8.0, negative_prompt="残缺的")
    write_model(tmp_path / "out", pieces, parts, scheduler=Scheduler("euler", 2.0), defaults=clip)
    assert read_defaults(tmp_path / "out") == clip
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 2.0)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, diffusers.WanImageToVideoPipeline)
    assert isinstance(loaded.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert loaded.scheduler.config.shift == 2.0
    assert loaded.tokenizer("a three moves up").input_ids[-1] == 1
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    pixels = loaded.image_processor(picture, return_tensors="np")["pixel_values"]
    processor = read_image_processor(tmp_path / "out" / "image_processor", 32)
    np.testing.assert_allclose(processor(picture[None])[0], pixels[0].transpose(1, 2, 0), atol=1e-6)


def test_a_text_to_video_model_has_no_image_parts(source, tmp_path):
    config, params = read_part(source, "text_encoder")
    random_model.pipeline(tmp_path / "t2v", image=False)
    write_model(tmp_path / "out", tmp_path / "t2v", {"text_encoder": (config, params)})
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"), diffusers.WanPipeline)
    assert read_scheduler(tmp_path / "out") == Scheduler("unipc", 3.0)
    assert not (tmp_path / "out" / "image_encoder").exists()
    assert read_defaults(tmp_path / "out") == Defaults(81, 480, 832, 16.0, NEGATIVE_PROMPT)
    assert read_defaults(tmp_path / "t2v", image=True) == Defaults(81, 480, 832, 16.0, IMAGE_NEGATIVE_PROMPT)


def test_unchanged_parts_are_copied_and_changed_ones_replaced(source, tmp_path):
    config, params = read_part(source, "transformer")
    params["proj_out"]["bias"] = params["proj_out"]["bias"] + 1
    write_model(tmp_path / "out", source, {"transformer": (config, params)})
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "vae" / name).read_bytes() == (source / "vae" / name).read_bytes()
    _, found = read_part(tmp_path / "out", "transformer")
    np.testing.assert_array_equal(found["proj_out"]["bias"], params["proj_out"]["bias"])


def test_refusals_leave_nothing_behind(source, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for overwrite in (False, True):  # only a model directory is ever replaced
        with pytest.raises(UserError, match="already exists"):
            write_model(taken, source, {}, overwrite=overwrite)
    with pytest.raises(UserError, match=r"no transformer \(found: no part of a Wan model\)"):
        write_model(tmp_path / "out", taken, {})
    parts = {name: read_part(source, name) for name in PARTS}
    with pytest.raises(UserError, match=r"no tokenizer \(found: no part of a Wan model\)"):
        write_model(tmp_path / "out", taken, parts)
    parts["transformer"] = (parts["transformer"][0], {"blocks": {}, "unknown": np.zeros(3)})
    with pytest.raises(ValueError, match="unknown"):
        write_model(tmp_path / "out", source, parts)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_overwriting_a_model_directory(source, tmp_path):
    write_model(tmp_path / "out", source, {})
    write_model(tmp_path / "out", source, {}, scheduler=Scheduler("euler", 7.0), overwrite=True)
    assert read_scheduler(tmp_path / "out").shift == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_negative_prompts_are_wans():
    """By the checksum of sample_neg_prompt in Wan's wan/configs/shared_config.py."""
    digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert IMAGE_NEGATIVE_PROMPT == "镜头晃动\uff0c" + NEGATIVE_PROMPT


@pytest.mark.parametrize("scheduler", [Scheduler("unipc", 5.0), Scheduler("euler", 3.0)])
def test_schedulers_are_read_by_diffusers(source, tmp_path, scheduler):
    write_model(tmp_path / "out", source, {}, scheduler=scheduler)
    folder = tmp_path / "out" / "scheduler"
    if scheduler.solver == "unipc":
        theirs = diffusers.UniPCMultistepScheduler.from_pretrained(folder)
        assert theirs.config.flow_shift == 5.0 and theirs.config.use_flow_sigmas
    else:
        theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
        theirs.set_timesteps(1)  # one step from pure noise to t = 0, as our one-step generators need it
        assert theirs.timesteps.tolist() == [1000.0] and theirs.sigmas.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_diffusers_euler_takes_our_times(steps, shift):
    """By itself for one step; for more when it is given the unshifted grid, also through a pipeline's own call."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(Scheduler("euler", shift).to_json())
    ours = shifted_times(steps, shift)
    theirs.set_timesteps(steps)
    assert np.allclose(theirs.sigmas.numpy(), ours, atol=1e-6) == (steps == 1)
    grid = [1 - i / steps for i in range(steps)]
    theirs.set_timesteps(sigmas=grid)
    np.testing.assert_allclose(theirs.sigmas.numpy(), ours, atol=1e-6)
    np.testing.assert_allclose(theirs.timesteps.numpy(), 1000 * ours[:-1], atol=1e-3)
    theirs.set_timesteps(50)
    theirs.set_timesteps = functools.partial(theirs.set_timesteps, sigmas=grid)
    theirs.set_timesteps(steps, device="cpu")  # as Wan's pipelines call it
    np.testing.assert_allclose(theirs.sigmas.numpy(), ours, atol=1e-6)


SCHEDULERS = {"unipc": diffusers.UniPCMultistepScheduler, "euler": diffusers.FlowMatchEulerDiscreteScheduler}


@pytest.mark.parametrize("scheduler", [Scheduler("unipc", 5.0, 40, 6.0), Scheduler("euler", 3.0, 4, 1.5)])
def test_recommendations_go_through_diffusers_without_a_remark(tmp_path, caplog, scheduler):
    (tmp_path / "ours" / "scheduler").mkdir(parents=True)
    path = tmp_path / "ours" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(scheduler.to_json()))
    assert read_scheduler(tmp_path / "ours") == scheduler
    diffusers.utils.logging.enable_propagation()
    theirs = SCHEDULERS[scheduler.solver].from_pretrained(path.parent)
    assert not caplog.records
    SCHEDULERS[scheduler.solver].from_config({**scheduler.to_json(), "num_inference_steps": 4})  # not private
    diffusers.utils.logging.disable_propagation()
    assert "num_inference_steps" in caplog.text
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    assert read_scheduler(tmp_path / "theirs") == scheduler


def test_schedulers_without_recommendations_are_wans_or_a_students(tmp_path):
    wan = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    diffusers.UniPCMultistepScheduler(**wan).save_pretrained(tmp_path / "wan" / "scheduler")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "student" / "scheduler")
    assert read_scheduler(tmp_path / "wan") == Scheduler("unipc", 5.0, steps=50, guidance=5.0)
    assert read_scheduler(tmp_path / "student") == Scheduler("euler", 3.0, steps=1, guidance=1.0)
    assert Scheduler("unipc") == Scheduler("unipc", 3.0, 50, 5.0) and Scheduler("euler", 2.0).guidance == 1.0


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(steps=-1), "steps is -1, expected at least 1"),
        (dict(guidance=0.5), "guidance is 0.5, expected at least 1"),
        (dict(shift=0.0), "shift is 0.0, expected a positive number"),
    ],
)
def test_scheduler_numbers_have_ranges(values, message):
    with pytest.raises(UserError, match=message):
        Scheduler(**values)


def test_settings_of_a_folder_without_a_scheduler(tmp_path):
    """Wan's own layout: Wan's code decides, or `vpae_jax.json`."""
    assert read_scheduler(tmp_path) == Scheduler("unipc", 5.0, 50, 5.0)
    assert read_scheduler(tmp_path, image=True) == Scheduler("unipc", 3.0, 40, 5.0)
    assert read_defaults(tmp_path) == Defaults(81, 480, 832, 16.0, NEGATIVE_PROMPT)
    assert read_defaults(tmp_path, image=True).negative_prompt == IMAGE_NEGATIVE_PROMPT
    student, clip = Scheduler("euler", 5.0, 2, 1.0), Defaults(9, 32, 48, 8.0, "a three")
    told = {**dataclasses.asdict(clip), "scheduler": dataclasses.asdict(student), "parts": {"vae": {}}}
    (tmp_path / "vpae_jax.json").write_text(json.dumps(told))
    assert read_scheduler(tmp_path, image=True) == student and read_defaults(tmp_path) == clip
    for wrong, message in (([], "expected a JSON object"), ({"solver": "heun"}, "'heun' is not one of")):
        spoil(tmp_path / "vpae_jax.json", scheduler=wrong)
        with pytest.raises(UserError, match=rf"vpae_jax.json.scheduler.*{message}"):
            read_scheduler(tmp_path)


def velocity(x, t):
    return np.sin(3 * np.asarray(x)) + np.asarray(t)[0]


def diffusers_sample(solver, changes, x, steps=6):
    """Six steps of Diffusers' scheduler with some settings changed; None where it refuses them."""
    settings = {k: v for k, v in {**Scheduler(solver, 3.0).to_json(), **changes}.items() if not k.startswith("_")}
    scheduler = SCHEDULERS[solver](**settings)
    x = torch.tensor(x)
    try:
        grid = {} if solver == "unipc" else {"sigmas": [1 - i / steps for i in range(steps)]}
        scheduler.set_timesteps(steps, **grid)
        for t in scheduler.timesteps:
            v = torch.tensor(velocity(x, t[None] / 1000), dtype=torch.float32)
            x = scheduler.step(v, t, x, return_dict=False)[0]
    except ValueError:
        return None
    return x.numpy()


def our_sample(solver, x, steps=6):
    def at(x, t):
        return jnp.sin(3 * x) + t[0]

    if solver == "unipc":
        levels = solvers.unipc_levels(steps, 3.0)
        return np.asarray(solvers.unipc(at, jnp.asarray(x), levels, solvers.unipc_times(levels)))
    return np.asarray(solvers.euler(at, jnp.asarray(x), shifted_times(steps, 3.0)))


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
    "euler": [
        dict(num_train_timesteps=500),
        dict(use_karras_sigmas=True),
        dict(use_exponential_sigmas=True),
        dict(use_beta_sigmas=True),
        dict(use_dynamic_shifting=True),
        dict(shift_terminal=0.1),
        dict(invert_sigmas=True),
        dict(stochastic_sampling=True),
    ],
}
WITHOUT_EFFECT = {
    "unipc": [
        dict(beta_start=0.001, beta_end=0.5, beta_schedule="scaled_linear"),
        dict(timestep_spacing="trailing", steps_offset=1),
        dict(rescale_betas_zero_snr=True),
        dict(dynamic_thresholding_ratio=0.5, sample_max_value=0.1),
        dict(sigma_min=0.1, sigma_max=0.9),
    ],
    "euler": [
        dict(base_shift=2.0, max_shift=3.0, base_image_seq_len=2, max_image_seq_len=3),
        dict(time_shift_type="linear"),
    ],
}


def cases(settings):
    return [pytest.param(name, c, id=f"{name}-{next(iter(c))}") for name, changes in settings.items() for c in changes]


def write_scheduler(folder, solver, changes):
    (folder / "scheduler").mkdir()
    values = {**Scheduler(solver, 3.0).to_json(), **changes}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("solver, changes", cases(REFUSED))
def test_settings_that_change_diffusers_steps_are_refused(tmp_path, solver, changes):
    x = np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32)
    theirs, ours = diffusers_sample(solver, changes, x), our_sample(solver, x)
    assert theirs is None or not np.allclose(theirs, ours, atol=1e-3)
    write_scheduler(tmp_path, solver, changes)
    (key, value), *_ = changes.items()
    with pytest.raises(UserError) as error:
        read_scheduler(tmp_path)
    assert f"scheduler_config.json: {key} is {value!r}, only " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("solver, changes", [("unipc", {}), ("euler", {}), *cases(WITHOUT_EFFECT)])
def test_settings_without_effect_are_accepted(tmp_path, solver, changes):
    x = np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(diffusers_sample(solver, changes, x), our_sample(solver, x), atol=1e-5)
    write_scheduler(tmp_path, solver, changes)
    assert read_scheduler(tmp_path) == Scheduler(solver, 3.0)


@pytest.mark.parametrize(
    "key, value", [("prediction_type", "epsilon"), ("use_flow_sigmas", False), ("flow_shift", 1.0)]
)
def test_settings_left_out_have_diffusers_values(tmp_path, key, value):
    assert getattr(diffusers.UniPCMultistepScheduler().config, key) == value
    write_scheduler(tmp_path, "unipc", {})
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    if key == "flow_shift":
        assert read_scheduler(tmp_path).shift == value
        return
    with pytest.raises(UserError, match=f"{key} is {value!r}.*as the file does not say"):
        read_scheduler(tmp_path)


def spoil(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "file, changes, read, message",
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, find_model, "_class_name is 'FluxPipeline'"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, find_model, "Wan 2.2"),
        ("model_index.json", {"expand_timesteps": True}, find_model, "Wan 2.2"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, read_scheduler, "'DDIMScheduler'"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon"},
            read_scheduler,
            "prediction_type is 'epsilon', only 'flow_prediction'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"solver_p": "DDIMScheduler"},
            read_scheduler,
            "solver_p is 'DDIMScheduler'",
        ),
        ("scheduler/scheduler_config.json", {"_num_inference_steps": "50"}, read_scheduler, "steps: expected int"),
        ("scheduler/scheduler_config.json", {"_guidance_scale": 0.5}, read_scheduler, "guidance is 0.5, expected"),
        ("vpae_jax.json", {"frames": 9}, read_defaults, "vpae_jax.json.frames: unknown key"),
        ("vpae_jax.json", {"negative_prompt": None}, read_defaults, "negative_prompt: expected str, found None"),
    ],
)
def test_other_pipelines_are_refused_in_one_line(source, tmp_path, file, changes, read, message):
    write_model(tmp_path / "out", source, {}, defaults=Defaults())
    spoil(tmp_path / "out" / file, **changes)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "out")
    assert file in str(error.value) and "\n" not in str(error.value)


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_model(tmp_path / "nowhere")


@pytest.mark.parametrize("height, width", [(32, 32), (30, 71), (100, 41)])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        (
            dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            ImageProcessor(24, (24, 24)),
        ),
        (
            dict(size={"height": 20, "width": 28}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.2] * 3),
            ImageProcessor((20, 28), None, (0.5,) * 3, (0.2,) * 3),
        ),
    ],
)
def test_image_processor_equals_transformers(tmp_path, height, width, theirs, ours):
    processor = CLIPImageProcessorPil(**theirs)
    processor.save_pretrained(tmp_path)
    assert read_image_processor(tmp_path, 32) == ours
    pictures = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    expected = processor(images=list(pictures), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(pictures), expected.transpose(0, 2, 3, 1), atol=1e-6)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_json()))
    assert read_image_processor(tmp_path, 32) == ours


def test_unknown_image_settings_are_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**ImageProcessor().to_json(), "resample": 2}))
    with pytest.raises(UserError, match="resample is 2, only 3 is supported"):
        read_image_processor(tmp_path, 32)
    path.write_text(json.dumps({**ImageProcessor().to_json(), "do_tile": True}))
    with pytest.raises(UserError, match="do_tile: unknown key"):
        read_image_processor(tmp_path, 32)
