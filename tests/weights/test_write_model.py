"""Whole model directories in every layout: settings, tokenizers and sizes survive, and nothing is half written."""

import dataclasses
import json
import shutil

import diffusers
import original_wan
import pytest
from folders import PARTS, bits, edit_json, tensors, values
from lora_models import silent

from vpae_jax.types import UserError
from vpae_jax.weights.card import Provenance
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import read_image_processor
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.settings import Defaults, Scheduler, read_defaults, read_scheduler
from vpae_jax.weights.writing import open_values

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
FORMS = ("wan", "diffusers", "orbax")

# Nothing here is as Wan 2.1 has it, and no shape tells it.
UNTOLD = {
    "transformer": {"rope_max_seq_len": 77, "eps": 1e-4, "text_len": 24},
    "vae": {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16},
    "text_encoder": {"relative_attention_max_distance": 33, "layer_norm_epsilon": 1e-3},
    "image_encoder": {"num_attention_heads": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
}
CLIP = Defaults(num_frames=9, height=32, width=48, fps=8.0, negative_prompt="残缺的")


@pytest.fixture(scope="module")
def odd(diffusers_folder, tmp_path_factory):
    """A model whose configs say what shapes do not."""
    folder = shutil.copytree(diffusers_folder, tmp_path_factory.mktemp("odd") / "model")
    for part, fields in UNTOLD.items():
        edit_json(folder / part / "config.json", **fields)
    edit_json(folder / "vpae_jax.json", **dataclasses.asdict(CLIP))
    return folder


def configs(model):
    return {name: source.config for name, source in model.parts.items()}


@pytest.mark.parametrize("form", ["wan", "diffusers"])
def test_what_shapes_do_not_tell_is_written_down(odd, tmp_path, form):
    model, scheduler = find_model(odd), Scheduler("euler", 7.0, 4, 1.5)
    write_model(tmp_path / "out", Contents(model, scheduler=scheduler), form)
    written = find_model(tmp_path / "out")
    assert configs(written) == configs(model)
    assert configs(model)["text_encoder"].relative_attention_max_distance == 33
    assert configs(model)["image_encoder"].num_attention_heads == 3
    assert read_scheduler(tmp_path / "out", image=True) == scheduler
    assert read_defaults(tmp_path / "out", image=True) == CLIP
    write_model(tmp_path / "back", Contents(written))
    back = find_model(tmp_path / "back")
    assert configs(back) == configs(model) and read_defaults(tmp_path / "back") == CLIP
    assert read_scheduler(tmp_path / "back") == scheduler
    if form == "wan":
        told = json.loads((tmp_path / "out" / "vpae_jax.json").read_text())["parts"]
        expected = {part: {k: v for k, v in f.items() if k not in ("eps", "text_len")} for part, f in UNTOLD.items()}
        assert told == expected  # the transformer's own config.json has these two


@pytest.mark.parametrize("image", [True, False])
def test_a_model_of_wan_needs_no_more_than_wan_writes(wan_folder, tmp_path, image):
    """Where all is as in the release, nothing is written down of the parts, and Wan's sampling holds."""
    source = wan_folder
    if not image:
        original_wan.save_folder(tmp_path / "t2v", image=False)
        source = tmp_path / "t2v"
    write_model(tmp_path / "out", Contents(find_model(source)), "wan")
    settings = json.loads((tmp_path / "out" / "vpae_jax.json").read_text())
    assert settings["parts"] == {}
    expected = Scheduler("unipc", 3.0, 40, 5.0) if image else Scheduler("unipc", 5.0, 50, 5.0)
    for folder in (source, tmp_path / "out"):
        assert read_scheduler(folder, image) == expected
    names = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and "-of-" not in path.name}
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    index = {path for path in names if path.name.endswith(".index.json")}
    assert {str(path) for path in written - names} <= {
        "README.md",
        "vpae_jax.json",
        "out.workflow.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert names - index <= written
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert {key: value for key, value in ours.items() if key != "text_dim"} == theirs  # here it is not the release's
    for name in ("google/umt5-xxl", *(["xlm-roberta-large"] if image else [])):
        for path in (source / name).iterdir():
            assert (tmp_path / "out" / name / path.name).read_bytes() == path.read_bytes()


def test_the_index_says_how_a_model_is_sampled_and_diffusers_has_nothing_to_remark(wan_folder, tmp_path, caplog):
    student = Scheduler("consistency", 5.0, 4, 1.0)
    write_model(tmp_path / "out", Contents(find_model(wan_folder), scheduler=student))
    told = json.loads((tmp_path / "out" / "model_index.json").read_text())["_sampling"]
    times = pytest.approx([1000, 937.5, 833.3333, 625])
    expected = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "consistency", "shift": 5.0}
    assert told == {**expected, "timesteps": times}
    with silent(caplog):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == times
    assert "| timesteps | 1000, 937.5, 833.333, 625 |" in (tmp_path / "out" / "README.md").read_text()


def test_diffusers_loads_what_was_wans(wan_folder, tmp_path):
    contents = Contents(find_model(wan_folder), provenance=Provenance("some | <b>where</b> [x](y)", {"step": 3}))
    write_model(tmp_path / "out", contents)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, diffusers.WanImageToVideoPipeline)
    assert isinstance(loaded.scheduler, diffusers.UniPCMultistepScheduler) and loaded.scheduler.config.flow_shift == 3
    assert loaded.tokenizer("a three").input_ids[-1] == 1
    side = find_model(wan_folder).part("image_encoder").config.image_size
    assert loaded.image_processor.crop_size["height"] == side == 32
    assert read_image_processor(tmp_path / "out" / "image_processor", side).crop_size == (32, 32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| some \\| &lt;b&gt;where&lt;/b&gt; \\[x](y) |" in card and "image-to-video" in card and "| step | 3 |" in card
    )


def test_pieces_of_several_models(wan_folder, diffusers_folder, tmp_path):
    """A transformer and tokenizer of one, the other parts of another."""
    wan, theirs = find_model(wan_folder), find_model(diffusers_folder)
    with open_values(theirs, "vae") as vae, open_values(theirs, "text_encoder") as text:
        write_model(tmp_path / "out", Contents(wan, {"vae": vae, "text_encoder": text}), "wan")
    for part, source in zip(PARTS, (wan_folder, diffusers_folder, diffusers_folder, wan_folder), strict=True):
        found, expected = (values(folder, part) for folder in (tmp_path / "out", source))
        assert found.keys() == expected.keys() and all((found[path] == v).all() for path, v in expected.items())


def test_links_become_files(diffusers_folder, tmp_path):
    """As a repository in the hub's cache."""
    linked = tmp_path / "linked"
    for path in (path for path in diffusers_folder.rglob("*") if path.is_file()):
        link = linked / path.relative_to(diffusers_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for form in FORMS:
        write_model(tmp_path / form, Contents(find_model(linked)), form)
        assert not [path for path in (tmp_path / form).rglob("*") if path.is_symlink()]
    for part in PARTS:
        assert bits(tensors(tmp_path / "diffusers", part)) == bits(tensors(diffusers_folder, part))


def test_refusals_leave_nothing_behind(wan_folder, tmp_path):
    model = find_model(wan_folder)
    less = ModelDirectory(
        model.path, model.folder, {n: s for n, s in model.parts.items() if n != "vae"}, model.tokenizer
    )
    with pytest.raises(UserError, match=r"no vae \(found: transformer, text_encoder, image_encoder\)"):
        less.require_whole()
    less.require_whole({"vae"})
    with pytest.raises(UserError, match="no tokenizer"):
        dataclasses.replace(model, tokenizer=None).require_whole()
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("there", "file"):
        with pytest.raises(UserError, match=f"{name}: already exists; remove it or choose another destination"):
            write_model(tmp_path / name, Contents(model), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"} and not list((tmp_path / "there").iterdir())
