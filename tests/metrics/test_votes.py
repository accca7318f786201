"""Pairs, votes, and what they add up to."""

import json

import numpy as np
import pytest

from vpae_jax.metrics.votes import Pair, Vote, add_vote, find_pairs, preferences, read_votes
from vpae_jax.types import UserError


@pytest.fixture
def rows(tmp_path):
    """Three rows; one lacks a clip, and one has a clip more."""
    clips = {"a": ["x", "y", "sub/z"], "b": ["x", "y", "sub/z", "w"], "c": ["x", "y"]}
    for name, stems in clips.items():
        for stem in stems:
            file = tmp_path / name / f"{stem}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
    return {name: tmp_path / name for name in clips}


def test_every_two_rows_are_compared_on_the_clips_that_both_have(rows):
    found = find_pairs(rows, "anna")
    compared = sorted((pair.clip, *sorted((pair.left, pair.right))) for pair in found)
    both = [("x", "y", "sub/z"), ("x", "y"), ("x", "y")]
    expected = [(c, *two) for clips, two in zip(both, (("a", "b"), ("a", "c"), ("b", "c")), strict=True) for c in clips]
    assert compared == sorted(expected)
    assert find_pairs(rows, "anna") == found != find_pairs(rows, "bert")


def test_sides_are_drawn(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(400):
            (tmp_path / name / f"{number}.mp4").touch()
    left = [pair.left for pair in find_pairs({name: tmp_path / name for name in ("a", "b")}, "anna")]
    assert 150 < left.count("a") < 250


def test_a_voters_last_word_on_a_pair_counts(tmp_path):
    file = tmp_path / "new" / "votes.jsonl"
    assert read_votes(file) == []
    votes = [
        Vote(Pair("x", "a", "b"), "left", "anna"),
        Vote(Pair("x", "b", "a"), "same", "anna"),
        Vote(Pair("x", "a", "b"), "right", "bert"),
    ]
    for vote in votes:
        add_vote(file, vote)
    assert read_votes(file) == votes[1:]
    assert json.loads(file.read_text().splitlines()[0])["choice"] == "left"


def test_preference_is_what_was_said(tmp_path):
    """Sides do not matter; the interval is that of draws of clips."""
    choices = ["a"] * 12 + ["b"] * 4 + ["same"] * 4
    votes = []
    for number, better in enumerate(choices):
        pair = Pair(str(number), *(("a", "b") if number % 2 else ("b", "a")))
        choice = "same" if better == "same" else "left" if pair.left == better else "right"
        votes.append(Vote(pair, choice, "anna"))
    (found,) = preferences(votes)
    assert (found.row, found.other) == ("a", "b") and (found.better, found.same, found.worse) == (12, 4, 4)
    assert found.value == pytest.approx(0.4) and found.clips == 20
    # The spread of a mean of 20 numbers whose own spread is .8.
    for end, sign in ((found.low, -1), (found.high, 1)):
        assert end == pytest.approx(0.4 + sign * 1.96 * 0.8 / np.sqrt(20), abs=0.06)
    (turned,) = preferences(votes, ("b", "a"))
    assert (turned.row, turned.value, turned.better) == ("b", pytest.approx(-0.4), 4)


def test_voters_of_one_clip_are_drawn_together():
    """Ten voters who agree on two clips are two clips, not twenty."""
    votes = [
        Vote(Pair(clip, "a", "b"), choice, str(i))
        for clip, choice in (("x", "left"), ("y", "right"))
        for i in range(10)
    ]
    (found,) = preferences(votes)
    assert (found.value, found.low, found.high, found.clips) == (0, -1, 1, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not a vote"),
        ("[]", "line 1 is not a vote"),
        ('{"clip": "x", "left": "a", "right": "b", "voter": "v"}', "line 1 is not a vote"),
        ('{"clip": "x", "left": "a", "right": "b", "voter": "v", "choice": "both"}', "choice 'both', expected left"),
        ('{"clip": "x", "left": "a", "right": "b", "voter": {}, "choice": "same"}', "line 1 is not a vote: clip, "),
        ("[" * 100_000, "line 1 is not a vote"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path, line, message):
    (tmp_path / "votes.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_votes(tmp_path / "votes.jsonl")


def test_a_file_that_holds_no_text_is_named(tmp_path):
    (file := tmp_path / "votes.jsonl").write_bytes(b"\xff\xfe")
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be read as votes: .*; name another file"):
            read_votes(path)


def test_rows_without_common_clips_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mp4").touch()
    with pytest.raises(UserError, match=r"have no \.mp4 file name in common"):
        find_pairs({name: tmp_path / name for name in ("a", "b")}, "")
    with pytest.raises(UserError, match="not a folder; give a folder of"):
        find_pairs({"a": tmp_path / "a", "c": tmp_path / "c"}, "")
