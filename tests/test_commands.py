"""Commands that documents, configs and messages give are read by the programs that they name: no key, flag, config or
value in them is unknown."""

import ast
import re
import shlex
import warnings
from functools import partial
from pathlib import Path

import pytest
from absl import flags
from config_files import CONFIGS, OPENINGS
from ml_collections import config_flags

from vpae_jax import convert, encode, evaluate, sample, serve, vote
from vpae_jax.config import parse
from vpae_jax.config_files import load
from vpae_jax.methods import make_method
from vpae_jax.planning import topology
from vpae_jax.suites import cli as suites
from vpae_jax.train.roles import check_roles
from vpae_jax.types import UserError

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PARSERS = {program.__name__.rpartition(".")[2]: program.parser for program in (encode, evaluate, sample, serve, vote)}
PARSERS["convert"] = partial(convert.parser, convert.__doc__)
ELIDED = "..."
# Programs that read their flags through absl; importing both would define them twice.
ABSL = {
    name: set(re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / "vpae_jax" / f"{name}.py").read_text()))
    | {"config"}
    for name in ("main", "plan")
}
COMMAND = re.compile(rf"python -m vpae_jax\.({'|'.join([*ABSL, *PARSERS])})\b([^`\n#;]*)")


def commands(text):
    """Every command in a text, as its words; a line that ends in a backslash goes on. Optional parts, in brackets, are
    left out; alternatives are represented by the first, letters by a number. A "..." comes last: more may follow."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = []
    for match in COMMAND.finditer(joined):
        rest, before = match[2], None
        while rest != before:  # brackets in brackets
            rest, before = re.sub(r"\[[^\[\]]*\]", "", rest), rest
        words = [re.sub(r"\|.*", "", word) for word in shlex.split(rest)]
        words = [re.sub(r"^(--[\w.]+=)(?:[NWAB]|\$\w+)$", r"\g<1>1", word) for word in words]
        if words:
            more = [ELIDED] if any(word.endswith(ELIDED) for word in words) else []
            found.append((match[1], [word for word in words if word != ELIDED] + more))
    return found


def opened(words):
    """What a training program makes of its words: an experiment and its method."""
    (chosen,) = [word for word in words if word.startswith("--config=")]
    config = load(chosen.removeprefix("--config="))
    changes = [word for word in words if word.startswith("--config.") and not word.endswith("KEY=VALUE")]
    values = flags.FlagValues()
    argv = ["main", *changes]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    experiment = parse(holder.value)
    return experiment, make_method(experiment.method)


def check(program, words):
    if program in ABSL:
        names = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")} - {"help"}
        assert {name for name in names if not name.startswith("config.")} <= ABSL[program]
        if "config" in names and "--config=CONFIG" not in words:
            experiment, method = opened(words)
            check_roles(method, experiment.optimizers)
        for word in words:
            if word.startswith("--topology="):
                topology.parse(word.partition("=")[2])
    else:
        parser = suites.parser() if suites.asked(words) else PARSERS[program]()
        if words[-1] == ELIDED:
            for action in parser._actions:
                action.required = False
            parser.parse_args(words[:-1])
            return
        given = parser.parse_args(words)
        if program == "encode":
            encode.check(given)


def found():
    for path in PAGES:
        for number, command in enumerate(commands(path.read_text())):
            yield pytest.param(*command, id=f"{path.relative_to(ROOT)} {number}")
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
