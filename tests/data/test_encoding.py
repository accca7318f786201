"""Encoding clips: records are what the encoders give, whatever the batches, devices and processes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import make_pipeline

from vpae_jax.convert.image_processor import ImageProcessor
from vpae_jax.convert.settings import Defaults
from vpae_jax.data.digits import MovingDigits
from vpae_jax.data.encoding import describe, encode, encode_into, fingerprint
from vpae_jax.data.pipeline import latent_batches, to_float
from vpae_jax.data.records import LatentRecords
from vpae_jax.data.source import Clip, InUnits, Reject, in_turn
from vpae_jax.data.tokenizer import build_tokenizer
from vpae_jax.data.units import Units
from vpae_jax.types import UserError

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


def test_what_is_encoded_already_is_kept(folder, pipeline, clips):
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert encode_into(folder.parent, InUnits(clips, 6), pipeline, BATCH) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_other_clips_or_encoders_have_a_folder_of_their_own(pipeline, clips, tokenizer, tmp_path):
    other = MovingDigits("train", size=COUNT, seed=1, frames=5, resolution=16)
    sources = ((clips, pipeline), (other, pipeline), (clips, make_pipeline(tokenizer, seed=1)))
    folders = {encode_into(tmp_path, InUnits(source), encoders, BATCH) for source, encoders in sources}
    assert folders == set(tmp_path.iterdir()) and len(folders) == 3
    one, *_ = folders
    with pytest.raises(UserError, match="holds other records: encoders is "):
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
