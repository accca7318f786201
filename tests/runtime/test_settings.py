"""Which process this is, from flags or the environment; whom a process meets; which clips it prepares."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from running import free_port

from vpae_jax.config import MeshConfig
from vpae_jax.runtime.distributed import find
from vpae_jax.runtime.rendezvous import ProcessSpec, meet
from vpae_jax.sharding import make_mesh, own_rows, put_batch, put_rows
from vpae_jax.tasks.digits.batches import pixel_batches
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import PixelBatch, UserError

JAX = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[07,09-11],other",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_one_process_needs_no_settings():
    assert find({}) is None
    assert find({**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_flags_come_before_the_environment_and_that_before_slurm():
    assert find({**JAX, **SLURM}, "a:1", 2, 0) == ProcessSpec("a:1", 2, 0)
    assert find({**JAX, **SLURM}) == ProcessSpec("node0:1234", 4, 3)
    assert find(SLURM) == ProcessSpec("node07:61445", 2, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a1,b2", "a1"),
        ("gpu-[3-7]", "gpu-3"),
        ("n[01,05]", "n01"),
        ("x[1-2],y", "x1"),
        ("h.d-1,z", "h.d-1"),
    ],
)
def test_the_coordinator_is_slurms_first_node(nodes, first):
    process = find({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert process is not None and process.endpoint == (first, 61445)


def test_several_tasks_on_a_node_have_a_device_each():
    shared = find({**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"})
    assert shared is not None and shared.devices == (2,)


def test_a_task_that_is_bound_to_its_device_has_all_that_it_sees():
    """As with --gpus-per-task: the only device that is left is the first one, whichever place the task has."""
    task = {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}
    bound, free = (find({**task, "CUDA_VISIBLE_DEVICES": visible}) for visible in ("3", "0,1,2,3"))
    assert bound is not None and bound.devices is None
    assert free is not None and free.devices == (2,)


def test_a_job_that_is_no_step_is_one_process():
    assert find({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert find({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, ("a:1", None, 0), "--num_processes: missing; give --coordinator, --num_processes, --process_id together"),
        ({"JAX_PROCESS_ID": "1"}, (), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES: missing"),
        ({**JAX, "JAX_PROCESS_ID": "4"}, (), "process_id is 4 of num_processes 4; expected 0 to 3"),
        ({**JAX, "JAX_NUM_PROCESSES": "four"}, (), "JAX_NUM_PROCESSES is 'four', expected a whole number"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "node0"}, (), "coordinator 'node0': expected HOST:PORT"),
        ({**SLURM, "SLURM_PROCID": ""}, (), "SLURM_PROCID is '', expected a whole number"),
    ],
)
def test_bad_settings_are_named(environment, flags, message):
    with pytest.raises(UserError) as error:
        find(environment, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def together(*processes: ProcessSpec, seconds: int = 500) -> list[str]:
    """What `meet` says to each of several at once; nothing is good."""
    said = [""] * len(processes)

    def one(i: int, process: ProcessSpec) -> None:
        try:
            meet(process, seconds)
        except UserError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_all_meet_in_any_order_twice():
    address = f"localhost:{free_port()}"
    processes = [ProcessSpec(address, 4, index) for index in (2, 0, 3, 1)]
    for _ in range(2):  # the port is free again at once
        assert together(*processes) == [""] * 4


def test_two_that_are_the_same_or_count_differently_are_told():
    address = f"localhost:{free_port()}"
    same = together(ProcessSpec(address, 3, 0), ProcessSpec(address, 3, 1), ProcessSpec(address, 3, 1))
    assert "two processes have process_id 1; give each a different one, from 0 to 2" in same[0]
    assert all(same)
    other = together(ProcessSpec(address, 2, 0), ProcessSpec(address, 3, 1))
    assert (
        other[0] == other[1] == "process 1 was started with 3 processes, but process 0 with 2; give all the same number"
    )


def test_who_is_missing_is_named():
    address = f"localhost:{free_port()}"
    (said,) = together(ProcessSpec(address, 3, 0), seconds=1)
    assert "process 0 of 3: waited 1 s at localhost" in said and "process 1, 2 did not appear" in said
    (said,) = together(ProcessSpec(address, 3, 2), seconds=1)
    assert said.startswith("process 2 of 3: waited 1 s for the coordinator localhost")


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        (said,) = together(ProcessSpec(f"localhost:{port}", 2, 0), seconds=1)
    assert f"cannot listen on port {port}" in said and "choose another coordinator port" in said


def test_strangers_at_the_port_are_ignored():
    port = free_port()
    stop = threading.Event()

    def knock() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("localhost", port), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                pass
            stop.wait(0.05)

    stranger = threading.Thread(target=knock)
    stranger.start()
    try:
        assert together(ProcessSpec(f"localhost:{port}", 2, 0), ProcessSpec(f"localhost:{port}", 2, 1)) == ["", ""]
    finally:
        stop.set()
        stranger.join()


@contextmanager
def dribbling(connected: Callable[[], socket.socket]) -> Iterator[None]:
    """Somebody who sends a byte now and then, and never a line end."""
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            try:
                with connected() as peer:
                    while not stop.wait(0.02):
                        peer.sendall(b"v")
            except OSError:  # the port is not open, or no longer
                stop.wait(0.02)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_one_that_never_ends_its_greeting_is_not_waited_for():
    port = free_port()
    with dribbling(lambda: socket.create_connection(("localhost", port), timeout=1)):
        assert together(ProcessSpec(f"localhost:{port}", 2, 0), ProcessSpec(f"localhost:{port}", 2, 1)) == ["", ""]
        (said,) = together(ProcessSpec(f"localhost:{port}", 2, 0), seconds=1)
    assert said.startswith("process 0 of 2: waited 1 s at localhost") and "process 1 did not appear" in said


def test_a_coordinator_that_never_ends_its_answer_is_not_waited_for():
    with socket.create_server(("localhost", 0)) as server:
        server.settimeout(0.1)
        with dribbling(lambda: server.accept()[0]):
            (said,) = together(ProcessSpec(f"localhost:{server.getsockname()[1]}", 2, 1), seconds=1)
    assert said.startswith("process 1 of 2: waited 1 s for the coordinator localhost")


def greet(port: int, index: int, proof: str) -> None:
    """What a stranger does who knows how processes speak, and not what they know."""
    while True:
        with suppress(OSError), socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(f"vpae {index} 2 number\n".encode())
            stranger.recv(1000)
            stranger.sendall(f"{proof}\n".encode())
            assert stranger.recv(1000) == b"", "rejected"
            return


@pytest.mark.parametrize("proof", ["", "0" * 64, ProcessSpec("a:1", 2, 1).proof("other", 1, 2, "number", ""), "\u00e9"])
def test_who_does_not_know_the_secret_is_no_process(proof):
    port = free_port()
    stranger = threading.Thread(target=greet, args=(port, 1, proof))
    stranger.start()

    def late() -> None:
        stranger.join()
        said.extend(together(ProcessSpec(f"localhost:{port}", 2, 1, secret="secret")))

    said: list[str] = []
    other = threading.Thread(target=late)
    other.start()
    said += together(ProcessSpec(f"localhost:{port}", 2, 0, secret="secret"))
    other.join()
    assert said == ["", ""]


def test_processes_of_two_jobs_do_not_meet():
    address = f"localhost:{free_port()}"
    jobs = ProcessSpec(address, 2, 0, secret="one"), ProcessSpec(address, 2, 1, secret="another")
    first, other = together(*jobs, seconds=2)
    assert "process 1 did not appear (" in first and " connections that did not belong to this job" in first
    assert "the program that answers there has another VPAE_SECRET" in other
    assert "another" not in repr(jobs[1])


def test_the_secret_comes_from_the_environment():
    secret = {"VPAE_SECRET": "word"}
    for environment in (JAX, SLURM):
        known, unknown = find({**environment, **secret}), find(environment)
        assert known is not None and unknown is not None and (known.secret, unknown.secret) == ("word", "")


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 4, 5], [0, 5]])
def test_some_rows_are_those_of_the_whole_batches(rows):
    clips = MovingDigits("train", size=10, frames=5, resolution=16)
    whole, part = pixel_batches(clips, 6, seed=3), pixel_batches(clips, 6, seed=3, rows=rows)
    for _ in range(5):  # three epochs; batches cross their ends
        np.testing.assert_array_equal(next(part).video, next(whole).video[np.array(rows)])
    assert part.get_state() == whole.get_state(), "a position holds for any share"
    other = pixel_batches(clips, 6, seed=3, rows=[2])
    other.set_state(whole.get_state())
    np.testing.assert_array_equal(next(other).video, next(whole).video[2:3])


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"data": 2, "context": 2, "tensor": 2}, {"tensor": 8}])
def test_rows_lie_where_a_whole_batch_would(axes):
    mesh: Mesh = make_mesh(MeshConfig(**{"fsdp": 1, **axes}))
    batch = PixelBatch(jax.random.normal(jax.random.key(0), (8, 1, 2, 2, 3)))
    assert own_rows(mesh, 8) == list(range(8)), "one process has all devices"
    placed, expected = put_rows(batch, mesh, 8), put_batch(batch, mesh)
    assert placed.video.sharding.is_equivalent_to(expected.video.sharding, 5)
    np.testing.assert_array_equal(placed.video, expected.video)
