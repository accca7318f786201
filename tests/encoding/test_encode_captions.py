"""`python -m vpae_jax.encode` of captions, for which a teacher makes the clips."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from encoding_runs import ROOT, contents, hidden, same, start
from manifests import write

from vpae_jax.encoding.captions import Captions, Prompt
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.types import UserError


def test_captions_that_the_encoder_does_not_take_are_said_to_be_too_long(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a three moves up " * 9)
    code, _, err = run(captions=tmp_path / "captions.txt", output=tmp_path / "records")
    assert code == 2 and len(err) == 1
    assert "rejected: 1 caption, the first being row 1: " in err[0] and "reads at most 16; " in err[0]


def test_the_teachers_clips_can_be_made_again(run, loaded, tmp_path):
    (tmp_path / "captions.txt").write_text("a three moves up\n\nthe digit seven\n" + "a three " * 20 + "\na one\n")
    output = tmp_path / "records"
    settings = dict(captions=tmp_path / "captions.txt", output=output, steps=2, guidance=3, seed=11, dtype="float32")
    code, out, err = run(**settings, unit=2, batch=2, shift=2)
    assert code == 0 and not err, err
    assert out[1] == f"records: {output}: 3 clips; rejected: 1 caption"
    found = contents(output)
    assert [(r["about"]["caption"], r["about"]["seed"]) for r in found.values()] == [
        ("a three moves up", 11),
        ("the digit seven", 12),
        ("a one", 14),
    ]
    assert "seed 14" in (output / "summary.html").read_text()
    pipeline = loaded("tiny")
    for record in found.values():
        recipe = dict(record["about"])
        caption = recipe.pop("caption")
        del recipe["id"]
        again = pipeline(caption, **recipe)
        decoded = np.asarray(pipeline.decode(jnp.asarray(record["latents"], jnp.float32)[None])[0])
        assert again.shape == decoded.shape == (9, 48, 48, 3)
        assert np.abs(again.astype(int) - decoded).mean() < 0.5
        other = pipeline(caption, **{**recipe, "seed": 3})
        assert np.abs(other.astype(int) - decoded).mean() > 2
    # The same model by another name is loaded apart, and makes the same.
    code, out, _ = run(**settings, unit=2, batch=1, shift=2, teacher=ROOT / "vpae_jax" / "assets" / "tiny")
    assert code == 0 and out[0] == f"{output} is already complete; nothing to do"
    code, _, err = run(**{**settings, "seed": 12}, unit=2, shift=2)
    assert code == 2 and len(err) == 1 and "holds other records: recipe.seed is 11 there, 12 here; choose" in err[0]


@pytest.mark.long
def test_two_teachers_at_the_same_time(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (captions := tmp_path / "captions.txt").write_text("".join(f"a three moves up {i}\n" for i in range(5)))
    settings = dict(captions=captions, unit=1, steps=1, guidance=1)
    running = [start(**settings, output=two, process_id=i, num_processes=2) for i in (0, 1)]
    code, out, err = run(**settings, output=one)
    assert code == 0 and out[0].startswith("encoded 5 clips; 5 of 5 units; "), err
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert any("summary: " in out for out, _ in said)
    assert same(one, two) and not hidden(two)


def test_captions_are_filtered_by_their_length(run, tmp_path):
    (captions := tmp_path / "captions.txt").write_text("a three moves up\na\nan eight moves up and to the right\n")
    settings = dict(captions=captions, output=tmp_path / "records", steps=1, guidance=1)
    code, out, err = run(**settings, min_caption=2, max_caption=20)
    assert code == 0, err
    assert out[1] == f"records: {tmp_path / 'records'}: 1 clips; rejected: 2 caption"
    code, _, err = run(**settings, min_caption=2)
    assert code == 2 and "holds other records: source.max_caption is 20 there, 10000 here; choose" in err[0]


def test_a_teachers_clip_leads_back_to_its_row(run, tmp_path):
    """Ids are the table's, the other columns are kept, and seeds count rows, whichever of them are used."""
    rows = [("a", "a three moves up"), ("b", "a three " * 1000), ("a", "the digit six"), ("c", ""), ("d", "a one")]
    table, output = tmp_path / "captions.csv", tmp_path / "records"
    lines = [f"{id},{text},{id}.mp4,{i}" for i, (id, text) in enumerate(rows)]
    table.write_text("\n".join(["id,text,video,seed", *lines]) + "\n")
    code, out, err = run(captions=table, columns="caption=text,id=id", output=output, steps=1, guidance=1, seed=7)
    assert code == 0 and not err and out[1].endswith("2 clips; rejected: 2 caption, 1 duplicate")
    found = {id: record["about"] for id, record in contents(output).items()}
    assert {id: (about["seed"], about["row"]) for id, about in found.items()} == {
        "a": (7, {"video": "a.mp4", "seed": "0"}),
        "d": (11, {"video": "d.mp4", "seed": "4"}),
    }
    rejects = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert [(each["id"], each["kind"], each["reason"]) for each in rejects] == [
        ("b", "caption", "has 2001 tokens; the text encoder reads at most 16"),
        ("a", "duplicate", "an earlier row has the same 'id', 'a'"),
        ("c", "caption", "no caption"),
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_captions_of_a_table(name, tmp_path):
    rows = [{"text": f"caption {i}", "n": i % 4, "score": 0.5} for i in range(6)]
    table = write(tmp_path / name, rows)
    plain, named = Captions(table, "text", unit=4), Captions(table, "text", "n", unit=4)
    assert plain.identity != named.identity and (plain.rows, plain.units) == (named.rows, named.units) == (6, 2)
    assert [item.id for unit in (0, 1) for item in plain.read(unit)] == [f"row {i + 1}" for i in range(6)]
    first, *_ = plain.read(0)
    assert {key: float(value) for key, value in first.about.items()} == {"n": 0, "score": 0.5}
    one, two = named.read(1)
    assert (one.id, one.kind, two.id, two.kind) == ("0", "duplicate", "1", "duplicate")
    last = list(named.read(0))[-1]
    assert (last.id, last.number, last.caption) == ("3", 3, "caption 3") and set(last.about) == {"score"}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, put in, or doubled."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 20))
        piece = rng.choice([b"", b"\0", b"\xff\xfe", b'"', b"\r", b"\n\n", "\u202e\u4e09".encode(), data[at:end] * 2])
        data = data[:at] + piece + data[end if rng.random() < 0.7 else at :]
    return data


CAPTIONS = {
    ".txt": b"a three moves up\nthe digit seven\na one\n",
    ".csv": b'caption,other\n"a three, moves up",1\nthe digit seven,2\n"a\none",3\n',
    ".jsonl": b'{"caption": "a three moves up"}\n{"caption": "the digit seven"}\n{"caption": "\\u4e09"}\n',
}


@pytest.mark.parametrize("suffix", CAPTIONS)
def test_any_file_of_captions_is_read_or_refused_in_one_line(suffix, tmp_path):
    file, read = tmp_path / f"captions{suffix}", 0
    for number in range(100):
        file.write_bytes(mutated(CAPTIONS[suffix], random.Random(number)))
        try:
            captions = Captions(file, unit=2)
            found = [item for unit in range(captions.units) for item in captions.read(unit)]
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error), error
            continue
        read += 1
        assert len(found) == captions.rows and len({item.id for item in found}) == captions.rows
        for number, item in enumerate(found):
            if isinstance(item, Prompt):
                assert item.number == number and item.caption == item.caption.strip() != ""
                item.caption.encode()
            else:
                assert isinstance(item, Reject) and item.kind in ("row", "caption") and "\n" not in item.reason
    assert read > 15, "some can be read"


def test_mutated_captions_through_the_whole_command(run, tmp_path):
    ended = []
    for number in range(6):
        suffix = list(CAPTIONS)[number % 3]
        file = tmp_path / f"captions{number}{suffix}"
        file.write_bytes(mutated(CAPTIONS[suffix], random.Random(number)))
        code, _, err = run(captions=file, output=tmp_path / f"out{number}", steps=1, guidance=1)
        assert (code, len(err)) in ((0, 0), (2, 1)), err
        ended.append(code)
        if not code:
            assert contents(tmp_path / f"out{number}")
    assert 0 in ended
