"""Human comparison: pairs of clips of one name from two folders, votes, and what these say.

A vote is a line of a JSONL file, {"clip", "left", "right", "choice", "voter"}: which rows were shown on which side, and
"left", "right" or "same". The preference for a row over another is

    (better - worse) / (better + same + worse)

from -1 to 1, as APT counts its users' votes (2501.08316), with a 95 % bootstrap interval over clips.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from vpae_jax.files import refused_writes
from vpae_jax.types import UserError

Choice = Literal["left", "right", "same"]
KEYS = ("clip", "left", "right", "choice", "voter")
SUFFIX = ".mp4"
DRAWS = 2000


@dataclass(frozen=True)
class Pair:
    """Two clips to be compared.

    Attributes:
      clip: their name, without its suffix.
      left, right: the rows that they are of.
    """

    clip: str
    left: str
    right: str


@dataclass(frozen=True)
class Vote:
    """What somebody said of a pair.

    Attributes:
      pair: what was compared.
      choice: the better one.
      voter: who said so.
    """

    pair: Pair
    choice: Choice
    voter: str


@dataclass(frozen=True)
class Preference:
    """What all votes on two rows say.

    Attributes:
      row, other: the rows.
      better, same, worse: votes for `row`, for neither, and for `other`.
      clips: how many were compared.
      value: preference for `row`, from -1 to 1.
      low, high: the interval.
    """

    row: str
    other: str
    better: int
    same: int
    worse: int
    clips: int
    value: float
    low: float
    high: float


def find_pairs(rows: Mapping[str, Path], seed: str) -> list[Pair]:
    """All pairs of rows of every clip that both have, in an order and on sides that the seed decides.

    Args:
      rows: folders of clips, by the row's name.
      seed: such as the voter's name, so that nobody sees the same order.

    Raises:
      UserError: no folder, or two rows without a common clip.
    """
    found = {}
    for name, folder in rows.items():
        if not folder.is_dir():
            raise UserError(f"{name}={folder}: is no folder of clips")
        found[name] = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob(f"*{SUFFIX}")}
    draw, pairs = random.Random(seed), []
    for one, other in combinations(rows, 2):
        common = sorted(found[one] & found[other])
        if not common:
            raise UserError(
                f"{rows[one]} and {rows[other]} have no {SUFFIX} file of one name; call clips of one prompt the same"
            )
        for clip in common:
            pairs.append(Pair(clip, *draw.sample((one, other), 2)))
    draw.shuffle(pairs)
    return pairs


def add_vote(file: Path, vote: Vote) -> None:
    """Appends a vote to a file. Raises `UserError` where it cannot be written."""
    line = json.dumps({**asdict(vote.pair), "choice": vote.choice, "voter": vote.voter})
    file.parent.mkdir(parents=True, exist_ok=True)
    with refused_writes(file), file.open("a") as stream:
        stream.write(line + "\n")


def read_votes(file: Path) -> list[Vote]:
    """The votes of a file; the last one of a voter on a pair counts, whichever side showed what.

    Raises:
      UserError: a file that cannot be read, or a line that is no vote.
    """
    latest = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as votes: {error}; name another file") from error
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            clip, left, right, choice, voter = said = [found[key] for key in KEYS]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is no vote; remove it") from error
        if not all(isinstance(word, str) for word in said):
            raise UserError(f"{file}: line {number} is no vote, whose {', '.join(KEYS)} are text; remove it")
        if choice not in get_args(Choice):
            raise UserError(f"{file}: line {number} has choice {choice!r}, expected left, right or same")
        latest[voter, clip, frozenset((left, right))] = Vote(Pair(clip, left, right), choice, voter)
    return list(latest.values())


def preferences(votes: Iterable[Vote], rows: Sequence[str] = ()) -> list[Preference]:
    """What votes say of every two rows that were compared, in the order of `rows` where they are named."""
    by_rows: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        shown = (vote.pair.left, vote.pair.right)
        one, other = sorted(shown, key=lambda row: (rows.index(row) if row in rows else len(rows), row))
        won = None if vote.choice == "same" else vote.pair.left if vote.choice == "left" else vote.pair.right
        by_rows[one, other][vote.pair.clip].append(0 if won is None else 1 if won == one else -1)
    return [_preference(one, other, list(clips.values())) for (one, other), clips in by_rows.items()]


def _preference(row: str, other: str, clips: Sequence[Sequence[int]]) -> Preference:
    every = np.concatenate([np.asarray(votes) for votes in clips])
    sums, counts = (np.asarray([f(votes) for votes in clips], np.float64) for f in (sum, len))
    drawn = np.random.default_rng(0).integers(len(clips), size=(DRAWS, len(clips)))
    values = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(values, (2.5, 97.5))
    better, same, worse = (int((every == value).sum()) for value in (1, 0, -1))
    return Preference(row, other, better, same, worse, len(clips), float(every.mean()), float(low), float(high))
