"""The queue: order, places, and requests that are superseded."""

import threading

import pytest

from vpae_jax.flow.sampler import Sampler
from vpae_jax.serving import jobs
from vpae_jax.serving.jobs import Full, JobQueue, Outcome
from vpae_jax.serving.limits import Asked


def asked(page, prompt="a"):
    return Asked(page, prompt, 0, None, {"teacher": Sampler(), "student": Sampler()})


def state(queue, job):
    return queue.look_up(job.name)["state"]


def ahead(queue, job):
    return queue.look_up(job.name)["ahead"]


def test_jobs_are_taken_in_their_order():
    queue = JobQueue()
    added = [queue.add(asked(page)) for page in "abc"]
    assert [ahead(queue, job) for job in added] == [0, 1, 2]
    assert queue.take() is added[0]
    assert [state(queue, job) for job in added] == ["running", "waiting", "waiting"]
    assert [ahead(queue, job) for job in added] == [0, 1, 2]
    queue.finish(added[0])
    assert state(queue, added[0]) == "done" and [ahead(queue, job) for job in added[1:]] == [0, 1]
    assert queue.take() is added[1]


def test_a_newer_request_takes_the_place_of_the_waiting_one():
    queue = JobQueue()
    first = queue.add(asked("a", "a th"))
    other = queue.add(asked("b"))
    second = queue.add(asked("a", "a three"))
    assert state(queue, first) == "superseded"
    assert ahead(queue, second) == 0 and ahead(queue, other) == 1
    assert queue.take() is second
    queue.finish(second)
    assert queue.take() is other


def test_a_newer_request_ends_the_running_one():
    queue = JobQueue()
    first = queue.add(asked("a"))
    assert queue.take() is first and queue.goes_on(first)
    second, other = queue.add(asked("a")), queue.add(asked("b"))
    assert not queue.goes_on(first) and state(queue, first) == "superseded"
    queue.finish(first)
    assert state(queue, first) == "superseded"
    assert queue.take() is second and queue.goes_on(second)
    assert ahead(queue, other) == 1


def test_a_full_queue_takes_no_more_pages():
    queue = JobQueue(places=2)
    queue.add(asked("a"))
    queue.add(asked("b"))
    with pytest.raises(Full, match="the queue is full: 2 requests are waiting; try again in a moment"):
        queue.add(asked("c"))
    newer = queue.add(asked("a"))  # in the place of its older one
    running = queue.take()
    assert running is newer
    assert ahead(queue, queue.add(asked("c"))) == 2


def test_outcomes_are_told():
    queue = JobQueue()
    job = queue.add(asked("a"))
    waiting = {"state": "waiting", "clip": None, "error": None}
    assert queue.look_up(job.name)["clips"] == [{"model": name, **waiting} for name in ("teacher", "student")]
    queue.report(queue.take(), "student", Outcome("failed", error="why"))
    assert queue.look_up(job.name)["clips"][1] == {
        "model": "student",
        "state": "failed",
        "clip": None,
        "error": "why",
    }
    assert queue.look_up("unknown") is None


def test_old_results_leave_and_waiting_jobs_stay(monkeypatch):
    monkeypatch.setattr(jobs, "MAX_KEPT", 3)
    queue = JobQueue()
    waiting = queue.add(asked("w"))
    done = [queue.add(asked("a")) for _ in range(5)]
    found = [queue.look_up(job.name) is not None for job in (waiting, *done)]
    assert found == [True, False, False, False, True, True]


def test_closing_wakes_the_worker():
    queue, taken = JobQueue(), []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.close()
    thread.join()
    assert taken == [None]
    queue.add(asked("a"))
    assert queue.take() is None
