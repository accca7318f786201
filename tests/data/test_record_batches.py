"""Batches of latent records: the same whoever reads them, from any position; damage is replaced, or stops the run."""

import json
import random
import tracemalloc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from record_files import SMALL, WIDE, arrays_of, number_of, write_folder

from vpae_jax.config import DataConfig
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.records import BadRecord, LatentRecords
from vpae_jax.types import Batch, UserError

SIZE = 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two folders: 11 clips of two shapes; 5 clips of one."""
    root = tmp_path_factory.mktemp("sources")
    mixed = [(n, WIDE if n % 4 == 0 else SMALL) for n in range(11)]
    real = write_folder(root / "real", [mixed[:4], mixed[4:]])
    made = write_folder(root / "made", [[(n, SMALL) for n in range(100, 105)]])
    return [(LatentRecords(real), 3.0), (LatentRecords(made), 1.0)]


@pytest.fixture(autouse=True)
def programs_parse_their_flags():
    """Which grain asks for before it starts processes."""
    flags.FLAGS.mark_as_parsed()


def numbers(batch: Batch) -> list[int]:
    return [number_of(latents) for latents in batch.latents]


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_a_batch_holds_records_of_one_shape(sources):
    shapes = Counter()
    for batch in take(latent_batches(sources, SIZE, seed=0), 40):
        shapes[batch.latents.shape[1:]] += 1
        for row, number in enumerate(numbers(batch)):
            given = arrays_of(number, batch.latents.shape[1:])
            found = {"latents": batch.latents} | {f: getattr(batch.condition, f) for f in ("text", "image", "frames")}
            for name, value in found.items():
                assert value.dtype == jnp.bfloat16
                np.testing.assert_allclose(np.float32(value[row]), given[name], rtol=4e-3, err_msg=name)
            assert np.array_equal(batch.condition.text_mask[row], given["text_mask"])
    # 3 of 11 clips of a source with 3/4 of the weight are wide.
    assert shapes[WIDE] == pytest.approx(40 * 0.75 * 3 / 11, abs=1)
    assert shapes[SMALL] + shapes[WIDE] == 40


def test_weights_decide_where_clips_come_from(sources):
    seen = Counter(n >= 100 for batch in take(latent_batches(sources, SIZE, seed=0), 100) for n in numbers(batch))
    assert seen[True] == pytest.approx(100, abs=3)
    by_size = [(records, float(len(records))) for records, _ in sources]
    seen = Counter(n for batch in take(latent_batches(by_size, SIZE, seed=0), 160) for n in numbers(batch))
    assert set(seen.values()) <= set(range(38, 43)) and sum(seen.values()) == 640 and len(seen) == 16


def test_each_process_reads_its_own_rows_of_the_same_batches(sources, monkeypatch):
    whole = take(latent_batches(sources, SIZE, seed=1), 12)
    read = []
    real = LatentRecords.__getitem__
    monkeypatch.setattr(LatentRecords, "__getitem__", lambda self, i: read.append(i) or real(self, i))
    for rows in ([0, 1], [2, 3], [0, 2], [3]):
        read.clear()
        part = latent_batches(sources, SIZE, seed=1, rows=rows)
        for batch in whole:
            own = jax.tree.map(lambda x: x[np.array(rows)], (batch.latents, batch.condition))  # noqa: B023
            found = next(part)
            assert equal(own, (found.latents, found.condition))
        part.close()
        # With what is prepared ahead. Were all rows read, there would be 4 a batch.
        assert len(read) <= (12 + 9) * len(rows) < 4 * 12, "other processes' rows are read"


def test_a_position_holds_for_any_rows_and_workers(sources):
    whole = take(latent_batches(sources, SIZE, seed=2), 14)
    for stop in range(10):
        batches = latent_batches(sources, SIZE, seed=2, rows=[1])
        take(batches, stop)
        position = json.loads(json.dumps(batches.get_state()))
        assert position["batches"] == stop and position["data"].startswith("batches of 4 from 11 of 11 clips of ")
        other = latent_batches(sources, SIZE, seed=2)
        next(other)
        other.set_state(position)
        assert all(equal(a, b) for a, b in zip(whole[stop : stop + 4], take(other, 4), strict=True))
    with pytest.raises(UserError, match="which another version wrote"):
        other.set_state({"next_index": 3})


def test_a_position_in_other_data_is_refused(sources):
    (real, _), (made, _) = sources
    position = latent_batches(sources, SIZE, seed=2).get_state()
    moved = [(LatentRecords(real.folder.parent / "." / "real"), 3.0), (made, 1.0)]
    latent_batches(moved, SIZE, seed=2).set_state(position)
    for others, seed in (([(real, 3.0)], 2), ([(real, 2.0), (made, 1.0)], 2), (sources, 3)):
        with pytest.raises(
            UserError, match=r"was trained on batches of 4 from .*, but the data is now batches of 4 from"
        ):
            latent_batches(others, SIZE, seed=seed).set_state(position)


def test_workers_give_the_same_batches_and_report_what_is_bad(sources, tmp_path, capfd):
    whole = take(latent_batches(sources, SIZE, seed=2), 8)
    batches = latent_batches(sources, SIZE, seed=2, workers=2)
    assert all(equal(a, b) for a, b in zip(whole[:5], take(batches, 5), strict=True))
    batches.set_state({**batches.get_state(), "batches": 3})
    assert all(equal(a, b) for a, b in zip(whole[3:6], take(batches, 3), strict=True))
    batches.close()
    folder = damaged(tmp_path / "folder", 8, (2,))
    here = take(latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=2, max_bad=0.5), 4)
    alone = capfd.readouterr().err
    batches = latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=2, workers=1, max_bad=0.5)
    assert all(equal(a, b) for a, b in zip(here, take(batches, 4), strict=True))
    batches.close()
    assert "record 2: " in alone and capfd.readouterr().err.splitlines()[:1] == alone.splitlines()[:1]


def damaged(folder, count, bad):
    """A folder of `count` clips in one shard, of which some are damaged."""
    write_folder(folder, [[(n, SMALL) for n in range(count)]])
    (path,) = (folder / "shards").iterdir()
    raw = bytearray(path.read_bytes())
    for number in bad:
        caption = f"number {number}".encode() + b'\\"'
        assert raw.count(caption) == 1
        raw[raw.index(caption)] ^= 1
    path.write_bytes(raw)
    return folder


def test_a_bad_record_is_replaced_and_named_once(tmp_path, capfd):
    folder = damaged(tmp_path / "folder", 50, (7, 30))
    sources = [(LatentRecords(folder), 1.0)]
    whole = take(latent_batches(sources, SIZE, seed=0, max_bad=0.1), 100)
    seen = Counter(n for batch in whole for n in numbers(batch))
    assert set(seen) == set(range(50)) - {7, 30}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("bad record: ") for line in lines), lines
    assert {int(line.split(", record ")[1].split(":")[0]) for line in lines} == {7, 30}
    for rows in ([0, 1], [2, 3]):
        part = take(latent_batches(sources, SIZE, seed=0, rows=rows, max_bad=0.1), 100)
        assert all(equal(a.latents[np.array(rows)], b.latents) for a, b in zip(whole, part, strict=True))
    later = latent_batches(sources, SIZE, seed=0, max_bad=0.1)
    later.set_state({**later.get_state(), "batches": 50})
    assert all(equal(a, b) for a, b in zip(whole[50:], take(later, 50), strict=True))


def test_too_many_bad_records_stop_the_run(tmp_path):
    folder = damaged(tmp_path / "folder", 20, (3, 4))
    batches = latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=0, max_bad=0.01)
    handed = 0
    with pytest.raises(UserError, match=r"^\d+ of 2\d\d records were bad, more than config.data.max_bad = 0.01 allows"):
        for _ in range(1000):
            next(batches)
            handed += 1
    assert 40 <= handed <= 50, "after 200 records"
    take(latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=0, max_bad=0.2), 100)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_bad_records_ends_at_once(workers, tmp_path):
    folder = damaged(tmp_path / "folder", 6, range(6))
    batches = latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=0, workers=workers, max_bad=0.9)
    with pytest.raises(UserError, match=r"200 records in a row were bad, the last one: .*its checksum is"):
        next(batches)
    batches.close()


def test_a_lost_folder_among_good_ones_ends_the_run(sources, tmp_path):
    lost = LatentRecords(write_folder(tmp_path / "lost", [[(n, SMALL) for n in range(6)]]))
    (lost.folder / "shards").rename(tmp_path / "elsewhere")
    batches = latent_batches([(sources[1][0], 1.0), (lost, 1.0)], SIZE, seed=0, max_bad=0.9)
    with pytest.raises(UserError, match=r"200 records in a row were bad, the last one: .*lost.*No such file"):
        next(batches)
    batches.close()


def test_damaged_shards_give_good_clips_or_one_line(tmp_path):
    folder = write_folder(tmp_path / "folder", [[(n, SMALL) for n in range(6)]])
    (path,) = (folder / "shards").iterdir()
    whole = path.read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]
    rng, stopped = random.Random(1), 0
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.choice(used)] ^= rng.randrange(1, 256)
        path.write_bytes(raw)
        batches = latent_batches([(LatentRecords(folder), 1.0)], SIZE, seed=0, max_bad=0.9)
        try:
            for batch in take(batches, 3):
                for row, number in enumerate(numbers(batch)):
                    np.testing.assert_allclose(np.float32(batch.latents[row]), arrays_of(number)["latents"], rtol=4e-3)
        except UserError:
            stopped += 1
        batches.close()
    assert 0 < stopped < 50


def test_sources_that_do_not_fit_together_are_named(sources):
    real = sources[0][0]
    with pytest.raises(UserError, match=r"weight 0\.0, expected more than 0"):
        latent_batches([(real, 0.0)], SIZE, seed=0)
    with pytest.raises(UserError, match=r"config\.batch_size is 12, but there are 11 clips"):
        latent_batches([(real, 1.0)], 12, seed=0)
    other = LatentRecords(sources[1][0].folder)
    other.null_text = other.null_text + np.float32(1).astype(other.null_text.dtype)
    with pytest.raises(UserError, match="have different text encoders"):
        latent_batches([(real, 1.0), (other, 1.0)], SIZE, seed=0)
    for field, change, reason in (
        ("shapes", {"latents": [2, 4, 6, 8], "frames": [2, 4, 6, 16], "image": [5, 3], "text": [8]}, "latents is"),
        ("shapes", {"latents": [2, 4, 6, 16], "text": [8]}, "frames is None and"),
    ):
        other = LatentRecords(sources[1][0].folder)
        other.index["shards"][0][field] = change
        with pytest.raises(UserError, match=f"do not fit together: {reason}"):
            latent_batches([(real, 1.0), (other, 1.0)], SIZE, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_may_have_the_seeds_of_their_noise(tmp_path, workers):
    """Each clip its own, of any 32 bits."""
    first = 2**32 - 20
    made = write_folder(tmp_path / "made", [[(n, SMALL) for n in range(20)]], seed=first)
    batches = latent_batches([(LatentRecords(made), 1.0)], SIZE, 0, workers, seeds=True)
    seen = take(batches, 5)
    batches.close()
    for batch in seen:
        assert batch.seed.dtype == np.uint32
        assert [int(seed) - first for seed in batch.seed] == numbers(batch)
    (batch,) = take(latent_batches([(LatentRecords(made), 1.0)], SIZE, 0), 1)
    assert batch.seed is None


def test_seeds_are_asked_of_a_teachers_clips_alone(sources, tmp_path):
    made = write_folder(tmp_path / "made", [[(n, SMALL) for n in range(8)]], seed=0)
    for chosen in (sources, [(LatentRecords(made), 1.0), sources[1]]):
        culprit = next(records.folder for records, _ in chosen if not records.from_teacher)
        with pytest.raises(UserError, match=f"^{culprit}: the noise of its clips is not known, .* --captions=...`$"):
            latent_batches(chosen, SIZE, 0, seeds=True)


@pytest.mark.parametrize("seed", [None, -1, 2**32, 1.5, "7", True])
def test_a_record_without_its_seed_is_bad(seed, tmp_path, monkeypatch):
    records = LatentRecords(write_folder(tmp_path / "made", [[(0, SMALL)]], seed=0))
    read = records._read

    def changed(index):
        shard, arrays, about = read(index)
        return shard, arrays, {**about, "seed": seed}

    monkeypatch.setattr(records, "_read", changed)
    with pytest.raises(BadRecord, match="record 0: its seed is"):
        records.with_seed(0)
    assert "seed" not in records[0]


def test_memory_stays_flat(sources):
    batches = latent_batches(sources, SIZE, seed=0)
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(4):
            take(batches, 40)
            tracemalloc.reset_peak()
            take(batches, 20)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert max(peaks[1:]) < 1.2 * peaks[0] + 100_000, peaks


def test_the_config_names_folders_and_weights():
    assert DataConfig().sources == ()
    assert DataConfig(records="a, b/c ").sources == (("a", None), ("b/c", None))
    assert DataConfig(records="a=2,../b=x=0.5").sources == (("a", 2.0), ("../b=x", 0.5))
    for bad in ("a=2,b", "a=", "=1", "a=0", "a=-1", "a=nan", "a,", "a=inf"):
        with pytest.raises(UserError, match="records"):
            DataConfig(records=bad)
    for bad in (-0.1, 1.0):
        with pytest.raises(UserError, match="max_bad"):
            DataConfig(max_bad=bad)
    with pytest.raises(UserError, match="records and videos are both given"):
        DataConfig(records="a", videos="b")
