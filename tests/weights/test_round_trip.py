"""From layout to layout and back: every tensor of every part is equal to the byte."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zlib import crc32

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import PARTS, bits, edit, edit_json, files, mixed, read, same, tensors, values

from vpae_jax.weights.directory import EXTRAS
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.writing import from_tree, open_values, verify_part, write_part

LAYOUTS = ("wan", "diffusers")


@dataclass(frozen=True)
class StoredModel:
    """A folder of weights, and what is in it."""

    folder: Path

    @cached_property
    def model(self):
        return find_model(self.folder)

    @cached_property
    def tensors(self):
        return {part: tensors(self.folder, part) for part in PARTS}

    @cached_property
    def values(self):
        return {part: values(self.model, part) for part in PARTS}


@pytest.fixture(scope="module")
def stored(wan_folder, diffusers_folder, tmp_path_factory):
    """Gives a folder of a layout whose weights are stored in some precision."""
    made = {("wan", "float32"): StoredModel(wan_folder), ("diffusers", "float32"): StoredModel(diffusers_folder)}

    def give(layout, kind):
        if (layout, kind) not in made:
            folder = shutil.copytree(made[layout, "float32"].folder, tmp_path_factory.mktemp(layout) / kind)
            for path in (path for part in PARTS for path in files(folder, part)):
                if kind == "mixed":
                    edit(path, lambda t: t.update(mixed(t)))
                else:
                    edit(path, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
            made[layout, kind] = StoredModel(folder)
        return made[layout, kind]

    return give


def is_rest(name):
    """Whether a tensor of CLIP's file is one that Wan does not read."""
    return name.startswith("textual.") or name in ("log_scale", "visual.head")


@pytest.mark.parametrize(
    "first, kind", [("wan", "float32"), ("wan", "bfloat16"), ("wan", "mixed"), ("diffusers", "bfloat16")]
)
def test_whole_models_there_and_back(stored, tmp_path, first, kind):
    given = stored(first, kind)
    (second,) = set(LAYOUTS) - {first}
    write_model(tmp_path / "there", Contents(given.model), second)
    there = StoredModel(tmp_path / "there")
    assert {part.layout for part in there.model.parts.values()} == {second}
    write_model(tmp_path / "back", Contents(there.model), first)
    back = StoredModel(tmp_path / "back")
    for part in PARTS:
        dtypes = {value.dtype for value in given.tensors[part].values()}
        assert dtypes == ({torch.float32, torch.bfloat16} if kind == "mixed" else {getattr(torch, kind)})
        assert bits(back.tensors[part]) == bits(given.tensors[part])
        assert same(there.values[part], given.values[part])
        assert back.model.parts[part].config == there.model.parts[part].config == given.model.parts[part].config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_equal_and_verified(stored, tmp_path, layout):
    given = stored(layout, "mixed")
    write_model(tmp_path / "copy", Contents(given.model), layout)
    copy = StoredModel(tmp_path / "copy")
    for part in PARTS:
        assert bits(copy.tensors[part]) == bits(given.tensors[part])
        with open_values(given.model, part) as expected:
            assert verify_part(copy.model, part, expected, None) == len(given.values[part])


def test_the_rest_of_clips_file_is_kept(stored, tmp_path):
    """Its text tower, scale and head go into a file beside the image encoder, and back into Wan's."""
    expected = stored("wan", "float32").tensors["image_encoder"]
    rest = bits({name: value for name, value in expected.items() if is_rest(name)})
    assert len(rest) > 20 and rest["log_scale"][1] == ()
    model = find_model(stored("wan", "float32").folder)
    for name in ("there", "copy"):  # it goes on through further copies
        with open_values(model, "image_encoder") as given:
            write_part(tmp_path / name, "image_encoder", given)
        assert bits(read(tmp_path / name / "image_encoder" / EXTRAS)) == rest
        assert not any(map(is_rest, tensors(tmp_path / name, "image_encoder")))
        model = find_model(tmp_path / name)
    with open_values(model, "image_encoder") as given:
        write_part(tmp_path / "back", "image_encoder", given, "wan")
    assert bits(tensors(tmp_path / "back", "image_encoder")) == bits(expected)
    # Without the file beside it, Wan's has the image encoder only.
    (tmp_path / "copy" / "image_encoder" / EXTRAS).unlink()
    with open_values(model, "image_encoder") as given:
        write_part(tmp_path / "less", "image_encoder", given, "wan")
    less = bits(tensors(tmp_path / "less", "image_encoder"))
    assert less == {name: value for name, value in bits(expected).items() if not is_rest(name)}


@pytest.mark.parametrize(
    "layout, part",
    [("wan", "transformer"), ("diffusers", "vae"), ("diffusers", "text_encoder"), ("wan", "image_encoder")],
)
def test_one_part_through_memory(stored, tmp_path, layout, part):
    """Read as arrays of ours, on a device, and written again; in shards, too."""
    given = stored(layout, "bfloat16" if part == "text_encoder" else "float32")
    params = from_tree(part, *read_part(given.model, part, None))
    expected = {name: value for name, value in bits(given.tensors[part]).items() if not is_rest(name)}
    for name, size in (("one", 10**9), ("shards", 10_000)):
        write_part(tmp_path / name, part, params, layout, shard_bytes=size)
        assert bits(tensors(tmp_path / name, part)) == expected
    assert len(files(tmp_path / "one", part)) == 1
    sharded = layout == "diffusers" or part == "transformer"
    assert (len(files(tmp_path / "shards", part)) > 2) == sharded
    assert len(list((tmp_path / "shards").rglob("*.index.json"))) == sharded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_part_from_files_in_shards(stored, tmp_path, layout):
    given = stored(layout, "mixed")
    for form in LAYOUTS:
        with open_values(given.model, "transformer") as found:
            write_part(tmp_path / form, "transformer", found, form, shard_bytes=15_000)
        assert len(files(tmp_path / form, "transformer")) > 2
        assert same(values(tmp_path / form, "transformer"), given.values["transformer"])
    assert bits(tensors(tmp_path / layout, "transformer")) == bits(given.tensors["transformer"])


def test_through_our_own_arrays(stored, tmp_path):
    """Orbax keeps one dtype a parameter, the widest of its layers'; the values are equal."""
    given, parts = stored("wan", "mixed"), ("vae", "text_encoder")
    for part in parts:
        with open_values(given.model, part) as values_of_files:
            write_part(tmp_path / "ours", part, values_of_files, "orbax")
            assert verify_part(find_model(tmp_path / "ours"), part, values_of_files, None) == len(given.values[part])
    ours = StoredModel(tmp_path / "ours")
    assert {part.layout for part in ours.model.parts.values()} == {"orbax"} and tuple(ours.model.parts) == parts
    for part in parts:
        expected, found = given.values[part], values(ours.model, part)
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path].astype(np.float32), value.astype(np.float32))
        assert {value.dtype.name for value in found.values()} == {"float32", "bfloat16"}
        assert ours.model.parts[part].config == given.model.parts[part].config
    with open_values(ours.model, "text_encoder") as given_again:
        write_part(tmp_path / "back", "text_encoder", given_again, "wan")
    assert same(values(tmp_path / "back", "text_encoder"), found)


def test_parts_of_one_tensor_in_different_precisions(stored, tmp_path):
    """CLIP's q, k and v lie one after the other in Wan's file, which has the widest of their dtypes."""
    folder = shutil.copytree(stored("diffusers", "float32").folder / "image_encoder", tmp_path / "m" / "image_encoder")
    kinds = {"q": torch.bfloat16, "k": torch.float16, "v": torch.bfloat16}

    def narrow(tensors):
        for name in tensors:
            for letter, kind in kinds.items():
                if f".{letter}_proj." in name:
                    tensors[name] = tensors[name].to(kind)

    edit(folder / "model.safetensors", narrow)
    source = find_model(tmp_path / "m")
    with open_values(source, "image_encoder") as given:
        write_part(tmp_path / "wan", "image_encoder", given, "wan")
        assert verify_part(find_wan(tmp_path / "wan", source), "image_encoder", given, None) > 0
    found = tensors(tmp_path / "wan", "image_encoder")
    assert {v.dtype for n, v in found.items() if "to_qkv" in n} == {torch.float32}


def find_wan(folder, source):
    """Wan's layout, with the number of heads that no shape tells."""
    heads = source.part("image_encoder").config.num_attention_heads
    edit_json(folder / "vpae_jax.json", parts={"image_encoder": {"num_attention_heads": heads}})
    return find_model(folder)


@pytest.mark.parametrize("form", LAYOUTS)
def test_other_precisions_are_rounded_once(stored, tmp_path, form):
    given = stored("wan", "mixed")
    with open_values(given.model, "transformer") as found:
        write_part(tmp_path, "transformer", found, form, dtype=jnp.bfloat16)
        assert verify_part(find_model(tmp_path), "transformer", found, jnp.bfloat16) > 0
    expected = {path: value.astype(jnp.bfloat16) for path, value in given.values["transformer"].items()}
    assert same(values(tmp_path, "transformer"), expected)


def test_layers_without_a_common_dtype(stored, tmp_path):
    """NumPy and JAX promote none of these pairs."""
    folder = shutil.copytree(stored("wan", "float32").folder, tmp_path / "model")
    kinds = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float8_e5m2]
    for path in files(folder, "transformer"):
        edit(path, lambda t: t.update({n: v.to(kinds[crc32(n.encode()) % len(kinds)]) for n, v in t.items()}))
    given = StoredModel(folder)
    with open_values(given.model, "transformer") as found:
        write_part(tmp_path / "ours", "transformer", found, "orbax")
        assert verify_part(find_model(tmp_path / "ours"), "transformer", found, None) > 0
    ours = values(tmp_path / "ours", "transformer")
    for path, value in values(given.model, "transformer").items():
        np.testing.assert_array_equal(ours[path].astype(np.float32), value.astype(np.float32))
