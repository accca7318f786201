"""How `--config` finds its file: a path, a bundled config's name, or the path that it has in a checkout."""

import shutil
from pathlib import Path

import pytest
from config_files import CONFIGS

from vpae_jax import config_files
from vpae_jax.config_files import BUNDLED, find, given, load, resolved
from vpae_jax.types import UserError

ROOT = Path(__file__).parent.parent


def test_the_bundled_configs_are_those_of_the_checkout():
    assert BUNDLED.resolve() == ROOT / "configs"
    assert {"phase1", "phase2"} <= set(CONFIGS) and not {"common", "__init__"} & set(CONFIGS)


@pytest.mark.parametrize("place", ["phase1", "configs/phase1.py", "./configs/phase1.py"])
@pytest.mark.parametrize("preset", [None, "t2v-1.3b-480p"])
def test_outside_a_checkout_a_name_and_a_documented_path_are_the_bundled_config(tmp_path, monkeypatch, place, preset):
    monkeypatch.chdir(tmp_path)
    assert find(place if preset is None else f"{place}:{preset}") == (BUNDLED / "phase1.py", preset)


def test_a_file_of_the_users_comes_before_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(BUNDLED / "phase1.py", "configs/phase1.py")
    assert find("configs/phase1.py:tiny") == (Path("configs/phase1.py"), "tiny")
    assert find("phase1") == (BUNDLED / "phase1.py", None)


@pytest.mark.parametrize(
    "place", ["phase3", "configs/phase3.py", "configs/common", "common", "elsewhere/phase1.py", ""]
)
def test_a_name_that_nothing_has_is_one_line(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"^{place}: no such config file or bundled config; (did you mean '|known: )[^\n]+$"
    ):
        find(place)


def test_the_command_line_that_absl_sees_names_a_file():
    argv = ["main", "--config=phase1:tiny", "--config.steps=3", "--workdir=a=b"]
    assert resolved(argv) == ["main", f"--config={BUNDLED / 'phase1.py'}:tiny", *argv[2:]]
    assert resolved(["main", "--config", "lcm"]) == ["main", "--config", str(BUNDLED / "lcm.py")]
    assert resolved(["main", "--config"]) == ["main", "--config"] and given(["main", "--config"]) is None
    assert given(argv) == "phase1:tiny" and given(["main", "-config", "lcm"]) == "lcm"


def test_a_preset_is_passed_on():
    assert (load("phase1").mesh.context, load("phase1:t2v-1.3b-480p").mesh.context) == (1, 4)
    with pytest.raises(UserError, match="preset 'tniy' does not exist; did you mean 'tiny'"):
        config_files.load("phase1:tniy")
