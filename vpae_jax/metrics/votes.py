"""Human comparison: pairs of clips of the same name from two folders, votes, and preferences.

A vote is a line of a JSONL file, {"clip", "left", "right", "choice", "voter"}: the rows shown on each side, and "left",
"right" or "same". The preference for one row over another is

    (better - worse) / (better + same + worse)

from -1 to 1, as in APT's user study (2501.08316), with a 95% bootstrap interval over clips.
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
    """Two clips to compare.

    Attributes:
      clip: their name, without suffix.
      left, right: the rows that they belong to.
    """

    clip: str
    left: str
    right: str


@dataclass(frozen=True)
class Vote:
    """One person's vote on a pair.

    Attributes:
      pair: the clips compared.
      choice: the better one.
      voter: the voter's name.
    """

    pair: Pair
    choice: Choice
    voter: str


@dataclass(frozen=True)
class Preference:
    """The result of all votes on two rows.

    Attributes:
      row, other: the rows.
      better, same, worse: numbers of votes for `row`, for neither, and for `other`.
      clips: number of clips compared.
      value: preference for `row`, from -1 to 1.
      low, high: ends of its 95% interval.
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
    """All pairs of rows for every clip that both have; the seed decides order and sides.

    Args:
      rows: folders of clips, by row name.
      seed: such as the voter's name, so that each voter sees another order.

    Raises:
      UserError: a missing folder, or two rows without a common clip.
    """
    found = {}
    for name, folder in rows.items():
        if not folder.is_dir():
            raise UserError(f"{name}={folder}: not a folder; give a folder of {SUFFIX} files")
        found[name] = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob(f"*{SUFFIX}")}
    draw, pairs = random.Random(seed), []
    for one, other in combinations(rows, 2):
        common = sorted(found[one] & found[other])
        if not common:
            raise UserError(
                f"{rows[one]} and {rows[other]} have no {SUFFIX} file name in common; name clips of one prompt the same"
            )
        for clip in common:
            pairs.append(Pair(clip, *draw.sample((one, other), 2)))
    draw.shuffle(pairs)
    return pairs


def add_vote(file: Path, vote: Vote) -> None:
    """Appends a vote to a file. Raises `UserError` if it cannot be written."""
    line = json.dumps({**asdict(vote.pair), "choice": vote.choice, "voter": vote.voter})
    file.parent.mkdir(parents=True, exist_ok=True)
    with refused_writes(file), file.open("a") as stream:
        stream.write(line + "\n")


def read_votes(file: Path) -> list[Vote]:
    """Reads the votes of a file. Only a voter's last vote on a pair counts, regardless of sides.

    Raises:
      UserError: a file that cannot be read, or a line that is not a vote.
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
            raise UserError(f"{file}: line {number} is not a vote; remove it") from error
        if not all(isinstance(word, str) for word in said):
            raise UserError(f"{file}: line {number} is not a vote: {', '.join(KEYS)} must be text; remove it")
        if choice not in get_args(Choice):
            raise UserError(f"{file}: line {number} has choice {choice!r}, expected left, right or same")
        latest[voter, clip, frozenset((left, right))] = Vote(Pair(clip, left, right), choice, voter)
    return list(latest.values())


def preferences(votes: Iterable[Vote], rows: Sequence[str] = ()) -> list[Preference]:
    """The preference for every pair of rows that was compared, in the order of `rows` where they are named."""
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
