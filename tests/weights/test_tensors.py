"""Tensors in files: values and byte counts of reads, what is written, and one line for whatever cannot be read."""

import errno
import json
import os
import pickle
import re
import sys
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from vpae_jax.types import UserError
from vpae_jax.weights import safetensors_file
from vpae_jax.weights.pickles import write_pickle
from vpae_jax.weights.safetensors_file import DTYPES
from vpae_jax.weights.tensors import open_shards, open_tensors, write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def random_bits(rng, dtype, shape):
    """Every bit pattern, not a number included; a bool has two."""
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def samples():
    rng = np.random.default_rng(0)
    tensors = {f"of.{dtype.name}": random_bits(rng, dtype, (3, 4, 5)) for dtype in DTYPES.values()}
    tensors |= {"scalar": np.array(2.5, np.float32), "flag": np.array(True), "one": np.ones((1, 1), BF16)}
    return tensors | {"empty": np.zeros((0, 3), np.float16), "hollow": np.zeros((3, 0, 2), np.int64)}


def assert_same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def infos(tensors):
    return [(name, value.dtype, value.shape) for name, value in tensors.items()]


def write(folder, tensors, stem="m", **options):
    write_safetensors(folder, stem, infos(tensors), iter(tensors.values()), **options)
    return folder / f"{stem}.safetensors"


def write_header(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def refusal(*paths, shards=False):
    """The one line with which files are refused."""
    with pytest.raises(UserError) as caught, open_shards(paths) if shards else open_tensors(paths[0]) as tensors:
        for name in tensors:
            tensors.read(name)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and message.startswith(f"{paths[0].parent}/")
    return message


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


# Reading


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
            assert read.flags.c_contiguous and read.flags.writeable and read.flags.owndata
            for axis, size in enumerate(value.shape):
                for part in (slice(1, 3), slice(None, 1), slice(-2, None), slice(2, 2), slice(size), slice(3, 1)):
                    index = (slice(None),) * axis + (part,)
                    assert_same(found.read(name, index), np.ascontiguousarray(value[index]))
        before = found.bytes_read
        assert before > 0
        assert_same(
            found.read("of.bfloat16", (slice(1, 2), slice(1, 2), slice(1, 2))), tensors["of.bfloat16"][1:2, 1:2, 1:2]
        )


@pytest.mark.parametrize("whole_rows, piece", [(0, 4 << 20), (64, 100), (64, 1), (4096, 4 << 20), (4096, 37)])
def test_any_slice_of_any_shape(tmp_path, monkeypatch, whole_rows, piece):
    monkeypatch.setattr(safetensors_file, "WHOLE_ROWS", whole_rows)
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", piece)
    rng = np.random.default_rng(whole_rows + piece)
    shapes = [tuple(rng.integers(1, 9, rng.integers(1, 6)).tolist()) for _ in range(20)]
    tensors = {str(i): random_bits(rng, np.dtype((BF16, np.int8, np.float64)[i % 3]), s) for i, s in enumerate(shapes)}
    with open_tensors(write(tmp_path, tensors)) as found:
        for name, value in tensors.items():
            for _ in range(20):
                ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in value.shape]
                index = tuple(slice(*pair) for pair in ends)[: rng.integers(len(ends) + 1)]
                before = found.bytes_read
                assert_same(found.read(name, index), np.ascontiguousarray(value[index]))
                asked, wanted = found.bytes_read - before, value[index].nbytes
                assert asked == wanted if whole_rows == 0 else wanted <= asked <= value.nbytes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_part_costs_its_bytes(tmp_path, axis):
    value = random_bits(np.random.default_rng(1), BF16, (16, 8, 4096))
    with open_tensors(write(tmp_path, {"other": value, "x": value})) as found:
        assert found.bytes_read == 0
        step = value.shape[axis] // 8
        for i in range(8):
            index = (slice(None),) * axis + (slice(i * step, (i + 1) * step),)
            assert_same(found.read("x", index), np.ascontiguousarray(value[index]))
            assert found.bytes_read == (i + 1) * value.nbytes // 8
        found.read("x", (slice(2, 3), slice(1, 3), slice(5, 5 + 100)))
        assert found.bytes_read == value.nbytes + 2 * 100 * 2


def test_short_rows_are_read_whole_and_by_the_piece(tmp_path, monkeypatch):
    sizes = []
    pread = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: sizes.append(len(views[0])) or pread(fd, views, at))
    value = random_bits(np.random.default_rng(1), BF16, (5000, 1024))
    with open_tensors(write(tmp_path, {"x": value})) as found:
        sizes.clear()
        assert_same(found.read("x", (slice(None), slice(128, 256))), np.ascontiguousarray(value[:, 128:256]))
        assert len(sizes) == 3 and max(sizes) <= safetensors_file.PIECE_BYTES
        assert sum(sizes) == found.bytes_read <= value.nbytes
        sizes.clear()
        assert_same(found.read("x", (slice(8, 4008),)), value[8:4008])
        assert sizes == [4000 * 2048]


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


# Several files


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


# Writing


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


# PyTorch


def test_pickles_are_read_by_pytorch(tmp_path):
    tensors = samples()
    for value in tensors.values():
        value.flags.writeable = False  # as JAX's arrays are
    write_pickle(tmp_path / "m.pth", tensors.items())
    write_pickle(tmp_path / "again.pth", tensors.items())
    assert (tmp_path / "m.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    found = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(found) is dict and list(found) == list(tensors)
    for name, value in tensors.items():
        assert str(found[name].dtype) == f"torch.{value.dtype.name}" and tuple(found[name].shape) == value.shape
        assert bytes(found[name].flatten().view(torch.uint8).tolist() if value.size else b"") == value.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pth", "m.pth"]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_state_dicts(tmp_path, new, key):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Conv2d(1, 2, 3)).to(torch.bfloat16)
    values = dict(module.named_parameters())
    values["view"] = values["0.weight"].detach().T[1:]
    values["same"] = values["0.weight"]
    values["wide"] = torch.tensor([1.0, 2.0]).expand(3, 2)
    whole = values if key is None else {key: values, "epoch": 3}
    torch.save(whole, tmp_path / "m.safetensors", _use_new_zipfile_serialization=new)
    with open_tensors(tmp_path / "m.safetensors") as found:
        assert list(found) == list(values)
        for name, value in values.items():
            expected = value.detach().float().numpy()
            assert found[name].dtype.name == str(value.dtype).removeprefix("torch.")
            assert found[name].shape == expected.shape
            np.testing.assert_array_equal(found.read(name).astype(np.float32), expected)
            np.testing.assert_array_equal(found.read(name, (slice(1, 2),)).astype(np.float32), expected[1:2])


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 2", "protocol 4"])
def test_code_is_refused_and_not_run(tmp_path, kind):
    path, evil = tmp_path / "m.pth", {"x": torch.zeros(2), "y": Evil(tmp_path / "ran")}
    if kind in ("zip", "legacy"):
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_bytes(pickle.dumps({"y": evil["y"]}, int(kind[-1])))
    expected = f"{path}: refused: the file asks to run code or holds more than tensors ("
    assert refusal(path).startswith(expected)
    assert "weights_only" not in refusal(path)
    if kind in ("zip", "legacy"):
        assert "posix.mkdir" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "m.pth")
    assert "holds more than tensors (Unsupported global: GLOBAL torch.nn.modules.linear.Linear" in refusal(
        tmp_path / "m.pth"
    )


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "holds a list, expected a mapping of names to tensors"),
        (torch.zeros(1), "holds a Tensor, expected a mapping"),
        ({"model": {"a": {"b": torch.zeros(1)}}}, "'a' is a dict, expected a tensor"),
        ({"x": torch.zeros(1), "epoch": 3}, "'epoch' is a int, expected a tensor; keep only the weights"),
        ({7: torch.zeros(1)}, "a tensor is named 7, expected text"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "tensor 'x' has dtype 'complex64', expected one of bfloat16"),
        ({"x": torch.zeros(1, device="meta")}, "tensor 'x' holds no values (device meta)"),
        ({"x": torch.zeros(2, dtype=torch.complex64).conj().imag}, "tensor 'x' is not stored densely"),
        ({"x": torch.zeros(1).expand(2, 10**12)}, "tensor 'x' claims 8000000000000 bytes in a storage of 4"),
        ({"x": torch.zeros(40 * (1,))}, f"tensor 'x' has shape {40 * [1]}, which no array can have"),
        ({"x\n\x1b[2J" * 99: 1}, r"'x\n\x1b[2Jx"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, message, new):
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    assert message in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.eye(2).to_sparse(), "torch.sparse_coo, torch.float32"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.sparse_csr, torch.float32"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "torch.strided, torch.qint8"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, make, message, new):
    path = tmp_path / "m.pth"
    with warnings.catch_warnings(action="ignore"):  # only here: reading must not warn
        torch.save({"x": make()}, path, _use_new_zipfile_serialization=new)
    assert refusal(path) == f"{path}: tensor 'x' is not stored densely ({message}); densify it first"


def test_nested_tensors_are_refused(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.save({"x": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])}, tmp_path / "m.pth")
    assert "tensor 'x' is not stored densely" in refusal(tmp_path / "m.pth")


def rezip(path, change, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as new:
        for name, value in records.items():
            new.writestr(name, value)


def test_zips_that_pytorch_would_misread(tmp_path):
    path = tmp_path / "m.pth"
    write_pickle(path, [("x", np.arange(16, dtype=np.float32)), ("y", np.arange(100, dtype=np.float32))])
    whole = path.read_bytes()
    rezip(path, lambda records: None, zipfile.ZIP_DEFLATED)
    assert refusal(path).endswith("record 'archive/data.pkl' is compressed; write the file again with torch.save")
    path.write_bytes(whole)
    number = b"cpuq\x06K"  # then how long the first tensor's storage is
    rezip(path, lambda records: records.update({"archive/data.pkl": longer(records["archive/data.pkl"], number)}))
    assert "tensor 'x' claims 64 bytes in a storage of 80, which the file does not hold; fetch it again" in refusal(
        path
    )
    path.write_bytes(whole)
    rezip(path, lambda records: records.update({"archive/constants.pkl": b""}))
    assert "truncated or not a PyTorch checkpoint (Cannot use ``weights_only=True`` with TorchScript" in refusal(path)
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or not a PyTorch checkpoint" in refusal(path)


def longer(data, before):
    at = data.index(before) + len(before)
    return data[:at] + bytes([data[at] + 4]) + data[at + 1 :]


def test_without_pytorch(tmp_path, monkeypatch):
    write_pickle(tmp_path / "m.pth", [("x", np.zeros(1))])
    path = write(tmp_path, {"x": np.zeros(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    expected = f"{tmp_path / 'm.pth'}: a PyTorch checkpoint needs PyTorch: pip install torch"
    assert refusal(tmp_path / "m.pth") == expected
    with pytest.raises(UserError, match="pip install torch"):
        write_pickle(tmp_path / "n.pth", [])
    with open_tensors(path) as found:
        assert found.read("x") == 0


# Hostile safetensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b"[1]", "a JSON list, expected an object"),
        (b"7", "a JSON int, expected an object"),
        (b"[" * 200_000, "recursion"),
        (b'{"x":' * 200_000, "recursion"),
        (b'{"x": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"x": {}, "x": {}}', "'x' is there twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "'dtype' is there twice"),
        ({"__metadata__": 3, "x": entry()}, "__metadata__ is not a mapping of texts"),
        ({"__metadata__": {"a": 3}, "x": entry()}, "__metadata__ is not a mapping of texts"),
        ({"x": 3}, "tensor 'x': expected dtype, shape and data_offsets, found 3"),
        ({"x": {"shape": [2], "data_offsets": [0, 8]}}, "tensor 'x': expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, "tensor 'x': expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "tensor 'x': expected dtype, shape and data_offsets"),
        ({"x": entry(dtype=3)}, "tensor 'x': expected dtype"),
        ({"x": entry(shape=(-2,))}, "tensor 'x': expected dtype"),
        ({"x": entry(shape=(2.0,))}, "tensor 'x': expected dtype"),
        ({"x": entry(shape=(True, 2))}, "tensor 'x': expected dtype"),
        ({"x": entry(offsets=(False, 8))}, "tensor 'x': expected dtype"),
        ({"x": entry(offsets=(0, 8, 8))}, "tensor 'x': expected dtype"),
        ({"x": entry(offsets=(-8, 0))}, "tensor 'x': expected dtype"),
        ({"x": {**entry(), "shape": 2}}, "tensor 'x': expected dtype"),
        ({"x": entry(offsets=(8, 0))}, r"tensor 'x' of float32[2] spans bytes 8 to 0, expected 8 bytes"),
        ({"x": entry(shape=(3,))}, "spans bytes 0 to 8, expected 12 bytes"),
        ({"x": entry(dtype="BF16")}, "tensor 'x' of bfloat16[2] spans bytes 0 to 8, expected 4 bytes"),
        ({"x": entry(offsets=(4, 12))}, "tensor 'x' begins at byte 4, expected 0"),
        ({"x": entry(), "y": entry()}, "tensor 'y' begins at byte 0, expected 8"),
        ({"x": entry(), "y": entry(shape=(1,), offsets=(4, 8))}, "tensor 'y' begins at byte 4, expected 8"),
        ({"x": entry(shape=(1,), offsets=(0, 4))}, "announces"),
        ({"x": entry(shape=(4,), offsets=(0, 16))}, "announces"),
        ({"x": entry(shape=(2**61,), offsets=(0, 2**63))}, "which no array can have"),
        ({"x": entry(shape=(2**40, 2**40), offsets=(0, 2**82))}, "which no array can have"),
        ({"x": entry(shape=(0, 2**70), offsets=(0, 0))}, "which no array can have"),
        ({"x": entry(shape=(1,) * 64, offsets=(0, 4))}, "which no array can have"),
        ({"x": entry(dtype="F4", shape=(16,))}, "tensor 'x' has dtype 'F4', expected one of bfloat16, float16"),
        ({"x": entry(dtype="C64", shape=(1,))}, "tensor 'x' has dtype 'C64', expected one of"),
        ({"x": entry(dtype="F8_E8M0", shape=(8,))}, "tensor 'x' has dtype 'F8_E8M0', expected one of"),
        ({"\x1b[2J\n" * 1000: 3}, r"tensor '\x1b[2J\n"),
        ({"x": entry(dtype="\n" * 1000)}, r"has dtype '\n"),
        ({"x": ["\ud800"] * 1000}, r"found ['\ud800'"),
    ],
)
def test_hostile_headers(tmp_path, header, message):
    path = tmp_path / "m.safetensors"
    write_header(path, header, bytes(8))
    line = refusal(path)
    assert line.startswith(f"{path}: ") and message in line
    told = "truncated or not a safetensors file (" in line and line.endswith("); fetch it again")
    assert told == ("has dtype" not in line and "no array" not in line)


@pytest.mark.parametrize("length", [0, 1, 60, 10**6, 100_000_001, 2**32, 2**63, 2**64 - 1])
def test_wrong_header_lengths(tmp_path, length):
    path = tmp_path / "m.safetensors"
    write_header(path, {"x": entry()}, bytes(8), length=length)
    assert refusal(path).startswith(f"{path}: truncated or not a safetensors file (")


def test_headers_beyond_the_librarys_limit(tmp_path):
    path = tmp_path / "m.safetensors"
    write_header(path, b'{"', length=100_000_001)
    os.truncate(path, 200_000_000)  # sparse
    assert "announce a header of 100000001 bytes" in refusal(path)


def test_every_truncation_is_refused(tmp_path):
    path = write(tmp_path, {"x": np.arange(4, dtype=np.float32), "y": np.ones(3, BF16)})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert refusal(path).startswith(f"{path}: truncated or not a safetensors file (")
    path.write_bytes(data + b"\0")
    assert f"announces {len(data)} bytes, it has {len(data) + 1}" in refusal(path)


def test_a_header_of_any_length_is_no_index(tmp_path):
    """One that begins like JSON, like a zip, or like a pickle, because of its length."""
    for length in (ord("{"), 0x0280, int.from_bytes(b"PK\3\0", "little")):
        raw = json.dumps({"x": entry()}).encode()
        write_header(tmp_path / "m", raw + b" " * (length - len(raw)), bytes(8))
        with open_tensors(tmp_path / "m") as found:
            assert_same(found.read("x"), np.zeros(2, np.float32))


# Hostile indexes, and what is no file


@pytest.fixture
def index(tmp_path):
    write(tmp_path, {"x": np.zeros(4, np.float32), "y": np.ones(4, np.float32)}, shard_bytes=16)
    return tmp_path / "m.safetensors.index.json"


FIRST, SECOND = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "{index}: not valid JSON: Expecting property name"),
        (b'{"a": "\xff"}', "{index}: not valid JSON: 'utf-8' codec"),
        (b'{"a": ' + b"[" * 200_000, "{index}: not valid JSON: maximum recursion depth"),
        (b'{"a": 1, "a": 1}', "{index}: not valid JSON: 'a' is there twice"),
        ({}, "{index}: no 'weight_map'; expected an index of safetensors shards"),
        ({"weight_map": [FIRST]}, "{index}: no 'weight_map'"),
        ({"weight_map": {"x": 3}}, "{index}: tensor 'x' is listed in 3, expected a file beside the index"),
        ({"weight_map": {"x": None}}, "{index}: tensor 'x' is listed in None, expected a file"),
        ({"weight_map": {"x": ""}}, "{index}: tensor 'x' is listed in '', expected a file"),
        ({"weight_map": {"x": "/etc/passwd"}}, "{index}: tensor 'x' is listed in '/etc/passwd', expected a file"),
        ({"weight_map": {"x": "../m.safetensors"}}, "{index}: tensor 'x' is listed in '../m.safetensors', expected"),
        ({"weight_map": {"x": "a/../../m"}}, "{index}: tensor 'x' is listed in 'a/../../m', expected a file"),
        ({"weight_map": {"x": "a\0b"}}, r"{index}: tensor 'x' is listed in 'a\x00b', expected a file"),
        ({"weight_map": {"x": "a\nb"}}, r"{index}: tensor 'x' is listed in 'a\nb', expected a file"),
        ({"weight_map": {"x": "\ud800"}}, r"{index}: tensor 'x' is listed in '\ud800', expected a file"),
        ({"weight_map": {"x": "."}}, "{index}: tensor 'x' is listed in '.', expected a file"),
        ({"weight_map": {"x": "folder"}}, "{folder}/folder: cannot be opened (Is a directory)"),
        ({"weight_map": {"x": "n" * 300}}, "cannot be opened (File name too long)"),
        (
            {"weight_map": {"x": "none.safetensors"}},
            "{folder}/none.safetensors: no such file; the weights are incomplete",
        ),
        (
            {"weight_map": {"x": "m.safetensors.index.json"}},
            "{index}: truncated or not a safetensors file (it is JSON)",
        ),
        (
            {"weight_map": {"x": FIRST, "y": SECOND, "z": FIRST}},
            "{index}: tensor 'z' is listed in " + FIRST + ", but is not there",
        ),
        (
            {"weight_map": {"x": SECOND, "y": FIRST}},
            "{index}: tensor 'x' is listed in " + SECOND + ", but is not there",
        ),
        (
            {"weight_map": {"x": FIRST, "z": SECOND}},
            "{index}: tensor 'z' is listed in " + SECOND + ", but is not there",
        ),
        ({"weight_map": {"x": FIRST, "y": SECOND, "w": "both"}}, "tensor 'x' is also in {folder}/both; remove one"),
        ({"weight_map": {"w": "both"}}, "{folder}/both: tensor 'x' is there, but {index} does not list it"),
    ],
)
def test_hostile_indexes(tmp_path, index, content, message):
    (tmp_path / "folder").mkdir()
    write(tmp_path, {"w": np.zeros(1), "x": np.zeros(1)}, "both").rename(tmp_path / "both")
    index.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert message.replace("{index}", str(index)).replace("{folder}", str(tmp_path)) in refusal(index)


def test_a_shard_may_be_in_a_folder_below(tmp_path, index):
    (tmp_path / "deep").mkdir()
    (tmp_path / FIRST).rename(tmp_path / "deep" / FIRST)
    index.write_text(json.dumps({"weight_map": {"x": f"./deep/{FIRST}", "y": SECOND}}))
    with open_tensors(index) as found:
        assert found["x"].file == tmp_path / "deep" / FIRST
        assert_same(found.read("y"), np.ones(4, np.float32))


def test_an_index_too_large_to_be_one(tmp_path, index):
    os.truncate(index, 100_000_001)  # sparse
    assert f"{index}: 100000001 bytes of JSON; expected an index of safetensors shards" in refusal(index)


def test_a_truncated_shard(tmp_path, index):
    os.truncate(tmp_path / SECOND, 90)
    assert refusal(index).startswith(f"{tmp_path / SECOND}: truncated or not a safetensors file (")


def test_what_is_no_file_of_weights(tmp_path):
    pipe, loop, folder, empty, text, page = (
        tmp_path / name for name in ("pipe", "loop", "dir", "empty", "text", "page")
    )
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    folder.mkdir()
    empty.touch()
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    page.write_bytes(b"\x80\x04\x95" + bytes(20))
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert refusal(pipe) == f"{pipe}: is not a regular file; expected a file of weights"
    assert refusal(tmp_path / "zero") == f"{tmp_path / 'zero'}: is not a regular file; expected a file of weights"
    assert refusal(folder) == f"{folder}: cannot be opened (Is a directory); expected a file of weights"
    assert re.fullmatch(rf"{loop}: cannot be opened \(.+\); expected a file of weights", refusal(loop))
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such file; the weights are incomplete"
    assert "cannot be opened (Not a directory)" in refusal(empty / "none")
    assert refusal(page).startswith(f"{page}: refused: ")
    for path in (empty, text):
        assert refusal(path).startswith(f"{path}: truncated or not a safetensors file (")
    if os.geteuid() != 0:  # root reads everything
        empty.chmod(0)
        assert "cannot be opened (Permission denied)" in refusal(empty)
