"""Chips, names of topologies, and the lines that bad ones end in."""

import subprocess
import sys
from pathlib import Path

import pytest

from vpae_jax.planning import topology
from vpae_jax.planning.chips import CHIPS, GIB
from vpae_jax.planning.topology import parse
from vpae_jax.types import UserError


@pytest.mark.parametrize(
    ("name", "chip", "shape"),
    [
        ("v5p:2x2x4", "v5p", (2, 2, 4)),
        ("v6e:16x16", "v6e", (16, 16)),
        ("tpu7x:4x4x4", "tpu7x", (4, 4, 4)),
        ("h100:8", "h100", (8,)),
        ("h20:32", "h20", (32,)),
        ("b200:4", "b200", (4,)),
    ],
)
def test_names(name, chip, shape):
    parsed = parse(name)
    assert (parsed.chip.name, parsed.shape, parsed.name) == (chip, shape, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:2x2", r"topology 'v5q:2x2': unknown chip 'v5q'; did you mean 'v5p'\?"),
        ("pentium:8", r"topology 'pentium:8': unknown chip 'pentium'; known: b200, h100, .*v6e"),
        ("v5p:2x2", r"topology 'v5p:2x2': expected 3 sizes after the colon, such as v5p:4x4x4"),
        ("v6e", r"topology 'v6e': expected 2 sizes after the colon, such as v6e:4x4"),
        ("v6e:0x4", "expected 2 sizes"),
        ("h100:8x8", r"topology 'h100:8x8': expected 1 sizes after the colon, such as h100:8"),
        ("h100:12", r"topology 'h100:12': GPUs come in hosts of 8; give a multiple of 8"),
    ],
)
def test_bad_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        parse(name)
    assert "\n" not in str(error.value)


def test_gpus_of_a_host_and_of_hosts():
    assert parse("h100:4").hosts == (1, 4)
    assert parse("h100:8").hosts == (1, 8)
    assert parse("h20:32").hosts == (4, 8)


def test_figures_are_of_the_right_size():
    for chip in CHIPS.values():
        assert 8 * GIB < chip.capacity <= chip.memory < 256 * GIB
        assert 1e14 < chip.flops < 1e16
        # A byte of HBM is worth tens to hundreds of FLOPs, a byte of a link more than one of HBM.
        assert 30 < chip.flops / chip.bandwidth < 1000
        assert chip.network < chip.link < chip.bandwidth
        assert (chip.gpu is None) == (chip.platform == "tpu")
    # Two devices are one chip of TPU7x: 192 GiB, 2307 TFLOP/s, 7.38 TB/s.
    assert 2 * CHIPS["tpu7x"].memory == 192 * GIB
    assert 2 * CHIPS["tpu7x"].flops == 2307e12


def test_a_gpu_is_described_to_its_compiler():
    text = topology.target_config(CHIPS["h20"])
    assert "core_count: 78 " in text and "memory_bandwidth: 4000000000000 " in text and "major: 9 minor: 0" in text
    assert text.count("{") == text.count("}")
    assert "major: 10 minor: 0" in topology.target_config(CHIPS["b200"])


def test_missing_modules_are_noticed_without_importing_them():
    assert topology.installed("jax")
    assert not topology.installed("nowhere")
    assert not topology.installed("nowhere.nothing")
    assert "jax.experimental.jax2tf" not in sys.modules and topology.installed("jax.experimental.jax2tf")


@pytest.mark.parametrize(
    ("name", "module", "package"), [("v5e:2x2", "libtpu", r"jax\[tpu\]"), ("h100:8", "jax_plugins", r"jax\[cuda12\]")]
)
def test_a_missing_compiler_is_named(name, module, package, monkeypatch):
    find = topology.importlib.util.find_spec
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda m: None if m.startswith(module) else find(m))
    with pytest.raises(UserError, match=rf"planning for {name} needs .*pip install '{package}==") as error:
        topology.prepare(parse(name))
    assert "\n" not in str(error.value)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vpae_jax.plan", "--config=configs/phase1.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, cwd=Path(__file__).parents[2]
    )


def test_a_slice_that_does_not_exist_is_one_line():
    ended = run("--topology=v5e:3x3")
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: topology 'v5e:3x3' is not supported by its compiler: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--topology=v9:2"], "error: topology 'v9:2': unknown chip 'v9'"),
        (["--topology=v5e:2x2", "--frames=10"], "error: --frames is 10, expected one more than a multiple of 4"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "error: config.mesh: "),
        (["--topology=v5e:2x2", "--config.nothing=3"], "error: config.nothing: unknown key"),
    ],
)
def test_bad_input_is_one_line(arguments, line):
    ended = run(*arguments)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith(line), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
