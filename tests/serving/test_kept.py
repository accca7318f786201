"""What is kept for the pages, and what leaves."""

import numpy as np
import pytest

from vpae_jax.media import read_video
from vpae_jax.serving import stores
from vpae_jax.serving.stores import Clips, Store
from vpae_jax.types import UserError


def test_the_oldest_leave():
    left = []
    store = Store(2, 10, left.append)
    names = [store.add(item, 1) for item in "abc"]
    assert [store.get(name) for name in names] == [None, "b", "c"] and left == ["a"]
    heavy = store.add("d", 10)
    assert store.get(heavy) == "d" and left == ["a", "b", "c"]
    heavier = store.add("e", 100)  # alone over the bound, but the newest
    assert (store.get(heavy), store.get(heavier)) == (None, "e")
    assert len({*names, heavy, heavier}) == 5


def test_clips_are_files_while_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MAX_CLIPS", 1)
    clips = Clips(tmp_path)
    frames = np.full((5, 32, 48, 3), 99, np.uint8)
    first = clips.keep(frames, 8.0)
    assert read_video(clips.file(first)).shape == frames.shape
    second = clips.keep(frames, 8.0)
    assert clips.file(first) is None and [*tmp_path.iterdir()] == [clips.file(second)]
    assert clips.file("../secret") is None
    with pytest.raises(UserError, match="even height"):
        clips.keep(frames[:, :31], 8.0)
