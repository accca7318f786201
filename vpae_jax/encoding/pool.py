"""Worker processes that may die: a crash or a hang of a decoder costs one task, and the rest go on.

Each worker is a fresh interpreter (no fork: JAX has threads) that imports what its tasks need and no more; unlike
`multiprocessing` it does not import the parent's main module. A thread of the parent waits for each worker, kills it
when a task takes too long, and starts another for the next task. Arrays come through memory that a worker shares with
its parent, and that is used again for the next task: new pages cost more than the copy that the parent's thread makes.

Why not pebble: its workers import the main module, so JAX, outlive a parent that is killed while they hang, and pass a
clip of 97 MB on in 1.5 s; here that takes 0.06 s.
"""

from __future__ import annotations

import gc
import math
import mmap
import os
import pickle
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import UInt8

HEADER = 8  # bytes that say how long a message is
# A worker ends itself after this many timeouts: its parent, which should have ended it, is gone.
ORPHAN = 2
DYING = 5.0  # seconds that a worker which has hung up is given to end
MEMORY = 2**32  # bytes of its own that a worker may take: a decoder of 8K holds half of that
STARTING = 300.0  # seconds that a worker is given to import what it needs; none of them is a task's
# Interrupts from the keyboard are the parent's to handle; libraries for matrices need no threads of their own.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from vpae_jax.encoding.pool import serve; serve({fd}, {memory}, {limit!r}, {most})"
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
        self._closing = threading.Event()
        # Also when the pool is forgotten, and at the interpreter's end.
        self.close = weakref.finalize(self, _close, self._threads, self._workers, self._closing)

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
            if self._closing.is_set():  # it may have come too late to be killed with the others
                raise Lost("crashed", "the pool was closed")
            result = worker.call(task)
        except Lost:
            self._workers.discard(worker)
            worker.end()
            raise
        self._idle.put(worker)
        return result


def _close(threads: ThreadPoolExecutor, workers: set[_Worker], closing: threading.Event) -> None:
    """Drops all tasks and ends the workers."""
    closing.set()
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
        self.timeout, self.started = timeout, False
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.memory = _Memory(_anonymous_file())
        with theirs:
            fds = theirs.fileno(), self.memory.fd
            code = START.format(path=sys.path, fd=fds[0], memory=fds[1], limit=ORPHAN * timeout, most=MEMORY)
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                pass_fds=fds,
                env={**os.environ, **ENVIRONMENT},
            )

    def call(self, task: tuple[Any, ...]) -> Any:
        shape = task[2]
        try:
            if not self.started:
                self.socket.settimeout(STARTING)
                self.started = _receive(self.socket)
                self.socket.settimeout(self.timeout)
            if shape is not None:
                self.memory.make_room(shape)
            _send(self.socket, task)
            result = _receive(self.socket)
        except TimeoutError as error:
            raise Lost("timeout", f"took more than {self.socket.gettimeout():g} s") from error
        except (EOFError, ConnectionError) as error:
            raise Lost("crashed", self._last_words()) from error
        return result if shape is None else (self.memory.array(shape).copy(), result)

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
        os.close(self.memory.fd)


class _Memory:
    """Memory that two processes share, as a file that no folder lists. One of them makes room, then both see it."""

    def __init__(self, fd: int):
        self.fd = fd
        self.mapped: mmap.mmap | None = None

    def make_room(self, shape: tuple[int, ...]) -> None:
        if os.fstat(self.fd).st_size < math.prod(shape):
            os.ftruncate(self.fd, math.prod(shape))

    def array(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        size = math.prod(shape)
        if self.mapped is None or len(self.mapped) < size:
            self.mapped = mmap.mmap(self.fd, size)
        return np.frombuffer(self.mapped, np.uint8, size).reshape(shape)


def serve(fd: int, memory: int, limit: float, most: int) -> None:
    """A worker's life: tasks come, results go, until the parent hangs up. A task of over `limit` seconds ends it, and
    one fails that takes over `most` bytes of memory, not counting what is shared with the parent."""
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    parent = socket.socket(fileno=fd)  # stays open until the end, so that last words are written before it closes
    shared = _Memory(memory)
    with suppress(ConnectionError):  # what the parent sent, or that it has gone, is read below
        _send(parent, True)
    while True:
        try:
            function, args, shape = _receive(parent)
        except (EOFError, ConnectionError):
            return parent.close()
        signal.setitimer(signal.ITIMER_REAL, limit)  # its signal ends a process that does not handle it
        _send(parent, function(*args) if shape is None else function(shared.array(shape), *args))
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()  # what a task has left may take the room of the next


def _anonymous_file() -> int:
    """A file in memory, gone with its last user; where the system has none, a temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _send(to: socket.socket, message: Any) -> None:
    body = pickle.dumps(message)
    to.sendall(len(body).to_bytes(HEADER, "little") + body)


def _receive(sender: socket.socket) -> Any:
    """A message; EOFError when the other side is gone."""
    return pickle.loads(_exactly(sender, int.from_bytes(_exactly(sender, HEADER), "little")))


def _exactly(sender: socket.socket, count: int) -> bytes:
    body = bytearray()
    while len(body) < count:
        part = sender.recv(count - len(body))
        if not part:
            raise EOFError
        body += part
    return bytes(body)
