"""Records: what comes back is what was written; damage is found, named, and ends nothing."""

import json
import pickle
import random
import resource
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from record_files import SMALL, TOKENS, WIDE, arrays_of, number_of, write_folder

from vpae_jax.data import records as module
from vpae_jax.data.records import (
    TAG_BYTES,
    BadRecord,
    LatentRecords,
    checksum,
    from_safetensors,
    is_finite,
    pack,
    stored,
    to_safetensors,
    unpack,
)
from vpae_jax.types import UserError

MUTATIONS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    units = [[(0, SMALL), (1, WIDE), (2, SMALL)], [], [(3, WIDE)], [(4, SMALL)]]
    return write_folder(tmp_path_factory.mktemp("records") / "folder", units)


@pytest.fixture
def copy(folder, tmp_path):
    return write_folder(tmp_path / "copy", [[(n, SMALL) for n in range(6)]])


def packed(id, arrays, about):
    return pack(id, stored(id, arrays), about)


def unpacked(record):
    return unpack(np.frombuffer(record, np.uint8))


def shard_of(folder):
    return next((folder / "shards").iterdir())


def test_what_is_read_is_what_was_written_in_bfloat16(folder):
    records = LatentRecords(folder)
    records.verify()
    assert len(records) == 5
    order = [0, 2, 1, 3, 4]  # by unit, then by shape
    for index, number in enumerate(order):
        given = arrays_of(number, WIDE if number in (1, 3) else SMALL)
        found = records[index]
        assert found.keys() == given.keys()
        for name, value in given.items():
            expected = value if value.dtype == bool else value.astype(ml_dtypes.bfloat16)
            assert found[name].dtype == expected.dtype and np.array_equal(found[name], expected), name
        assert records.about(index) == {"id": f"clip {number}", "caption": f"number {number}"}
    assert {shape: list(places) for shape, places in records.shapes.items()} == {SMALL: [0, 1, 4], WIDE: [2, 3]}
    assert records.null_text.shape == (TOKENS, 8) and records.null_mask.sum() == 1
    for index in (-1, 5):
        with pytest.raises(IndexError):
            records[index]


def test_the_text_of_a_record_ends_with_its_prompt(folder):
    arrays, about = unpacked(packed("a", arrays_of(2), {"caption": "two"}))
    assert arrays["text"].shape == (3, 8)
    assert arrays["frames"].shape == SMALL
    assert about == {"id": "a", "caption": "two"}
    trimmed = {name: value for name, value in arrays_of(2).items() if name != "text_mask"}
    trimmed["text"] = trimmed["text"][:3]
    assert packed("a", trimmed, {"caption": "two"}) == packed("a", arrays_of(2), {"caption": "two"})


def test_captions_of_any_kind_come_back():
    for caption in ("", "ein Bär 🐻", "\x00\ud800\u202e", "a" * 100_000):
        assert unpacked(packed("a", arrays_of(0), {"caption": caption}))[1]["caption"] == caption


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_values_that_are_not_finite_in_bfloat16_are_refused(value):
    arrays = arrays_of(0)
    arrays["latents"].flat[7] = value
    with pytest.raises(UserError, match="clip 'a three': its latents are not finite in bfloat16"):
        packed("a three", arrays, {})


def test_is_finite_of_bfloat16_agrees_with_numpy_on_all_values():
    values = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values).tolist()
    assert [is_finite(value) for value in values[:, None]] == expected
    assert is_finite(values[:0])


def test_frames_of_another_mask_are_an_error():
    arrays = arrays_of(0)
    arrays["frames"][1, ..., 0] = 1
    with pytest.raises(ValueError, match="does not mark exactly the first frame"):
        packed("a", arrays, {})


def test_any_changed_byte_of_a_record_is_found():
    whole = packed("a", arrays_of(0), {"caption": "zero"})
    rng = random.Random(0)
    for _ in range(MUTATIONS):
        at = rng.randrange(len(whole))
        changed = whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :]
        for bad in (changed, whole[:at], changed[at:]):
            with pytest.raises(BadRecord):
                unpacked(bad)


def test_bytes_that_are_no_record_are_found_whatever_their_checksum():
    whole = packed("a", arrays_of(0), {"caption": "zero"})[:-TAG_BYTES]
    rng = random.Random(0)
    for _ in range(MUTATIONS):
        at = rng.randrange(600)  # the header and a little more
        changed = whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
        try:
            arrays, about = unpacked(changed + checksum(changed))
        except BadRecord:
            continue
        assert isinstance(about, dict) and all(isinstance(value, np.ndarray) for value in arrays.values())
    for bad in (b"", b"null", b"\x04" + bytes(7) + b"null", b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(BadRecord):
            from_safetensors(bad)


def test_a_flipped_bit_in_a_shard_costs_no_more_than_its_record(copy):
    path = shard_of(copy)
    whole = path.read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]
    rng = random.Random(0)
    counts = Counter()
    for _ in range(MUTATIONS):
        at = rng.choice(used)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
        records, bad = LatentRecords(copy), 0
        for index in range(6):
            try:
                assert number_of(records[index]["latents"]) == index
            except BadRecord as error:
                assert str(error).startswith(f"{path}, record {index}: ") and "\n" not in str(error)
                bad += 1
        counts[bad] += 1
    assert set(counts) == {0, 1} and counts[1] > 20 * counts[0], "ArrayRecord's own structures are not needed"
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(UserError, match=r"array_record is damaged; remove it and run the same encode command again"):
        LatentRecords(copy).verify()


def test_a_shard_that_is_missing_or_cut_short_is_said_when_opening(copy):
    path = shard_of(copy)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"has {len(whole) - 1} bytes, expected {len(whole)} bytes; run the same enc"):
        LatentRecords(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"array_record is missing, expected .* bytes; run the same encode command"):
        LatentRecords(copy)


def test_a_shard_that_is_cut_short_or_removed_while_it_is_read_gives_bad_records(copy):
    path = shard_of(copy)
    opened, unopened = LatentRecords(copy), LatentRecords(copy)
    opened[0]
    with path.open("r+b") as file:
        file.truncate(3000)
    for records in (opened, unopened):
        with pytest.raises(BadRecord):
            records[5]
    path.unlink()
    with pytest.raises(BadRecord):
        LatentRecords.__getitem__(pickle.loads(pickle.dumps(unopened)), 0)


def test_what_the_system_refuses_for_the_moment_is_no_damage(copy):
    records = LatentRecords(copy)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"array_record, record 0: cannot be read: Too many open files; once this is"
        ):
            records[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert number_of(records[0]["latents"]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: arrays | {"latents": arrays["latents"][:1]}, "which differs from the index"),
        (
            lambda arrays: {name: value for name, value in arrays.items() if name != "image"},
            "which differs from the index",
        ),
        (lambda arrays: arrays | {"text": np.zeros((TOKENS + 1, 8), np.float32)}, "which differs from the index"),
        (lambda arrays: arrays | {"latents": np.full(SMALL, np.nan)}, "latents is not finite"),
    ],
)
def test_a_record_that_is_whole_but_not_what_the_index_says_is_bad(change, reason, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        arrays = dict(unpacked(packed("a", arrays_of(0), {}))[0])
        patch.setattr(module, "is_finite", lambda value: True)  # writing refuses what is tested here
        payload = to_safetensors("a", change(arrays), {"id": "a"})
        patch.setattr("vpae_jax.encoding.unit_writer.pack", lambda *_: payload + checksum(payload))
        write_folder(tmp_path / "folder", [[(0, SMALL)]])
    with pytest.raises(BadRecord, match=reason):
        LatentRecords(tmp_path / "folder")[0]


def test_folders_that_cannot_be_read_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"contains no encoded clips \(index.json is missing\)"):
        LatentRecords(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    for schema in (1, 3):
        (tmp_path / "index.json").write_text(json.dumps({**index, "schema": schema}))
        with pytest.raises(
            UserError, match=rf"schema {schema}, expected 2; encode the clips again into another folder"
        ):
            LatentRecords(tmp_path)
    for text in ("", "{", "[]", "{}"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="not an index of records"):
            LatentRecords(tmp_path)
