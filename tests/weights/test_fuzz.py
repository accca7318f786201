"""Damaged weight files: thousands of mutants are read or refused in one line; nothing else ever comes out.

Every batch has its own seed, so that a failing mutant can be made again.
"""

import faulthandler
import io
import json
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from vpae_jax.types import UserError
from vpae_jax.weights.pickles import write_pickle
from vpae_jax.weights.tensors import open_tensors, write_safetensors

BATCHES, MUTANTS = 3, 250
SECONDS = 120
NUMBERS = (0, 1, 2, 7, 8, 24, 255, 4096, -1, -8, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 2**70, 1.0, 1.5, True, False)
ODD = (None, "", "x", [], {}, [1], [[0]], {"a": 1}, "F32", "NaN", *NUMBERS)
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F4", "F8_E8M0", "C64", "BOOL", "I8", "U64", "f32", "F33", "")
SHARDS = (
    "../m.safetensors",
    "/etc/passwd",
    ".",
    "..",
    "",
    "a\0b",
    "a\nb",
    "x" * 300,
    "\ud800",
    "m.safetensors.index.json",
)
GLOBALS = (
    b"posix\nsystem",
    b"builtins\neval",
    b"builtins\nbytearray",
    b"builtins\nset",
    b"_codecs\nencode",
    b"collections\nCounter",
    b"torch\nFloatTensor",
    b"torch\nQInt8Storage",
    b"torch\nComplexFloatStorage",
    b"torch\nUntypedStorage",
    b"torch.nn.parameter\nParameter",
    b"torch.sparse\nFloatTensor",
    b"torch._utils\n_rebuild_tensor",
    b"torch._utils\n_rebuild_tensor_v3",
    b"torch._utils\n_rebuild_parameter",
    b"torch._utils\n_rebuild_qtensor",
    b"torch._utils\n_rebuild_sparse_tensor",
    b"torch._utils\n_rebuild_nested_tensor",
    b"torch._utils\n_rebuild_meta_tensor_no_storage",
    b"torch._utils\n_rebuild_wrapper_subclass",
    b"torch._tensor\n_rebuild_from_type_v2",
)


def samples():
    rng = np.random.default_rng(0)
    return {
        "blocks.0.weight": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "blocks.0.bias": rng.normal(size=4).astype(np.float32),
        "mask": np.array([True, False, True]),
        "empty": np.zeros((0, 2), np.float16),
        "step": np.array(7, np.int64),
    }


def damage(rng, data):
    """One change to bytes, of a kind that disks, networks and hands make."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 16, 64)))
    match rng.randrange(9):
        case 0:
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            data[at:end] = rng.randbytes(end - at)
        case 2:
            data[at:end] = bytes(end - at)
        case 3:
            data[at:end] = b"\xff" * (end - at)
        case 4:
            del data[at:]
        case 5:
            del data[at:end]
        case 6:
            data[at:at] = data[at:end]
        case 7:
            data += rng.choice((bytes(8), rng.randbytes(5), bytes(data[:at])))
        case 8:
            other = rng.randrange(len(data))
            data[at:end] = data[other : other + end - at]
    return bytes(data)


def change(rng, value, odd):
    """A JSON value with one node changed, removed or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return {
                    rng.choice((*value, "x", "\n", "")) if name == key else name: one for name, one in value.items()
                }
        return {**value, key: change(rng, value[key], odd)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
        return [*value[:at], change(rng, value[at], odd), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -1, 1, 8))
    return rng.choice(odd)


def header(rng, data):
    """A safetensors file with another header, whose length is right; or with another length."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        length = rng.choice((0, 1, length - 1, length + 1, len(data) - 8, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    parsed = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2))):
        parsed = change(rng, parsed, (*ODD, *DTYPES))
    raw = json.dumps(parsed).encode()
    if rng.random() < 0.1:
        raw = damage(rng, raw)
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def zipped(rng, data):
    """A zip whose checksums are right, with one record changed, left out, renamed or compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        records = {name: old.read(name) for name in old.namelist()}
        chosen = rng.choice(list(records))
        if rng.random() < 0.8:
            chosen = next(name for name in records if name.endswith("data.pkl"))
            records[chosen] = pickled(rng, records[chosen])
        else:
            match rng.randrange(3):
                case 0:
                    del records[chosen]
                case 1:
                    records[chosen] = damage(rng, records[chosen] or b"0")
                case 2:
                    records[rng.choice(("archive/constants.pkl", "archive/byteorder", "x", "../x"))] = records[chosen]
        for name, value in records.items():
            new.writestr(name, value, zipfile.ZIP_DEFLATED if rng.random() < 0.005 else zipfile.ZIP_STORED)
    return out.getvalue()


def pickled(rng, data):
    """Pickle bytes with a number, a name or any bytes changed."""
    numbers = [i for i in range(len(data) - 1) if data[i : i + 1] == b"K"]
    names = [i for i in range(len(data)) if data[i : i + 1] == b"c" and data[i + 1 :].count(b"\n") > 1]
    match rng.randrange(4):
        case 0 if numbers:
            at = rng.choice(numbers)
            long = rng.choice(NUMBERS[:-4]).to_bytes(9, "little", signed=True)
            new = rng.choice((b"K" + rng.randbytes(1), b"J" + rng.randbytes(4), b"\x8a\x09" + long))
            return data[:at] + new + data[at + 2 :]
        case 1 if names:
            at = rng.choice(names)
            end = data.index(b"\n", data.index(b"\n", at) + 1)
            return data[: at + 1] + rng.choice(GLOBALS) + data[end:]
    return damage(rng, data)


def write_single(folder):
    tensors = samples()
    infos = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_safetensors(folder, "m", infos, tensors.values())
    return folder / "m.safetensors"


def write_index(folder):
    tensors = samples()
    infos = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_safetensors(folder, "m", infos, tensors.values(), shard_bytes=24)
    return folder / "m.safetensors.index.json"


def write_zip(folder):
    write_pickle(folder / "m.pth", samples().items())
    return folder / "m.pth"


def write_legacy(folder):
    path = folder / "m.pth"
    write_pickle(path, samples().items())
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def index(rng, data):
    if rng.random() < 0.3:
        return damage(rng, data)
    parsed = json.loads(data)
    names = list(parsed["weight_map"])
    if rng.random() < 0.5:
        parsed["weight_map"][rng.choice(names)] = rng.choice((*SHARDS, *parsed["weight_map"].values()))
        return json.dumps(parsed).encode()
    return json.dumps(change(rng, parsed, (*ODD, *SHARDS))).encode()


def either(first, second):
    return lambda rng, data: rng.choice((first, second))(rng, data)


KINDS = {
    "safetensors": (write_single, damage),
    "header": (write_single, header),
    "index": (write_index, index),
    "zip": (write_zip, either(damage, zipped)),
    "pickle": (write_zip, zipped),
    "legacy": (write_legacy, either(damage, pickled)),
}


def outcome(path):
    """None for a file that was read, else the error."""
    try:
        with open_tensors(path) as tensors:
            for name, stored in tensors.items():
                value = tensors.read(name)
                assert value.shape == stored.shape and value.dtype == stored.dtype
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def no_hang():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("seed", range(BATCHES))
@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_read_or_refused_in_one_line(tmp_path, capfd, kind, seed):
    write, mutate = KINDS[kind]
    path = write(tmp_path)
    data = path.read_bytes()
    assert outcome(path) is None
    rng = random.Random(f"{kind} {seed}")
    refused = 0
    for number in range(MUTANTS):
        path.write_bytes(mutate(rng, data))
        message = outcome(path)
        if message is not None:
            refused += 1
            assert message.startswith(f"{tmp_path}/"), (number, message)
            assert kind == "index" or str(path) in message, (number, message)
            assert message.isprintable() and len(message) < 600, (number, message)
    assert MUTANTS // 4 < refused < MUTANTS  # neither everything nor nothing is refused
    assert capfd.readouterr() == ("", "")
