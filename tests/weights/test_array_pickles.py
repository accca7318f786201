"""Pickles of arrays are read without running what they name."""

import pickle
import pickletools

import numpy as np
import pytest

from vpae_jax.types import UserError
from vpae_jax.weights.array_pickles import read_arrays

TREE = {"params": {"a/b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "bias": np.ones(2)}}


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_arrays_come_back_by_their_path(tmp_path, protocol):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(TREE, protocol))
    if protocol == 5:  # NumPy writes arrays another way, which no package of ours does
        with pytest.raises(UserError, match="refused: holds more than arrays"):
            read_arrays(path)
        return
    if protocol < 3:  # bytes are written as a call of a codec
        with pytest.raises(UserError, match=r"it names _codecs.encode"):
            read_arrays(path)
        return
    found = read_arrays(path)
    assert list(found) == ["params/a/b/kernel", "params/bias"]
    np.testing.assert_array_equal(found["params/a/b/kernel"], TREE["params"]["a/b"]["kernel"])


def test_arrays_that_numpy_1_wrote(tmp_path):
    path = tmp_path / "weights.ckpt"
    content = pickle.dumps(TREE, 3)
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(read_arrays(path)["params/bias"], 1)


def test_code_is_refused_and_does_not_run(tmp_path):
    path, trace = tmp_path / "weights.ckpt", tmp_path / "trace"
    for held in (Code(trace), {"params": Code(trace)}, {"params": np.array([Code(trace)], object)}):
        path.write_bytes(pickle.dumps(held, 4))
        with pytest.raises(UserError, match=r"weights.ckpt: refused: holds more than arrays, .*names (io|_io).open"):
            read_arrays(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "held, at",
    [
        ([np.ones(2)], r"the file is not a float array \(list\)"),
        ({"a": {"b": [1.0]}}, r"a/b is not a float array \(list\)"),
        ({"a": np.ones(2, int)}, r"a is not a float array \(array\)"),
        ({"a": np.array([None])}, r"a is not a float array \(array\)"),
        ({"a": np.zeros(2, [("x", "f4")])}, r"a is not a float array \(array\)"),
        ({1: np.ones(2)}, r"the file is not a float array \(dict\)"),
    ],
)
def test_anything_but_float_arrays_in_dictionaries_is_refused(tmp_path, held, at):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(held, 4))
    with pytest.raises(UserError, match=f"weights.ckpt: {at}; install its package again"):
        read_arrays(path)


def test_order_of_bytes_and_of_columns(tmp_path):
    path, values = tmp_path / "weights.ckpt", np.arange(6.0).reshape(2, 3)
    for held in (values.astype(">f4"), np.asfortranarray(values), values.astype(np.float16)):
        path.write_bytes(pickle.dumps({"a": held}, 4))
        np.testing.assert_array_equal(read_arrays(path)["a"], values)


def test_an_array_without_all_its_bytes_is_refused(tmp_path):
    """Of a shape that would take memory which the file does not fill."""
    content = pickletools.optimize(pickle.dumps({"a": np.ones(2)}, 3))
    path = tmp_path / "weights.ckpt"
    small, large = b"K\x02\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"  # (2,) and (2**40,)
    assert content.count(small) == 1
    path.write_bytes(content.replace(small, large))
    with pytest.raises(UserError, match=r"a is not a float array \(array\)"):
        read_arrays(path)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path, whole, rng = tmp_path / "weights.ckpt", pickle.dumps(TREE, 4), np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        if trial % 3:
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_arrays(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 150
    assert (np.ones(3) / 2).sum() == 1.5, "no dtype of the process has been changed"
    with pytest.raises(UserError, match="cannot be read"):
        read_arrays(tmp_path / "none")
