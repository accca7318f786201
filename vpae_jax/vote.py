"""Compares clips by people: two side by side, without names, in random order, the better one chosen by a key.

    python -m vpae_jax.vote teacher=DIR student=DIR --votes=votes.jsonl [--voter=NAME] [--port=8000]
    python -m vpae_jax.vote --votes=votes.jsonl

Rows are folders of .mp4 files, such as `evaluate --suite` makes; clips of one prompt have one name. The page is served
to this machine's own browsers, at the address that is printed; every vote is in the file before the next pair is shown,
and a voter who comes back goes on where he stopped. Without rows, the votes of the file are added up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

from vpae_jax import cli
from vpae_jax.metrics.votes import (
    SUFFIX,
    Choice,
    Pair,
    Preference,
    Vote,
    add_vote,
    find_pairs,
    preferences,
    read_votes,
)
from vpae_jax.pages import page_template
from vpae_jax.types import UserError

TEMPLATE = "vote.html.jinja"
CHOICES: tuple[Choice, ...] = get_args(Choice)
LONGEST = 200  # bytes of a vote


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.vote", __doc__)
    add = result.add_argument
    add("rows", nargs="*", metavar="NAME=DIR", help="folders of clips, two or more")
    add("--votes", type=Path, required=True, help="file of votes, which grows")
    add("--voter", default="anonymous", help="who votes; each voter is shown another order")
    add("--port", type=int, default=8000, help="of the page; 0 for any that is free")
    return result


def parse_rows(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR, by name. Raises `UserError` for what is none, or two of one name."""
    rows = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"{text!r}: expected NAME=DIR")
        if name in rows:
            raise UserError(f"two rows are called {name!r}; give each its own name")
        rows[name] = Path(folder)
    if len(rows) == 1:
        raise UserError("one row was given; a comparison needs two or more")
    return rows


class Election:
    """Pairs that a voter has not voted on, by number, and the votes that come in.

    Args:
      rows: folders of clips, by the row's name.
      file: of votes.
      voter: who votes.
    """

    def __init__(self, rows: dict[str, Path], file: Path, voter: str) -> None:
        self.rows, self.file, self.voter = rows, file, voter
        pairs = find_pairs(rows, voter)
        done = {(v.pair.clip, frozenset((v.pair.left, v.pair.right))) for v in read_votes(file) if v.voter == voter}
        self.pairs = [pair for pair in pairs if (pair.clip, frozenset((pair.left, pair.right))) not in done]
        self.done = len(pairs) - len(self.pairs)

    def page(self) -> str:
        """The page, which knows pairs by their numbers alone."""
        prompts = [Path(pair.clip).name for pair in self.pairs]
        return page_template(TEMPLATE).render(prompts=prompts, done=self.done, total=self.done + len(prompts))

    def clip(self, number: int, side: str) -> Path:
        """A clip's file."""
        pair = self.pairs[number]
        folder = self.rows[pair.left if side == "left" else pair.right]
        return folder / f"{pair.clip}{SUFFIX}"

    def vote(self, number: int, choice: Choice) -> None:
        pair: Pair = self.pairs[number]
        add_vote(self.file, Vote(pair, choice, self.voter))


class Handler(BaseHTTPRequestHandler):
    """Serves one election: `/`, `/NUMBER/left`, `/NUMBER/right`, and a vote posted to `/NUMBER`."""

    def __init__(self, election: Election, *args: Any) -> None:
        self.election = election
        super().__init__(*args)

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts == [""]:
            self._send("text/html; charset=utf-8", self.election.page().encode())
        elif len(parts) == 2 and parts[1] in ("left", "right") and (number := self._number(parts[0])) is not None:
            self._send("video/mp4", self.election.clip(number, parts[1]).read_bytes())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        number, length = self._number(self.path.strip("/")), self.headers.get("Content-Length", "")
        if number is None or not length.isdecimal() or int(length) > LONGEST:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        said = self.rfile.read(int(length)).decode(errors="replace")
        if said not in CHOICES:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            self.election.vote(number, CHOICES[CHOICES.index(said)])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            self.send_error(HTTPStatus.INSUFFICIENT_STORAGE)
            return
        self._send("text/plain", b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of requests."""

    def _number(self, text: str) -> int | None:
        return int(text) if text.isdecimal() and int(text) < len(self.election.pairs) else None

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


def table(found: Sequence[Preference]) -> str:
    """A line for every two rows."""
    lines = ["row, over another            preference   95 % interval    better  same  worse  clips"]
    for one in found:
        numbers = f"{one.better:>6}  {one.same:>4}  {one.worse:>5}  {one.clips:>5}"
        name = f"{one.row}, over {one.other}"
        lines.append(f"{name:<28} {one.value:>+10.0%}   {one.low:>+5.0%} to {one.high:>+5.0%}   {numbers}")
    return "\n".join(lines)


def serve(election: Election, port: int) -> ThreadingHTTPServer:
    """A server on this machine's own address, not running yet. Raises `UserError` for a port that is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, election))
    except OSError as error:
        raise UserError(f"--port={port}: {error.strerror}; give another, or 0 for any that is free") from error


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    rows = parse_rows(given.rows)
    if not rows:
        if not (votes := read_votes(given.votes)):
            raise UserError(f"--votes={given.votes}: holds no vote yet; name rows, NAME=DIR, to vote on")
        print(table(preferences(votes)))
        return
    election = Election(rows, given.votes, given.voter)
    if not election.pairs:
        print(f"{given.voter} has voted on all {election.done} pairs")
        return
    with serve(election, given.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/  ({len(election.pairs)} pairs; Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"votes are in {given.votes}")


if __name__ == "__main__":
    cli.run(main)
