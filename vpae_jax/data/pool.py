"""Worker processes that may die: a crash or a hang of a decoder costs one task, and the rest go on.

Each worker is a fresh interpreter (no fork: JAX has threads) that imports what its tasks need and no more; unlike
`multiprocessing` it does not import the parent's main module. A thread of the parent waits for each worker, kills it
when a task takes too long, and starts another for the next task. Arrays come back in anonymous shared memory, by its
file descriptor, and are not copied.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8

HEADER = 8  # bytes that say how long a message is
# A worker ends itself after this many timeouts: its parent, which should have ended it, is gone.
ORPHAN = 2
DYING = 5.0  # seconds that a worker which has hung up is given to end
# Interrupts from the keyboard are the parent's to handle; libraries for matrices need no threads of their own.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from vpae_jax.data.pool import serve; serve({fd}, {timeout!r})"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Lost(Exception):
    """A worker died over a task, or was killed because it took too long.

    Attributes:
      kind: "crashed" or "timeout".
      reason: one line.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


class Pool:
    """Runs functions in up to `workers` processes, which start when there is work and live until `close()`."""

    def __init__(self, workers: int, timeout: float):
        """
        Args:
          workers: processes at a time.
          timeout: seconds that a task may take.
        """
        self.timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="pool")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        # Also when the pool is forgotten, and at the interpreter's end.
        self.close = weakref.finalize(self, _close, self._threads, self._workers)

    def submit(self, function: Callable[..., Any], *args: Any, shape: tuple[int, ...] | None = None) -> Future[Any]:
        """Has a worker call `function(*args)`, or `function(array, *args)` if an array's shape is given.

        Args:
          function: importable; what it raises ends its worker.
          args: picklable.
          shape: of an array of uint8 for the function to fill.

        Returns:
          A future of what the function returns, or of (array, what it returns). It raises `Lost` if there is none.
        """
        return self._threads.submit(self._run, (function, args, shape))

    def _run(self, task: tuple[Any, ...]) -> Any:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self.timeout)
            self._workers.add(worker)
        try:
            result = worker.call(task)
        except Lost:
            self._workers.discard(worker)
            worker.end()
            raise
        self._idle.put(worker)
        return result


def _close(threads: ThreadPoolExecutor, workers: set[_Worker]) -> None:
    """Drops all tasks and ends the workers."""
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in tuple(workers):
        worker.process.kill()  # its thread, if it waits, sees it go
    threads.shutdown()
    while workers:
        workers.pop().end()


class _Worker:
    """A process, as its parent sees it."""

    def __init__(self, timeout: float):
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(timeout)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        with theirs:
            code = START.format(path=sys.path, fd=theirs.fileno(), timeout=timeout)
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ENVIRONMENT},
            )

    def call(self, task: tuple[Any, ...]) -> Any:
        try:
            _send(self.socket, task)
            message, fds = _receive(self.socket)
        except TimeoutError as error:
            raise Lost("timeout", f"took more than {self.socket.gettimeout():g} s") from error
        except (EOFError, ConnectionError) as error:
            raise Lost("crashed", self._last_words()) from error
        return (_mapped(fds[0], task[2]), message) if fds else message

    def _last_words(self) -> str:
        try:
            status = self.process.wait(DYING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        if lines:
            return f"the decoder failed: {lines[-1].strip()[:200]}"
        return f"the decoder died of {signal.Signals(-status).name if status < 0 else f'status {status}'}"

    def end(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()


def serve(fd: int, timeout: float) -> None:
    """A worker's life: tasks come, results go, until the parent hangs up."""
    parent = socket.socket(fileno=fd)  # stays open until the end, so that last words are written before it closes
    while True:
        try:
            (function, args, shape), _ = _receive(parent)
        except (EOFError, ConnectionError):
            return parent.close()
        signal.setitimer(signal.ITIMER_REAL, ORPHAN * timeout)  # its signal ends a process that does not handle it
        if shape is None:
            _send(parent, function(*args))
        else:
            memory = _anonymous_file()
            os.ftruncate(memory, math.prod(shape))
            _send(parent, function(_mapped(os.dup(memory), shape), *args), [memory])
            os.close(memory)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _anonymous_file() -> int:
    """A file in memory that no folder lists, gone with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(fd: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """The file as an array; closes the descriptor, and the memory goes with the array."""
    memory = mmap.mmap(fd, math.prod(shape))
    os.close(fd)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def _send(to: socket.socket, message: Any, fds: list[int] | None = None) -> None:
    body = pickle.dumps(message)
    socket.send_fds(to, [len(body).to_bytes(HEADER, "little")], fds or [])
    to.sendall(body)


def _receive(sender: socket.socket) -> tuple[Any, list[int]]:
    """A message and the file descriptors that came with it; EOFError when the other side is gone."""
    header, fds, *_ = socket.recv_fds(sender, HEADER, 1)
    header += _exactly(sender, HEADER - len(header))
    return pickle.loads(_exactly(sender, int.from_bytes(header, "little"))), fds


def _exactly(sender: socket.socket, count: int) -> bytes:
    body = bytearray()
    while len(body) < count:
        part = sender.recv(count - len(body))
        if not part:
            raise EOFError
        body += part
    return bytes(body)
