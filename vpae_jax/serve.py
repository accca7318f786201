"""A page to play with a model, or to compare a teacher with its students side by side.

    python -m vpae_jax.serve --model=DIR [--compare=NAME=DIR[:STEPS:GUIDANCE] ...] [--port=8000]

The page takes a prompt, a first frame where a model takes one, a seed, and each model's steps and guidance. It shows
every model's clip with its network evaluations and times. If all clips together take at most 5 s, measured at start,
they are made while the user types; otherwise a button starts them.

It is served to this machine's own browsers at the address that is printed; --host=0.0.0.0 opens it to the network,
without a password. Nothing is kept: clips are deleted when the program ends, by Ctrl-C or SIGTERM. It needs the extra
`serve`: pip install "vpae_jax[serve]" (docs/serve.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from vpae_jax import cli
from vpae_jax.config import MeshConfig
from vpae_jax.evaluation.rows import Entry, check_names, parse_entry
from vpae_jax.runtime.platforms import compute_dtype
from vpae_jax.runtime.progress import say
from vpae_jax.serving.jobs import JobQueue
from vpae_jax.serving.stores import Clips, picture_store
from vpae_jax.serving.worker import Worker
from vpae_jax.sharding import make_mesh
from vpae_jax.types import UserError
from vpae_jax.weights.locate import EMBEDDED

PACKAGES = ("starlette", "uvicorn")  # what the extra `serve` brings
EXAMPLE = "a three moves up and to the left"  # a prompt that the embedded model understands


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.serve", __doc__)
    add = result.add_argument
    add("--model", default="tiny", help="model: folder or file in any layout, 'tiny', or OWNER/NAME of the hub")
    more = "sampled as its folder says unless :STEPS:GUIDANCE[:SOLVER] follows; repeatable"
    add("--compare", action="append", default=[], help=f"another model beside it: NAME=DIR, {more}")
    add("--host", default="127.0.0.1", help="address to serve on; by default only this machine can connect")
    add("--port", type=int, default=8000, help="port of the page, 0 for any that is free; 8000 by default")
    add(
        "--generate",
        choices=("auto", "typing", "button"),
        default="auto",
        help="when clips are made: while the user types, or at the press of a button; by default whichever their "
        "measured time allows",
    )
    add("--devices", type=int, default=1, help="devices of this process that make each clip together; 1 by default")
    add("--dtype", choices=cli.DTYPES, help=cli.DTYPE_HELP)
    add("--decoder", help="small decoder in place of every model's VAE: TAEHV's taew2_1, or one of configs/decoder.py")
    return result


def entries(given: argparse.Namespace) -> list[Entry]:
    """The models that the command line names. Raises `UserError` for what cannot be read, or two of one name."""
    compared = [parse_entry(text) for text in given.compare]
    rows = [Entry("teacher" if compared else "model", given.model), *compared]
    check_names(rows)
    return rows


def check_packages() -> None:
    """Raises `UserError` if the extra is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f'{" and ".join(missing)}: not installed; run pip install "vpae_jax[serve]"')


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    check_packages()
    from vpae_jax.serving import access, app, server  # need the packages

    rows, devices = entries(given), cli.local_devices(given.devices)
    for row in rows:  # before the address is bound
        row.sampler(row.find())
    mesh = make_mesh(MeshConfig(fsdp=1, context=len(devices)), devices) if len(devices) > 1 else None
    load = {"dtype": given.dtype or compute_dtype(), "mesh": mesh, "decoder": given.decoder}
    with server.bind(given.host, given.port) as listening, TemporaryDirectory(prefix="vpae_jax-serve-") as folder:
        where = server.address(listening)
        if not access.is_loopback(given.host):
            print(f"note: --host={given.host} lets everyone who reaches this machine use the page", file=sys.stderr)
        say(f"{where} (loading; the page shows how far)")
        worker = Worker(rows, load, JobQueue(), Clips(Path(folder)), picture_store(), given.generate, say, where)
        example = EXAMPLE if given.model == EMBEDDED else ""
        server.run(server.make_server(app.make_app(worker, given.host, example)), listening, worker)


def program() -> None:
    """Runs `main`, and ends the process at once: neither a clip in work nor Python's own tidying is waited for."""
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program()
