"""Encoding clips: records are what the encoders give, whatever the batches, devices and processes."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoding_runs import files
from pipelines import make_pipeline
from record_files import FACTS, NULL, arrays_of

from vpae_jax.data.batches import latent_batches, to_float
from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding import encoder
from vpae_jax.encoding.clip_source import Clip, InUnits, Reject, in_turn
from vpae_jax.encoding.encoder import Encoded, describe, encode, encode_into, fingerprint, write_units
from vpae_jax.encoding.identity import differences
from vpae_jax.encoding.units import Units
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.words import build_tokenizer
from vpae_jax.types import UserError
from vpae_jax.weights.image_processor import ImageProcessor
from vpae_jax.weights.settings import Defaults

COUNT, BATCH = 10, 4
BFLOAT16 = 2**-8  # relative precision


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return make_pipeline(tokenizer)


@pytest.fixture(scope="module")
def clips():
    return MovingDigits("train", size=COUNT, frames=5, resolution=16)


@pytest.fixture(scope="module")
def folder(pipeline, clips, tmp_path_factory):
    return encode_into(tmp_path_factory.mktemp("records"), InUnits(clips, 6), pipeline, BATCH)


class Mixed:
    """A source of clips of two sizes, and of what is refused, in two units."""

    units = 2

    def __init__(self, end: int | None = None):
        self.end = end

    @property
    def identity(self):
        return {"kind": "mixed"}

    def expected(self, unit):
        return 7

    def read(self, units):
        return in_turn(self._read, units)

    def _read(self, unit):
        for number in range(7 * unit, 7 * (unit + 1)):
            if number == self.end:
                raise OSError("disk gone")
            if number % 7 == 3:
                yield Reject(f"clip {number}", "static", "does not move", np.zeros((4, 4, 3), np.uint8))
                continue
            side = 32 if number % 3 == 0 else 16
            video = np.random.default_rng(number).integers(0, 256, (5, 16, side, 3), np.uint8)
            caption = "far too many words for so small a text encoder to read" if number == 8 else "a three"
            yield Clip(f"clip {number}", video, caption, {"number": number, "motion": 3.0})


def contents(folder):
    records = LatentRecords(folder)
    return {records.about(i)["id"]: records[i] for i in range(len(records))}


def test_records_hold_what_the_encoders_give(folder, pipeline, clips):
    records = LatentRecords(folder)
    records.verify()
    assert len(records) == COUNT
    assert len(records.index["shards"]) == 2
    for index in (0, 5, 6, 9):
        clip, record = clips[index], records[index]
        video = jnp.asarray(to_float(clip["video"][None]))
        condition = pipeline.condition([clip["caption"]], clip["video"][None, 0], 5, 16, 16)
        close = {"latents": pipeline.vae.encode(video), "image": condition.image, "frames": condition.frames}
        for name, expected in {**close, "text": condition.text}.items():
            np.testing.assert_allclose(record[name], expected[0], rtol=BFLOAT16, atol=1e-5, err_msg=name)
        assert np.array_equal(record["text_mask"], condition.text_mask[0])
        assert not record["text"][~record["text_mask"]].any()
        assert records.about(index) == {name: clip[name] for name in ("caption", "digit", "direction", "id")}
    null, mask = pipeline.encode_prompt([pipeline.defaults.negative_prompt])
    np.testing.assert_allclose(records.null_text, null[0], rtol=BFLOAT16, atol=1e-5)
    assert np.array_equal(records.null_mask, mask[0])


def test_the_negative_prompt_is_the_models_own(pipeline, clips, tmp_path):
    worse = dataclasses.replace(
        pipeline, defaults=Defaults(num_frames=5, height=16, width=16, negative_prompt="a blur")
    )
    folder = encode_into(tmp_path, InUnits(clips, 6), worse, BATCH)
    null, _ = pipeline.encode_prompt(["a blur"])
    np.testing.assert_allclose(LatentRecords(folder).null_text, null[0], rtol=BFLOAT16, atol=1e-5)
    assert fingerprint(worse) != fingerprint(pipeline)


def test_text_to_video_records_have_no_image(tokenizer, clips, tmp_path):
    folder = encode_into(tmp_path, InUnits(clips), make_pipeline(tokenizer, image=False), BATCH)
    batch = next(latent_batches([(LatentRecords(folder), 1.0)], 2, seed=0))
    assert batch.condition.image is None
    assert batch.condition.frames is None


def test_batches_devices_and_processes_change_no_record(pipeline, tmp_path):
    """Of clips of two sizes, with rejects among them."""
    expected = None
    for name, batch, processes, devices in (("a", 1, 1, 1), ("b", 3, 2, 1), ("c", 2, 1, 3)):
        folder, source = tmp_path / name, Mixed()
        units = Units(folder, describe(source, pipeline), source.units)
        done = [encode(source, pipeline, units, batch, i, processes, jax.devices()[:devices]) for i in range(processes)]
        assert done == [False] * (processes - 1) + [True]
        found = contents(folder)
        assert set(found) == {f"clip {number}" for number in range(14) if number not in (3, 8, 10)}
        assert units.read(0).rejects[0].reason == "does not move"
        assert LatentRecords(folder).index["rejects"] == {"caption": 1, "static": 2}
        expected = expected or found
        for id, record in found.items():
            for key, value in record.items():
                np.testing.assert_allclose(
                    np.float32(value),
                    np.float32(expected[id][key]),
                    rtol=2 * BFLOAT16,
                    atol=1e-3,
                    err_msg=f"{id} {key}",
                )


def test_an_encoding_that_was_broken_off_goes_on_with_the_unit_it_broke_off_in(pipeline, tmp_path):
    source = Mixed(end=9)
    units = Units(tmp_path / "records", describe(source, pipeline), source.units)
    with pytest.raises(OSError, match="disk gone"):
        encode(source, pipeline, units, BATCH)
    assert units.pending() == [1]
    before = {path: path.stat().st_mtime_ns for path in units.folder.rglob("*") if path.is_file()}
    whole = Units(tmp_path / "records", describe(Mixed(), pipeline), 2)
    assert encode(Mixed(), pipeline, whole, BATCH)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(contents(tmp_path / "records")) == 11


def made_by(run, items, folder, size=4, batch=1, threads=1):
    """Writes units of `size` items each with `run` in place of encoders."""
    count = -(-len(items) // size)
    units = Units(folder, {"clips": "some"}, count)
    read = in_turn(lambda unit: items[unit * size : (unit + 1) * size], range(count))
    write_units(units, range(count), read, [run] * threads, batch, size=lambda _: 0, expected=lambda _: size)
    return units


def drawn(ids, spoilt=()):
    """Clips as if they were encoded; the latents of some are not finite."""
    video = np.zeros((1, 16, 16, 3), np.uint8)
    made = []
    for id in ids:
        arrays = arrays_of(id)
        arrays["latents"][0, 0, 0, 0] = np.nan if id in spoilt else id
        made.append(Encoded(str(id), arrays, {"caption": "a three"}, video))
    return made


def test_a_clip_that_is_not_finite_is_a_reject_and_the_others_go_on(tmp_path):
    units = made_by(lambda ids: drawn(ids, {1, 4, 8}), list(range(9)), tmp_path / "records", batch=3)
    assert units.finish(NULL, FACTS)
    records = LatentRecords(units.folder)
    assert [records.about(i)["id"] for i in range(len(records))] == ["0", "2", "3", "5", "6", "7"]
    assert records.index["rejects"] == {"not finite": 3}
    (reject,) = units.read(2).rejects
    assert (reject.id, reject.kind) == ("8", "not finite")
    assert reject.reason.startswith("clip '8': its latents are not finite in bfloat16")


def test_encoders_that_give_nothing_finite_stop_it_in_one_line(tmp_path):
    """Were all clips rejects, the folder would be done, and empty."""
    for size, done in ((6, 1), (1, 9)):  # units of one clip tell it after a few of them
        folder = tmp_path / f"records{size}"
        with pytest.raises(
            UserError, match=r"none of the last . clips is finite: clip '.*': its latents are not finite"
        ):
            made_by(lambda ids: drawn(ids, range(6, 1000)), list(range(1000)), folder, size)
        assert len(list((folder / "units").iterdir())) == done
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_next_unit_is_read_while_the_last_batches_of_one_are_encoded(tmp_path):
    """Its contents do not depend on that, and it is written as soon as it is done."""
    folder, read, begun = tmp_path / "records", threading.Event(), time.monotonic()
    first = (folder / "units" / "00000.json").is_file

    def items(unit):
        if unit == 1:
            assert not first(), "the encoder waits for this"
            read.set()
            yield 4
            while not first() and time.monotonic() < begun + 600:
                time.sleep(0.01)
                yield Reject("row", "static", "still")
            assert first(), "a unit is written before the next one is read to its end"
            yield 5
        else:
            yield from (0, 1, 2, 3)

    def run(ids):
        if ids[-1] == 3:
            assert read.wait(600), "no clip of the next unit is read"
        return drawn(ids)

    units = Units(folder, {"clips": "some"}, 2)
    write_units(units, [0, 1], in_turn(items, [0, 1]), [run], 3, size=lambda _: 0, expected=lambda _: 4)
    assert units.finish(NULL, FACTS)
    records = LatentRecords(folder)
    assert [records.about(i)["id"] for i in range(len(records))] == list("012345")


def test_a_unit_is_the_same_whatever_comes_before_it(tmp_path):
    """Batches hold clips of one unit, and the order of rejects does not depend on how fast encoders are."""
    items = [Reject(str(i), "static", "still") if i % 5 == 2 else i for i in range(24)]

    def slow(ids):
        time.sleep(0.02 * (ids[0] % 3))
        return drawn(ids, {1, 9, 17})

    quick = made_by(lambda ids: drawn(ids, {1, 9, 17}), items, tmp_path / "quick", size=8, batch=3)
    late = Units(tmp_path / "late", {"clips": "some"}, 3)
    for pending in ([1], [0, 2]):  # as if other processes had done the others
        read = in_turn(lambda unit: items[unit * 8 : (unit + 1) * 8], pending)
        write_units(late, pending, read, [slow, slow], 3, size=lambda _: 0, expected=lambda _: None)
    for units in (quick, late):
        assert units.finish(NULL, FACTS)
    assert files(quick.folder) == files(late.folder)


def test_what_waits_does_not_grow_with_the_rejects(tmp_path):
    """While a batch takes its time, no more than the next unit is read."""
    begun = []

    def items(unit):
        begun.append(unit)
        yield from [unit] if unit == 0 else [Reject(str(unit), "static", "still")]

    def run(ids):
        time.sleep(0.5)
        assert max(begun) <= 2, "the unit after the next waits to be read"
        return drawn(ids)

    units = Units(tmp_path / "records", {"clips": "some"}, 50)
    write_units(units, range(50), in_turn(items, range(50)), [run], 1, size=lambda _: 0, expected=lambda _: 1)
    assert units.finish(NULL, FACTS) and begun == list(range(50))


def test_a_source_that_ends_within_a_unit_ends_no_unit(tmp_path):
    units = Units(tmp_path / "records", {"clips": "some"}, 2)
    with pytest.raises(ValueError, match="unit 1 has no end"):
        write_units(units, [0, 1], [0, None, 1], [drawn], 1, size=lambda _: 0, expected=lambda _: 1)
    assert units.pending() == [1]


def test_a_failure_does_not_wait_for_what_is_queued(tmp_path, monkeypatch):
    """Of a teacher each batch may take minutes."""
    calls, ending = [], threading.Event()

    class Watched(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ending.set()
            super().shutdown(wait)

    monkeypatch.setattr(encoder, "ThreadPoolExecutor", Watched)

    def run(ids):
        calls.append(ids)
        if len(calls) == 1:
            raise UserError("the teacher is gone")
        assert ending.wait(600), "what is queued is run"
        return drawn(ids)

    with pytest.raises(UserError, match="the teacher is gone"):
        made_by(run, list(range(20)), tmp_path / "records", size=20)
    assert len(calls) <= 2, "what has begun is waited for, and nothing else"
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["identity.json"]


def test_another_precision_has_a_folder_of_its_own(pipeline, clips, tmp_path):
    """A run that was killed must not go on in another one."""
    rounded = make_pipeline(pipeline.tokenizer)
    for leaf in jax.tree.leaves(rounded.text_encoder, is_leaf=lambda x: hasattr(x, "set_value")):
        leaf.set_value(leaf[...].astype(jnp.bfloat16))
    one, two = describe(InUnits(clips), pipeline), describe(InUnits(clips), rounded)
    assert list(differences(one, two)) == ["dtype is 'float32' there, 'bfloat16' here"]


def test_what_is_encoded_already_is_kept(folder, pipeline, clips):
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert encode_into(folder.parent, InUnits(clips, 6), pipeline, BATCH) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_process_waits_for_the_share_of_the_other(pipeline, clips, tmp_path, monkeypatch):
    source, at = InUnits(clips, 6), []

    def the_other_comes(place):
        at.append(place)
        (folder,) = tmp_path.iterdir()
        units = Units(folder, describe(source, pipeline), source.units)
        assert not units.complete() and units.pending(1, 2) == []
        encode(source, pipeline, units, BATCH, 0, 2)

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(encoder, "wait_for_all", the_other_comes)
    assert len(LatentRecords(encode_into(tmp_path, source, pipeline, BATCH))) == COUNT and at == ["encoded"]


def test_other_clips_or_encoders_have_a_folder_of_their_own(pipeline, clips, tokenizer, tmp_path):
    other = MovingDigits("train", size=COUNT, seed=1, frames=5, resolution=16)
    sources = ((clips, pipeline), (other, pipeline), (clips, make_pipeline(tokenizer, seed=1)))
    folders = {encode_into(tmp_path, InUnits(source), encoders, BATCH) for source, encoders in sources}
    assert folders == set(tmp_path.iterdir()) and len(folders) == 3
    one, *_ = folders
    with pytest.raises(UserError, match=r"holds other records: the model has different encoders; choose"):
        Units(one, {**LatentRecords(one).index["identity"], "encoders": "others"}, 1)


def test_fingerprint_sees_every_part_and_no_precision(pipeline, tokenizer):
    prints = {fingerprint(pipeline)}
    assert fingerprint(make_pipeline(tokenizer)) in prints, "the same weights, the same print"
    other = make_pipeline(tokenizer, seed=1)
    for part in ("vae", "text_encoder", "image_encoder"):
        prints.add(fingerprint(dataclasses.replace(pipeline, **{part: getattr(other, part)})))
    prints.add(fingerprint(dataclasses.replace(pipeline, image_processor=ImageProcessor(18, (16, 16)))))
    assert len(prints) == 5
    assert fingerprint(dataclasses.replace(pipeline, transformer=other.transformer)) in prints, "not the transformer"
    rounded = make_pipeline(tokenizer)
    for leaf in jax.tree.leaves(rounded.text_encoder, is_leaf=lambda x: hasattr(x, "set_value")):
        leaf.set_value(leaf[...].astype(jnp.bfloat16))
    assert fingerprint(rounded) in prints
