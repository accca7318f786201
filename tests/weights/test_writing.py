"""Parts written: so that diffusers and transformers load them, and whole or not at all."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from folders import PARTS, bits, edit, files, read, tensors, values
from full_disk import limited

from vpae_jax.files import replacing, write_text
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import read_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import Adapter, Lora, Merged
from vpae_jax.weights.writing import finite, from_tree, open_values, verify_part, write_part

CLASSES = {
    "transformer": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text_encoder": transformers.UMT5EncoderModel,
    "image_encoder": transformers.CLIPVisionModel,
}


@pytest.fixture(scope="module")
def model(diffusers_folder):
    return find_model(diffusers_folder)


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_from_pretrained_reads_what_was_written(model, tmp_path, part, shard_bytes):
    with open_values(model, part) as given:
        write_part(tmp_path, part, given, shard_bytes=shard_bytes)
    assert (len(files(tmp_path, part)) > 1) == (shard_bytes < 10**9)
    loaded, info = CLASSES[part].from_pretrained(tmp_path / part, output_loading_info=True)
    assert not any(info.values()), info
    expected = CLASSES[part].from_pretrained(model.path / part)
    if part in ("transformer", "vae"):
        ours, theirs = (dict(m.config) for m in (loaded, expected))
        private = [key for key in {**ours, **theirs} if key.startswith("_")]
        assert {k: ours[k] for k in ours if k not in private} == {k: theirs[k] for k in theirs if k not in private}
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours[next(iter(ours))].dtype == torch.float32


@pytest.mark.parametrize("part", CLASSES)
def test_from_pretrained_reads_wans_weights(wan_folder, tmp_path, part):
    with open_values(find_model(wan_folder), part) as given:
        write_part(tmp_path, part, given)
    loaded, info = CLASSES[part].from_pretrained(tmp_path / part, output_loading_info=True)
    assert not any(info.values()), info
    count = sum(value.numel() for value in tensors(tmp_path, part).values())
    repeated = 0 if part != "text_encoder" else loaded.shared.weight.numel()
    assert sum(value.numel() for value in loaded.state_dict().values()) - repeated in (count, count - repeated)


def test_a_failed_write_leaves_the_old_part(model, tmp_path):
    shutil.copytree(model.path / "image_encoder", tmp_path / "image_encoder")
    before = bits(tensors(tmp_path, "image_encoder"))
    config, params = read_part(model, "image_encoder")
    params["layers"]["fc2"]["kernel"] = "not an array"
    with pytest.raises((AttributeError, TypeError, ValueError)):
        write_part(tmp_path, "image_encoder", from_tree("image_encoder", config, params))
    assert bits(tensors(tmp_path, "image_encoder")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["image_encoder"]


@pytest.mark.parametrize("form", ["diffusers", "wan", "orbax"])
def test_values_that_fail_midway_leave_no_weights(model, tmp_path, form):
    """The last tensor to be written cannot be read."""

    class Failing:
        def __init__(self, values):
            self.values, self.left = values, len(values.shapes())
            self.config, self.shapes = values.config, values.shapes
            self.dtype, self.extras = values.dtype, values.extras

        def read(self, path, layer):
            self.left -= 1
            if self.left < 0:
                raise UserError("the disk went away")
            return self.values.read(path, layer)

    for part in ("transformer", "text_encoder"):
        with open_values(model, part) as given, pytest.raises(UserError, match="the disk went away"):
            write_part(tmp_path, part, Failing(given), form, shard_bytes=10**9)
    assert not [path for path in tmp_path.rglob("*") if path.name != "config.json"]


def test_an_existing_part_is_replaced(model, wan_folder, tmp_path):
    for source in (find_model(wan_folder), model):
        for form in ("diffusers", "orbax"):
            with open_values(source, "text_encoder") as given:
                write_part(tmp_path / form, "text_encoder", given, form)
    assert bits(tensors(tmp_path / "diffusers", "text_encoder")) == bits(tensors(model.path, "text_encoder"))
    assert {path.name for path in (tmp_path / "diffusers").iterdir()} == {"text_encoder"}
    ours, theirs = (values(folder, "text_encoder") for folder in (tmp_path / "orbax", model.path))
    assert all((ours[path] == value).all() for path, value in theirs.items())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch, fails_at):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"), replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "weights").read_text() == "old"
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "weights").read_text() == "new"


def test_verification_sees_a_single_bit(wan_folder, tmp_path):
    model = find_model(wan_folder)
    with open_values(model, "transformer") as given:
        write_part(tmp_path, "transformer", given)
        assert verify_part(find_model(tmp_path), "transformer", given, None) == len(values(model, "transformer"))
        (path,) = files(tmp_path, "transformer")

        def flip(tensors):
            tensors["blocks.1.ffn.net.2.bias"].view(torch.int32)[3] ^= 1

        edit(path, flip)
        with pytest.raises(UserError, match="transformer's blocks/ffn/proj_out/bias does not read back as it was"):
            verify_part(find_model(tmp_path), "transformer", given, None)
        edit(path, lambda t: (flip(t), t.update({"proj_out.bias": t["proj_out.bias"].double()})))
        with pytest.raises(UserError, match="transformer's proj_out/bias does not read back as it was written"):
            verify_part(find_model(tmp_path), "transformer", given, None)
        with pytest.raises(UserError, match="does not read back as it was written"):
            verify_part(find_model(tmp_path), "transformer", given, jnp.bfloat16)
    with (
        open_values(model, "text_encoder") as given,
        pytest.raises(UserError, match="no text_encoder"),
    ):
        verify_part(find_model(tmp_path), "text_encoder", given, None)


def test_verification_sees_another_config(wan_folder, tmp_path):
    with open_values(find_model(wan_folder), "image_encoder") as given:
        write_part(tmp_path, "image_encoder", given)
        path = tmp_path / "image_encoder" / "config.json"
        path.write_text(path.read_text().replace('"gelu"', '"quick_gelu"'))
        with pytest.raises(UserError, match="image_encoder has a different config from the one written"):
            verify_part(find_model(tmp_path), "image_encoder", given, None)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fn"])
def test_finite_numbers_are_told_from_others(kind):
    dtype = jnp.dtype(kind)
    numbers = np.array([0, -0.0, 1, -1, 0.015625, jnp.finfo(dtype).max, jnp.finfo(dtype).min], dtype)
    assert finite(numbers) and finite(numbers[:0]) and finite(numbers[5:6].reshape(()))
    whole = np.tile(numbers, (3, 2, 1))
    assert finite(whole.transpose(2, 0, 1)) and finite(whole[:, ::2])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        if kind == "float8_e4m3fn" and np.isinf(bad):
            continue  # it has none
        for at in range(0, whole.size, 11):
            spoilt = whole.copy()
            spoilt.flat[at] = bad
            assert not finite(spoilt) and not finite(spoilt.transpose(1, 2, 0))
    assert not finite(np.full((), np.nan, dtype))


def test_every_bit_pattern_of_sixteen_is_judged_as_numpy_does():
    for dtype in (np.dtype(np.float16), jnp.dtype(jnp.bfloat16)):
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        found = [finite(every[i : i + 1]) for i in range(0, 2**16, 37)]
        assert found == np.isfinite(every[::37].astype(np.float32)).tolist()


def test_trees_on_meshes_are_written(model, tmp_path):
    """Weights as they lie in training: sharded, in float32, on eight devices."""
    config, params = read_part(model, "text_encoder")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params["shared"]["embedding"] = jax.device_put(params["shared"]["embedding"], rows)
    for form in ("diffusers", "wan", "orbax"):
        write_part(tmp_path / form, "text_encoder", from_tree("text_encoder", config, params), form)
        assert values(tmp_path / form, "text_encoder").keys() == values(model, "text_encoder").keys()
    assert bits(tensors(tmp_path / "diffusers", "text_encoder")) == bits(tensors(model.path, "text_encoder"))


def test_files_of_wan_have_the_names_of_the_release(wan_folder, tmp_path):
    for part in PARTS:
        with open_values(find_model(wan_folder), part) as given:
            write_part(tmp_path, part, given, "wan")
        assert list(map(read, files(tmp_path, part)))
    released = {path.name for path in wan_folder.iterdir() if path.is_file() and "-of-" not in path.name}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == (released - {"diffusion_pytorch_model.safetensors.index.json"}) | {
        "diffusion_pytorch_model.safetensors"
    }


# What is not finite is not written.


@pytest.mark.parametrize("form", ["diffusers", "wan", "orbax"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_trees_that_are_not_finite_are_refused(model, tmp_path, form, bad):
    config, params = read_part(model, "text_encoder")
    table = np.array(params["shared"]["embedding"])
    table[3, 5] = bad
    params["shared"]["embedding"] = table
    with pytest.raises(UserError, match=r"^text_encoder: tensor '\S+' holds NaN or infinity; are the weights damaged"):
        write_part(tmp_path, "text_encoder", from_tree("text_encoder", config, params), form)
    given = from_tree("text_encoder", config, params, Path("our/params"))
    with pytest.raises(UserError, match="holds NaN or infinity in our/params; are"):
        write_part(tmp_path, "text_encoder", given, form)
    assert not [path for path in tmp_path.rglob("*") if path.name != "config.json"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["diffusers", "wan", "orbax"])
@pytest.mark.parametrize("dtype, value", [("float16", 1e30), ("float8_e4m3fn", 1e5), ("float32", 1e300)])
def test_numbers_that_overflow_a_dtype_are_refused(model, tmp_path, form, dtype, value):
    config, params = read_part(model, "text_encoder")
    table = np.array(params["shared"]["embedding"], np.float64)
    table[3, 5] = value
    params["shared"]["embedding"] = table
    with pytest.raises(UserError, match=rf"overflows {dtype} to NaN or infinity; keep") as error:
        write_part(tmp_path, "text_encoder", from_tree("text_encoder", config, params), form, jnp.dtype(dtype))
    assert "\n" not in str(error.value) and "its own dtype, float64" in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["diffusers", "wan", "orbax"])
def test_a_lora_that_overflows_is_refused(model, tmp_path, form):
    config, params = read_part(model, "transformer", jnp.float16)
    given = from_tree("transformer", config, params)
    d_in, d_out = given.shapes()["proj_out/kernel"]
    adapter = Adapter(np.full((d_in, 1), 1e20, np.float32), np.full((1, d_out), 1e20, np.float32))
    merged = Merged(given, Lora({("proj_out", 0): adapter}))
    with pytest.raises(UserError, match=r"holds NaN or infinity; .*is an added LoRA too large for float16"):
        write_part(tmp_path, "transformer", merged, form)


def image_encoder_of_wan(wan_folder, tmp_path, change):
    path = shutil.copy(files(wan_folder, "image_encoder")[0], tmp_path)
    return find_model(edit(Path(path), change))


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_extras_that_are_not_finite_are_refused(wan_folder, tmp_path, form):
    given = image_encoder_of_wan(wan_folder, tmp_path, lambda t: t.update(log_scale=torch.tensor(torch.inf)))
    with (
        open_values(given, "image_encoder") as opened,
        pytest.raises(UserError, match=rf"^{given.path}: tensor 'log_scale' holds NaN or infinity; the weights are"),
    ):
        write_part(tmp_path / "out", "image_encoder", opened, form)


def test_integers_are_finite():
    assert finite(np.array([0x7F80, 0x7C00, -1], np.int16)) and finite(np.array([True]))


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_verification_sees_extras(wan_folder, tmp_path, form):
    with open_values(find_model(wan_folder), "image_encoder") as given:
        write_part(tmp_path, "image_encoder", given, form)
        assert verify_part(find_model(tmp_path), "image_encoder", given, None)
        inner = tmp_path / "image_encoder"
        path = inner / "wan_extras.safetensors" if form == "diffusers" else files(tmp_path, "image_encoder")[0]
        before = path.read_bytes()
        for change in (
            lambda t: t.update(log_scale=t["log_scale"] + 1),
            lambda t: t.pop("log_scale"),
            lambda t: t.update({"textual.more": torch.ones(2)}),
        ):
            path.write_bytes(before)
            edit(path, change)
            with pytest.raises(
                UserError, match=r"image_encoder's extra tensor '.*' does not read back as it was written"
            ):
                verify_part(find_model(tmp_path), "image_encoder", given, None)


def test_extras_are_read_one_at_a_time(wan_folder, tmp_path):
    """Each is written before the next is read."""
    with open_values(find_model(wan_folder), "image_encoder") as given:
        seen = []

        class Watching:
            config, shapes, dtype, read = given.config, given.shapes, given.dtype, given.read

            def extras(self, layout):
                for extra in given.extras(layout):
                    yield dataclasses.replace(
                        extra, read=lambda extra=extra: (seen.append(extra.name), extra.read())[1]
                    )

        values_ = Watching()
        names = [extra.name for extra in values_.extras("wan")]
        assert seen == [] and len(names) > 2
        write_part(tmp_path, "image_encoder", values_)
        assert seen == names


# What the system refuses.


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_a_full_disk_is_one_line(model, tmp_path, form):
    with (
        open_values(model, "text_encoder") as given,
        limited(5000),
        pytest.raises(UserError) as error,
        replacing(tmp_path / "out") as temporary,
    ):
        write_part(temporary, "text_encoder", given, form)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/out/") and ".tmp" not in message and "\n" not in message
    assert "cannot be written: File too large; make room there, or choose another destination" in message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_orbax_is_a_user_error(tmp_path):
    """In a process of its own, as Orbax leaves threads and event loops behind."""
    code = f"""
import pathlib, resource, numpy
from vpae_jax.weights import orbax
from vpae_jax.types import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
values = numpy.random.default_rng(0).random((100, 100))
try:
    orbax.save(pathlib.Path({str(tmp_path / "params")!r}), {{"a": values}})
except UserError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == (
        f"{tmp_path}/params: cannot be written: File too large; make room there, or choose another destination\n"
    )


def test_places_that_cannot_be_written_are_one_line(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "there")
    places = {
        tmp_path / "file" / "out": "File exists|Not a directory",
        tmp_path / "file" / "deep" / "out": "Not a directory",
        Path("/proc/out"): "No such file",
        tmp_path / ("x" * 250): "File name too long",
        tmp_path / "dangling": "Not a directory",
        tmp_path / "dangling" / "out": "File exists|No such file",
    }
    for place, reason in places.items():
        message = f"^{place}: cannot be written: ({reason}).*; make room"
        with pytest.raises(UserError, match=message) as error, replacing(place) as temporary:
            temporary.mkdir()
        assert "\n" not in str(error.value)
        if place.name != "dangling":  # a file in place of a link is fine
            with pytest.raises(UserError, match=f"^{place}: cannot be written: ({reason})"):
                write_text(place, "text")
    with open_values(model, "image_encoder") as given, pytest.raises(UserError, match="cannot be written: "):
        write_part(tmp_path / "file", "image_encoder", given, "wan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_errors_of_reading_do_not_blame_the_destination(tmp_path, number):
    for error in (OSError(number, os.strerror(number), "/source/file"), OSError(errno.EIO, "of nobody")):
        with pytest.raises(OSError, match=r"Errno"), replacing(tmp_path / "out") as temporary:
            temporary.mkdir()
            raise error
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").symlink_to("nowhere")
    message = r"out: cannot be written: \S+/file cannot be copied \(.*\); make room"
    with pytest.raises(UserError, match=message), replacing(tmp_path / "out") as temporary:
        shutil.copytree(tmp_path / "from", temporary)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 10**5, "not valid JSON: maximum recursion depth"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        (b"\xff\xfe{", "not valid JSON: 'utf-8' codec"),
        ("[1]", "holds a list, expected a JSON object"),
        ("{", "not valid JSON: "),
        (None, "no such file"),
        ("folder", "cannot be read: Is a directory"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^{path}: {message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)
