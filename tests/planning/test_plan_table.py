"""The recorded table: rows in order of importance, each kept once, and a stopped run continues."""

import json

import pytest

from vpae_jax.config_files import bundled
from vpae_jax.planning import survey
from vpae_jax.planning.clips import SIZES
from vpae_jax.planning.topology import parse
from vpae_jax.types import UserError


def plan(fits=True, seconds=4.0, **more):
    return {
        "phase": "phase2",
        "topology": "v5p:2x2x4",
        "chip": {"name": "v5p", "memory": 96 * 2**30, "capacity": 95 * 2**30},
        "devices": 16,
        "setting": {"data": 1, "fsdp": 8, "context": 2, "tensor": 1, "accumulation": 1, "remat": "full"},
        "total": 40 * 2**30,
        "fits": fits,
        "step": {
            "seconds_overlapped": seconds,
            "seconds_serial": seconds,
            "mfu_overlapped": 0.4,
            "mfu_serial": 0.3,
        },
        "run": {"steps": 1000, "device_hours_overlapped": seconds and 16 * 1000 * seconds / 3600},
        **more,
    }


def test_rows_are_presets_on_machines_that_exist():
    rows = list(survey.rows())
    assert rows[0] == ("i2v-14b-720p", "phase2", "h100:8") and rows[1][1] == "phase1"
    assert len(rows) == len(set(rows)) == 5 * 7 * 2 + len(survey.OTHERS) * 3 + 4 * 2 * 2
    others = set(bundled()) - {"vae", "encoders", "teacher", "decoder"}
    assert {*survey.OTHERS, *survey.PHASES, *survey.CAUSAL} == others
    assert {preset for preset, _, _ in rows} == set(SIZES) - {"tiny"}
    assert all(parse(name) for _, _, name in rows)


def test_a_row_shows_what_the_search_found():
    line = survey.line(plan(), "i2v-14b-720p", "phase2")
    assert line == (
        "| i2v-14b-720p | phase2 | 16 x v5p (v5p:2x2x4) | fsdp 8 x context 2, 1 parts, remat full "
        "| 40.0 of 95.0 GiB, fits | 4.0 to 4.0 s | 30% to 40% | 18 |\n"
    )
    found = survey.line(plan(fits=False, search={"plan": plan(seconds=9.0)}), "i2v-14b-720p", "phase2")
    assert "fits | 9.0 to 9.0 s" in found
    refused = survey.line(plan(fits=False, seconds=None, search={"plan": None}), "i2v-14b-720p", "phase2")
    assert "does not fit | - | - | - |" in refused


def test_a_stopped_table_continues(tmp_path, monkeypatch, capsys):
    asked = []

    def run(preset, phase, name):
        asked.append((preset, phase, name))
        if len(asked) == 20:
            raise KeyboardInterrupt
        if name.startswith("h"):
            raise UserError(f"{preset} {phase} {name}: planning for {name} needs JAX's CUDA plugin")
        return plan(phase=phase, topology=name)

    monkeypatch.setattr(survey, "run", run)
    with pytest.raises(KeyboardInterrupt):
        survey.main(["--output", str(tmp_path)])
    kept = {path.name for path in tmp_path.glob("*.json")}
    first = list(asked)
    assert kept and json.loads((tmp_path / "i2v-14b-720p_phase2_v5p_2x2x4.json").read_text())["topology"] == "v5p:2x2x4"
    survey.main(["--output", str(tmp_path)])
    again = asked[len(first) :]
    assert not [row for row in again if row in first[:19] and not row[2].startswith("h")]
    assert len((tmp_path / "plans.md").read_text().splitlines()) == 2 + 5 * 3 * 2 + 4 * 2
    assert "left out: i2v-14b-720p phase2 h20:32: planning for h20:32 needs" in capsys.readouterr().err
