"""Tensors in files: values and byte counts of reads, several files as one, and what is written."""

import errno
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from weight_files import BF16, assert_same, random_bits, refusal, samples, write

from vpae_jax.types import UserError
from vpae_jax.weights.pickles import write_pickle
from vpae_jax.weights.safetensors_file import DTYPES
from vpae_jax.weights.tensors import open_shards, open_tensors, write_safetensors


@pytest.fixture(params=["safetensors", "zip", "legacy"])
def stored(request, tmp_path):
    """The samples in a file of each kind, whose suffix says nothing."""
    path, tensors = tmp_path / "weights", samples()
    if request.param == "safetensors":
        write(tmp_path, tensors).rename(path)
        return path, tensors
    if request.param == "legacy":  # PyTorch itself cannot read the newer dtypes back
        newer = {f"of.{name}" for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")}
        tensors = {name: value for name, value in tensors.items() if name not in newer}
    write_pickle(path, tensors.items())
    if request.param == "legacy":
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path, tensors


def test_reads_what_the_library_reads(tmp_path):
    tensors = {name: value for name, value in samples().items() if "float8" not in name}
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    loaded = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    with open_tensors(tmp_path / "m.safetensors") as found:
        assert set(found) == set(loaded) == set(tensors) and len(found) == len(tensors)
        for name, value in loaded.items():
            assert_same(found.read(name), value)
            assert_same(found.read(name), tensors[name])
            assert (found[name].file, found[name].dtype, found[name].shape) == (
                tmp_path / "m.safetensors",
                value.dtype,
                value.shape,
            )


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.uint16])
def test_reads_what_the_library_writes_from_pytorch(tmp_path, kind):
    value = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(kind)
    safetensors.torch.save_file({"x": value}, tmp_path / "m.safetensors")
    with open_tensors(tmp_path / "m.safetensors") as found:
        assert found.read("x").tobytes() == bytes(range(256))
        assert found["x"].dtype.name == str(kind).removeprefix("torch.")


def test_reads_whole_tensors_and_slices_of_every_axis(stored):
    path, tensors = stored
    with open_tensors(path) as found:
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            read = found.read(name)
            assert_same(read, value)
            assert read.flags.c_contiguous and read.flags.writeable
            for axis, size in enumerate(value.shape):
                for part in (slice(1, 3), slice(None, 1), slice(-2, None), slice(2, 2), slice(size), slice(3, 1)):
                    index = (slice(None),) * axis + (part,)
                    assert_same(found.read(name, index), np.ascontiguousarray(value[index]))
        before = found.bytes_read
        assert before > 0
        assert_same(
            found.read("of.bfloat16", (slice(1, 2), slice(1, 2), slice(1, 2))), tensors["of.bfloat16"][1:2, 1:2, 1:2]
        )


def test_any_slice_of_any_shape(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [tuple(rng.integers(1, 9, rng.integers(1, 6)).tolist()) for _ in range(20)]
    tensors = {str(i): random_bits(rng, np.dtype((BF16, np.int8, np.float64)[i % 3]), s) for i, s in enumerate(shapes)}
    with open_tensors(write(tmp_path, tensors)) as found:
        for name, value in tensors.items():
            for _ in range(20):
                ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in value.shape]
                index = tuple(slice(*pair) for pair in ends)[: rng.integers(len(ends) + 1)]
                before, part = found.bytes_read, value[index]
                assert_same(found.read(name, index), np.ascontiguousarray(part))
                rows = value[index[:1]].nbytes if part.size else 0
                assert found.bytes_read - before == rows, "rows are read whole, and no others"


def test_wrong_indices_are_mistakes(tmp_path):
    with open_tensors(write(tmp_path, {"x": np.zeros((2, 3), np.float32)})) as found:
        for index in ((slice(None),) * 3, (slice(0, 2, 2),), (slice(None, None, -1),)):
            with pytest.raises(ValueError, match="cannot be read at"):
                found.read("x", index)
        with pytest.raises(KeyError):
            found.read("y")
        assert "y" not in found


def test_closed_files_are_not_read(stored):
    path, _ = stored
    with open_tensors(path) as found:
        pass
    with pytest.raises(ValueError, match="closed"):
        found.read("scalar")


def test_threads_read_at_once(stored):
    path, tensors = stored
    rng = np.random.default_rng(0)
    names = [name for name in tensors if name.startswith("of.")]
    jobs = [(names[i % len(names)], tuple(slice(*sorted(rng.integers(0, 6, 2))) for _ in range(3))) for i in range(400)]
    with open_tensors(path) as found, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: found.read(*job), jobs))
        threaded = found.bytes_read
        for job in jobs:
            found.read(*job)
        assert found.bytes_read == 2 * threaded > 0
    for (name, index), result in zip(jobs, results, strict=True):
        assert_same(result, np.ascontiguousarray(tensors[name][index]))


def test_a_file_that_shrinks_is_an_error(stored):
    path, _ = stored
    with open_tensors(path) as found:
        os.truncate(path, path.stat().st_size // 3)
        with pytest.raises(UserError, match=f"{path}: (ends at byte|became shorter)") as caught:
            for name in found:
                found.read(name)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path, samples())

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with open_tensors(path) as found:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(UserError, match=rf"{path}: cannot be read at byte \d+: Input/output error"):
            found.read("scalar")
    assert "cannot be read at byte 0: Input/output error" in refusal(path)
    monkeypatch.setattr(os, "pread", fail)
    assert refusal(path) == f"{path}: cannot be read: Input/output error"


def test_shards_with_an_index(tmp_path):
    tensors = samples()
    write(tmp_path, tensors, shard_bytes=500)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    with open_tensors(tmp_path / "m.safetensors.index.json") as found:
        assert set(found) == set(tensors)
        assert {stored.file for stored in found.values()} == set(shards)
        for name, value in tensors.items():
            assert_same(found.read(name), value)
        assert found.bytes_read == sum(value.nbytes for value in tensors.values())


def test_shards_without_an_index(tmp_path):
    first, second, third = ({str(i): np.full(3, i, np.float32)} for i in range(3))
    write_pickle(tmp_path / "third.pth", third.items())
    paths = [write(tmp_path, first, "first"), write(tmp_path, second, "second"), tmp_path / "third.pth"]
    with open_shards(paths) as found:
        for name, value in (first | second | third).items():
            assert_same(found.read(name), value)
    again = write(tmp_path, first | {"new": np.zeros(1)}, "again")
    assert refusal(*paths, again, shards=True) == f"{again}: tensor '0' is also in {paths[0]}; remove one"
    write(tmp_path, samples(), "several", shard_bytes=500)
    index = tmp_path / "several.safetensors.index.json"
    assert "it is JSON" in refusal(index, shards=True)


@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_links_of_the_hub_cache(tmp_path, shard_bytes):
    write(tmp_path / "blobs", samples(), shard_bytes=shard_bytes)
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = path.rename(path.with_name(f"{number:064x}"))
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    path = snapshot / ("m.safetensors" if shard_bytes > 500 else "m.safetensors.index.json")
    with open_tensors(path) as found:
        for name, value in samples().items():
            assert_same(found.read(name), value)
            assert found[name].file.parent == snapshot


def test_written_files_are_the_librarys(tmp_path):
    tensors = {"b": np.ones(3, np.int8), "f": np.ones((2, 3), np.float64), **samples(), "ünï": np.ones(1, BF16)}
    path = write(tmp_path, tensors, metadata={"format": "pt", "step": "7"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "7"}
        assert set(opened.keys()) == set(tensors)
        for name, value in tensors.items():
            found = opened.get_tensor(name)
            assert tuple(found.shape) == value.shape and str(found.dtype) == f"torch.{value.dtype.name}"
            assert bytes(found.flatten().view(torch.uint8).tolist() if value.size else b"") == value.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    with open_tensors(path) as ours:
        assert ours.metadata == {"format": "pt", "step": "7"}


def test_written_shards_and_their_index(tmp_path):
    tensors = {name: np.full(size, size, np.float32) for name, size in zip("edcba", (4, 4, 3, 9, 1), strict=True)}
    write(tmp_path, tensors, shard_bytes=32)
    names = [f"m-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = tmp_path / "m.safetensors.index.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, index.name]
    weight_map = dict(zip("edcba", (names[i] for i in (0, 0, 1, 2, 3)), strict=True))
    expected = {"metadata": {"total_size": 84}, "weight_map": weight_map}
    assert json.loads(index.read_text()) == expected
    assert index.read_text() == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    for name in names:
        for tensor, value in safetensors.numpy.load_file(tmp_path / name).items():
            assert weight_map[tensor] == name
            assert_same(value, tensors[tensor])


@pytest.mark.parametrize("shard_bytes", [100, 10**9])
def test_writing_holds_one_tensor(tmp_path, shard_bytes):
    announced = [(str(i), np.dtype(np.float32), (8,)) for i in range(12)]

    def values():
        last = None
        for i in range(12):
            assert last is None or last() is None
            value = np.full(8, i, np.float32)
            last = weakref.ref(value)
            yield value
            del value

    write_safetensors(tmp_path, "m", announced, values(), shard_bytes)
    with open_tensors(next(tmp_path.glob("*.json" if shard_bytes == 100 else "*"))) as found:
        assert [found.read(str(i))[0] for i in range(12)] == list(range(12))


def test_values_need_not_be_contiguous(tmp_path):
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"turned": value.transpose(2, 0, 1), "every": value[:, ::2], "wide": np.broadcast_to(value[0, 0], (5, 4))}
    write_pickle(tmp_path / "m.pth", views.items())
    for path in (write(tmp_path, views), tmp_path / "m.pth"):
        with open_tensors(path) as found:
            for name, view in views.items():
                assert_same(found.read(name), np.ascontiguousarray(view))


@pytest.mark.parametrize(
    "announced, values, message",
    [
        ([("x", np.dtype("f4"), (2,))], [np.zeros(2, "f8")], r"expected float32\[2\], found float64\[2\]"),
        ([("x", np.dtype("f4"), (2,))], [np.zeros((2, 1), "f4")], r"expected float32\[2\], found float32\[2, 1\]"),
        ([("x", np.dtype("f4"), (2,))], [np.zeros(2, ">f4")], "expected float32"),
        ([("x", np.dtype("f4"), (2,))], [], "found none"),
        ([("x", np.dtype("f4"), (2,))] * 2, [], "a name that is taken"),
        ([("__metadata__", np.dtype("f4"), (2,))], [], "a name that is taken"),
        ([("x", np.dtype("c8"), (2,))], [], "a dtype that cannot be written"),
    ],
)
def test_mistakes_leave_no_file(tmp_path, announced, values, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path, "m", announced, values)
    assert not list(tmp_path.iterdir())


def test_too_many_values_are_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="more values than the 0 tensors"):
        write_safetensors(tmp_path, "m", [], [np.zeros(1)])
