"""Commands that documents, configs and messages give are read by the programs that they name: no key, flag, config or
value in them is unknown."""

import ast
import re
import shlex
import warnings
from pathlib import Path

import pytest
from absl import flags
from config_files import CONFIGS, OPENINGS
from ml_collections import config_flags

from vpae_jax import evaluate, sample
from vpae_jax.config import parse
from vpae_jax.methods import make_method
from vpae_jax.train.roles import check_roles
from vpae_jax.types import UserError

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"python -m vpae_jax\.(main|evaluate|sample) [^`\n#]*")
PARSERS = {"evaluate": evaluate.parser, "sample": sample.parser}


def commands(text):
    """Every command in a text, as its words; a line that ends in a backslash goes on."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [(match[1], shlex.split(match[0])[3:]) for match in COMMAND.finditer(joined)]


def opened(words):
    """What a training program makes of its words: an experiment and its method."""
    (chosen,) = [word for word in words if word.startswith("--config=")]
    module, _, preset = chosen.removeprefix("--config=configs/").partition(".py")
    preset = preset.removeprefix(":")
    config = CONFIGS[module].get_config(*([preset] if preset not in ("", "[:PRESET]") else []))
    changes = [word for word in words if word.startswith("--config.") and not word.endswith(("KEY=VALUE", "..."))]
    values = flags.FlagValues()
    argv = ["main", *changes]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    experiment = parse(holder.value)
    return experiment, make_method(experiment.method)


def check(program, words):
    if program == "main":
        experiment, method = opened(words)
        check_roles(method, experiment.optimizers)
    else:
        PARSERS[program]().parse_args([word for word in words if not word.startswith("[")])


def found():
    for path in [ROOT / "docs" / "methods.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))]:
        for number, command in enumerate(commands(path.read_text())):
            yield pytest.param(*command, id=f"{path.name} {number}")
    for line in (ROOT / "docs" / "methods" / "train_tiny.sh").read_text().splitlines():
        if line.startswith("train "):
            _, name, config, steps, *changes = shlex.split(line)
            words = [f"--config=configs/{config}.py", f"--config.steps={steps}", *changes]
            yield pytest.param("main", words, id=f"train_tiny.sh {name}")
    for name, module in CONFIGS.items():
        for number, command in enumerate(commands(module.__doc__)):
            yield pytest.param(*command, id=f"configs/{name}.py {number}")
    freeze = ast.get_docstring(ast.parse((ROOT / "docs" / "evaluation" / "freeze.py").read_text())) or ""
    yield from (pytest.param(*command, id=f"freeze.py {number}") for number, command in enumerate(commands(freeze)))


@pytest.mark.parametrize(("program", "words"), list(found()))
def test_written_commands_are_understood(program, words):
    check(program, words)


@pytest.mark.parametrize(("name", "preset"), OPENINGS)
def test_the_command_for_a_phase_before_is_understood(name, preset):
    experiment = parse(CONFIGS[name].get_config(preset))
    if experiment.previous.command:
        ((program, words),) = commands(experiment.previous.command)
        first, _ = opened(words)
        assert program == "main" and first.model.path == experiment.model.path


def test_a_command_that_is_wrong_is_found():
    with warnings.catch_warnings(), pytest.raises(Exception, match="bckbone"):
        check(*commands("`python -m vpae_jax.main --config=configs/phase2.py --config.method.bckbone=ema`")[0])
    with pytest.raises(UserError, match="--prompt"):
        check(*commands("python -m vpae_jax.sample --modle=tiny")[0])
    assert [
        words for _, words in commands("python -m vpae_jax.main --config=configs/lcm.py \\\n   --config.steps=2")
    ] == [["--config=configs/lcm.py", "--config.steps=2"]]
