"""Binds the address, and runs the HTTP server in the main thread with the worker beside it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from vpae_jax.serving.worker import Worker
from vpae_jax.types import UserError

GRACE = 0.5  # seconds that open connections and the clip in work are given at the end


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` for a port that is taken, or an address that is not this machine's."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port}: expected a number from 0 (any that is free) to {2**16 - 1}")
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = os.strerror(error.errno)
            raise UserError(f"--port={port}: {reason}; give another, or 0 for any that is free") from error
        reason = error.strerror or error
        raise UserError(f"--host={host}: {reason}; give an address of this machine, such as 127.0.0.1") from error


def address(listening: socket.socket) -> str:
    """The page's address."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: Starlette) -> uvicorn.Server:
    """A server that logs nothing but its own failures."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            log_level="error",
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=5,
            limit_concurrency=128,
        )
    )


def run(server: uvicorn.Server, listening: socket.socket, worker: Worker) -> None:
    """Serves until a signal or `server.should_exit` ends it. Returns after SIGTERM; the clip in work may go on in its
    thread, which nothing can interrupt.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      UserError: a model cannot be loaded.
    """
    devices = ThreadPoolExecutor(1, thread_name_prefix="vpae_jax-devices")
    working: Future[None] = devices.submit(worker.run)
    working.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        with _sigterm_returns():
            server.run(sockets=[listening])
    finally:
        worker.queue.close()
        listening.close()
        wait([working], GRACE)
        devices.shutdown(wait=False)
    if working.done():
        working.result()


@contextmanager
def _sigterm_returns() -> Iterator[None]:
    """After SIGTERM has ended the server, which sends it once more, the program goes on. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(number: int, frame: Any) -> None:
        del number, frame

    before = signal.signal(signal.SIGTERM, ignore)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
