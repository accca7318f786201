"""ComfyUI workflows: their nodes are ComfyUI's, and they sample at the student's own times."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vpae_jax.convert import main
from vpae_jax.flow import draws, solvers
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.weights import layout
from vpae_jax.weights.comfyui import model_file, obstacle, sampling, simple_sigmas, workflow
from vpae_jax.weights.find import find_model
from vpae_jax.weights.settings import Defaults, Scheduler

CLIP = Defaults(81, 480, 832, 16.0, "blurred")
COMBO, INT, FLOAT, STRING = "COMBO", int, float, str

# What the nodes take and give, as Comfy-Org/ComfyUI publishes it: nodes.py at 02217e36a45b,
# comfy_extras/nodes_model_advanced.py at 691e82787be2, nodes_wan.py at 679f171b2f46, nodes_hunyuan.py at 9ca52b46479,
# nodes_custom_sampler.py at 4be318aa1a66, nodes_video.py at 39b885faf944. Inputs by name: a type of link, or of a
# value; of a combo its options, or nothing where they are files. "?" marks what may be left out.
FILE = (COMBO, None)
SAMPLERS = (COMBO, {"euler", "lcm", "uni_pc"})  # of comfy/samplers.py at 311c01406130, those that are of use here
NODES = {
    "UNETLoader": (
        {"unet_name": FILE, "weight_dtype": (COMBO, {"default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"})},
        ("MODEL",),
    ),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": FILE, "strength_model": (FLOAT, -100, 100)},
        ("MODEL",),
    ),
    "CLIPLoader": (
        {"clip_name": FILE, "type": (COMBO, {"wan"}), "device?": (COMBO, {"default", "cpu"})},
        ("CLIP",),
    ),
    "VAELoader": ({"vae_name": FILE}, ("VAE",)),
    "CLIPVisionLoader": ({"clip_name": FILE}, ("CLIP_VISION",)),
    "CLIPVisionEncode": (
        {"clip_vision": "CLIP_VISION", "image": "IMAGE", "crop": (COMBO, {"center", "none"})},
        ("CLIP_VISION_OUTPUT",),
    ),
    "LoadImage": ({"image": FILE}, ("IMAGE", "MASK")),
    "CLIPTextEncode": ({"text": (STRING,), "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyHunyuanLatentVideo": (
        {
            "width": (INT, 16, 16384, 16),
            "height": (INT, 16, 16384, 16),
            "length": (INT, 1, 16384, 4),
            "batch_size": (INT, 1, 4096, 1),
        },
        ("LATENT",),
    ),
    "WanImageToVideo": (
        {
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "vae": "VAE",
            "width": (INT, 16, 16384, 16),
            "height": (INT, 16, 16384, 16),
            "length": (INT, 1, 16384, 4),
            "batch_size": (INT, 1, 4096, 1),
            "clip_vision_output?": "CLIP_VISION_OUTPUT",
            "start_image?": "IMAGE",
            "ref_pad_image?": "IMAGE",
        },
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": (FLOAT, 0, 100)}, ("MODEL",)),
    "KSampler": (
        {
            "model": "MODEL",
            "seed": (INT, 0, 2**64 - 1, 1),
            "steps": (INT, 1, 10000, 1),
            "cfg": (FLOAT, 0, 100),
            "sampler_name": SAMPLERS,
            "scheduler": (COMBO, {"simple"}),
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": (FLOAT, 0, 1),
        },
        ("LATENT",),
    ),
    "RandomNoise": ({"noise_seed": (INT, 0, 2**64 - 1, 1)}, ("NOISE",)),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": (FLOAT, 0, 100)},
        ("GUIDER",),
    ),
    "KSamplerSelect": ({"sampler_name": SAMPLERS}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": (STRING,)}, ("SIGMAS",)),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveWEBM": (
        {
            "images": "IMAGE",
            "filename_prefix": (STRING,),
            "codec": (COMBO, {"vp9", "av1"}),
            "fps": (FLOAT, 0.01, 1000),
            "crf": (FLOAT, 0, 63),
        },
        ("IMAGE",),
    ),
}


def check_value(kind, value):
    """A widget's value: of its type, within its bounds, on its steps."""
    first, *rest = kind
    if first is COMBO:
        assert isinstance(value, str) and (rest[0] is None or value in rest[0])
    elif first is STRING:
        assert isinstance(value, str)
    elif first is FLOAT:
        assert isinstance(value, int | float) and rest[0] <= value <= rest[1]
    else:
        low, high, step = rest
        assert isinstance(value, int) and low <= value <= high and (value - low) % step == 0


def check(graph):
    """Whether ComfyUI's page takes a file for a prompt, and its server every node of it."""
    assert graph and json.loads(json.dumps(graph)) == graph
    used = set()
    for name, node in graph.items():
        assert name.isdecimal() and node.keys() <= {"class_type", "inputs", "_meta"}
        takes, _ = NODES[node["class_type"]]
        known = {key.removesuffix("?"): kind for key, kind in takes.items()}
        required = {key for key in takes if not key.endswith("?")}
        assert required <= node["inputs"].keys() <= known.keys(), (node["class_type"], node["inputs"].keys())
        for key, value in node["inputs"].items():
            if isinstance(known[key], str):
                source, number = value
                gives = NODES[graph[source]["class_type"]][1]
                assert gives[number] == known[key], (node["class_type"], key)
                assert int(source) < int(name)  # no cycles
                used.add(source)
            else:
                check_value(known[key], value)
    ends = {node["class_type"] for name, node in graph.items() if name not in used}
    assert ends == {"SaveWEBM"}  # nothing is loaded in vain


def nodes(graph, kind):
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


SCHEDULERS = {
    "one step": Scheduler("euler", 3.0, 1, 1.0),
    "one step, unipc": Scheduler("unipc", 3.0, 1, 1.0),
    "four steps": Scheduler("consistency", 5.0, 4, 1.0),
    "three steps": Scheduler("euler", 5.0, 3, 1.0),
    "listed": Scheduler.of(Sampler("consistency", (1.0, 0.9375, 0.8333, 0.625, 0.0)), 5.0),
    "an odd shift": Scheduler("consistency", 7.891, 4, 1.0),
    "the teacher": Scheduler("unipc", 5.0, 50, 5.0),
}


@pytest.mark.parametrize("image, encoder", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("lora", [None, "student.safetensors"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_nodes_and_links_are_comfyuis(name, image, encoder, lora):
    graph = workflow(SCHEDULERS[name], CLIP, "model.safetensors", image=image, image_encoder=encoder, lora=lora)
    check(graph)
    kinds = {node["class_type"] for node in graph.values()}
    assert ("WanImageToVideo" in kinds) == ("LoadImage" in kinds) == image != ("EmptyHunyuanLatentVideo" in kinds)
    assert ("CLIPVisionLoader" in kinds) == encoder and ("LoraLoaderModelOnly" in kinds) == (lora is not None)
    (latent,) = nodes(graph, "WanImageToVideo" if image else "EmptyHunyuanLatentVideo")
    assert (latent["width"], latent["height"], latent["length"]) == (832, 480, 81)
    (saved,) = nodes(graph, "SaveWEBM")
    assert saved["fps"] == 16
    (sampler,) = nodes(graph, "KSampler") + nodes(graph, "CFGGuider")
    negative = graph[sampler["negative"][0]]
    while negative["class_type"] != "CLIPTextEncode":
        negative = graph[negative["inputs"]["negative"][0]]
    assert sampler["cfg"] == SCHEDULERS[name].guidance
    assert negative["inputs"]["text"] == ("blurred" if sampler["cfg"] > 1 else "")


def comfyui_levels(graph):
    """The levels that ComfyUI makes of a workflow, from its published formulas, in its float32."""
    if manual := nodes(graph, "ManualSigmas"):
        found = re.findall(r"[-+]?(?:\d*\.*\d+)", manual[0]["sigmas"])  # as the node reads them
        return np.array([float(text) for text in found], np.float32)
    (model,), (sampler,) = nodes(graph, "ModelSamplingSD3"), nodes(graph, "KSampler")
    s, steps = model["shift"], sampler["steps"]
    u = np.arange(1, 1001, dtype=np.float32) / np.float32(1000)
    table = u if s == 1.0 else s * u / (1 + (s - 1) * u)
    return np.array([*(table[-(1 + int(i * (1000 / steps)))] for i in range(steps)), 0], np.float32)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_levels_are_the_students_times(name):
    scheduler = SCHEDULERS[name]
    graph = workflow(scheduler, CLIP, "model.safetensors")
    expected = np.array(scheduler.sampler().times)
    if scheduler.steps == 1:
        expected[0] = 1  # UniPC calls it .9998
    np.testing.assert_allclose(comfyui_levels(graph), expected, atol=1e-6)
    simple = {"one step", "one step, unipc", "four steps"}
    assert bool(nodes(graph, "KSampler")) == (name in simple)
    names = {"euler": "euler", "consistency": "lcm", "unipc": "uni_pc"}
    (chosen,) = {inputs["sampler_name"] for kind in ("KSampler", "KSamplerSelect") for inputs in nodes(graph, kind)}
    assert chosen == ("euler" if scheduler.steps == 1 else names[scheduler.solver])


@pytest.mark.parametrize("solver", ["euler", "consistency"])
def test_ksamplers_simple_levels_are_even_times_where_the_steps_divide_1000(solver):
    for steps in (*range(1, 31), 40, 50, 100):
        for shift in (1.0, 3.0, 5.0, 8.0, 12.5):
            times = Sampler.even(steps, shift, 1.0, solver).times
            same = np.allclose(simple_sigmas(steps, shift), times, rtol=0, atol=1e-6)
            assert same == (1000 % steps == 0), (steps, shift)
            found = sampling(Scheduler(solver, shift, steps, 1.0))
            assert found.shift == (shift if same else None)
            np.testing.assert_allclose(found.sigmas, times, atol=1e-6)


def test_one_step_does_not_depend_on_the_shift():
    assert {simple_sigmas(1, shift) for shift in (0.5, 1.0, 3.0, 8.0)} == {(1.0, 0.0)}


def test_the_samplers_take_our_steps():
    """ComfyUI's "euler" and "lcm", by their published formulas, on a network whose answer is known."""
    x = np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32)
    key = jax.random.key(7)
    for name in ("three steps", "four steps"):
        scheduler = SCHEDULERS[name]
        levels, state = comfyui_levels(workflow(scheduler, CLIP, "m")), x
        keys = draws.split(draws.clip_keys(key, 1), scheduler.steps)
        for t, after, one in zip(levels, levels[1:], keys, strict=False):
            denoised = state - t * (np.sin(3 * state) + t)
            noise = np.asarray(draws.normal(one, x.shape))
            if scheduler.solver == "euler":
                state = state + (state - denoised) / t * (after - t)
            else:
                state = denoised if after == 0 else after * noise + (1 - after) * denoised

        def velocity(x, t):
            return jnp.sin(3 * x) + t[0]

        times = np.asarray(scheduler.sampler().times)
        if scheduler.solver == "euler":
            ours = solvers.euler(velocity, jnp.asarray(x), times)
        else:
            ours = solvers.consistency(velocity, jnp.asarray(x), times, key)
        np.testing.assert_allclose(state, np.asarray(ours), atol=1e-5)


def test_models_without_a_workflow():
    one = SCHEDULERS["one step"]
    assert obstacle(one, None) is None
    assert "two experts" in (obstacle(one, 0.9) or "")
    assert "causal" in (obstacle(dataclasses.replace(one, chunks=Chunks(3)), None) or "")
    assert "at most 100" in (obstacle(dataclasses.replace(one, guidance=200.0), None) or "")


@pytest.mark.parametrize(
    "base, name",
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1_t2v_1.3B_fp16.safetensors"),
        ("models/Wan2.1-T2V-14B", "wan2.1_t2v_14B_fp16.safetensors"),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers@main", "wan2.1_i2v_480p_14B_fp16.safetensors"),
        ("Wan2.1-I2V-14B-720P", "wan2.1_i2v_720p_14B_fp16.safetensors"),
        ("some/wan_fp8.safetensors", "wan_fp8.safetensors"),
        ("runs/phase1/model", "model.safetensors"),
        ("me/own", "own.safetensors"),
    ],
)
def test_what_the_file_of_a_model_is_called(base, name):
    assert model_file(base) == name


# As `convert` writes them.


def run(*arguments):
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_convert_writes_a_workflow_beside_the_weights(models, tmp_path, task):
    run(models[task], tmp_path / "student", "--format=wan")
    graph = json.loads((tmp_path / "student" / "student.workflow.json").read_text())
    check(graph)
    assert nodes(graph, "UNETLoader")[0]["unet_name"] == "student.safetensors"
    (sampler,) = nodes(graph, "KSampler")
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (2, 1.0, "euler")
    assert nodes(graph, "ModelSamplingSD3") == [{"model": ["1", 0], "shift": 3.0}]
    assert bool(nodes(graph, "CLIPVisionEncode")) == (task == "i2v")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "Drag `student.workflow.json` into ComfyUI" in card and "diffusion_models/student.safetensors" in card
    assert ("clip_vision/" in card) == (task == "i2v")
    assert find_model(tmp_path / "student").parts.keys() == find_model(models[task]).parts.keys()
    run(tmp_path / "student", tmp_path / "back", "--format=diffusers", "--verify")
    assert not list((tmp_path / "back").glob("*.workflow.json"))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_convert_writes_a_workflow_beside_a_lora(models, tmp_path, task):
    run(models[task], tmp_path / "model", "--format=diffusers")
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.attn1.to_q.weight"] += 1
    save_file(tensors, path)
    file = tmp_path / "student.safetensors"
    run(tmp_path / "model", file, "--format=wan", "--as-lora", "--rank=1", f"--base={models[task]}")
    graph = json.loads((tmp_path / "student.workflow.json").read_text())
    check(graph)
    assert nodes(graph, "LoraLoaderModelOnly")[0]["lora_name"] == file.name
    assert nodes(graph, "UNETLoader")[0]["unet_name"] == f"{models[task].name}.safetensors"
    with safe_open(file, "np") as opened:
        told = opened.metadata()
    assert json.loads(told["sampling"])["num_inference_steps"] == 2
    assert told["task"] == ("image-to-video" if task == "i2v" else "text-to-video")


def test_the_weights_for_comfyui_are_one_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 10_000)
    for form, several in (("wan", False), ("diffusers", True)):
        run(models["t2v"], tmp_path / form, f"--format={form}")
        found = list((tmp_path / form).rglob("diffusion_pytorch_model-*-of-*.safetensors"))
        assert bool(found) == several
