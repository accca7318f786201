"""`python -m vpae_jax.serve`: bad input in one line, a port that is taken, and how it ends."""

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from vpae_jax import serve
from vpae_jax.serving.server import address, bind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"compare": "tiny"}, "--compare='tiny': expected NAME=DIR"),
        ({"compare": "student=tiny:x:1"}, "--compare='student=tiny:x:1': expected NAME=DIR"),
        ({"compare": "teacher=tiny"}, "two rows are named 'teacher'"),
        ({"compare": "student=tiny:4,1:1"}, "this model is not causal"),
        ({"port": 65536}, "--port=65536: expected a number from 0 (any that is free) to 65535"),
        ({"host": "192.0.2.1"}, "--host=192.0.2.1: "),
        ({"host": "host.invalid"}, "--host=host.invalid: "),
        ({"devices": 99}, "--devices=99: this process has 8"),
        ({"generate": "never"}, "--generate"),
        ({"decoder": "/nowhere", "port": 0}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(program, options, message):
    code, _, err = program(serve.main, **options)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_port_that_is_taken_is_named(program):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, out, err = program(serve.main, port=port)
    assert code == 2 and not out  # before anything is loaded
    assert err == f"error: --port={port}: Address already in use; choose another, or 0 for any free port\n"


def test_what_the_extra_brings_is_named(program, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = program(serve.main)
    assert code == 2
    assert err == 'error: starlette and uvicorn: not installed; run pip install "vpae_jax[serve]"\n'


def test_the_network_is_a_note(program):
    code, out, err = program(serve.main, host="0.0.0.0", port=0, decoder="/nowhere")
    assert code == 2 and out.startswith("http://0.0.0.0:")
    assert err.startswith("note: --host=0.0.0.0 lets everyone who reaches this machine use the page")


def test_addresses():
    with bind("localhost", 0) as listening:
        assert address(listening).startswith(("http://127.0.0.1:", "http://[::1]:"))


# Where tests run in the background, Ctrl-C is ignored, and so it is by what they start.
PROGRAM = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("vpae_jax.serve", run_name="__main__")
"""


@contextmanager
def started(folder, *flags):
    """The program in a process of its own, with its temporary files in a folder."""
    command, pipe = [sys.executable, "-u", "-c", PROGRAM, "--port=0", *flags], subprocess.PIPE
    env = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process, beginning):
    """The lines up to one."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError((lines, process.stderr.read()))


def left_in(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith("vpae_jax-")]


def test_ctrl_c_while_loading(tmp_path):
    with started(tmp_path) as process:
        until(process, "http://127.0.0.1:")
        assert left_in(tmp_path)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (130, "interrupted; what was saved is kept\n")
    assert not left_in(tmp_path)


@pytest.mark.long
def test_sigterm_while_a_clip_is_made(tmp_path):
    """It says what it does; at the end nothing is left behind."""
    with started(tmp_path, "--compare=student=tiny:1:1") as process:
        lines = [line for line in until(process, "ready: ") if not line.endswith(" so far\n")]
        netloc = urlsplit(lines[0].split()[0]).netloc
        assert lines[0] == f"http://{netloc}/ (loading; the page shows how far)\n"
        assert lines[-1] == f"ready: http://{netloc}/ (Ctrl-C ends)\n"
        compiling = [f"{name}: compiling, and making a clip ...\n" for name in ("teacher", "student")]
        assert [line for line in lines if line.endswith(" ...\n")] == ["reading tiny ...\n", *compiling]
        assert sum(line.endswith(" s per clip\n") for line in lines) == 2 and "in the warm-up" in lines[-2]
        connection = http.client.HTTPConnection(netloc)
        request = {"page": "p", "prompt": "a three", "models": {"teacher": {"steps": 99}}}
        connection.request("POST", "/requests", json.dumps(request))
        assert connection.getresponse().status == 202  # the connection stays open
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
        connection.close()
    assert (process.returncode, err) == (0, "")
    assert not left_in(tmp_path)
