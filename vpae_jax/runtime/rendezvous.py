"""Waiting for all processes to start, with a bound and a clear word when one does not come.

JAX's own client ends a process with a page of text in that case. So the processes meet first, by plain sockets on the
coordinator's port, and only then hand it over to JAX. Each says who it is, the first one and it prove to each other
that they know the job's secret, and then it waits:

    other -> first   vpae INDEX COUNT NUMBER          a number that nobody can guess
    first -> other   NUMBER PROOF                     another one, and a digest of both under the secret
    other -> first   PROOF                            a digest of all
    first -> other   go                               when all are there; or what is wrong

The secret is what the launcher has put into VPAE_SECRET. Without one, whoever speaks so is taken for a process.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field

from vpae_jax.types import UserError

RETRY_SECONDS = 0.2
PEER_SECONDS = 10.0  # in which one that has connected says and proves who it is
LINE_BYTES = 512  # at most


@dataclass(frozen=True)
class ProcessSpec:
    """One process among others.

    Attributes:
      address: host and port of the first one, as all others see it.
      count: how many there are.
      index: which of them this is, from 0.
      devices: the ones of the host's devices that are its own; None for all.
      secret: what all of them know, and nobody else.

    Raises:
      UserError: an address without a port, or an index outside the count.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"coordinator {self.address!r}: expected HOST:PORT, such as node0:12355")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(f"process_id is {self.index} of num_processes {self.count}; expected 0 to {self.count - 1}")

    @property
    def name(self) -> str:
        return f"process {self.index} of {self.count}"

    def proof(self, *words: object) -> str:
        """What only those who know the secret can make of words."""
        text = " ".join(map(str, words))
        return hmac.new(self.secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    @property
    def endpoint(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def meet(process: ProcessSpec, seconds: int) -> None:
    """Returns when all processes are there.

    Raises:
      UserError: some did not come in time; two are the same one, or count differently; the port is taken.
    """
    if process.index == 0:
        asyncio.run(_gather(process, seconds))
    else:
        _join(process, seconds)


async def _gather(process: ProcessSpec, seconds: int) -> None:
    """The first process: waits for the others, all at the same time, then lets them go."""
    gathering = _Gathering(process)
    server = await asyncio.start_server(
        gathering.accept, sock=_server(process), limit=LINE_BYTES, backlog=process.count
    )
    try:
        async with asyncio.timeout(seconds):
            wrong = await gathering.end
    except TimeoutError:
        count = gathering.strangers
        strangers = f" ({count} connections that did not prove to be of this job were turned away)" if count else ""
        wrong = (
            f"{process.name}: waited {seconds} s at {process.address}, but process {gathering.missing} did not come"
            f"{strangers}; start all processes with the same coordinator, number of processes and VPAE_SECRET"
        )
        raise UserError(wrong) from None
    finally:
        server.close()
        await gathering.close()
    if wrong:
        raise UserError(wrong)


class _Gathering:
    """Those that have come to the first process so far.

    Attributes:
      end: what is wrong, or "" when all are there; to be awaited.
      strangers: how many connections were turned away.
    """

    def __init__(self, process: ProcessSpec):
        self.process, self.strangers = process, 0
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.here: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self.greetings: set[asyncio.Task] = set()

    @property
    def missing(self) -> str:
        return ", ".join(str(i) for i in range(1, self.process.count) if i not in self.here)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._greet(reader, writer))
        self.greetings.add(task)
        task.add_done_callback(self.greetings.discard)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PEER_SECONDS):
                index, count = await self._introduced(reader, writer)
        except (OSError, ValueError):  # also a time that is over
            self.strangers += 1
            writer.transport.abort()
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        wrong = self._wrong(index, count)
        if wrong:
            writer.write(f"{wrong}\n".encode())
            writer.close()
        else:
            self.here[index] = (reader, writer)
        if not self.end.done() and (wrong or not self.missing):
            self.end.set_result(wrong or "")

    async def _introduced(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, int]:
        """The index and count of one that has proved to know the secret. Raises `ValueError` for a stranger."""
        word, index, count, theirs = (await reader.readline()).decode().split()
        own = secrets.token_hex(16)
        writer.write(f"{own} {self.process.proof('first', theirs, own)}\n".encode())
        proof, expected = await reader.readline(), self.process.proof("other", index, count, theirs, own)
        if word != "vpae" or not hmac.compare_digest(proof.strip(), expected.encode()):
            raise ValueError("a stranger")
        return int(index), int(count)

    def _wrong(self, index: int, count: int) -> str | None:
        if count != self.process.count:
            return (
                f"process {index} was told of {count} processes, but process 0 of {self.process.count}; give all the "
                "same number"
            )
        if not 0 < index < count or (index in self.here and not self.here[index][0].at_eof()):
            return f"two processes have process_id {index}; give each its own, from 0 to {count - 1}"
        return None

    async def close(self) -> None:
        """Tells all what has come of it, and ends."""
        for task in self.greetings:
            task.cancel()
        await asyncio.gather(*self.greetings, return_exceptions=True)
        word = (self.end.result() or "go") if self.end.done() and not self.end.cancelled() else None
        for _, writer in self.here.values():
            if word is not None:
                writer.write(f"{word}\n".encode())
            writer.close()
        async with asyncio.timeout(PEER_SECONDS):
            await asyncio.gather(*(w.wait_closed() for _, w in self.here.values()), return_exceptions=True)


def _server(process: ProcessSpec) -> socket.socket:
    port = process.endpoint[1]
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=process.count
        )
    except OSError as error:
        raise UserError(
            f"{process.name}: cannot listen on port {port} ({error.strerror}); choose another coordinator port"
        ) from error


def _join(process: ProcessSpec, seconds: int) -> None:
    """Any other process: knocks until the first one answers."""
    deadline, reason = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(process.endpoint, timeout=min(PEER_SECONDS / 2, seconds)) as peer:
                _introduce(process, peer, min(deadline, time.monotonic() + PEER_SECONDS))
                answer = _line(peer, deadline)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        except ValueError as error:
            reason = str(error)
        else:
            if answer == "go":
                return
            if answer.startswith(("process ", "two processes ")):
                raise UserError(answer)
        time.sleep(RETRY_SECONDS)
    raise UserError(
        f"{process.name}: waited {seconds} s for the coordinator {process.address} ({reason}); "
        "is process 0 running there, are all others, and is the port open?"
    )


def _introduce(process: ProcessSpec, peer: socket.socket, deadline: float) -> None:
    """Says who this process is. Raises `ValueError` when who answers is not of this job."""
    own = secrets.token_hex(16)
    _send(peer, f"vpae {process.index} {process.count} {own}")
    theirs, _, proof = _line(peer, deadline).partition(" ")
    if not hmac.compare_digest(proof.encode(), process.proof("first", own, theirs).encode()):
        raise ValueError("who answers there has another VPAE_SECRET, or is no such program")
    _send(peer, process.proof("other", process.index, process.count, own, theirs))


def _line(peer: socket.socket, deadline: float) -> str:
    """One short line; what comes before the connection ends, if it ends early. Raises `TimeoutError` for a late one."""
    data = b""
    while not data.endswith(b"\n") and len(data) < LINE_BYTES:
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        if not (more := peer.recv(LINE_BYTES)):
            break
        data += more
    return data.decode("utf-8", "replace").strip()


def _send(peer: socket.socket, text: str) -> None:
    """Sends a line; one that has gone does not hear it."""
    with suppress(OSError):
        peer.sendall(f"{text}\n".encode())
