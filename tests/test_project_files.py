"""The files around the code agree with it and with each other: workflows, metadata, citation, changelog."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import vpae_jax

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(workflow):
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    made = [word for step in steps(workflow) for word in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))]
    assert set(made) <= targets and made
    assert all("@" in step["uses"] for step in steps(workflow) if "uses" in step)


def test_every_python_that_is_promised_is_tested():
    versions = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert versions["python"] == named and PROJECT["requires-python"] == f">={named[0]}"
    ran = [command for step in steps(ROOT / ".github/workflows/ci.yml") for command in [step.get("run", "")]]
    assert {"make check", "make test", "make docs"} <= set(ran)


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vpae_jax.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == vpae_jax.__version__


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and "[yyyy]" not in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_whole(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    assert all(item["type"] in ("input", "textarea") and item["attributes"]["label"] for item in form["body"])


def test_the_pre_commit_hooks_are_those_of_make_check():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {"ruff-format", "ruff-check"} <= {hook["id"] for repo in repos for hook in repo["hooks"]}
