"""The container image: what its Dockerfile copies exists and is not ignored, and its linter finds nothing."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
COPIED = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M) for word in shlex.split(line)[:-1]]


def test_the_linter_finds_nothing():
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    ended = subprocess.run([tool, ROOT / "launch" / "Dockerfile"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_exists_and_is_not_ignored(name):
    assert (ROOT / name).exists()
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*" and any(fnmatch(name.split("/")[0], rule[1:]) for rule in rules if rule.startswith("!"))


def test_all_that_launchers_and_programs_need_is_copied():
    assert {"vpae_jax", "configs", "launch", "pyproject.toml", "requirements.txt"} <= set(COPIED)
    for manifest in (ROOT / "launch" / "gke").glob("*.yaml"):
        (command,) = re.findall(r"command: \[(.*)\]", manifest.read_text())
        assert command.split("/")[0] in COPIED and (ROOT / command).is_file()


def test_extras_that_its_header_names_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"^# EXTRA: (.*(?:\n# .*)*)", DOCKERFILE, re.M)
    assert {"cuda13", "cuda12", "tpu"} <= set(re.findall(r"\w+", named)) & set(extras)
