"""An evaluation that is stopped, shared or repeated makes no clip twice, and ends with the same numbers."""

import numpy as np
import pytest

from vpae_jax.evaluation import making
from vpae_jax.evaluation.costs import typical
from vpae_jax.files import claimed
from vpae_jax.types import UserError

CLIPS = 16  # of a row: eight conditions, each a second time from other noise


def clips(output):
    """When the latents of each row's clips were written."""
    return {path: path.stat().st_mtime_ns for path in (output / "clips").glob("*/*.latents.npz")}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An evaluation that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(output)
    return output


def test_two_processes_share_the_clips(run, rows, whole, tmp_path, capsys):
    output = tmp_path / "out"
    run(output, process_id=0, num_processes=2)
    assert f"this process has done its share; {CLIPS} clips remain for other processes" in capsys.readouterr().out
    first = clips(output)
    assert len(first) == CLIPS and not (output / "metrics.json").exists()
    run(output, process_id=1, num_processes=2)
    assert len(clips(output)) == 2 * CLIPS and first.items() <= clips(output).items(), "none is made twice"
    assert not list(output.rglob("*.lock"))
    undisturbed = rows(whole)
    for name, row in rows(output).items():
        assert row["t2v"] == pytest.approx(undisturbed[name]["t2v"], rel=1e-3, abs=1e-3)


def test_what_is_there_is_not_made_again_and_rows_can_be_added(run, rows, models, whole, capsys):
    before, scores = clips(whole), rows(whole)["model"]["t2v"]
    run(whole, f"--compare=four={models['t2v']}:4:1")
    said = capsys.readouterr().out
    assert f"teacher: {CLIPS} clips, 2 network evaluations each; {CLIPS} already exist" in said
    after = clips(whole)
    assert before.items() <= after.items() and len(after) == len(before) + CLIPS
    found = rows(whole)
    assert found["teacher"]["t2v"] == scores and found["four"]["t2v"]["flow"] != scores["flow"]
    assert found["four"]["evaluations"] == 4


def test_latents_that_were_not_measured_are_not_made_again(run, rows, whole, monkeypatch):
    before, scores = clips(whole), rows(whole)
    folder = next(path for path in (whole / "clips").iterdir() if path.name.startswith("model-"))
    (folder / "00005.measures.npz").unlink()
    (folder / "00007.measures.npz").write_bytes(b"damaged")
    monkeypatch.setattr(making.Generation, "batches", lambda *_: pytest.fail("a clip is made anew"))
    run(whole)
    assert clips(whole) == before and (folder / "00005.measures.npz").is_file()
    assert rows(whole)["model"]["t2v"] == pytest.approx(next(iter(scores.values()))["t2v"], rel=1e-3, abs=1e-3)


def test_a_share_is_made_by_one_process(run, tmp_path):
    output = tmp_path / "out"
    run(output, process_id=0, num_processes=4)
    folder = next((output / "clips").glob("model-*"))
    (folder / "00000.latents.npz").unlink()
    with claimed(folder / "0-of-4.lock") as ours:
        assert ours
        with pytest.raises(UserError, match=r"^share 0 of 4 of model is being made by another process; give each its"):
            run(output, process_id=0, num_processes=4)


def test_clips_are_the_same_on_a_mesh(run, rows, whole, tmp_path):
    output = tmp_path / "out"
    run(output, devices=2)
    undisturbed = next(iter(rows(whole).values()))["t2v"]
    assert rows(output)["model"]["t2v"] == pytest.approx(undisturbed, rel=0.02, abs=0.02)


def test_what_a_clip_typically_takes():
    costs = [{"text": 1.0, "first call": 90.0, "peak memory": 5.0}, {"text": 1.0, "network": 8.0, "decode": 2.0}]
    costs += [{"network": 12.0, "decode": 4.0, "peak memory": 7.0}, {}]
    assert typical(costs, 4) == {
        "text": 1.0,
        "network": 10.0,
        "decode": 3.0,
        "first call": 90.0,
        "evaluation": 2.5,
        "peak memory": 7.0,
    }
    assert typical([{}], 4) == {}
    assert np.isfinite(making.peak_memory()) and making.peak_memory() > 2**26
