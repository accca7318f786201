"""Students as folders: Diffusers, unpatched, makes of each the frames that we make, told nothing but the prompt."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import random_model
import torch
from flax import nnx
from PIL import Image

from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.run.export import Trained, write_student
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import LORA_FILE, Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import from_adapters
from vpae_jax.weights.settings import Defaults, Scheduler, read_scheduler

PROMPT, SEED = "a three moves up", 5
CLIP = Defaults(5, 32, 48, 8.0, "the digit seven")
LIMIT = 0.6 / 255  # ours are rounded to whole levels, which is half a level
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def teacher(folder, image):
    """A teacher's folder, with weights that are strong enough for every step to be seen in the frames."""
    made = random_model.pipeline(folder, image)
    generator = torch.Generator().manual_seed(7)
    for weight in made.transformer.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    made.transformer.save_pretrained(folder / "transformer")
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(CLIP)))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(Scheduler("unipc", 3.0, 50, 5.0).to_json()))
    return folder


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return teacher(tmp_path_factory.mktemp("t2v"), image=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return teacher(tmp_path_factory.mktemp("i2v"), image=True)


def changed(folder, scale):
    """The teacher's weights, trained a little."""
    return Trained(jax.tree.map(lambda p: scale * p, read_part(folder, "transformer")[1]))


def adapted(folder, rank=2, alpha=3.0):
    """The teacher's weights with adapters, whose scale is no power of 2."""
    config, params = read_part(folder, "transformer")
    shapes = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), lora=LoRASpec(rank, alpha)))
    adapters = nnx.to_pure_dict(nnx.split(shapes, nnx.LoRAParam, nnx.Param)[1])
    draw = np.random.default_rng(2).standard_normal
    adapters = jax.tree.map(lambda p: np.asarray(0.2 * draw(p.shape), np.float32), adapters)
    return Trained(params, from_adapters(adapters, alpha, rank))


def loaded(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_frames(pipe, monkeypatch, student, noise, steps, guidance, image):
    """A plain call of a pipeline of Diffusers', with our noise at the start and between steps."""
    keys = iter(jax.random.split(noise_of_seed(SEED, noise.shape)[1], steps))

    def drawn(*args, **kwargs):
        return torch.tensor(np.asarray(jax.random.normal(next(keys), noise.shape))).permute(0, 4, 1, 2, 3)

    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", drawn)
    size = {"num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width}
    return pipe(
        prompt=PROMPT,
        negative_prompt=CLIP.negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
        output_type="np",
        **size,
        **({"image": Image.fromarray(PICTURE)} if image else {}),
    ).frames[0]


def compare(folder, monkeypatch, sampler, image=False, pipe=None):
    """The frames of a folder, which both make alike; `pipe` in place of what Diffusers loads from it."""
    ours = load_pipeline(folder)
    assert ours.sampler().solver == sampler.solver and ours.scheduler.guidance == sampler.guidance
    np.testing.assert_allclose(ours.sampler().times, sampler.times, atol=1e-6)
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(1))
    found = ours(PROMPT, image=PICTURE if image else None, noise=noise, seed=SEED)
    given = (monkeypatch, ours, noise, sampler.steps, sampler.guidance, image)
    expected = their_frames(loaded(folder) if pipe is None else pipe, *given)
    difference = np.abs(found / 255 - expected).max()
    assert difference <= LIMIT, f"{255 * difference:.4f} levels of 255"
    assert found.std() > 20
    return found.astype(int)


SAMPLERS = [
    Sampler(),
    Sampler.even(4, 5.0),
    Sampler.even(2, 3.0, 2.5),
    Sampler.even(4, 5.0, 1.0, "consistency"),
    Sampler("euler", (1.0, 0.9, 0.3, 0.0)),
]


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(s, id=f"{s.solver}-{s.steps}-{s.guidance:g}", marks=[pytest.mark.long] * (s.steps in (2, 3)))
        for s in SAMPLERS
    ],
)
def test_a_student_makes_the_same_frames_in_diffusers(t2v, tmp_path, monkeypatch, sampler):
    folder = write_student(tmp_path, find_model(t2v), changed(t2v, 1.1), sampler, shift=3.0)
    assert folder == tmp_path / "model"
    frames = compare(folder, monkeypatch, sampler)
    if sampler == Sampler():  # the shift of other numbers of steps, and never the teacher's guidance
        assert read_scheduler(folder) == Scheduler("euler", 3.0, 1, 1.0)
        assert (load_pipeline(t2v)(PROMPT, steps=1, guidance=1.0, seed=SEED) != frames).any()


@pytest.mark.parametrize("sampler", SAMPLERS[-2:-1], ids=lambda s: f"{s.solver}-{s.steps}")
def test_an_image_to_video_student_does(i2v, tmp_path, monkeypatch, sampler):
    folder = write_student(tmp_path, find_model(i2v), changed(i2v, 1.1), sampler)
    compare(folder, monkeypatch, sampler, image=True)


def test_adapters_merged_and_as_a_file_for_the_teacher(t2v, tmp_path, monkeypatch):
    sampler = Sampler.even(2, 3.0)
    trained = adapted(t2v)
    folder = write_student(tmp_path, find_model(t2v), trained, sampler)
    merged = compare(folder, monkeypatch, sampler)
    pipe = loaded(t2v)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipe.load_lora_weights(folder)
    assert (compare(folder, monkeypatch, sampler, pipe=pipe) == merged).all()
    plain = write_student(tmp_path / "plain", find_model(t2v), Trained(trained.params), sampler)
    assert np.abs(compare(plain, monkeypatch, sampler) - merged).max() > 8
    assert not (plain / LORA_FILE).exists() and LORA_FILE in (folder / "README.md").read_text()


def test_merged_in_float32_whatever_the_base_is_stored_in(t2v, tmp_path):
    trained = adapted(t2v)
    half = jax.tree.map(lambda p: p.astype(jax.numpy.bfloat16), trained.params)
    folder = write_student(tmp_path, find_model(t2v), Trained(half, trained.lora), Sampler())
    params = read_part(folder, "transformer", None)[1]
    kernel, adapter = params["blocks"]["attn1"]["to_q"]["kernel"], trained.lora.adapters["blocks/attn1/to_q", 1]
    assert kernel.dtype == np.float32 and params["proj_out"]["kernel"].dtype == jax.numpy.bfloat16
    base = np.asarray(half["blocks"]["attn1"]["to_q"]["kernel"][1], np.float32)
    np.testing.assert_array_equal(kernel[1], base + adapter.product())


EXPERTS = [(Sampler.even(4, 3.0), 0.75), (Sampler.even(3, 3.0, 2.0, "consistency"), 0.8)]


@pytest.mark.parametrize(
    "sampler, boundary",
    [pytest.param(*EXPERTS[0], id="at a time"), pytest.param(*EXPERTS[1], id="between", marks=pytest.mark.long)],
)
def test_two_experts_make_the_same_frames_in_diffusers(t2v, tmp_path, monkeypatch, sampler, boundary):
    high, low = changed(t2v, 1.1), changed(t2v, 0.8)
    folder = write_student(tmp_path, find_model(t2v), high, sampler, low=low, boundary=boundary)
    frames = compare(folder, monkeypatch, sampler)
    assert sum(t >= load_pipeline(folder).boundary for t in sampler.times[:-1]) in range(1, sampler.steps)
    for one in (high, low):
        alone = write_student(tmp_path / "one", find_model(t2v), one, sampler)
        assert np.abs(compare(alone, monkeypatch, sampler) - frames).max() > 8


def test_two_experts_of_adapters_are_written_merged_and_leave_no_file_of_adapters(t2v, tmp_path):
    """A file beside two transformers would not say of which one it is."""
    high, low = adapted(t2v), adapted(t2v, alpha=-3.0)
    folder = write_student(tmp_path, find_model(t2v), high, Sampler.even(4, 3.0), low=low, boundary=0.7)
    assert not (folder / LORA_FILE).exists() and LORA_FILE not in (folder / "README.md").read_text()
    path, layer = "blocks/attn1/to_q", 1
    for part, trained in (("transformer", high), ("transformer_2", low)):
        kernel = read_part(folder, part, None)[1]["blocks"]["attn1"]["to_q"]["kernel"][layer]
        expected = (
            trained.params["blocks"]["attn1"]["to_q"]["kernel"][layer] + trained.lora.adapters[path, layer].product()
        )
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


def test_two_image_to_video_experts_do(i2v, tmp_path, monkeypatch):
    sampler = Sampler.even(4, 3.0)
    folder = write_student(tmp_path, find_model(i2v), changed(i2v, 1.1), sampler, low=changed(i2v, 0.9), boundary=0.7)
    compare(folder, monkeypatch, sampler, image=True)


@pytest.mark.parametrize(
    "form", ["diffusers", *(pytest.param(form, marks=pytest.mark.long) for form in ("wan", "orbax"))]
)
def test_two_experts_go_through_every_layout(t2v, tmp_path, form):
    student = write_student(
        tmp_path, find_model(t2v), changed(t2v, 1.1), Sampler.even(4, 3.0), low=changed(t2v, 0.8), boundary=0.6
    )
    counts = write_model(tmp_path / "there", Contents(find_model(student)), form, verify=True)
    assert counts["transformer_2"] == counts["transformer"] > 0
    there = find_model(tmp_path / "there")
    assert there.boundary == 0.6 and read_scheduler(tmp_path / "there") == Scheduler("euler", 3.0, 4, 1.0)
    write_model(tmp_path / "back", Contents(there), verify=True)
    for part in ("transformer", "transformer_2"):
        (config, expected), (again, found) = read_part(student, part), read_part(tmp_path / "back", part)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert loaded(tmp_path / "back").config.boundary_ratio == 0.6
    assert "transformer from t = 0.6 on" in (tmp_path / "back" / "README.md").read_text()
    # A student of one transformer takes nothing of the second.
    alone = find_model(write_student(tmp_path / "one", there, changed(t2v, 1.0), Sampler()))
    assert alone.boundary is None and "transformer_2" not in alone.parts


def test_experts_that_do_not_fit_are_refused(t2v, tmp_path):
    student = write_student(
        tmp_path, find_model(t2v), changed(t2v, 1.1), Sampler.even(4, 3.0), low=changed(t2v, 0.8), boundary=0.6
    )
    index = json.loads((student / "model_index.json").read_text())
    for wrong in (None, 0, 1.5, True, "half"):
        (student / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": wrong}))
        with pytest.raises(UserError, match=rf"boundary_ratio is {wrong!r}, expected a number between 0 and 1"):
            find_model(student)
    (student / "model_index.json").write_text(json.dumps(index))
    (student / "transformer_2").rename(tmp_path / "away")
    with pytest.raises(UserError, match="no transformer_2"):
        load_pipeline(student)
    with pytest.raises(ValueError, match="belong together"):
        write_student(tmp_path / "out", find_model(t2v), changed(t2v, 1.1), Sampler(), low=changed(t2v, 1.0))
