"""The script of the style in docs/methods/low_rank.md: its clips are as described, and are read back as such."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest

from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.frame_statistics import measure
from vpae_jax.tasks.digits.clips import MovingDigits

SCRIPT = Path(__file__).parents[2] / "docs" / "style" / "thick_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("thick_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ink_is_the_share_of_bright_pixels(script):
    video = np.zeros((2, 4, 4, 3), np.uint8)
    video[0, :2], video[1, 0, 0] = 128, 127
    assert script.ink(video) == 0.25


def test_strokes_become_a_pixel_wider_on_every_side_and_nothing_else(script):
    video = np.zeros((2, 9, 9, 3), np.uint8)
    video[1, 4, 4] = (200, 0, 0)
    expected = np.zeros_like(video)
    expected[1, 3:6, 3:6] = (200, 0, 0)
    np.testing.assert_array_equal(script.thick(video), expected)


def test_clips_lie_beside_their_captions_and_keep_their_ink(script, tmp_path, capsys):
    script.write(tmp_path, 3)
    assert "3 clips with" in capsys.readouterr().out
    clips = MovingDigits("train", 3)
    assert len(list(tmp_path.iterdir())) == 6
    for clip in (clips[i] for i in range(3)):
        assert (tmp_path / f"{clip['id']}.txt").read_text() == clip["caption"]
        with av.open(str(tmp_path / f"{clip['id']}.mp4")) as file:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        assert frames.shape == clip["video"].shape
        assert script.ink(frames) == pytest.approx(script.ink(script.thick(clip["video"])), rel=0.1)
        assert script.ink(frames) > 1.4 * script.ink(clip["video"])
        assert Filters(max_black=1.0).clip(measure(frames)) is None
