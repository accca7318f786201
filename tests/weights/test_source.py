"""Finding a model: whatever its layout, the names of its files and their sizes; or one line that says what is wrong."""

import dataclasses
import json
import shutil

import diffusers
import huggingface_hub
import jax.numpy as jnp
import original_wan
import pytest
import torch
from folders import PARTS, bits, edit, edit_json, files, mixed, read, same, tensors, values, write

from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.types import UserError
from vpae_jax.weights import orbax
from vpae_jax.weights.filenames import write_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.locate import embedded_model, locate
from vpae_jax.weights.parts import config_json
from vpae_jax.weights.tensors import Tensors

HUGE = 10**12


def refused(path, part=None):
    """The one line with which a model is refused, on being found or, with a part, on its being opened."""
    with pytest.raises(UserError) as error:
        source = find_model(path).part(part) if part else find_model(path)
        if part:
            with source.open():
                pass
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def opened(path, part):
    """The config of a part whose every tensor fits."""
    source = find_model(path).part(part)
    with source.open():
        return source.config


@pytest.fixture
def wan(wan_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(wan_folder, tmp_path / "model")


@pytest.fixture
def theirs(diffusers_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(diffusers_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def wide():
    """A transformer of one head of Wan's 128 channels, whose sizes need no config.json."""
    torch.manual_seed(0)
    sizes = {"dim": 128, "ffn_dim": 16, "freq_dim": 8, "num_heads": 1, "num_layers": 2, "text_dim": 8}
    return dict(original_wan.Transformer(**sizes).state_dict())


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# Folders as their authors publish them.


def test_a_folder_of_diffusers(diffusers_folder):
    model = find_model(diffusers_folder)
    assert tuple(model.parts) == PARTS and model.folder == diffusers_folder
    assert model.tokenizer == diffusers_folder / "tokenizer" and model.more_tokenizers == ()
    assert model.image_processor == diffusers_folder / "image_processor"
    for name, source in model.parts.items():
        assert source.layout == "diffusers" and source.folder == diffusers_folder / name
        written = json.loads((diffusers_folder / name / "config.json").read_text())
        ours = json.loads(json.dumps(dataclasses.asdict(source.config)))
        assert {k: v for k, v in ours.items() if k in written} == {k: v for k, v in written.items() if k in ours}
        with source.open() as found:
            assert set(found.names.values()) == set(read(source.files[0])) and not found.extras


@pytest.mark.parametrize("image, shards", [(True, 2), (False, 1)])
def test_a_folder_of_wan(tmp_path, image, shards):
    made = original_wan.save_folder(tmp_path, image=image, shards=shards)
    model = find_model(tmp_path)
    assert tuple(model.parts) == (PARTS if image else PARTS[:3])
    assert {source.layout for source in model.parts.values()} == {"wan"}
    assert model.tokenizer == tmp_path / "google" / "umt5-xxl" and model.image_processor is None
    assert model.more_tokenizers == ((tmp_path / "xlm-roberta-large",) if image else ())
    transformer, text, vae = (model.parts[name].config for name in ("transformer", "text_encoder", "vae"))
    assert (transformer.width, transformer.num_attention_heads, transformer.num_layers) == (24, 2, 2)
    assert (transformer.in_channels, transformer.out_channels) == (36 if image else 16, 16)
    assert (transformer.ffn_dim, transformer.freq_dim, transformer.text_dim) == (40, 16, 32)
    assert transformer.image_dim == (32 if image else None) and transformer.pos_embed_seq_len is None
    assert (text.vocab_size, text.d_model, text.d_kv, text.d_ff, text.num_heads) == (384, 32, 6, 48, 4)
    assert (vae.base_dim, vae.dim_mult, vae.num_res_blocks) == (4, (1, 2, 2, 2), 1)
    if image:
        vision = model.parts["image_encoder"].config
        assert (vision.hidden_size, vision.num_attention_heads, vision.hidden_act) == (32, 16, "gelu")
        assert (vision.image_size, vision.patch_size, vision.num_tokens) == (32, 8, made.image_encoder.num_tokens)
        with model.parts["image_encoder"].open() as found:
            assert {name.split(".")[0] for name in found.extras} == {"textual", "log_scale", "visual"}
    for name in model.parts:
        opened(tmp_path, name)


@pytest.mark.parametrize("part", PARTS)
def test_dtypes_are_the_files(wan, wan_folder, part):
    (path, *_) = files(wan, part)
    edit(path, lambda t: t.update(mixed(t)))
    with find_model(wan).part(part).open() as found:
        kinds = {theirs: found.stored(name).dtype for name, theirs in found.names.items()}
    expected = {name: value.dtype for name, value in tensors(wan, part).items() if name in kinds}
    assert {name: getattr(torch, kind.name) for name, kind in kinds.items()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}


def test_other_texts_and_first_and_last_frame(tmp_path):
    sizes = {"transformer": {"model_type": "flf2v", "text_len": 24, "num_heads": 3, "num_layers": 1, "dim": 18}}
    original_wan.save_folder(tmp_path, image=True, **sizes)
    config = opened(tmp_path, "transformer")
    assert (config.text_len, config.num_attention_heads, config.attention_head_dim) == (24, 3, 6)
    assert config.pos_embed_seq_len == 34 and config.added_kv_proj_dim == 18


# Files as others repackage them.


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "a."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_single_file(tmp_path, wide, prefix, suffix):
    path = write(tmp_path / f"any.{suffix}", prefixed(prefix, wide))
    model = find_model(path)
    assert tuple(model.parts) == ("transformer",) and model.parts["transformer"].prefix == prefix
    config = opened(path, "transformer")
    assert (config.num_attention_heads, config.attention_head_dim, config.text_len) == (1, 128, 512)
    assert (config.num_layers, config.image_dim) == (2, None)
    with find_model(path).part("transformer").open() as found:
        assert found.names == {name: prefix + name for name in wide}


def test_a_single_file_with_diffusers_names(tmp_path):
    sizes = {"text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1}
    theirs = diffusers.WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **sizes)
    path = write(tmp_path / "x.safetensors", prefixed("model.", theirs.state_dict()))
    source = find_model(path).part("transformer")
    assert source.layout == "diffusers" and source.prefix == "model." and source.config.num_attention_heads == 1


def test_widths_that_are_no_multiple_need_a_config(wan, wan_folder):
    single = write(wan.parent / "single" / "x.safetensors", tensors(wan, "transformer"))
    assert "the width 24 is no multiple of Wan's 128 channels a head; add the model's config.json" in refused(single)
    assert str(single) in refused(single)
    shutil.copy(wan / "config.json", single.parent)
    assert opened(single, "transformer") == find_model(wan_folder).part("transformer").config


def test_several_parts_in_one_file(tmp_path, wide, wan_folder, diffusers_folder):
    original = tensors(wan_folder, "image_encoder")
    state = {
        "transformer": prefixed("model.diffusion_model.", wide),
        "vae": prefixed("first_stage_model.", tensors(wan_folder, "vae")),
        "text_encoder": prefixed("text_encoders.umt5xxl.transformer.", tensors(diffusers_folder, "text_encoder")),
        "image_encoder": prefixed("clip.", {n: v for n, v in original.items() if n.startswith("visual.")}),
    }
    path = write(tmp_path / "all.safetensors", {n: v for part in state.values() for n, v in part.items()})
    model = find_model(path)
    assert {name: source.layout for name, source in model.parts.items()} == {
        "transformer": "wan",
        "vae": "wan",
        "text_encoder": "diffusers",
        "image_encoder": "wan",
    }
    for name, folder in (("vae", wan_folder), ("text_encoder", diffusers_folder), ("image_encoder", wan_folder)):
        assert same(values(model, name), values(folder, name))
    with model.part("transformer").open() as found:
        assert set(found.names) == set(wide)
    # The transformer's tensors without a prefix, the others' with one.
    state["transformer"] = wide
    path = write(tmp_path / "some.safetensors", {n: v for part in state.values() for n, v in part.items()})
    model = find_model(path)
    assert set(model.parts) == set(PARTS) and model.parts["transformer"].prefix == ""
    assert same(values(model, "vae"), values(wan_folder, "vae"))
    with model.part("transformer").open() as found:
        assert set(found.names) == set(wide)


def test_a_tree_of_comfyui(tmp_path, wide, wan_folder, diffusers_folder):
    write(tmp_path / "diffusion_models" / "wan2.1_t2v.safetensors", prefixed("model.diffusion_model.", wide))
    write(tmp_path / "vae" / "wan_2.1_vae.safetensors", tensors(wan_folder, "vae"))
    text = tensors(diffusers_folder, "text_encoder") | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    write(tmp_path / "text_encoders" / "umt5_xxl.safetensors", text)
    vision = tensors(wan_folder, "image_encoder")
    write(tmp_path / "clip_vision" / "open_clip.pt", vision)
    model = find_model(tmp_path)
    assert {name: (source.layout, source.folder.name) for name, source in model.parts.items()} == {
        "transformer": ("wan", "diffusion_models"),
        "vae": ("wan", "vae"),
        "text_encoder": ("diffusers", "text_encoders"),
        "image_encoder": ("wan", "clip_vision"),
    }
    assert model.tokenizer is None
    assert same(values(model, "vae"), values(wan_folder, "vae"))
    assert same(values(model, "text_encoder"), values(diffusers_folder, "text_encoder"))
    assert same(values(model, "image_encoder"), values(wan_folder, "image_encoder"))


def test_an_encoder_with_transformers_names_beside_wans_config(wan, diffusers_folder):
    """The config.json there is the transformer's."""
    (wan / original_wan.TEXT_FILE).unlink()
    write(wan / "umt5.safetensors", tensors(diffusers_folder, "text_encoder"))
    source = find_model(wan).part("text_encoder")
    assert source.layout == "diffusers" and source.config.num_layers == 2
    opened(wan, "text_encoder")
    opened(wan, "transformer")


def test_shards_without_an_index(wan, wan_folder):
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    source = find_model(wan).part("transformer")
    assert len(source.files) == 2
    assert same(values(wan, "transformer"), values(wan_folder, "transformer"))
    source.files[1].unlink()
    assert "is missing" in refused(wan, "transformer")


def test_files_are_known_by_their_content(wan, wan_folder):
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    whole = write(wan / "weights.safetensors", tensors(wan, "transformer")).rename(wan / "a.ckpt")
    for path in files(wan, "transformer"):
        path.unlink()
    for part, name in (("vae", "b.bin"), ("text_encoder", "c.safetensors"), ("image_encoder", "sub/d.pt")):
        (wan / "sub").mkdir(exist_ok=True)
        files(wan, part)[0].rename(wan / name)
    model = find_model(wan)
    assert model.parts["transformer"].files == (whole,)
    assert {source.folder.name for source in model.parts.values()} == {"model", "sub"}
    for part in PARTS:
        assert same(values(model, part), values(wan_folder, part))


def test_checkpoints_inside_others(tmp_path, wan_folder):
    state = tensors(wan_folder, "vae")
    torch.save({"state_dict": prefixed("model.", state), "step": 3}, tmp_path / "vae.pth")
    assert same(values(tmp_path, "vae"), values(wan_folder, "vae"))


def test_one_part_of_a_pipeline(diffusers_folder):
    model = find_model(diffusers_folder / "vae")
    assert tuple(model.parts) == ("vae",)
    assert "no transformer (found: vae); expected a whole model" in refused(diffusers_folder / "vae", "transformer")


def test_folders_without_a_model(tmp_path):
    assert "no such folder or file; expected a model directory" in refused(tmp_path / "none")
    assert find_model(tmp_path).parts == {}
    assert "no vae (found: no part of a Wan model)" in refused(tmp_path, "vae")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / ".hidden.safetensors").write_text("nothing")
    assert find_model(tmp_path).parts == {}
    write(tmp_path / "other.safetensors", {"unet.weight": torch.zeros(2)})
    assert find_model(tmp_path).parts == {} and find_model(tmp_path / "other.safetensors").parts == {}
    (tmp_path / "text.txt").write_text("no weights")
    assert "not a safetensors file" in refused(tmp_path / "text.txt")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    assert "broken.safetensors: truncated or not a safetensors file" in refused(tmp_path / "broken.safetensors")
    assert find_model(tmp_path).parts == {}
    assert "could not read " in refused(tmp_path, "vae") and "broken.safetensors: truncated" in refused(tmp_path, "vae")


UNRELATED = {
    "optimizer.pt": b"PK\3\4 cut off",
    "training_args.bin": b"\x80\2cos\nsystem\n.",
    "scheduler.bin": b"",
    "other.safetensors.index.json": b"{}",
    "bad.safetensors.index.json": b"{",
    "transformer/optimizer.bin": b"\0" * 20,
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_files_are_passed_over(theirs, name):
    (theirs / name).write_bytes(UNRELATED[name])
    model = find_model(theirs)
    assert tuple(model.parts) == PARTS and [path for path, _ in model.passed_over] == [theirs / name]
    assert str(theirs / name) in refused(theirs / name)
    shutil.rmtree(theirs / "vae")
    message = refused(theirs, "vae")
    assert "no vae (found: " in message and f"; could not read {theirs / name}: {model.passed_over[0][1]}" in message


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors.index.json",
        "image_encoder/model-00001-of-00002.safetensors",
        "Wan2.1_VAE.pth",
        "diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_broken_files_at_the_usual_places_are_refused(theirs, name):
    (theirs / name).write_bytes(b"{}")
    assert str(theirs / name) in refused(theirs)


def test_pickled_shards_beside_safetensors(theirs, diffusers_folder):
    folder = theirs / "text_encoder"
    state = sorted(read(folder / "model.safetensors").items())
    for number, part in enumerate((state[:3], state[3:]), 1):
        write(folder / f"pytorch_model-0000{number}-of-00002.bin", dict(part))
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    expected = values(diffusers_folder, "text_encoder")
    assert same(values(theirs, "text_encoder"), expected)
    (folder / "model.safetensors").rename(folder / "renamed.safetensors")
    assert find_model(theirs).part("text_encoder").files == (folder / "renamed.safetensors",)
    (folder / "renamed.safetensors").unlink()
    assert len(find_model(theirs).part("text_encoder").files) == 2
    assert same(values(theirs, "text_encoder"), expected)


@pytest.mark.parametrize("mark", ["model_index.json", "vpae_jax.json"])
def test_a_model_inside_another_is_not_looked_into(theirs, wan_folder, mark):
    inner = shutil.copytree(wan_folder, theirs / "another")
    assert len(find_model(theirs).more_tokenizers) == 1
    shutil.rmtree(theirs / "vae")
    assert find_model(theirs).part("vae").folder == inner
    (inner / mark).write_text("{}")
    model = find_model(theirs)
    assert "vae" not in model.parts and model.more_tokenizers == ()


def test_the_tokenizers_usual_places_come_first(theirs):
    for name in ("a", "google/umt5-xxl"):
        shutil.copytree(theirs / "tokenizer", theirs / name)
    (theirs / "a" / "tokenizer_config.json").write_text("{")
    model = find_model(theirs)
    assert model.tokenizer == theirs / "tokenizer"
    assert model.more_tokenizers == (theirs / "google" / "umt5-xxl", theirs / "a")


def test_repeated_tensors_are_compared_in_blocks(theirs, monkeypatch):
    path = theirs / "text_encoder" / "model.safetensors"
    edit(path, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"]}))
    size, read_whole = read(path)["shared.weight"].nbytes, Tensors.read
    blocks = []

    def counted(self, name, index=()):
        blocks.append(read_whole(self, name, index))
        return blocks[-1]

    monkeypatch.setattr(Tensors, "read", counted)
    monkeypatch.setattr("vpae_jax.run.first_weights.directory.BLOCK", size // 5)
    opened(theirs, "text_encoder")
    assert len(blocks) == 12 and max(block.nbytes for block in blocks) <= size // 5
    assert sum(block.nbytes for block in blocks) == 2 * size
    for change in (lambda t: t[-1].add_(1), lambda t: t.set_(t[:-1].clone()), lambda t: t.set_(t.reshape(-1).clone())):
        edit(path, lambda t, change=change: change(t["encoder.embed_tokens.weight"]))
        assert "differs from 'shared.weight', which it should repeat" in refused(theirs, "text_encoder")


@pytest.mark.parametrize("name", ["config.json", "vpae_jax.json", "model_index.json"])
def test_folders_in_place_of_json_are_refused(wan, name):
    (wan / name).unlink(missing_ok=True)
    (wan / name).mkdir()
    assert refused(wan).startswith(f"{wan / name}: is not a regular file")


@pytest.mark.parametrize("part", PARTS)
def test_an_orbax_part_alone(theirs, tmp_path, part):
    config = find_model(theirs).part(part).config
    folder = tmp_path / "any"
    folder.mkdir()
    orbax.save(folder / "params", {"a": jnp.ones(2)})
    assert "params: " in refused(folder, part) and "does not say of which part" in refused(folder, part)
    write_json(folder / "config.json", config_json(config, part))
    found = find_model(folder)
    assert tuple(found.parts) == (part,) and found.part(part).config == config
    assert found.part(part).layout == "orbax" and found.part(part).folder == folder


# The hub.

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub; call it to put a folder there."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder, repository, ref="main"):
        home = cache / f"models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / REVISION
        (home / "blobs").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / ref).write_text(REVISION)
        for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            blob = home / "blobs" / f"{number:064x}"
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return snapshot

    return put


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_a_repository_in_the_hubs_cache(hub, wan_folder, diffusers_folder, layout):
    folder = wan_folder if layout == "wan" else diffusers_folder
    snapshot = hub(folder, "Some-Body/wan_2.1")
    found = locate("Some-Body/wan_2.1")
    assert found == snapshot and all(p.is_symlink() for p in found.rglob("*.safetensors"))
    model = find_model(found)
    assert tuple(model.parts) == PARTS and {s.layout for s in model.parts.values()} == {layout}
    for part in PARTS:
        assert same(values(model, part), values(folder, part))


def test_a_revision_in_the_hubs_cache(hub, wan_folder):
    snapshot = hub(wan_folder, "owner/name", ref="v1.0")
    assert locate("owner/name@v1.0") == locate(f"owner/name@{REVISION}") == snapshot
    for name in ("owner/name", "owner/name@v2", "owner/other"):
        with pytest.raises(UserError, match="not in the hub's cache, and the hub cannot be asked") as error:
            locate(name)
        assert "\n" not in str(error.value)


def test_names_that_stand_for_models(hub, tmp_path, wan_folder, monkeypatch):
    assert locate(None) == locate("tiny") == embedded_model() and locate(wan_folder) == wan_folder
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").resolve() == tmp_path / "owner" / "name"  # a path is preferred
    for name in ("none", "a/b/c", "/a/b", "../b", "a/b c", "a/", ".."[:1] + "a/b"):
        with pytest.raises(UserError, match="no such folder or file") as error:
            locate(name)
        assert "\n" not in str(error.value)


def test_the_embedded_model_is_one():
    model = find_model(embedded_model())
    assert tuple(model.parts) == PARTS and model.tokenizer is not None
    for part in PARTS:
        opened(embedded_model(), part)


# Refusals.


def test_a_part_twice(wan, wan_folder):
    shutil.copy(wan / original_wan.VAE_FILE, wan / "copy.pth")
    assert same(values(wan, "vae"), values(wan_folder, "vae"))  # the usual place decides
    (wan / original_wan.VAE_FILE).rename(wan / "another.pth")
    assert refused(wan) == (f"{wan}: another.pth and copy.pth both hold the vae; name one of them, or remove one")


def test_variants_beside_the_usual_file(theirs):
    path = theirs / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert find_model(theirs).part("vae").files == (path,)


def test_a_part_twice_in_one_file(tmp_path, wide):
    state = prefixed("model.", wide) | prefixed("ema.", wide)
    message = refused(write(tmp_path / "x.safetensors", state))
    assert message.startswith(str(tmp_path)) and "both hold the transformer" in message


def test_an_orbax_part_is_found_and_may_not_be_there_twice(theirs, tmp_path):
    config = find_model(theirs).part("vae").config
    folder = tmp_path / "ours" / "vae"
    folder.mkdir(parents=True)
    orbax.save(folder / "params", {"a": jnp.ones(2)})
    write_json(folder / "config.json", config_json(config, "vae"))
    source = find_model(tmp_path / "ours").part("vae")
    assert source.layout == "orbax" and source.config == config and source.folder == folder
    with pytest.raises(ValueError, match="holds our own arrays"), source.open():
        pass
    shutil.copytree(folder / "params", theirs / "vae" / "params")
    assert "both hold the vae" in refused(theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "this is a Wan 2.2 pipeline"),
        ({"expand_timesteps": True}, "this is a Wan 2.2 pipeline"),
        ({"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipeline', expected 'WanPipeline' or"),
        ({"_class_name": ["WanPipeline"]}, "_class_name is ['WanPipeline'], expected"),
    ],
)
def test_other_pipelines_are_refused(theirs, changes, message):
    edit_json(theirs / "model_index.json", transformer_2=[None, None], expand_timesteps=False)
    find_model(theirs)
    edit_json(theirs / "model_index.json", **changes)
    assert "model_index.json" in refused(theirs) and message in refused(theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["scaled_fp8", "blocks.0.ffn.0.scale_weight", "blocks.0.ffn.0.weight_scale"])
def test_scaled_float8_is_refused(tmp_path, wide, prefix, inside, name):
    state = {n: v.to(torch.float8_e4m3fn) if n.endswith("ffn.0.weight") else v for n, v in wide.items()}
    state = prefixed(prefix, state) | {(prefix if inside else "") + name: torch.ones(())}
    message = refused(write(tmp_path / "fp8.safetensors", state), "transformer")
    assert "fp8.safetensors" in message and name in message
    assert "scales float8 weights; fetch the bfloat16 or float16 file" in message


def test_plain_float8_is_read(tmp_path, wide):
    state = {n: v.to(torch.float8_e4m3fn) if n.endswith("ffn.0.weight") else v for n, v in wide.items()}
    write(tmp_path / "fp8.safetensors", state)
    found = values(tmp_path, "transformer")["blocks/ffn/proj_in/kernel[0]"]
    assert found.dtype == jnp.float8_e4m3fn
    expected = state["blocks.0.ffn.0.weight"].float().numpy().T
    assert (found.astype(jnp.float32) == expected).all()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_integers_are_refused(tmp_path, wide, kind):
    name = "blocks.1.ffn.0.weight"
    path = write(tmp_path / "int8.safetensors", wide | {name: torch.ones(16, 128, dtype=kind)})
    called = str(kind).removeprefix("torch.")
    assert refused(path, "transformer") == (
        f"{path}: tensor '{name}' is of {called}, expected floating point; quantised weights do not load"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blocks.1.ffn.0.weight"), "tensor 'blocks.1.ffn.0.weight' of shape [16, 128] is missing"),
        (
            lambda t: t.pop("blocks.0.ffn.0.weight"),
            "tensor 'blocks.0.ffn.0.weight' is missing; fetch the weights again",
        ),
        (lambda t: t.pop("patch_embedding.weight"), "tensor 'patch_embedding.weight' is missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.1.") and "norm" in n],
            "tensor 'blocks.1.self_attn.norm_k.weight' of shape [128] is missing (and 5 more)",
        ),
        (lambda t: t.update({"vace.weight": torch.ones(3)}), "tensor 'vace.weight' of shape [3] is unknown"),
        (
            lambda t: t.update({"blocks.1.ffn.0.weight": torch.ones(16, 127)}),
            "tensor 'blocks.1.ffn.0.weight' has shape [16, 127], expected [16, 128]",
        ),
        (
            lambda t: t.update({"patch_embedding.weight": torch.ones(3)}),
            "tensor 'patch_embedding.weight' has shape [3], which no Wan 2.1 model has",
        ),
        (
            lambda t: t.update({"patch_embedding.weight": torch.ones(128, 16, 1, 0, 2)}),
            "tensor 'patch_embedding.weight' has shape [128, 16, 1, 0, 2], which no Wan 2.1 model has",
        ),
        (
            lambda t: t.update({"blocks.999999999999.ffn.0.weight": t.pop("blocks.1.ffn.0.weight")}),
            "tensor 'blocks.2.self_attn.norm_k.weight' of shape [128] is missing (and 27 more)",
        ),
    ],
)
def test_spoilt_tensors_are_one_line(tmp_path, wide, change, message):
    state = dict(wide)
    change(state)
    path = write(tmp_path / "x.safetensors", state)
    found = refused(path, "transformer")
    assert str(path) in found and message in found


# Configs.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights make it 2; which of them is wrong?"),
        ({"ffn_dim": HUGE}, f"ffn_dim is {HUGE}, but the weights make it 40"),
        ({"dim": HUGE}, f"added_kv_proj_dim is 24, expected the model's width {HUGE}"),
        ({"num_heads": HUGE}, f"dim is 24 and num_heads {HUGE}, expected a multiple and its divisor"),
        ({"num_heads": 0}, "num_heads 0, expected a multiple"),
        ({"num_heads": 24}, "attention_head_dim is 1, expected an even number"),
        ({"dim": "24"}, "dim is '24' and num_heads 2"),
        ({"dim": None}, "dim is None and num_heads 2"),
        ({"num_layers": 2.5}, "num_layers: expected int, found 2.5"),
        ({"in_dim": -1}, "in_channels is -1, expected at least 1"),
        ({"patch_size": [1, 1, 1]}, "patch_size is (1, 1, 1), but the weights make it (1, 2, 2)"),
        ({"text_dim": 31}, "text_dim is 31, but the weights make it 32"),
        ({"model_type": "vace"}, "expected a WanModel of type t2v, i2v, flf2v"),
        ({"_class_name": "VaceWanModel"}, "_class_name is 'VaceWanModel', expected"),
        ({"qk_norm": False}, "qk_norm is False, only True is supported"),
        ({"window_size": [5, 5]}, "window_size is [5, 5], only [-1, -1] is supported"),
        ({"num_layer": 2}, "config.json.num_layer: unknown key"),
    ],
)
def test_a_config_of_wan_that_the_weights_contradict(wan, changes, message):
    edit_json(wan / "config.json", **changes)
    found = refused(wan)
    assert str(wan / "config.json") in found and message in found


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights make it 2"),
        ("transformer", {"num_attention_heads": HUGE}, "added_kv_proj_dim is 24, expected the model's width"),
        (
            "transformer",
            {"image_dim": None, "added_kv_proj_dim": None},
            "image_dim is None, but the weights make it 24",
        ),
        ("transformer", {"cross_attn_norm": False}, "cross_attn_norm is False, but the weights make it True"),
        ("vae", {"num_res_blocks": HUGE}, f"num_res_blocks is {HUGE}, but the weights make it 1"),
        ("vae", {"dim_mult": [1, 2, 2, HUGE]}, "but the weights make it (1, 2, 2, 2)"),
        ("vae", {"temperal_downsample": [True, True, False]}, "but the weights make it (False, True, True)"),
        ("text_encoder", {"vocab_size": HUGE}, f"vocab_size is {HUGE}, but the weights make it 384"),
        ("text_encoder", {"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights make it 2"),
        ("image_encoder", {"num_hidden_layers": HUGE}, f"num_hidden_layers is {HUGE}, but the weights make it 3"),
        ("image_encoder", {"image_size": 8 * HUGE}, f"image_size is {8 * HUGE}, but the weights make it 32"),
        ("image_encoder", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
    ],
)
def test_a_config_of_diffusers_that_the_weights_contradict(theirs, part, changes, message):
    path = theirs / part / "config.json"
    edit_json(path, **changes)
    found = refused(theirs)
    assert str(path) in found and message in found


def test_a_wan_model_of_bare_weights(wan, wan_folder):
    """Without config.json, all that shapes do not tell comes from vpae_jax.json."""
    (wan / "config.json").unlink()
    assert "the width 24 is no multiple" in refused(wan)
    edit_json(wan / "vpae_jax.json", parts={"transformer": {"num_attention_heads": 2, "attention_head_dim": 12}})
    assert opened(wan, "transformer") == find_model(wan_folder).part("transformer").config


@pytest.mark.parametrize("dim, heads", [(24, 3), (40, 8)])
def test_an_image_encoder_of_other_heads(tmp_path, dim, heads):
    torch.manual_seed(0)
    state = original_wan.ImageEncoder(dim=dim, num_heads=heads).state_dict()
    write(tmp_path / "clip.pth", state)
    message = refused(tmp_path)
    assert f"the width {dim} is no multiple of Wan's 16 heads; give num_attention_heads in vpae_jax.json" in message
    edit_json(tmp_path / "vpae_jax.json", parts={"image_encoder": {"num_attention_heads": heads}})
    assert opened(tmp_path, "image_encoder").num_attention_heads == heads
    assert opened(tmp_path / "clip.pth", "image_encoder").hidden_size == dim
    for parts, message in (
        ({"image_encoder": {"hidden_size": 48}}, f"hidden_size is 48, but the weights make it {dim}"),
        ({"image_encoder": {"num_attention_heads": heads, "head": 3}}, ".head: unknown key"),
        ([], "parts is [], expected an object of objects"),
        ({"image_encoder": 3}, "expected an object of objects"),
    ):
        edit_json(tmp_path / "vpae_jax.json", parts=parts)
        assert message in refused(tmp_path)


DEPTHS = [
    dict(num_res_blocks=1),
    dict(num_res_blocks=3, base_dim=6, dim_mult=(1, 2, 1), temperal_downsample=(True, True)),
    dict(num_res_blocks=2, dim_mult=(2, 1, 3), temperal_downsample=(True, False)),
    dict(num_res_blocks=1, dim_mult=(1, 2), temperal_downsample=(False,)),
    dict(num_res_blocks=1, dim_mult=(1, 1, 2, 2, 3), temperal_downsample=(True, True, False, True)),
]


@pytest.mark.parametrize("sizes", DEPTHS)
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_autoencoders_of_other_depths(tmp_path, layout, sizes):
    torch.manual_seed(0)
    original = original_wan.VAE(**sizes)
    state = original.state_dict()
    if layout == "diffusers":
        state = original_wan.vae_reference(state, **sizes).state_dict()
    config = opened(write(tmp_path / "vae.safetensors", prefixed("vae.", state)), "vae")
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in original.sizes.items()}
    assert {name: getattr(config, name) for name in expected} == expected
    time = expected["temperal_downsample"]
    assert config == WanVAEConfig(**expected, scale_factor_spatial=2 ** len(time), scale_factor_temporal=2 ** sum(time))


def test_autoencoders_of_other_kinds(tmp_path):
    torch.manual_seed(0)
    sizes = dict(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, decoder_base_dim=6, attn_scales=[0.5, 0.25])
    state = diffusers.AutoencoderKLWan(**sizes).state_dict()
    config = opened(write(tmp_path / "vae.safetensors", state), "vae")
    assert (config.base_dim, config.decoder_base_dim, config.attn_scales) == (4, 6, (0.5, 0.25))
    write(tmp_path / "z" / "vae.pth", original_wan.VAE(z_dim=3).state_dict())
    assert "3 latent channels, but Wan's mean and deviation are of 16; give latents_mean" in refused(tmp_path / "z")
    moments = {"latents_mean": [0.0, 1.0, 2.0], "latents_std": [1.0, 2.0, 3.0]}
    edit_json(tmp_path / "z" / "vpae_jax.json", parts={"vae": moments})
    assert opened(tmp_path / "z", "vae").latents_std == (1.0, 2.0, 3.0)


def test_uneven_autoencoders_are_refused(tmp_path):
    first, second = (original_wan.VAE(num_res_blocks=n, dim_mult=(1, 1, 1, 1)).state_dict() for n in (1, 2))
    assert "is unknown" in refused(
        write(tmp_path / "gap.pth", second | {"encoder.downsamples.1.x": torch.ones(1)}), "vae"
    )
    blocks = "encoder.downsamples."
    # Levels of 1, 1, 1 and 2 blocks.
    uneven = {n: v for n, v in second.items() if not n.startswith(blocks)} | first
    uneven |= {n.replace(f"{blocks}6.", f"{blocks}7."): v for n, v in first.items() if n.startswith(f"{blocks}6.")}
    message = refused(write(tmp_path / "vae.pth", uneven))
    assert "vae.pth" in message and "no Wan 2.1 VAE has" in message


def test_written_bits_are_those_of_the_files(wan_folder):
    """What the other tests of this file compare is not empty."""
    found = values(wan_folder, "transformer")
    assert len(found) == len(bits(tensors(wan_folder, "transformer"))) and found["proj_out/bias[0]"].any()
