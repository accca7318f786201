"""The pipeline prepares conditions and samples as Diffusers' Wan pipelines do."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from flax import nnx
from PIL import Image

import vpae_jax
from vpae_jax.config import MeshConfig
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import shifted_times
from vpae_jax.inference import samplers
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import clean_prompt
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.sharding import make_mesh
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.locate import embedded_model
from vpae_jax.weights.settings import NEGATIVE_PROMPT, Defaults, Scheduler
from vpae_jax.weights.writing import from_tree

PROMPTS = ["a three moves up", "the digit seven is moving down and to the left"]
FRAMES, HEIGHT, WIDTH = 5, 32, 48


def load(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("model")
    theirs = random_model.pipeline(folder, image)
    clip = Defaults(FRAMES, HEIGHT, WIDTH, 8.0)
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(clip)))
    student = Scheduler("euler", 3.0, 1, 1.0)  # a call that says nothing else takes one step
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(student.to_json()))
    return folder, theirs, load_pipeline(folder)


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return load(tmp_path_factory, image=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return load(tmp_path_factory, image=True)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def to_torch(latents):
    return torch.tensor(np.asarray(latents)).permute(0, 4, 1, 2, 3)


def from_torch(latents):
    return latents.detach().permute(0, 2, 3, 4, 1).numpy()


def torch_prompts(theirs, prompts):
    """Diffusers' text states for the tiny tokenizer's length, padded to Wan's 512 tokens."""
    with torch.no_grad():
        states = theirs._get_t5_prompt_embeds(prompts, max_sequence_length=16, device="cpu")
    return torch.nn.functional.pad(states, (0, 0, 0, 512 - states.shape[1]))


def torch_frames(theirs, picture):
    """Mask and first-frame latents, as Diffusers prepares them for one picture."""
    image = theirs.video_processor.preprocess(Image.fromarray(picture), height=HEIGHT, width=WIDTH)
    with torch.no_grad():
        _, frames = theirs.prepare_latents(
            image, 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu", torch.Generator().manual_seed(0)
        )
    return frames


def torch_sample(theirs, noise, text, null_text, times, guidance, frames=None, image=None):
    """Euler's method by hand around Diffusers' transformer."""
    x = to_torch(noise)
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        model_input = x if frames is None else torch.cat([x, frames], dim=1)

        def velocity(states, model_input=model_input, t=t):
            time = torch.full((len(model_input),), 1000 * t)
            return theirs.transformer(model_input, time, states, image, return_dict=False)[0]

        with torch.no_grad():
            v = velocity(text)
            if guidance > 1:
                v_null = velocity(null_text)
                v = v_null + guidance * (v - v_null)
        x = x + (t_next - t) * v
    return from_torch(x)


def test_prompts_equal_diffusers(t2v):
    _, theirs, ours = t2v
    states, mask = ours.encode_prompt(PROMPTS)
    expected = torch_prompts(theirs, PROMPTS)[:, :16].numpy()
    assert relative(states, expected) <= 1e-5
    assert mask.dtype == bool and states.shape[:2] == mask.shape == (2, 16)
    assert not np.asarray(states)[~np.asarray(mask)].any()
    assert mask.sum(axis=1).tolist() == [len(ours.tokenizer(p).input_ids) for p in PROMPTS]


@pytest.mark.parametrize(
    "prompt",
    ["a  three\n moves\tup ", "&amp;lt;three&amp;gt;", "镜头晃动\uff0c色调艳丽", "caf\u00c3\u00a9 \u201cquoted\u201d"],
)
def test_prompts_are_cleaned_as_diffusers_does(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_a_long_caption_is_one_line(t2v):
    _, _, ours = t2v
    prompt = "a three moves up and then it moves down and up again and down again and up"
    count = len(ours.tokenizer(prompt).input_ids)
    assert count > 16
    with pytest.raises(UserError, match=f"{count} tokens, at most 16") as error:
        ours.encode_prompt([prompt])
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_length_gets_wans(t2v, tmp_path):
    folder, _, _ = t2v
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10**30}))
    assert load_pipeline(tmp_path / "model").tokenizer.model_max_length == 512


def test_pictures_equal_diffusers(i2v, pictures):
    _, theirs, ours = i2v
    with torch.no_grad():
        expected = theirs.encode_image([Image.fromarray(p) for p in pictures], "cpu").numpy()
    assert relative(ours.encode_image(pictures), expected) <= 1e-5


def test_first_frames_equal_diffusers(i2v, pictures):
    _, theirs, ours = i2v
    condition = ours.condition(PROMPTS, pictures)
    expected = np.concatenate([from_torch(torch_frames(theirs, p)) for p in pictures])
    assert condition.frames.shape == expected.shape == (2, 2, 4, 6, 20)
    np.testing.assert_array_equal(condition.frames[..., :4], expected[..., :4])
    assert relative(condition.frames[..., 4:], expected[..., 4:]) <= 1e-4


def test_frames_after_the_first_are_not_looked_at(i2v):
    _, _, ours = i2v
    video = jax.random.uniform(jax.random.key(0), (1, FRAMES, HEIGHT, WIDTH, 3), minval=-1)
    whole, first = ours.condition_frames(video), ours.condition_frames(video[:, :1])
    np.testing.assert_array_equal(whole, first)


def test_without_a_picture_all_is_zero(i2v):
    _, _, ours = i2v
    condition = ours.condition(PROMPTS)
    assert condition.image.shape == (2, 17, 24) and not condition.image.any()
    assert condition.frames.shape == (2, 2, 4, 6, 20) and not condition.frames.any()


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (4, 3.0)])
def test_text_to_video_latents_equal_diffusers(t2v, steps, guidance):
    _, theirs, ours = t2v
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(2))
    condition, null = ours.condition(PROMPTS), ours.condition(["", ""])
    found = ours.sample(noise, condition, null, ours.sampler(steps, guidance, "euler"))
    text, null_text = torch_prompts(theirs, PROMPTS), torch_prompts(theirs, ["", ""])
    expected = torch_sample(theirs, noise, text, null_text, shifted_times(steps, 3.0), guidance)
    assert relative(found, expected) <= 1e-4
    assert relative(found, noise) > 0.05


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (4, 3.0)])
def test_image_to_video_latents_equal_diffusers(i2v, pictures, steps, guidance):
    _, theirs, ours = i2v
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(2))
    condition, null = ours.condition(PROMPTS, pictures), ours.condition(["", ""], pictures)
    found = ours.sample(noise, condition, null, ours.sampler(steps, guidance, "euler"))
    text, null_text = torch_prompts(theirs, PROMPTS), torch_prompts(theirs, ["", ""])
    frames = torch.cat([torch_frames(theirs, p) for p in pictures])
    image = theirs.encode_image([Image.fromarray(p) for p in pictures], "cpu")
    times = shifted_times(steps, 3.0)
    expected = torch_sample(theirs, noise, text, null_text, times, guidance, frames, image)
    assert relative(found, expected) <= 1e-4


def test_a_written_directory_makes_the_same_clip_in_diffusers(i2v, pictures, tmp_path):
    folder, _, ours = i2v
    params = nnx.to_pure_dict(nnx.state(ours.transformer, nnx.Param))
    part = (ours.transformer.config, jax.tree.map(lambda p: 1.1 * p, params))
    contents = Contents(find_model(folder), {"transformer": from_tree("transformer", *part)})
    write_model(tmp_path / "student", contents)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    theirs.set_progress_bar_config(disable=True)
    noise = jax.random.normal(jax.random.key(5), ours.latent_shape(1))
    expected = theirs(
        image=Image.fromarray(pictures[0]),
        prompt=PROMPTS[0],
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=to_torch(noise),
        output_type="latent",
    ).frames
    student = load_pipeline(tmp_path / "student")
    found = student.sample(noise, student.condition(PROMPTS[:1], pictures[:1]))
    assert relative(found, from_torch(expected)) <= 1e-4
    assert relative(found, ours.sample(noise, ours.condition(PROMPTS[:1], pictures[:1]))) > 1e-2


def test_a_call_decodes_what_it_samples(i2v, pictures):
    _, theirs, ours = i2v
    options = dict(image=pictures[0], height=HEIGHT, width=WIDTH)
    frames = ours(PROMPTS[0], seed=3, **options)
    assert frames.dtype == np.uint8 and frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    noise = jax.random.normal(jax.random.split(jax.random.key(3))[0], ours.latent_shape(1))
    latents = ours.sample(noise, ours.condition(PROMPTS[:1], pictures[:1]), sampler=ours.sampler())
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (ours.vae.config.latents_mean, ours.vae.config.latents_std)
    )
    with torch.no_grad():
        video = theirs.vae.decode(to_torch(latents) * std + mean, return_dict=False)[0]
    expected = theirs.video_processor.postprocess_video(video, output_type="np")[0]
    assert np.abs(frames - expected * 255.0).max() <= 1.01
    np.testing.assert_array_equal(frames, ours(PROMPTS[0], seed=3, **options))
    assert (frames != ours(PROMPTS[0], seed=4, **options)).any()


def test_one_program_serves_all_weights(t2v):
    _, _, ours = t2v
    noise, condition = jax.random.normal(jax.random.key(0), ours.latent_shape(1)), ours.condition(PROMPTS[:1])
    first = ours.sample(noise, condition)
    before = samplers._sample._cache_size()
    params = nnx.to_pure_dict(nnx.state(ours.transformer, nnx.Param))
    graph = nnx.graphdef(ours.transformer)
    other = Denoiser(graph, jax.tree.map(lambda p: 0.9 * p, params))
    assert relative(ours.sample(noise, condition, denoiser=other), first) > 1e-3
    np.testing.assert_array_equal(ours.sample(noise, condition), first)
    np.testing.assert_array_equal(ours.sample(noise, condition, denoiser=Denoiser(graph, params)), first)
    ours.sample(noise, condition, condition, Sampler())  # no guidance: the same program
    assert samplers._sample._cache_size() == before


def test_unipc_latents_equal_diffusers(t2v):
    _, theirs, ours = t2v
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(2))
    found = ours.sample(noise, ours.condition(PROMPTS), sampler=ours.sampler(4, solver="unipc"))
    x, text = to_torch(noise), torch_prompts(theirs, PROMPTS)
    theirs.scheduler.set_timesteps(4)
    for t in theirs.scheduler.timesteps:
        with torch.no_grad():
            v = theirs.transformer(x, t.expand(2), text, return_dict=False)[0]
        x = theirs.scheduler.step(v, t, x, return_dict=False)[0]
    assert relative(found, from_torch(x)) <= 1e-4


def test_the_consistency_sampler_takes_one_step_as_euler(t2v):
    _, _, ours = t2v
    noise, condition = jax.random.normal(jax.random.key(0), ours.latent_shape(1)), ours.condition(PROMPTS[:1])
    found = ours.sample(noise, condition, sampler=ours.sampler(solver="consistency"), key=jax.random.key(1))
    assert ours.sampler() == Sampler()
    assert relative(found, ours.sample(noise, condition)) <= 1e-6
    with pytest.raises(UserError, match="give it a key"):
        ours.sample(noise, condition, sampler=ours.sampler(solver="consistency"))


def test_the_scheduler_gives_the_shift(t2v):
    _, _, ours = t2v
    noise, condition = jax.random.normal(jax.random.key(0), ours.latent_shape(1)), ours.condition(PROMPTS[:1])
    moved = dataclasses.replace(ours, scheduler=Scheduler("euler", 7.0, 1, 1.0)).sampler(2)
    assert moved == Sampler.even(2, 7.0) == ours.sampler(2, solver="euler", shift=7.0)
    found = ours.sample(noise, condition, sampler=moved)
    assert relative(found, ours.sample(noise, condition, sampler=ours.sampler(2, solver="euler"))) > 1e-6


def test_a_call_takes_all_from_the_scheduler(t2v):
    _, _, ours = t2v
    told = dict(steps=3, guidance=2.0, solver="unipc", shift=5.0)
    teacher = dataclasses.replace(ours, scheduler=Scheduler("unipc", 5.0, 3, 2.0))
    by_itself = teacher(PROMPTS[0])
    np.testing.assert_array_equal(by_itself, ours(PROMPTS[0], **told))
    for change in (dict(steps=2), dict(guidance=1.0), dict(solver="euler"), dict(shift=8.0)):
        assert (teacher(PROMPTS[0], **change) != by_itself).any()
        np.testing.assert_array_equal(teacher(PROMPTS[0], **change), ours(PROMPTS[0], **{**told, **change}))
    listed = Scheduler("consistency", 5.0, 3, 1.0, (1.0, 0.9, 0.2, 0.0))
    student = dataclasses.replace(ours, scheduler=listed)
    assert student.sampler() == Sampler("consistency", listed.times)
    assert (student(PROMPTS[0], seed=1) != student(PROMPTS[0], seed=1, steps=2)).any()
    np.testing.assert_array_equal(student(PROMPTS[0], seed=1), student(PROMPTS[0], seed=1))


def test_a_call_guides_away_from_the_models_negative_prompt(t2v):
    _, _, ours = t2v
    options = dict(steps=2, guidance=5.0)
    given = ours(PROMPTS[0], negative_prompt=PROMPTS[1], **options)
    moody = dataclasses.replace(ours, defaults=dataclasses.replace(ours.defaults, negative_prompt=PROMPTS[1]))
    np.testing.assert_array_equal(moody(PROMPTS[0], **options), given)
    empty = ours(PROMPTS[0], **options)
    np.testing.assert_array_equal(moody(PROMPTS[0], negative_prompt="", **options), empty)
    assert (given != empty).any()
    np.testing.assert_array_equal(moody(PROMPTS[0]), ours(PROMPTS[0]))  # no guidance


def test_a_negative_prompt_that_is_too_long_is_named(t2v):
    _, _, ours = t2v
    wans = dataclasses.replace(ours, defaults=dataclasses.replace(ours.defaults, negative_prompt=NEGATIVE_PROMPT))
    with pytest.raises(
        UserError, match=r"^negative_prompt \(the model's own, as none was given\): prompt too long: \d+"
    ):
        wans(PROMPTS[0], guidance=2.0)
    with pytest.raises(UserError, match=r"^negative_prompt: prompt too long: "):
        ours(PROMPTS[0], guidance=2.0, negative_prompt=NEGATIVE_PROMPT)
    assert wans(PROMPTS[0]).shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_guidance_keeps_the_picture(i2v, pictures):
    """The negative prompt is told the same image and first frame; with the prompt itself nothing moves."""
    _, _, ours = i2v
    unguided = ours(PROMPTS[0], image=pictures[0])
    guided = ours(PROMPTS[0], image=pictures[0], guidance=5.0, negative_prompt=PROMPTS[0])
    assert np.abs(guided.astype(int) - unguided).max() <= 1


def test_a_call_takes_its_noise(t2v):
    _, _, ours = t2v
    noise = jax.random.normal(jax.random.split(jax.random.key(3))[0], ours.latent_shape(1))
    frames = ours(PROMPTS[0], seed=3)
    np.testing.assert_array_equal(ours(PROMPTS[0], noise=noise), frames)
    assert (ours(PROMPTS[0], noise=-noise) != frames).any()
    for wrong in (noise[:, :, :, :4], jnp.concatenate([noise, noise])):
        with pytest.raises(UserError, match=r"^noise has shape .*, expected \(1, 2, 4, 6, 16\)") as error:
            ours(PROMPTS[0], noise=wrong)
        assert "\n" not in str(error.value)


def wan_size(area, height, width):
    """The height and width in pixels that Wan's image2video.py computes, in double precision."""
    latent = [np.sqrt(area * ratio) // 8 // 2 * 2 for ratio in (height / width, width / height)]
    return round(latent[0]) * 8, round(latent[1]) * 8


@pytest.mark.parametrize("size", [(480, 832), (720, 1280), (48, 48)])
def test_sizes_follow_the_picture_as_in_wan(t2v, size):
    _, _, ours = t2v
    ours = dataclasses.replace(ours, defaults=Defaults(height=size[0], width=size[1]))
    area, differ = size[0] * size[1], []
    for height, width in np.random.default_rng(0).integers(400, 2000, (500, 2)).tolist():
        found = ours.fit(height, width)
        assert found[0] * found[1] <= area and not found[0] % 16 and not found[1] % 16
        if found != wan_size(area, height, width):
            differ.append((height, width))
    assert not differ
    assert ours.fit(*size) == size and ours.fit(size[1], size[0]) == (size[1], size[0])
    # Exactly its own size, where Wan's floating point falls short of it.
    assert wan_size(480 * 832, 480, 832) == (464, 832)


def test_a_pictures_shape_is_kept(i2v, pictures):
    _, _, ours = i2v
    wide = np.concatenate([pictures[0]] * 2, axis=1)  # 40x112
    assert ours(PROMPTS[0], image=wide).shape == (FRAMES, 16, 64, 3)
    assert ours(PROMPTS[0], image=wide, height=HEIGHT).shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert ours(PROMPTS[0]).shape == (FRAMES, HEIGHT, WIDTH, 3)
    long = np.zeros((4, 900, 3), np.uint8)
    with pytest.raises(UserError, match=r"^the image is 4x900, too elongated .* 32x48; crop it, or give") as error:
        ours(PROMPTS[0], image=long)
    assert "\n" not in str(error.value)


def test_first_and_last_frame_models_are_not_sampled(i2v, pictures):
    _, _, ours = i2v
    config = dataclasses.replace(ours.transformer.config, pos_embed_seq_len=34)
    abstract = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    between = dataclasses.replace(ours, transformer=abstract)
    with pytest.raises(UserError, match=r"a first-and-last-frame model .* not sampled; load") as error:
        between(PROMPTS[0], image=pictures[0])
    assert "\n" not in str(error.value)


def test_a_mesh_holds_the_weights(i2v, pictures):
    folder, _, ours = i2v
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=1, tensor=1), jax.devices()[:2])
    sharded = load_pipeline(folder, mesh=mesh)
    kernel = sharded.transformer.blocks.attn1.to_q.kernel.get_value()
    assert len(kernel.sharding.device_set) == 2 and kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 2
    noise = jax.random.normal(jax.random.key(0), ours.latent_shape(1))
    expected = ours.sample(noise, ours.condition(PROMPTS[:1], pictures[:1]))
    assert relative(sharded.sample(noise, sharded.condition(PROMPTS[:1], pictures[:1])), expected) <= 1e-5


def test_bfloat16_keeps_the_autoencoder_in_float32(t2v):
    folder, _, _ = t2v
    pipe = vpae_jax.load_pipeline(str(folder), dtype=jnp.bfloat16)
    dtypes = {
        name: {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(getattr(pipe, name), nnx.Param))}
        for name in ("transformer", "text_encoder", "vae")
    }
    assert dtypes == {"transformer": {"bfloat16"}, "text_encoder": {"bfloat16"}, "vae": {"float32"}}
    noise = jax.random.normal(jax.random.key(0), pipe.latent_shape(1))
    latents = pipe.sample(noise, pipe.condition(PROMPTS[:1]))
    assert latents.dtype == jnp.float32 and np.isfinite(latents).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_frames=8), "num_frames is 8, expected 1 + a multiple of 4, such as 9"),
        (dict(num_frames=0), "num_frames is 0, expected 1 + a multiple of 4, such as 1"),
        (dict(height=40), "height is 40, expected a multiple of 16, such as 32"),
        (dict(width=0), "width is 0, expected a multiple of 16, such as 16"),
        (dict(guidance=0.5), "guidance is 0.5, expected at least 1 (1 is no guidance)"),
        (dict(guidance=float("nan")), "guidance is nan, expected at least 1 (1 is no guidance)"),
        (dict(steps=0), "steps is 0, expected at least 1"),
        (dict(shift=-1.0), "shift is -1.0, expected a positive number"),
        (dict(image=np.zeros((8, 8, 3), np.uint8)), "an image was given, but this is a text-to-video model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_one_line(t2v, arguments, message):
    _, _, ours = t2v
    with pytest.raises(UserError) as error:
        ours("a three moves up", **arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        (
            "text_encoder",
            {"d_model": 32, "num_heads": 4, "d_kv": 8, "vocab_size": 999},
            "vocab_size is 999, but the weights imply 384",
        ),
        ("transformer", {"text_dim": 48}, "text_dim is 48, but the weights imply 32"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(t2v, tmp_path, part, changes, message):
    folder, _, _ = t2v
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path / "model")


def test_parts_of_different_models_are_refused(t2v, i2v, tmp_path):
    shutil.copytree(i2v[0], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "transformer")
    shutil.copytree(t2v[0] / "transformer", tmp_path / "model" / "transformer")
    with pytest.raises(UserError, match="image_dim is None, but the image_encoder's hidden_size is 24"):
        load_pipeline(tmp_path / "model")


def test_no_model_directory_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no transformer \(found: no part of a Wan model\); expected a complete model"):
        load_pipeline(tmp_path)


def test_the_embedded_model_is_in_the_package():
    assert embedded_model().parts[-2:] == ("assets", "tiny")
