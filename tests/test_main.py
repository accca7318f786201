"""The training program from outside: bad input is one line, status 2, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from vpae_jax.config import parse
from vpae_jax.configs import phase1, phase2
from vpae_jax.run.experiment import run
from vpae_jax.types import UserError

ROOT = Path(__file__).parent.parent


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vpae_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# Each starts a program; one of a kind does so in every run of the tests.
BAD_COMMAND_LINES = {
    "misspelt key": (
        ["--config=configs/phase1.py", "--config.stepps=3"],
        ["config.stepps: unknown key; did you mean 'steps'?"],
    ),
    "Python's word": (
        ["--config=configs/phase1.py", "--config.method.lambda=5"],
        ["config.method.lambda: unknown key", "ema"],
    ),
    "misspelt key of a part": (
        ["--config", "configs/phase1.py", "--config.data.clip", "5"],
        ["config.data.clip: unknown key", "'clips'"],
    ),
    "misspelt role": (
        ["--config=configs/phase1.py", "--config.optimizers.generater.b1=0"],
        ["did you mean 'generator'?"],
    ),
    "key of a value": (
        ["--config=configs/phase1.py", "--config.steps.x=5"],
        ["config.steps: is a value and has no key 'x'"],
    ),
    "a part": (
        ["--config=configs/phase1.py", "--config.method=lcm"],
        ["config.method: is a group", "set one of these"],
    ),
    "no key": (["--config=configs/phase1.py", "--config.=3"], ["config.: unknown key"]),
    "negative seed": (
        ["--config=configs/phase1.py", "--config.seed=-1"],
        ["config: seed is -1, expected a number from 0 to 429"],
    ),
    "large seed": (
        ["--config=configs/phase1.py", "--config.data.seed=4294967296"],
        ["config.data: seed is 4294967296"],
    ),
    "shorter than the warm-up": (
        ["--config=configs/phase2.py", "--config.steps=10"],
        ["raise config.steps, or lower config.method.disc_warm"],
    ),
    "infinite": (["--config=configs/phase1.py", "--config.sample_guidance=inf"], ["config.sample_guidance", "inf"]),
    "unknown preset": (["--config=configs/phase1.py:tinny"], ["tinny", "tiny"]),
    "no such config": (["--config=configs/phase9.py"], ["configs/phase9.py"]),
    "ill-typed value": (
        ["--config=configs/phase1.py", "--config.steps=many"],
        ["--config.steps=many: expected a whole num"],
    ),
    "preset is no key": (["--config=configs/phase1.py", "--config.preset=tiny"], ["preset"]),
    "key of another kind": (
        ["--config=configs/phase2.py", "--config.method.noise.t.mean=.5"],
        ["config.method.noise.t", "mean=0.5", "kind 'uniform'"],
    ),
    "value out of range": (
        ["--config=configs/phase2.py", "--config.checkpoint_every=0"],
        ["checkpoint_every is 0", "at least 1"],
    ),
    "no path": (
        ["--config=configs/phase1.py", "--workdir=gs://bucket/run"],
        ["gs://bucket/run: an address", "mounted path"],
    ),
}
OF_EVERY_RUN = ("misspelt key", "Python's word", "infinite", "no such config", "no path")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(*given, id=name, marks=[pytest.mark.long] * (name not in OF_EVERY_RUN))
        for name, given in BAD_COMMAND_LINES.items()
    ],
)
def test_a_bad_command_line_is_one_line(arguments, words, tmp_path):
    result = train(f"--workdir={tmp_path / 'run'}", *arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()


def test_phase_two_without_phase_one_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"phase2 starts from the previous phase.*configs/phase1.py:tiny --workdir="):
        run(parse(phase2.get_config()), tmp_path / "phase2")
    assert not (tmp_path / "phase2").exists()


def test_a_model_directory_that_is_not_there_is_named(tmp_path):
    config = phase1.get_config()
    config.model.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        run(parse(config), tmp_path / "phase1")
    assert not (tmp_path / "phase1").exists()


def test_a_batch_that_does_not_divide_is_named(tmp_path):
    config = phase1.get_config()
    config.batch_size = 12
    with pytest.raises(UserError, match=r"config.batch_size is 12, expected a multiple of 8"):
        run(parse(config), tmp_path / "phase1")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("taps", (3, 9), r"config.networks.heads.taps are \(3, 9\), but the transformer has 6 blocks"),
        ("width", 96, "config.networks.heads.width is 96, but the transformer's is 192"),
        ("kind", "mlp", "heads: kind is 'mlp'|config.networks.heads.kind: 'mlp' is not one of"),
    ],
)
def test_heads_that_do_not_fit_are_named(tmp_path, key, value, message):
    config = phase2.get_config()
    config.networks.heads[key] = value
    with pytest.raises(UserError, match=message):
        run(parse(config), tmp_path / "phase2")
    assert not (tmp_path / "phase2").exists()


@pytest.mark.parametrize("preset", ["", ":i2v-14b-720p"])
def test_help_lists_every_key_of_the_config_with_its_value_and_meaning(preset):
    result = train(f"--config=configs/phase2.py{preset}", "--help")
    assert result.returncode == 0 and not result.stderr
    text = " ".join(result.stdout.split())
    assert "Trains one phase." in text and "--workdir" in text
    expected = {
        "steps": "training steps in total.",
        "method.disc_warmup": "number of first steps in which only the discriminator is trained.",
        "method.ema": "decay of the generator's average",
        "method.csds.guidance": "of the teacher; 1 saves one evaluation.",
        "optimizers.generator.learning_rate": "peak learning rate.",
        "networks.heads.width": "",
        "data.max_bad": "maximum tolerated fraction of corrupt records",
    }
    values = config_dict_values(phase2.get_config(*([preset[1:]] if preset else [])))
    for key, value in values.items():
        assert f" {key} = {value!r} " in text
    for key, meaning in expected.items():
        assert f" {key} = {values[key]!r} {meaning}" in text, key


def config_dict_values(config, prefix=""):
    found = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            found |= config_dict_values(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_help_without_a_config_says_how_to_see_its_keys():
    result = train("--help")
    assert result.returncode == 0 and "With --config=FILE.py[:PRESET], --help lists the config's keys" in result.stdout
