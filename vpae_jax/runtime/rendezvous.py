"""Waits for all processes to start, with a timeout and a clear message if one does not appear.

JAX's own client would end a process with a page of text in that case. So the processes first meet over plain sockets on
the coordinator's port, which JAX then takes over. Each process introduces itself to the first one, both prove to each
other that they know the job's secret, and then it waits:

    other -> first   vpae INDEX COUNT NUMBER          a random number
    first -> other   NUMBER PROOF                     another random number, and an HMAC of both under the secret
    other -> first   PROOF                            an HMAC of everything
    first -> other   go                               when all have arrived; or an error message

The launcher puts the secret into VPAE_SECRET. Without one, anything that speaks this protocol is accepted as a process.
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
PEER_SECONDS = 10.0  # for a connected process to introduce itself and prove that it knows the secret
LINE_BYTES = 512  # maximum length of a line


@dataclass(frozen=True)
class ProcessSpec:
    """One process of a run.

    Attributes:
      address: HOST:PORT of the first process, as seen by the others.
      count: number of processes.
      index: index of this process, from 0.
      devices: indices of the host's devices that it uses; None for all.
      secret: shared by all processes of the job, and known to nobody else.

    Raises:
      UserError: the address has no port, or the index is out of range.
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
        """Returns an HMAC of the words, which only a process that knows the secret can compute."""
        text = " ".join(map(str, words))
        return hmac.new(self.secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    @property
    def endpoint(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def meet(process: ProcessSpec, seconds: int) -> None:
    """Waits until all processes have started.

    Raises:
      UserError: some did not appear in time; two have the same index, or different counts; the port is in use.
    """
    if process.index == 0:
        asyncio.run(_gather(process, seconds))
    else:
        _join(process, seconds)


async def _gather(process: ProcessSpec, seconds: int) -> None:
    """In the first process: waits for all the others concurrently, then releases them."""
    gathering = _Gathering(process)
    server = await asyncio.start_server(
        gathering.accept, sock=_server(process), limit=LINE_BYTES, backlog=process.count
    )
    try:
        async with asyncio.timeout(seconds):
            wrong = await gathering.end
    except TimeoutError:
        count = gathering.strangers
        strangers = f" ({count} connections that did not belong to this job were rejected)" if count else ""
        wrong = (
            f"{process.name}: waited {seconds} s at {process.address}, but process {gathering.missing} did not appear"
            f"{strangers}; start all processes with the same coordinator, number of processes and VPAE_SECRET"
        )
        raise UserError(wrong) from None
    finally:
        server.close()
        await gathering.close()
    if wrong:
        raise UserError(wrong)


class _Gathering:
    """The processes that have connected to the first one so far.

    Attributes:
      end: a future of an error message, or of "" once all have arrived.
      strangers: number of connections that were rejected.
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
        except (OSError, ValueError):  # includes a timeout
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
        """Returns index and count of a process that has proved that it knows the secret. Raises `ValueError` for any
        other."""
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
                f"process {index} was started with {count} processes, but process 0 with {self.process.count}; give "
                "all the same number"
            )
        if not 0 < index < count or (index in self.here and not self.here[index][0].at_eof()):
            return f"two processes have process_id {index}; give each a different one, from 0 to {count - 1}"
        return None

    async def close(self) -> None:
        """Sends the outcome to all processes, and closes the connections."""
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
    """In any other process: retries until the first process answers."""
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
        f"{process.name}: waited {seconds} s for the coordinator {process.address} ({reason}); check that process 0 "
        "is running there, that all others are running, and that the port is open"
    )


def _introduce(process: ProcessSpec, peer: socket.socket, deadline: float) -> None:
    """Introduces this process. Raises `ValueError` if the peer does not belong to this job."""
    own = secrets.token_hex(16)
    _send(peer, f"vpae {process.index} {process.count} {own}")
    theirs, _, proof = _line(peer, deadline).partition(" ")
    if not hmac.compare_digest(proof.encode(), process.proof("first", own, theirs).encode()):
        raise ValueError("the program that answers there has another VPAE_SECRET, or is not this one")
    _send(peer, process.proof("other", process.index, process.count, own, theirs))


def _line(peer: socket.socket, deadline: float) -> str:
    """Receives one short line, or what arrives before the connection ends. Raises `TimeoutError` at the deadline."""
    data = b""
    while not data.endswith(b"\n") and len(data) < LINE_BYTES:
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        if not (more := peer.recv(LINE_BYTES)):
            break
        data += more
    return data.decode("utf-8", "replace").strip()


def _send(peer: socket.socket, text: str) -> None:
    """Sends a line, ignoring errors if the peer is gone."""
    with suppress(OSError):
        peer.sendall(f"{text}\n".encode())
