"""Blind human comparison of clips: two side by side in random order; the voter picks the better one with a key.

    python -m vpae_jax.vote teacher=DIR student=DIR --votes=votes.jsonl [--voter=NAME] [--port=8000]
    python -m vpae_jax.vote --votes=votes.jsonl

Rows are folders of .mp4 files, such as `evaluate --suite` makes; clips of the same prompt have the same name. The page
is served only to browsers on this machine, at the address that is printed. Each vote is written to the file before the
next pair is shown, and a returning voter continues where they left off. Without rows, the file's votes are totalled.
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
LONGEST = 200  # maximum bytes of a posted vote


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.vote", __doc__)
    add = result.add_argument
    add("rows", nargs="*", metavar="NAME=DIR", help="folders of clips, two or more")
    add("--votes", type=Path, required=True, help="JSONL file that votes are appended to")
    add("--voter", default="anonymous", help="name of the voter; each voter sees another order")
    add("--port", type=int, default=8000, help="port of the page; 0 for any free one")
    return result


def parse_rows(texts: Sequence[str]) -> dict[str, Path]:
    """Parses NAME=DIR arguments, by name. Raises `UserError` for anything else, or for two with the same name."""
    rows = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"{text!r}: expected NAME=DIR")
        if name in rows:
            raise UserError(f"two rows are named {name!r}; give each its own name")
        rows[name] = Path(folder)
    if len(rows) == 1:
        raise UserError("one row was given; a comparison needs two or more")
    return rows


class Election:
    """The pairs that a voter has not voted on, by number; records incoming votes.

    Args:
      rows: folders of clips, by row name.
      file: the file of votes.
      voter: the voter's name.
    """

    def __init__(self, rows: dict[str, Path], file: Path, voter: str) -> None:
        self.rows, self.file, self.voter = rows, file, voter
        pairs = find_pairs(rows, voter)
        done = {(v.pair.clip, frozenset((v.pair.left, v.pair.right))) for v in read_votes(file) if v.voter == voter}
        self.pairs = [pair for pair in pairs if (pair.clip, frozenset((pair.left, pair.right))) not in done]
        self.done = len(pairs) - len(self.pairs)

    def page(self) -> str:
        """The page, which knows pairs only by their numbers."""
        prompts = [Path(pair.clip).name for pair in self.pairs]
        return page_template(TEMPLATE).render(prompts=prompts, done=self.done, total=self.done + len(prompts))

    def clip(self, number: int, side: str) -> Path:
        """The file of a pair's clip on one side."""
        pair = self.pairs[number]
        folder = self.rows[pair.left if side == "left" else pair.right]
        return folder / f"{pair.clip}{SUFFIX}"

    def vote(self, number: int, choice: Choice) -> None:
        pair: Pair = self.pairs[number]
        add_vote(self.file, Vote(pair, choice, self.voter))


class Handler(BaseHTTPRequestHandler):
    """Serves one election: `/`, `/NUMBER/left`, `/NUMBER/right`, and votes posted to `/NUMBER`."""

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
        """Suppresses the request log."""

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
    """The preferences as text, one line per pair of rows."""
    lines = ["row, over another            preference   95% interval     better  same  worse  clips"]
    for one in found:
        numbers = f"{one.better:>6}  {one.same:>4}  {one.worse:>5}  {one.clips:>5}"
        name = f"{one.row}, over {one.other}"
        lines.append(f"{name:<28} {one.value:>+10.0%}   {one.low:>+5.0%} to {one.high:>+5.0%}   {numbers}")
    return "\n".join(lines)


def serve(election: Election, port: int) -> ThreadingHTTPServer:
    """A server on the loopback address, not running yet. Raises `UserError` if the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, election))
    except OSError as error:
        raise UserError(f"--port={port}: {error.strerror}; give another, or 0 for any free one") from error


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    rows = parse_rows(given.rows)
    if not rows:
        if not (votes := read_votes(given.votes)):
            raise UserError(f"--votes={given.votes}: holds no votes yet; give rows to vote on, as NAME=DIR")
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
