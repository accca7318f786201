"""PyTorch checkpoints: what PyTorch writes is read, and nothing else, in one line each."""

import os
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from weight_files import refusal, samples, write

from vpae_jax.types import UserError
from vpae_jax.weights.pickles import write_pickle
from vpae_jax.weights.tensors import open_tensors


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
        ({7: torch.zeros(1)}, "a tensor is named 7, expected a string"),
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
