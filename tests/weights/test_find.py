"""Finding a model, whatever its layout, and the names of its files."""

import dataclasses
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import huggingface_hub
import jax.numpy as jnp
import original_wan
import pytest
import torch
from finding import opened, prefixed, refused
from folders import PARTS, edit, files, mixed, read, same, tensors, values, write

from vpae_jax.types import UserError
from vpae_jax.weights import orbax
from vpae_jax.weights.filenames import write_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.locate import embedded_model, locate
from vpae_jax.weights.parts import config_json
from vpae_jax.weights.tensors import Tensors

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
    assert "the width 24 is not a multiple of Wan's 128 channels per head; add the model's config.json" in refused(
        single
    )
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
    assert "no transformer (found: vae); expected a complete model" in refused(diffusers_folder / "vae", "transformer")


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
    monkeypatch.setattr("vpae_jax.weights.directory.COMPARED_BYTES", size // 5)
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
    assert "params: " in refused(folder, part) and "does not say which part" in refused(folder, part)
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
        with pytest.raises(UserError, match="not in the hub's cache, and the hub cannot be reached") as error:
            locate(name)
        assert "\n" not in str(error.value)


class Escaping(BaseHTTPRequestHandler):
    """A hub whose repository holds a file that would lie outside of it."""

    name = ""

    def do_GET(self):
        found = {"id": "owner/name", "sha": REVISION, "siblings": [{"rfilename": self.name}]}
        file = {"type": "file", "path": self.name, "oid": REVISION, "size": 1}
        body = json.dumps([file] if "/tree/" in self.path else found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("name", ["../../../../evil.json", "a/../../evil.json", "/evil.json"])
def test_a_repository_whose_files_lead_out_of_it_is_refused(hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("localhost", 0), type("Hub", (Escaping,), {"name": name})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://localhost:{server.server_port}")
            with pytest.raises(UserError, match=r"owner/name: no such folder, and the hub reports: ") as error:
                locate("owner/name")
        finally:
            server.shutdown()
            thread.join()
    assert "\n" not in str(error.value) and name in str(error.value)
    assert not list(tmp_path.rglob("evil.json"))


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


@pytest.mark.parametrize("ended", [True, False])
def test_the_workdir_of_a_run_is_no_model_and_says_where_that_is(tmp_path, ended):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"method": {"name": "lcm"}}')
    there = "when it has finished, its model will be"
    if ended:
        (tmp_path / "model").mkdir()
        there = "its model is"
    with pytest.raises(UserError, match=f"^{tmp_path}: is the workdir of a training run; {there} {tmp_path}/model$"):
        find_model(tmp_path)
