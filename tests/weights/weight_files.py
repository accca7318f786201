"""Weight files of every kind of tensor, and of none."""

import json

import ml_dtypes
import numpy as np
import pytest

from vpae_jax.types import UserError
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
