"""Waiting for all processes to start, with a bound and a clear word when one does not come.

JAX's own client ends a process with a page of text in that case. So the processes meet first, by plain sockets on the
coordinator's port, and only then hand it over to JAX. Each sends `vpae INDEX COUNT`; the first answers `go` when all
are there, or what is wrong.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from vpae_jax.types import UserError

RETRY_SECONDS = 0.2
PEER_SECONDS = 10  # in which one that has connected says who it is


@dataclass(frozen=True)
class ProcessSpec:
    """One process among others.

    Attributes:
      address: host and port of the first one, as all others see it.
      count: how many there are.
      index: which of them this is, from 0.
      devices: the ones of the host's devices that are its own; None for all.

    Raises:
      UserError: an address without a port, or an index outside the count.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"coordinator {self.address!r}: expected HOST:PORT, such as node0:12355")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(f"process_id is {self.index} of num_processes {self.count}; expected 0 to {self.count - 1}")

    @property
    def name(self) -> str:
        return f"process {self.index} of {self.count}"

    @property
    def endpoint(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def meet(process: ProcessSpec, seconds: int) -> None:
    """Returns when all processes are there.

    Raises:
      UserError: some did not come in time; two are the same one, or count differently; the port is taken.
    """
    deadline = time.monotonic() + seconds
    if process.index == 0:
        _gather(process, seconds, deadline)
    else:
        _join(process, seconds, deadline)


def _gather(process: ProcessSpec, seconds: int, deadline: float) -> None:
    """The first process: waits for the others, then lets them go."""
    here: dict[int, socket.socket] = {}
    try:
        with _server(process) as server:
            while missing := sorted(set(range(1, process.count)) - set(here)):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    names = ", ".join(map(str, missing))
                    raise UserError(
                        f"{process.name}: waited {seconds} s at {process.address}, but process {names} did not come; "
                        "start all processes with the same coordinator and number of processes"
                    ) from None
                except OSError:
                    continue  # it has gone again
                try:
                    peer.settimeout(PEER_SECONDS)
                    index, count = _parse(_line(peer))
                except (OSError, ValueError):
                    peer.close()  # not one of ours
                    continue
                wrong = _wrong(process, index, count, here)
                if wrong:
                    for other in (*here.values(), peer):
                        _send(other, wrong)
                    peer.close()
                    raise UserError(wrong)
                here[index] = peer
        for peer in here.values():
            _send(peer, "go")
    finally:
        for peer in here.values():
            peer.close()


def _wrong(process: ProcessSpec, index: int, count: int, here: dict[int, socket.socket]) -> str | None:
    if count != process.count:
        return (
            f"process {index} was told of {count} processes, but process 0 of {process.count}; give all the same number"
        )
    if index in here or not 0 < index < count:
        return f"two processes have process_id {index}; give each its own, from 0 to {count - 1}"
    return None


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


def _join(process: ProcessSpec, seconds: int, deadline: float) -> None:
    """Any other process: knocks until the first one answers."""
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(process.endpoint, timeout=min(5, seconds)) as peer:
                _send(peer, f"vpae {process.index} {process.count}")
                peer.settimeout(max(0.01, deadline - time.monotonic()))
                answer = _line(peer)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
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


def _line(peer: socket.socket) -> str:
    """One short line; what comes before the connection ends, if it ends early."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 512 and (more := peer.recv(512)):
        data += more
    return data.decode("utf-8", "replace").strip()


def _send(peer: socket.socket, text: str) -> None:
    """Sends a line; one that has gone does not hear it."""
    with suppress(OSError):
        peer.sendall(f"{text}\n".encode())


def _parse(line: str) -> tuple[int, int]:
    word, index, count = line.split()
    if word != "vpae":
        raise ValueError(line)
    return int(index), int(count)
