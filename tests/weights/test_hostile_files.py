"""Files that hold no weights, or not what they say: one line each."""

import json
import os
import re

import numpy as np
import pytest
from weight_files import BF16, assert_same, refusal, write, write_header

from vpae_jax.weights.tensors import open_tensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"", "EOF while parsing"),
        (b'{"a": "\xff"}', "invalid UTF-8"),
        (b"[1]", "invalid type: sequence"),
        (b"[" * 200_000, "invalid type: sequence"),
        (b'{"x":' * 200_000, "recursion limit exceeded"),
        (b'{"x": ' + b"9" * 5000 + b"}", "number out of range"),
        ({"__metadata__": {"a": 3}, "x": entry()}, "expected a string"),
        ({"x": 3}, "expected struct TensorInfo"),
        ({"x": {"shape": [2], "data_offsets": [0, 8]}}, "missing field `dtype`"),
        ({"x": entry(shape=(-2,))}, "expected usize"),
        ({"x": entry(shape=(3,))}, "invalid shape, data type, or offset"),
        ({"x": entry(offsets=(4, 12))}, "invalid offset for tensor `x`"),
        ({"x": entry(), "y": entry()}, "invalid offset for tensor"),
        ({"x": entry(shape=(1,), offsets=(0, 4))}, "file not fully covered"),
        ({"x": entry(shape=(2**61,), offsets=(0, 2**63))}, "overflow"),
        ({"x": entry(), "y": entry(shape=(0, 2**62), offsets=(8, 8))}, "which no array can have"),
        ({"x": entry(shape=(1,) * 64, offsets=(0, 4)), "y": entry(shape=(1,), offsets=(4, 8))}, "no array can have"),
        ({"x": entry(dtype="F4", shape=(16,))}, "tensor 'x' has dtype 'F4', expected one of bfloat16, float16"),
        ({"x": entry(dtype="C64", shape=(1,))}, "tensor 'x' has dtype 'C64', expected one of"),
        ({"\x1b[2J\n" * 1000: 3}, "expected struct TensorInfo"),
        ({"x": entry(dtype="\n" * 1000)}, "unknown variant"),
        ({"x": ["\ud800"] * 1000}, "unexpected end of hex escape"),
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
    assert "header too large" in refusal(path)


def test_every_truncation_is_refused(tmp_path):
    path = write(tmp_path, {"x": np.arange(4, dtype=np.float32), "y": np.ones(3, BF16)})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert refusal(path).startswith(f"{path}: truncated or not a safetensors file (")
    path.write_bytes(data + b"\0")
    assert "file not fully covered" in refusal(path)


def test_a_header_of_any_length_is_no_index(tmp_path):
    """One that begins like JSON, like a zip, or like a pickle, because of its length."""
    for length in (ord("{"), 0x0280, int.from_bytes(b"PK\3\0", "little")):
        raw = json.dumps({"x": entry()}).encode()
        write_header(tmp_path / "m", raw + b" " * (length - len(raw)), bytes(8))
        with open_tensors(tmp_path / "m") as found:
            assert_same(found.read("x"), np.zeros(2, np.float32))


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
        ({}, "{index}: no 'weight_map'; expected an index of safetensors shards"),
        ({"weight_map": [FIRST]}, "{index}: no 'weight_map'"),
        ({"weight_map": {"x": 3}}, "{index}: tensor 'x' is listed in 3, expected a file next to the index"),
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
            "{index}: tensor 'z' is listed in " + FIRST + ", but missing there",
        ),
        (
            {"weight_map": {"x": SECOND, "y": FIRST}},
            "{index}: tensor 'x' is listed in " + SECOND + ", but missing there",
        ),
        (
            {"weight_map": {"x": FIRST, "z": SECOND}},
            "{index}: tensor 'z' is listed in " + SECOND + ", but missing there",
        ),
        ({"weight_map": {"x": FIRST, "y": SECOND, "w": "both"}}, "tensor 'x' is also in {folder}/both; remove one"),
        ({"weight_map": {"w": "both"}}, "{folder}/both: tensor 'x' is not listed in {index}"),
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
    text.write_text("Entry not found")
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
