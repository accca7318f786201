"""A command line's keys of a config, looked up before absl and ml_collections see them."""

from pathlib import Path

import pytest

from vpae_jax.config_files import load
from vpae_jax.run import keys
from vpae_jax.types import UserError

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs' / 'phase1.py'}"


@pytest.mark.parametrize(
    "argument",
    [
        "--config.steps=3",
        '--config["model"].path=x',
        "--config.mesh['data']=2",
        "-config.steps=3",
        "--config.steps",
        "--noconfig.guard.enabled",
        "--config.guard.enabled",
    ],
)
def test_keys_that_are_there(argument):
    """Also in brackets."""
    keys.check([CONFIG, argument, "--workdir=x"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.stepz=3", r"config\.stepz: unknown key; did you mean 'steps'"),
        ("-config.stepz=3", r"config\.stepz: unknown key; did you mean 'steps'"),
        ("--config.stepz", r"config\.stepz: unknown key"),
        ("--noconfig.guard.enabld", r"config\.guard\.enabld: unknown key; did you mean 'enabled'"),
        ("-config.method=5", r"config\.method: is a group of keys"),
        ("--config.method['lambda']=5", r"config\.method\.lambda: unknown key"),
        ("--config.model.init_scale['a.b=c']=5", r"config\.model\.init_scale\.a\.b=c: unknown key; known: none"),
    ],
)
def test_a_key_that_is_not_there_however_its_flag_is_written(argument, message):
    with pytest.raises(UserError, match=f"^{message}"):
        keys.check([CONFIG, argument])


def test_a_config_file_may_define_a_dataclass(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar\n"
        "from ml_collections import ConfigDict\n\n@dataclasses.dataclass\nclass Sizes:\n    kind: ClassVar[str] = 'x'\n"
        "    width: int = 3\n\n\ndef get_config():\n    return ConfigDict(dataclasses.asdict(Sizes()))\n"
    )
    assert load(str(tmp_path / "mine.py")).width == 3


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("x = 1\n", "other.py", "defines no get_config"),
        ("get_config = {}\n", "other.py", "defines no get_config"),
        ("# a text\n", "other.md", "expected a Python file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, name, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))
