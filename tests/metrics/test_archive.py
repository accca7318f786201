"""Clips on disk with what was measured of them: whole or not at all, and by what measures now."""

import numpy as np
import pytest

from vpae_jax.metrics.archive import Archive, Shelf, file_name

LATENTS = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
FRAMES = np.full((3, 16, 16, 3), 90, np.uint8)


@pytest.fixture
def archive(tmp_path):
    made = Archive(tmp_path / "row", "this")
    made.keep_latents(3, LATENTS, {"network": 2.0})
    made.keep_video(3, FRAMES, 8.0)
    made.keep(3, {"speed": np.array(7.0), "clip": FRAMES}, {"write": 0.5})
    return made


def test_what_was_kept_is_there(archive):
    np.testing.assert_array_equal(archive.latents(3), LATENTS)
    assert archive.measures(3).keys() == {"speed", "clip"} and archive.measures(3)["speed"] == 7
    assert archive.costs(3) == {"network": 2.0, "write": 0.5}
    assert archive.video(3).is_file()
    assert archive.without_latents(range(5)) == archive.without_measures(range(5)) == [0, 1, 2, 4]
    assert archive.latents(0) is None and archive.measures(0) is None and archive.costs(0) == {}
    assert not [path for path in archive.folder.iterdir() if path.name.startswith(".")]


def test_measures_have_a_row_for_each_clip(archive):
    archive.keep(4, {"speed": np.array(9.0), "clip": FRAMES})
    found = archive.all_measures([4, 3])
    assert found["speed"].tolist() == [9, 7] and found["clip"].shape == (2, *FRAMES.shape)
    archive.keep(5, {})  # its latents are not finite
    assert archive.without_measures([5]) == [] and archive.all_measures([3, 5]) is None


def test_measures_by_something_else_are_as_good_as_absent(archive):
    other = Archive(archive.folder, "another version")
    assert other.without_measures([3]) == [3] and other.without_latents([3]) == []


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and nothing else", "flipped"])
def test_damaged_files_are_put_aside(archive, damage):
    for name in ("00003.latents.npz", "00003.measures.npz"):
        path = archive.folder / name
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 255
        path.write_bytes(data if damage == "flipped" else damage)
    assert archive.latents(3) is None and archive.measures(3) is None
    assert archive.without_latents([3]) == archive.without_measures([3]) == [3]
    assert {path.name for path in archive.folder.glob("damaged-*")} == {
        "damaged-00003.latents.npz",
        "damaged-00003.measures.npz",
    }


def test_an_archive_is_of_what_its_clips_are_made_from(tmp_path):
    shelf = Shelf(tmp_path, "this")
    one = shelf.archive("teacher, one step", {"steps": 1, "guidance": 1.0})
    assert one.folder.name.startswith("teacher_one_step-") and one.by == "this"
    assert one.folder == shelf.archive("teacher, one step", {"guidance": 1.0, "steps": 1}).folder
    assert one.folder != shelf.archive("teacher, one step", {"steps": 2, "guidance": 1.0}).folder
    one.keep(0, {"speed": np.array(1.0)})
    assert shelf.archive("another name", {"steps": 1, "guidance": 1.0}).folder == one.folder
    assert file_name("a/b: c") == "a_b_c"
