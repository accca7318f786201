"""Worker processes that may die: if a decoder crashes or hangs, only one task is lost, and the others continue.

Each worker is a fresh interpreter (not forked, because JAX uses threads) that imports only what its tasks need; unlike
in `multiprocessing`, it does not import the parent's main module. For each worker, a thread of the parent waits, kills
it when a task takes too long, and starts another for the next task. Arrays are returned in memory shared between worker
and parent, which is reused for the next task: new pages would cost more than the copy made by the parent's thread.

Why not pebble: its workers import the main module and therefore JAX, outlive a parent that is killed while they hang,
and take 1.5 s to return a clip of 97 MB, against 0.06 s here.
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

HEADER = 8  # bytes for the length of a message
# A worker ends itself after this many timeouts, since its parent, which should have killed it, must be gone.
ORPHAN = 2
DYING = 5.0  # seconds for a worker to exit after it has closed its connection
MEMORY = 2**32  # bytes of private memory per worker: a decoder of 8K video needs half of that
STARTING = 300.0  # seconds for a worker to import its modules; this does not count as part of a task
# The parent handles keyboard interrupts; linear algebra libraries need no threads.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from vpae_jax.encoding.pool import serve; serve({fd}, {memory}, {limit!r}, {most})"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Lost(Exception):
    """A worker died while executing a task, or was killed because it took too long.

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
          workers: maximum number of processes at a time.
          timeout: seconds that a task may take.
        """
        self.timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="pool")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._closing = threading.Event()
        # Also called when the pool is garbage-collected, and at interpreter exit.
        self.close = weakref.finalize(self, _close, self._threads, self._workers, self._closing)

    def submit(self, function: Callable[..., Any], *args: Any, shape: tuple[int, ...] | None = None) -> Future[Any]:
        """Has a worker call `function(*args)`, or `function(array, *args)` if the shape of an array is given.

        Args:
          function: must be importable; an exception ends its worker.
          args: must be picklable.
          shape: shape of a uint8 array for the function to fill.

        Returns:
          A future of the function's result, or of (array, result). It raises `Lost` if the worker is lost.
        """
        return self._threads.submit(self._run, (function, args, shape))

    def _run(self, task: tuple[Any, ...]) -> Any:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self.timeout)
            self._workers.add(worker)
        try:
            if self._closing.is_set():  # the worker may have started too late to be killed with the others
                raise Lost("crashed", "the pool was closed")
            result = worker.call(task)
        except Lost:
            self._workers.discard(worker)
            worker.end()
            raise
        self._idle.put(worker)
        return result


def _close(threads: ThreadPoolExecutor, workers: set[_Worker], closing: threading.Event) -> None:
    """Cancels all tasks and ends the workers."""
    closing.set()
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in tuple(workers):
        worker.process.kill()  # wakes its thread, if it is waiting
    threads.shutdown()
    while workers:
        workers.pop().end()


class _Worker:
    """The parent's side of a worker process."""

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
    """Memory shared by two processes, as an anonymous file. When one of them enlarges it, both see the new size."""

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
    """The main loop of a worker: receives tasks and sends results until the parent closes the connection. A task that
    takes over `limit` seconds ends the worker; one that uses over `most` bytes of memory, not counting what is shared
    with the parent, fails."""
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    parent = socket.socket(fileno=fd)  # stays open until the end, so that error messages are written before it closes
    shared = _Memory(memory)
    with suppress(ConnectionError):  # whether the parent is gone is noticed below
        _send(parent, True)
    while True:
        try:
            function, args, shape = _receive(parent)
        except (EOFError, ConnectionError):
            return parent.close()
        signal.setitimer(signal.ITIMER_REAL, limit)  # the signal ends the process, which does not handle it
        _send(parent, function(*args) if shape is None else function(shared.array(shape), *args))
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()  # leftovers of a task may take the memory needed for the next


def _anonymous_file() -> int:
    """Creates a file in memory that vanishes with its last user; a temporary file if the system has no such thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _send(to: socket.socket, message: Any) -> None:
    body = pickle.dumps(message)
    to.sendall(len(body).to_bytes(HEADER, "little") + body)


def _receive(sender: socket.socket) -> Any:
    """Receives a message. Raises `EOFError` if the other side is gone."""
    return pickle.loads(_exactly(sender, int.from_bytes(_exactly(sender, HEADER), "little")))


def _exactly(sender: socket.socket, count: int) -> bytes:
    body = bytearray()
    while len(body) < count:
        part = sender.recv(count - len(body))
        if not part:
            raise EOFError
        body += part
    return bytes(body)
