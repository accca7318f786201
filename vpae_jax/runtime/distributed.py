"""One run on many processes: how they find each other, and how none of them outlives another.

    where = distributed.find(os.environ, coordinator, num_processes, process_id)
    with distributed.joined(where):
        ...

Flags come first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then SLURM's variables of a step.
`AUTOMATIC` leaves it to JAX, which asks a TPU pod's own services. VPAE_SECRET is what launchers give all processes of a
job, so that they know each other.

A process that dies takes the others down: each leaves a sign of life with the coordination service every `BEAT` seconds
and looks at the others'. JAX does the same, but ends with a page of text; so we look more closely, and say in one line
what happened. The coordinator's own death is the exception: JAX ends the others at once, in the middle of whatever they
say. Then, and after a kill from outside, the line comes from a shell that waits for its parent's end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

import jax

from vpae_jax.cli import EXIT_BAD_INPUT
from vpae_jax.runtime import processes
from vpae_jax.runtime.rendezvous import ProcessSpec, meet
from vpae_jax.types import UserError

T = TypeVar("T")
AUTOMATIC: Literal["automatic"] = "automatic"
START_SECONDS = 300
BEAT, SILENCE = 2.0, 30.0  # seconds between signs of life, and without one until a process counts as gone
AFTER_ERROR = 10.0  # the same after a computation has failed, which a lost process often is the reason of
JAX_SILENCE = 50  # until JAX's own watch ends everything, should ours not
LINGER = 3 * BEAT  # the coordinator goes last, or JAX would end the others with its page of text
EXIT_LOST = 75  # "try again later" (sysexits.h)
AGAIN = "start the same command again: it continues from its newest checkpoint"
SIGNS = "vpae/signs/"
SECRET = "VPAE_SECRET"
DONE, FAILED = "done", "failed: "

Where = ProcessSpec | Literal["automatic"] | None


def find(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> ProcessSpec | None:
    """This process among others, from flags or the environment; None for a run of one process.

    Raises:
      UserError: some of the settings are missing, or wrong.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if all(value is None for value in given.values()):
        given = {name: environment.get(name) for name in names}
        if all(value is None for value in given.values()):
            return _slurm(environment)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; give {', '.join(given)} together, or none of them")
    (_, address), (count_name, count), (index_name, index) = given.items()
    secret = environment.get(SECRET, "")
    process = ProcessSpec(str(address), _number(count_name, count), _number(index_name, index), secret=secret)
    return process if process.count > 1 else None


def share(process_id: int | None, num_processes: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many processes this is that share out work and need not meet, from flags or the environment. Each
    has devices of its own then.

    Raises:
      UserError: one of two flags, or an index that is not one of the processes.
    """
    index, count = process_id, num_processes
    if index is None and count is None:
        where = find(environment)
        if where is None:
            return 0, 1
        if where.devices is not None:  # several processes on one host, which would all claim all of its GPUs
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, where.devices)))
        return where.index, where.count
    if index is None or count is None:
        raise UserError("--process_id and --num_processes: give both, or neither")
    if count < 1:
        raise UserError(f"--num_processes is {count}; expected 1 or more")
    if not 0 <= index < count:
        raise UserError(f"--process_id is {index} of --num_processes={count}; expected 0 to {count - 1}")
    return index, count


def _slurm(environment: Mapping[str, str]) -> ProcessSpec | None:
    """The task of a step that `srun` started. A node's only task has all of its devices, else each has one: of all that
    it sees the one of its place on the node, unless SLURM has bound it to one, which then is all that it sees."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in environment for name in names) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    job, nodes, tasks, index = (_number(name, environment[name]) for name in (names[0], *names[2:]))
    # "node[001,007-015],other" and the like: the first name is the prefix and what follows the bracket.
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environment["SLURM_STEP_NODELIST"])
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {environment['SLURM_STEP_NODELIST']!r}, expected names of nodes")
    port = environment.get("VPAE_PORT") or 61440 + job % 4096  # the same on all nodes, another one for each job
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    bound = visible != "" and "," not in visible
    local = environment.get("SLURM_LOCALID") if tasks > nodes and not bound else None
    devices = None if local is None else (_number("SLURM_LOCALID", local),)
    return ProcessSpec(f"{found[1]}{found[2] or ''}:{port}", tasks, index, devices, environment.get(SECRET, ""))


def _number(name: str, value: str | int | None) -> int:
    if not str(value).isdecimal():
        raise UserError(f"{name} is {value!r}, expected a whole number")
    return int(str(value))


@contextmanager
def joined(where: Where, seconds: int = START_SECONDS) -> Iterator[None]:
    """Joins the other processes, keeps watch while the body runs, and leaves when all are done.

    Args:
      where: this process; None for a run of one process, which needs nothing of this.
      seconds: how long to wait for the others at the start.

    Raises:
      UserError: the others did not come.
    """
    if where is None:
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    last = LastWords(where.name if isinstance(where, ProcessSpec) else "this process")
    try:
        _initialize(where, seconds)
        with Watch(processes.client(), jax.process_index(), jax.process_count(), last):
            yield
            processes.wait_for_all("end")
    finally:
        last.unsay()
    jax.distributed.shutdown()


def _initialize(where: ProcessSpec | Literal["automatic"], seconds: int) -> None:
    options: dict[str, Any] = {
        "initialization_timeout": seconds,
        "heartbeat_timeout_seconds": JAX_SILENCE,
        "shutdown_timeout_seconds": 60,
    }
    if isinstance(where, ProcessSpec):
        meet(where, seconds)
        options |= {"cluster_detection_method": "deactivate", "local_device_ids": where.devices}
        jax.distributed.initialize(where.address, where.count, where.index, **options)
        return
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:  # how JAX says that it detects nothing
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--detect_cluster: JAX finds no cluster here ({reason}); give --coordinator, --num_processes and "
            "--process_id, or leave it out on a single host"
        ) from error


class Watch:
    """Ends this process, in one line, soon after another one is gone or has failed.

    As a context manager it tells the others when its body fails, and ends this process then: Python's own exit would
    wait for them.

    Args:
      client: of the coordination service.
      index, count: which of how many processes this is.
      last: silenced before this process ends with a line of its own.
    """

    def __init__(self, client: Any, index: int, count: int, last: LastWords):
        self.client, self.index, self.count, self.last = client, index, count, last
        self.lock = threading.Lock()  # of what this process says of itself
        self.beats = 0
        self.heard = {other: ("", time.monotonic()) for other in range(count) if other != index}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._beat()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._stop(DONE)
            return
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            self._blame(AFTER_ERROR)
            traceback.print_exception(error)
        self._stop(f"{FAILED}{_first_line(error)}")
        self._exit(EXIT_BAD_INPUT if isinstance(error, UserError) else 1)

    def _watch(self) -> None:
        while not self.over.wait(BEAT):
            self._beat()
            if lost := self._lost(SILENCE):
                self._end(lost)

    def _blame(self, seconds: float) -> None:
        """After a failed computation: whether another process is the reason. Does not return if one is."""
        deadline = time.monotonic() + seconds + BEAT
        while time.monotonic() < deadline:
            if lost := self._lost(seconds):
                self._end(lost)
            time.sleep(BEAT / 4)

    def _beat(self) -> None:
        with self.lock:
            if not self.over.is_set():
                self.beats += 1
                self._say(str(self.beats))

    def _stop(self, state: str) -> None:
        with self.lock:
            self.over.set()
            self._say(state)
        self.thread.join(2 * BEAT)

    def _say(self, state: str) -> None:
        self._ask(partial(self.client.key_value_set, f"{SIGNS}{self.index}", state, allow_overwrite=True))

    def _ask(self, call: Callable[[], T]) -> T:
        """What the coordination service answers. Without one this process ends, and its last words are the shell's."""
        try:
            return call()
        except jax.errors.JaxRuntimeError:
            os._exit(EXIT_LOST)

    def _lost(self, silence: float) -> str | None:
        """What is wrong with another process, or None."""
        found = self._ask(partial(self.client.key_value_dir_get, SIGNS))
        signs = {int(key.rsplit("/", 1)[1]): sign for key, sign in found}
        now = time.monotonic()
        for other, (before, since) in self.heard.items():
            sign = signs.get(other, "")
            if sign.startswith(FAILED):
                return f"process {other} of {self.count} failed ({sign.removeprefix(FAILED)})"
            if sign != before or sign == DONE:
                self.heard[other] = (sign, now)
            elif now - since > silence:
                return f"process {other} of {self.count} is gone: no sign of life for {now - since:.0f} s"
        return None

    def _end(self, reason: str) -> None:
        """Ends this process at once: its main thread may wait for the lost one for ever."""
        print(f"error: {reason}; process {self.index} stops too; {AGAIN}", file=sys.stderr, flush=True)
        self._exit(EXIT_LOST)

    def _exit(self, status: int) -> NoReturn:
        sys.stdout.flush()
        self.last.unsay()
        if self.index == 0:
            time.sleep(LINGER)
        os._exit(status)


class LastWords:
    """A line that is printed if this process ends without having said `unsay`, even by SIGKILL.

    Args:
      name: of the process.
    """

    def __init__(self, name: str):
        line = f"error: {name} was ended from outside: killed, out of memory, or its coordinator is gone; {AGAIN}"
        # The shell reads until its parent writes a word, or is no more.
        command = ["/bin/sh", "-c", 'read -r word || printf "%s\\n" "$0" >&2', line]
        self.shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self.lock = threading.Lock()

    def unsay(self) -> None:
        """Nothing is printed any more."""
        with self.lock:
            if self.shell.returncode is None:
                self.shell.communicate(b"over\n")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
