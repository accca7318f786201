"""Records of prompts alone: conditions without latents, whose index says the size of the clips that are to be made."""

import json

import numpy as np
import pytest
from absl import flags
from record_files import FACTS, NULL, SMALL, WIDE, arrays_of, write_folder

from vpae_jax.data.batches import latent_batches
from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding.units import Units
from vpae_jax.types import UserError


def write_prompts(folder, prompts, unit=0, pictures=True):
    """A finished folder of one unit of prompts, each a number and the size of its clip."""
    made = Units(folder, {"prompts": "numbers"}, 1)
    with made.write(unit) as writer:
        for number, size in prompts:
            arrays = arrays_of(number, size)
            del arrays["latents"]
            if not pictures:
                arrays |= {name: 0 * arrays[name] for name in ("frames", "image")}
            writer.add(f"prompt {number}", arrays, {"caption": f"number {number}"}, size)
    assert made.finish(NULL, FACTS)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 prompts for clips of two sizes."""
    prompts = [(number, WIDE if number % 3 == 0 else SMALL) for number in range(12)]
    return write_prompts(tmp_path_factory.mktemp("prompts") / "records", prompts)


def test_a_record_is_a_condition_and_a_size(folder):
    records = LatentRecords(folder)
    assert records.of_prompts and {shape: len(clips) for shape, clips in records.shapes.items()} == {SMALL: 8, WIDE: 4}
    records.verify()
    seen = set()
    for index in range(len(records)):
        item, number = records[index], int(records.about(index)["caption"].split()[1])
        size = WIDE if number % 3 == 0 else SMALL
        assert set(item) == {"text", "text_mask", "image", "frames", "size"} and tuple(item["size"]) == size
        given = arrays_of(number, size)
        for name in ("text", "image", "frames"):
            np.testing.assert_allclose(np.float32(item[name]), given[name], rtol=4e-3, err_msg=name)
        seen.add(number)
    assert seen == {*range(12)}
    index = json.loads((folder / "index.json").read_text())
    assert all("latents" not in shard["shapes"] for shard in index["shards"])
    assert sorted(shard["latent_size"] for shard in index["shards"]) == sorted([list(SMALL), list(WIDE)])


def test_without_a_picture_no_frame_is_given(tmp_path):
    records = LatentRecords(write_prompts(tmp_path / "text", [(1, SMALL)], pictures=False))
    assert not records[0]["frames"].any() and not records[0]["image"].any()
    assert records[0]["frames"].shape == (*SMALL[:-1], 4 + SMALL[-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_of_one_size_and_the_same_whoever_reads_them(folder, workers):
    flags.FLAGS.mark_as_parsed()  # which grain asks for before it starts processes
    source = [(LatentRecords(folder), 1.0)]
    whole = latent_batches(source, 4, seed=2, workers=workers)
    half = latent_batches(source, 4, seed=2, rows=[1, 3])
    sizes = set()
    for _ in range(6):
        batch, some = next(whole), next(half)
        assert batch.latents is None and batch.size == some.size and batch.shape == (4, *batch.size)
        assert batch.condition.frames.shape[:-1] == batch.shape[:-1]
        np.testing.assert_array_equal(batch.condition.text[[1, 3]], some.condition.text)
        sizes.add(batch.size)
    assert sizes == {SMALL, WIDE}
    again = latent_batches(source, 4, seed=2)
    again.set_state(whole.get_state())
    one, two = next(whole), next(again)
    np.testing.assert_array_equal(one.condition.text, two.condition.text)
    assert one.size == two.size
    for batches in (whole, half, again):
        batches.close()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda shard: shard.update(latent_size=[3, 4, 4]), r"shards\[0\].latent_size is .*, expected four numbers"),
        (lambda shard: shard.update(latent_size=[3, 4, 0, 16]), "latent_size is .*, expected four numbers"),
        (lambda shard: shard.update(latent_size=[3, 4, 4, 8]), r"shards\[1\].shapes have .*'latent_size': \[16\]"),
        (lambda shard: shard["shapes"].update(latents=[3, 4, 4, 16]), "one number of text and no latents among them"),
        (lambda shard: shard.pop("latent_size"), "expected shapes by name, four numbers of latents and one of text"),
    ],
)
def test_an_index_that_does_not_fit_itself_is_refused(tmp_path, change, reason):
    folder = write_prompts(tmp_path / "records", [(0, WIDE), (1, SMALL)])
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"not an index of records .*{reason}"):
        LatentRecords(folder)


def test_prompts_and_clips_do_not_fit_together(folder, tmp_path):
    clips = write_folder(tmp_path / "clips", [[(number, SMALL) for number in range(4)]])
    assert not LatentRecords(clips).of_prompts
    with pytest.raises(UserError, match="do not fit together: latent"):
        latent_batches([(LatentRecords(folder), 1.0), (LatentRecords(clips), 1.0)], 4, seed=0)
