"""What processes of one run compare, and how they name a difference."""

import dataclasses
import json
from pathlib import Path

import pytest

from vpae_jax.config import parse
from vpae_jax.configs import phase1
from vpae_jax.run import agreement
from vpae_jax.run.agreement import OWN, difference, flat, reads, require_same, started_with
from vpae_jax.weights.directory import ModelDirectory, StoredPart
from vpae_jax.weights.find import find_model


def test_processes_that_are_alike_do_not_differ():
    assert difference({"config.steps": 3}, [{}, {}, {}]) is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([{}, {"config.steps": 30}], "config.steps is 20 in process 0, 30 in process 1"),
        ([{}, {}, {"config.steps": 30}], "config.steps is 20 in processes 0 and 1, 30 in process 2"),
        (
            [{}, {"config.steps": 30}, {"config.steps": 30}, {"config.steps": 40}],
            "config.steps is 20 in process 0, 30 in processes 1 and 2, 40 in process 3",
        ),
        ([{}, {"config.name": None}], "config.name is phase1 in process 0, not given in process 1"),
        ([{}, {"config.new": 3}], "config.new is not given in process 0, 3 in process 1"),
        (
            [{}, {"config.name": "phase2", "config.steps": 30}],
            "config.name is phase1 in process 0, phase2 in process 1 (and 1 more difference)",
        ),
    ],
)
def test_the_first_difference_is_named_with_values_and_processes(others, expected):
    line = difference({"config.name": "phase1", "config.steps": 20}, others)
    assert line.startswith(f"the processes of this run differ: {expected}; start ") and "\n" not in line


def test_the_whole_config_is_compared_but_for_what_is_a_hosts_own():
    experiment = parse(phase1.get_config())
    facts = json.loads(json.dumps(started_with(experiment)))
    config = {key.removeprefix("config.") for key in facts if key.startswith("config.")}
    assert config == set(flat(dataclasses.asdict(experiment))) - set(OWN)
    assert {"steps", "log_every", "checkpoint_every", "keep", "data.max_bad", "mesh.fsdp", "guard.enabled"} <= config
    assert set(OWN) <= set(flat(dataclasses.asdict(experiment)))


def test_another_code_is_another_fact(tmp_path, monkeypatch):
    experiment = parse(phase1.get_config())
    before = started_with(experiment)
    monkeypatch.setattr(agreement.vpae_jax, "__version__", "0.0.9")
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(agreement.vpae_jax, "__file__", str(tmp_path / "__init__.py"))
    after = started_with(experiment)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"the version of vpae_jax", "the digest of vpae_jax"}
    (tmp_path / "module.py").write_text("x = 2\n")
    assert started_with(experiment)["the digest of vpae_jax"] != after["the digest of vpae_jax"]


def model(folder: Path, at: int, value: int) -> Path:
    raw = bytearray(2_000_000)
    raw[at] = value
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw)
    return folder


def facts_of(path: Path) -> dict[str, str]:
    part = StoredPart("vae", "wan", (path,), "", None)
    return dict(reads(ModelDirectory(path, path.parent, {"vae": part}), {}))


def test_another_model_and_other_clips_are_other_facts(tmp_path):
    folders = [model(tmp_path / str(i), at, 1) for i, at in enumerate((0, 0, 1_999_999))]
    facts = [facts_of(folder / "model.safetensors") for folder in folders]
    assert facts[0] == facts[1] != facts[2], "wherever it lies"
    assert [facts_of(folder) for folder in folders] == facts, "a folder is its files"
    assert reads(None, {"config.data.records": ("ab at weight 2", "cd")}) == {
        "the digest of config.data.records": "ab at weight 2 and cd"
    }


def test_another_lora_file_is_another_fact(tmp_path):
    one, same, other = (model(tmp_path / name, at, 1) for name, at in (("a", 0), ("b", 0), ("c", 7)))
    facts = [reads(None, {}, {"config.model.lora": [folder / "model.safetensors"]}) for folder in (one, same, other)]
    assert facts[0] == facts[1] != facts[2] and set(facts[0]) == {"the digest of config.model.lora"}
    assert reads(None, {}, {}) == {}


def test_the_embedded_models_parts_are_facts():
    named = set(reads(find_model("tiny"), {}))
    assert {f"the digest of the model's {part}" for part in ("transformer", "vae", "text_encoder")} <= named


def test_a_run_of_one_process_looks_for_no_facts():
    require_same("start", lambda: pytest.fail("not asked for"))
