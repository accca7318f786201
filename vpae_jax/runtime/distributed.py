"""One run on many processes: how they find each other, and how all end if one of them dies.

    where = distributed.find(os.environ, coordinator, num_processes, process_id)
    with distributed.joined(where):
        ...

Flags take precedence, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then the variables of a SLURM
step. `AUTOMATIC` leaves it to JAX, which queries the services of a TPU pod. Launchers set VPAE_SECRET to the same value
for all processes of a job, so that they can authenticate each other.

If a process dies, the others end too: each sends a heartbeat to the coordination service every `BEAT` seconds and
checks those of the others. JAX does the same, but ends with a page of text, so our check has a shorter timeout and
prints one line about what happened. The exception is the death of the coordinator: JAX then ends the others at once,
even while they are printing. In that case, and after SIGKILL, the line is printed by a shell that waits for its parent
to exit.
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
BEAT, SILENCE = 2.0, 30.0  # seconds between heartbeats, and without one until a process counts as lost
AFTER_ERROR = 10.0  # the latter after a failed computation, which is often caused by a lost process
JAX_SILENCE = 50  # seconds until JAX's own check ends everything, as a fallback
LINGER = 3 * BEAT  # the coordinator exits last, or JAX would end the others with its page of text
EXIT_LOST = 75  # "try again later" (sysexits.h)
AGAIN = "run the same command again to resume from the newest checkpoint"
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
    """Determines this process's place in the run, from flags or the environment; None for a run of one process.

    Raises:
      UserError: some of the settings are missing or invalid.
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
    """Returns the index of this process and the number of processes that divide some work without communicating, from
    flags or the environment. Each process uses separate devices.

    Raises:
      UserError: only one of the two flags is given, or the index is out of range.
    """
    index, count = process_id, num_processes
    if index is None and count is None:
        where = find(environment)
        if where is None:
            return 0, 1
        if where.devices is not None:  # several processes on one host, each of which would claim all of its GPUs
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
    """Returns the task of a step started by `srun`. If a node has one task, the task uses all of its devices. Otherwise
    each task uses one: the only one it sees if SLURM has bound it, else the one with the task's local id."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in environment for name in names) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    job, nodes, tasks, index = (_number(name, environment[name]) for name in (names[0], *names[2:]))
    # For example "node[001,007-015],other": the first name is the prefix plus the first item in brackets.
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environment["SLURM_STEP_NODELIST"])
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {environment['SLURM_STEP_NODELIST']!r}, expected names of nodes")
    port = environment.get("VPAE_PORT") or 61440 + job % 4096  # the same on all nodes, different for each job
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
    """Joins the other processes, monitors them while the body runs, and leaves when all are done.

    Args:
      where: this process's place; None for a run of one process, for which this does nothing.
      seconds: how long to wait for the others at startup.

    Raises:
      UserError: some of the others did not appear.
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
    except (ValueError, RuntimeError) as error:  # JAX raises these if it detects nothing
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--detect_cluster: JAX finds no cluster here ({reason}); give --coordinator, --num_processes and "
            "--process_id instead, or none of them on a single host"
        ) from error


class Watch:
    """Ends this process with one line soon after another one is lost or has failed.

    As a context manager, it informs the others if its body fails, and then ends this process, because Python's normal
    exit would wait for them.

    Args:
      client: client of the coordination service.
      index, count: index of this process, and number of processes.
      last: silenced before this process ends with its own line.
    """

    def __init__(self, client: Any, index: int, count: int, last: LastWords):
        self.client, self.index, self.count, self.last = client, index, count, last
        self.lock = threading.Lock()  # guards the state that this process publishes
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
        """After a failed computation, checks whether another process is the cause. Does not return if one is."""
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
        """Calls the coordination service. If it is gone, this process ends, and the shell prints the line."""
        try:
            return call()
        except jax.errors.JaxRuntimeError:
            os._exit(EXIT_LOST)

    def _lost(self, silence: float) -> str | None:
        """Returns a description of another process that is lost or has failed; else None."""
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
                return f"process {other} of {self.count} is gone: no heartbeat for {now - since:.0f} s"
        return None

    def _end(self, reason: str) -> None:
        """Ends this process at once, since its main thread may wait forever for the lost one."""
        print(f"error: {reason}; process {self.index} stops too; {AGAIN}", file=sys.stderr, flush=True)
        self._exit(EXIT_LOST)

    def _exit(self, status: int) -> NoReturn:
        sys.stdout.flush()
        self.last.unsay()
        if self.index == 0:
            time.sleep(LINGER)
        os._exit(status)


class LastWords:
    """A line that is printed if this process ends without calling `unsay`, even by SIGKILL.

    Args:
      name: name of the process, for the line.
    """

    def __init__(self, name: str):
        line = f"error: {name} was ended from outside: killed, out of memory, or its coordinator is gone; {AGAIN}"
        # The shell reads until its parent writes a word or exits.
        command = ["/bin/sh", "-c", 'read -r word || printf "%s\\n" "$0" >&2', line]
        self.shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self.lock = threading.Lock()

    def unsay(self) -> None:
        """Cancels the line."""
        with self.lock:
            if self.shell.returncode is None:
                self.shell.communicate(b"over\n")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
