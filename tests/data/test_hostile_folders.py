"""Folders of records that somebody else made: what their files say is checked when they are opened."""

import json
import random
import resource
import sys
from contextlib import suppress

import numpy as np
import pytest
from record_files import SMALL, TOKENS, WIDE, WIDTH, arrays_of, write_folder

from vpae_jax.data import index as index_module
from vpae_jax.data import records as module
from vpae_jax.data.index import read_index
from vpae_jax.data.records import BadRecord, LatentRecords, checksum, stored, to_safetensors
from vpae_jax.encoding.units import Units
from vpae_jax.types import UserError

UNITS = [[(0, SMALL), (1, WIDE)], [(2, SMALL)]]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder", UNITS)


def refusal(folder):
    with pytest.raises(UserError) as error:
        LatentRecords(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


def change(folder, *path, to):
    """Gives one value of the index another, or removes it."""
    index = json.loads((folder / "index.json").read_text())
    holder = index
    for key in path[:-1]:
        holder = holder[key]
    if to is Ellipsis:
        del holder[path[-1]]
    else:
        holder[path[-1]] = to
    (folder / "index.json").write_text(json.dumps(index))


KEYS = ["schema", "fingerprint", "identity", "count", "rejects", "text_tokens", "takes_image", "shards"]
SHARD = ["file", "bytes", "sha256", "shapes", "sizes"]


@pytest.mark.parametrize("key", KEYS)
def test_an_index_without_a_key(folder, key):
    change(folder, key, to=...)
    assert f"index.json: not an index of records ({key} is missing); run the same encode command again" in refusal(
        folder
    )


@pytest.mark.parametrize("key", SHARD)
def test_a_shard_without_a_key(folder, key):
    change(folder, "shards", 1, key, to=...)
    assert f"not an index of records (shards[1].{key} is missing)" in refusal(folder)


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "text", [], [None], {}, {"a": None}, 2**70, float("nan")])
@pytest.mark.parametrize("key", KEYS + SHARD)
def test_a_value_of_another_kind(folder, key, value):
    where = ("shards", 1, key) if key in SHARD else (key,)
    change(folder, *where, to=value)
    fits = {"takes_image": value is True, "rejects": value == {}, "identity": isinstance(value, dict)}
    if fits.get(key):
        assert len(LatentRecords(folder)) == 3
    else:
        message = refusal(folder)
        assert (
            "schema -1, expected 2" if (key, value) == ("schema", -1) else "not an index of records ("
        ) in message or (key == "schema" and f"schema {value}, expected 2" in message)


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("shards", 0), [], "shards[0] is [], expected an object"),
        (("shards", 0), "shards/a.array_record", "expected an object"),
        (("shards", 0, "file"), "../../secret.array_record", "expected shards/NAME.array_record"),
        (("shards", 0, "file"), "/etc/passwd", "expected shards/NAME.array_record"),
        (("shards", 0, "file"), "shards/../../secret.array_record", "expected shards/NAME.array_record"),
        (("shards", 0, "file"), "shards/", "expected shards/NAME.array_record"),
        (("shards", 0, "file"), "shards/a\u0000.array_record", "expected shards/NAME.array_record"),
        (("shards", 0, "file"), "shards\\..\\a.array_record", "expected shards/NAME.array_record"),
        (("shards", 0, "sizes"), [2**57], "sizes are 144115188075855872 bytes together, but the file has"),
        (("shards", 0, "sizes"), [1, -1], "expected sizes of records"),
        (("shards", 0, "sizes"), [1, 0], "expected sizes of records"),
        (("shards", 0, "sizes"), [1.0], "expected sizes of records"),
        (("shards", 0, "sizes"), [True], "expected sizes of records"),
        (("shards", 0, "sizes"), [1] * 5, "count is 3, its shards have 7 records"),
        (("shards", 0, "shapes", "latents"), [2, 4, 6], "expected shapes by name"),
        (("shards", 0, "shapes", "latents"), [2, 4, 0, 16], "expected shapes by name"),
        (("shards", 0, "shapes", "latents"), [2, 4, 6, "16"], "expected shapes by name"),
        (("shards", 0, "shapes", "latents"), ..., "expected shapes by name"),
        (("shards", 0, "shapes", "text"), [6, 8], "expected shapes by name"),
        (("shards", 1, "shapes", "text"), [9], "shards[1].shapes have "),
        (("shards", 1, "shapes", "latents"), [2, 4, 6, 12], "shards[1].shapes have "),
        (("shards", 1, "shapes", "image"), ..., "shards[1].shapes have "),
        (("count",), 4, "count is 4, its shards have 3 records"),
        (("rejects",), {"static": -1}, "rejects is {'static': -1}, expected numbers of rejects by kind"),
        (("rejects",), {"\u001b[2J": 1}, "expected numbers of rejects by kind"),
        (("fingerprint",), "\u001b[31m", "fingerprint is '\\x1b[31m', expected 16 hexadecimal digits"),
        (("text_tokens",), 0, "text_tokens is 0, expected a number of tokens"),
    ],
)
def test_an_index_that_says_what_cannot_be(folder, where, value, reason):
    (folder.parent / "secret.array_record").write_bytes(b"secret" * 1000)
    change(folder, *where, to=value)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'index.json'}: not an index of records (") and reason in message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 100,
        b"[" * 200_000,
        b'{"schema":' * 100_000,
        b'{"schema": NaN}',
    ],
)
def test_what_is_no_index(folder, text):
    (folder / "index.json").write_bytes(text)
    assert "index.json: not an index of records (" in refusal(folder)


def test_a_deep_value_in_a_whole_index(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(
        text.replace('"identity": {', '"deep": ' + "[" * 5000 + "]" * 5000 + ', "identity": {')
    )
    message = refusal(folder) if sys.version_info < (3, 14) else "recursion"
    assert "recursion" in message


def test_an_index_of_another_schema_is_not_held_against_this_one(folder):
    (folder / "index.json").write_text('{"schema": 3, "clips": []}')
    assert "schema 3, expected 2; encode the clips again into another folder" in refusal(folder)


@pytest.mark.parametrize("name", ["index.json", "null.safetensors"])
def test_a_sparse_file_is_not_read(folder, name):
    with (folder / name).open("r+b") as file:
        file.truncate(8 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(folder)
    assert f"{name}: " in message and f"it has {8 << 30} bytes, at most {2**28} are read" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


@pytest.mark.parametrize("name", ["index.json", "null.safetensors"])
def test_a_file_that_is_a_folder_or_a_pipe(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert ("is not finished" if name == "index.json" else "null.safetensors: it is missing") in refusal(folder)


def write_null(folder, **arrays):
    (folder / "null.safetensors").write_bytes(to_safetensors("null", arrays, {}))


GOOD = {"text": np.zeros((TOKENS, WIDTH), np.float32), "text_mask": np.arange(TOKENS) < 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": ...}, "its text is missing, not bfloat16, or not finite"),
        ({"text_mask": ...}, "its text_mask is missing, not bool, or not finite"),
        ({"text": np.full((TOKENS, WIDTH), np.nan)}, "its text is missing, not bfloat16, or not finite"),
        ({"text": np.full((TOKENS, WIDTH), np.inf)}, "its text is missing, not bfloat16, or not finite"),
        ({"text": np.zeros((TOKENS, WIDTH), np.int8)}, "its text is missing, not bfloat16, or not finite"),
        ({"text_mask": np.ones(TOKENS, np.float32)}, "its text_mask is missing, not bool, or not finite"),
        ({"text": np.zeros((TOKENS + 1, WIDTH))}, f"its text has shape [{TOKENS + 1}, {WIDTH}]"),
        ({"text": np.zeros((TOKENS, WIDTH + 1))}, f"expected [{TOKENS}, {WIDTH}]"),
        ({"text": np.zeros(TOKENS)}, f"expected [{TOKENS}, {WIDTH}]"),
        ({"text_mask": np.ones(TOKENS - 1, bool)}, f"mask [{TOKENS - 1}]"),
    ],
)
def test_a_negative_prompt_that_cannot_be(folder, change, reason, monkeypatch):
    arrays = {name: value for name, value in (GOOD | change).items() if value is not ...}
    with monkeypatch.context() as patch:
        patch.setattr(module, "is_finite", lambda value: True)  # writing refuses what is tested here
        write_null(folder, **arrays)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'null.safetensors'}: ") and reason in message


@pytest.mark.parametrize("tokens", [TOKENS - 1, 2**57])
def test_a_number_of_tokens_that_the_negative_prompt_does_not_have(folder, tokens):
    """Each clip's text would take so much memory."""
    change(folder, "text_tokens", to=tokens)
    assert f"its text has shape [{TOKENS}, {WIDTH}] and mask [{TOKENS}], expected [{tokens}, {WIDTH}]" in refusal(
        folder
    )


def test_random_damage_of_the_small_files_is_one_line_or_none(folder):
    whole = {name: (folder / name).read_bytes() for name in ("index.json", "null.safetensors")}
    values = ["null", "true", "-1", "1e400", '"x"', "[]", "{}", "[[[]]]", "99999999999999999999", "0.5"]
    ended = []
    for number in range(400):
        rng = random.Random(number)
        name = rng.choice(list(whole))
        data = bytearray(whole[name])
        if name == "index.json" and rng.random() < 0.5:
            places = [i for i, byte in enumerate(data) if byte in b":,[" and data[i + 1 : i + 2] in (b" ", b"0", b"1")]
            place = rng.choice(places) + 1
            end = next(i for i in range(place + 1, len(data)) if data[i] in b",]}")
            data[place:end] = rng.choice(values).encode()
        else:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / name).write_bytes(data)
        try:
            records = LatentRecords(folder)
            for clip in range(len(records)):
                with suppress(BadRecord):
                    records[clip], records.about(clip)
            ended.append("read")
        except UserError as error:
            assert "\n" not in str(error)
            ended.append("refused")
        (folder / name).write_bytes(whole[name])
    assert ended.count("read") > 20 and ended.count("refused") > 200


# --- Records


def record(monkeypatch, payload_of, tmp_path):
    """A folder of one record, whose bytes are whole, and not what its writer would have made."""
    payload = payload_of(to_safetensors("a", stored("a", arrays_of(0)), {"id": "a", "caption": "one"}))
    with monkeypatch.context() as patch:
        patch.setattr("vpae_jax.encoding.unit_writer.pack", lambda *_: payload + checksum(payload))
        patch.setattr("vpae_jax.encoding.unit_writer.unpack", lambda _: None)
        return LatentRecords(write_folder(tmp_path / "odd", [[(0, SMALL)]]))


def with_header(change):
    def of(payload):
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        text = change(header)
        data = (text if isinstance(text, str) else json.dumps(header)).encode()
        return len(data).to_bytes(8, "little") + data + payload[8 + length :]

    return of


ODD = {
    "deep header": lambda header: "[" * 200_000,
    "deep about": lambda header: header.__setitem__("__metadata__", {"about": "[" * 200_000}),
    "about is a list": lambda header: header.__setitem__("__metadata__", {"about": "[]"}),
    "about is a number": lambda header: header.__setitem__("__metadata__", {"about": "7"}),
    "huge shape": lambda header: header["latents"].__setitem__("shape", [2**70, 2]),
    "negative shape": lambda header: header["latents"].__setitem__("shape", [-5, 2]),
    "huge offsets": lambda header: header["latents"].__setitem__("data_offsets", [0, 2**80]),
    "another dtype": lambda header: header["latents"].__setitem__("dtype", "F16"),
    "unknown dtype": lambda header: header["latents"].__setitem__("dtype", []),
    "no arrays": lambda header: json.dumps({"__metadata__": header["__metadata__"]}),
}


@pytest.mark.parametrize("case", ODD)
def test_a_record_that_says_what_cannot_be_is_bad(case, monkeypatch, tmp_path):
    records = record(monkeypatch, with_header(ODD[case]), tmp_path)
    with pytest.raises(BadRecord) as error:
        records[0]
    assert "\n" not in str(error.value)


def test_a_caption_that_is_no_text_is_bad(monkeypatch, tmp_path):
    about = json.dumps({"id": "a", "caption": ["one"]})
    records = record(monkeypatch, with_header(lambda h: h.__setitem__("__metadata__", {"about": about})), tmp_path)
    records[0]
    with pytest.raises(BadRecord, match="record 0: its caption is not text"):
        records.about(0)


def test_records_of_the_size_that_a_stranger_claims_are_read_no_further_than_their_file(folder, monkeypatch):
    """Of sizes that add up, and lie beyond the file all the same."""
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["sizes"] = [index["shards"][0]["bytes"]]
    (folder / "index.json").write_text(json.dumps(index))
    records = LatentRecords(folder)
    with pytest.raises(BadRecord, match="cannot be read: the file ends at byte"):
        records[0]


def test_a_writer_writes_a_unit_again_whose_shard_leads_out_of_the_folder(folder):
    path = folder / "units/00000.json"
    facts = json.loads(path.read_text())
    facts["shards"][0]["file"] = "../" + facts["shards"][0]["file"]
    path.write_text(json.dumps(facts))
    assert Units(folder, {"clips": "numbers"}, 2).pending() == [0]
    path.write_text("[" * 100_000)
    assert Units(folder, {"clips": "numbers"}, 2).pending() == [0]


def test_an_index_is_checked_fast_enough(tmp_path):
    """Of a million clips it has some seven million bytes."""
    whole = write_folder(tmp_path / "folder", [[(0, SMALL)]])
    index = json.loads((whole / "index.json").read_text())
    (shard,) = index["shards"]
    shard |= {"sizes": [123456] * 64, "bytes": 123456 * 70}
    index |= {"shards": [shard] * 15_625, "count": 1_000_000}
    (whole / "index.json").write_text(json.dumps(index))
    assert (whole / "index.json").stat().st_size < index_module.MAX_INDEX / 16
    assert read_index(whole)["count"] == 1_000_000
