"""Checkpoints on disk: what a fault of the disk does to them, and what a full one does to a run."""

import dataclasses
import gc
import json
import logging
import random
import shutil
import warnings
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import limited
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vpae_jax.config import OptimizerConfig
from vpae_jax.methods.base import Role, averages
from vpae_jax.train import checksums
from vpae_jax.train.checkpoint import UNFINISHED, Checkpoints, read_state
from vpae_jax.train.newest import FOLDER, Moment, latest, moments_in, whole_moment
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.state import TrainState, create
from vpae_jax.types import Note, UserError

OLD, NEW = Moment(3), Moment(6)
ROLES = {"net": Role("fresh", True, part="vae", averages=averages(0.9))}


def state_at(step: int | Moment, width: int = 64) -> TrainState:
    """Numbers that no compression makes small, others at every step."""
    step = step.step if isinstance(step, Moment) else step
    params = {"net": {"w": jax.random.normal(jax.random.key(step), (width, width)), "b": jnp.full(8, step / 7)}}
    state = create(step, params, ROLES, {"net": make_optimizer(OptimizerConfig(0.1))})
    return dataclasses.replace(state, step=jnp.int32(step))


def same(state: TrainState, step: Moment) -> bool:
    def bits(state):
        plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]

    return bits(state) == bits(state_at(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir) as checkpoints:
        for step in (1, OLD.step, NEW.step):
            checkpoints.save(state_at(step), {"batches": 10 * step})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def test_a_checkpoint_is_complete_and_the_last_two_are_kept(saved):
    folder = saved / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == [str(OLD), str(NEW)]
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.newest()
        state, position, metrics = checkpoints.restore(found, state_at(0))
    assert found == latest(saved) == whole_moment(saved) == NEW
    assert same(state, NEW) and position == {"batches": 60} and metrics == {}


def spread(state: TrainState, places: P) -> TrainState:
    """The state with every matrix at these places of a mesh of 4 x 2 devices, and all else on each device."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "context"))

    def put(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, places if leaf.ndim == 2 else P()))

    plain = jax.tree.map(put, dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return dataclasses.replace(plain, key=jax.random.wrap_key_data(plain.key))


def test_a_checkpoint_is_restored_into_other_places_than_it_was_saved_from(tmp_path):
    """A later version may place a parameter along another axis, as `sharding.py` once did with two projections."""
    by_columns, by_rows = P(None, ("fsdp", "context")), P(("fsdp", "context"), None)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(spread(state_at(NEW), by_columns), {})
    with Checkpoints(tmp_path) as checkpoints:
        found, *_ = checkpoints.restore(checkpoints.newest(), spread(state_at(0), by_rows))
    assert same(found, NEW)
    matrices = [leaf for leaf in jax.tree.leaves((found.params, found.opt, found.averages)) if leaf.ndim == 2]
    assert len(matrices) == 4 and all(leaf.addressable_shards[0].data.shape == (8, 64) for leaf in matrices)


def test_a_checkpoint_within_a_step_comes_between_those_of_whole_ones(workdir):
    metrics = {"net/loss": 0.1, "net/grad_norm": 1e-30}
    with Checkpoints(workdir) as checkpoints:
        for updates in (2, 10):  # numbers, and not words
            checkpoints.save(state_at(NEW), {"batches": 60 + updates}, updates, metrics)
    assert moments_in(workdir / FOLDER) == [(6, 2), (6, 10)]
    assert {path.name for path in (workdir / FOLDER).iterdir()} == {"6+2", "6+10"}
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.newest()
        state, position, again = checkpoints.restore(found, state_at(0))
        assert found == Moment(6, 10) < Moment(7)
        assert same(state, NEW) and position == {"batches": 70} and again == metrics
        checkpoints.save(state_at(7), {})
    assert moments_in(workdir / FOLDER) == [(6, 10), (7, 0)]
    assert int(read_state(workdir, Moment(6, 10))["step"]) == 6
    assert all(Moment.named(name) is None for name in ("06", "6+", "6+0", "+3", "6+-1", "damaged-6", "unfinished", "٦"))


def test_every_file_has_a_checksum(saved):
    folder = saved / FOLDER / str(NEW)
    content = (folder / checksums.FILE).read_text()
    listed = json.loads(content[: content.rindex("}") + 1])
    assert sorted([*listed, checksums.FILE]) == sorted(files_of(folder))
    assert all(found.split()[0] == str((folder / name).stat().st_size) for name, found in listed.items())


def test_sixty_bytes_that_flip_are_all_found(workdir):
    folder, rng = workdir / FOLDER / str(NEW), random.Random(0)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    assert checksums.fault(folder) is None
    for turn in range(60):
        path = paths[turn % len(paths)]
        raw = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        raw[place] ^= bit
        path.write_bytes(raw)
        fault = checksums.fault(folder)
        assert fault is not None and path.relative_to(folder).as_posix() in fault, (path, place)
        raw[place] ^= bit
        path.write_bytes(raw)
    assert checksums.fault(folder) is None


def test_the_bytes_of_the_sums_themselves_count(workdir):
    folder = workdir / FOLDER / str(NEW)
    whole = (folder / checksums.FILE).read_bytes()
    for place in range(0, len(whole), 3):
        (folder / checksums.FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checksums.fault(folder) == f"{checksums.FILE} is damaged"
    for cut in range(0, len(whole), 3):
        (folder / checksums.FILE).write_bytes(whole[:cut])
        assert checksums.fault(folder) == f"{checksums.FILE} is damaged"


FILES = {
    "values": "state/ocdbt.process_0/d/*",
    "index": "state/d/*",
    "manifest": "state/manifest.ocdbt",
    "manifest of a process": "state/ocdbt.process_0/manifest.ocdbt",
    "tree": "state/_METADATA",
    "position": "data/metadata",
    "about": "_CHECKPOINT_METADATA",
    "sums": checksums.FILE,
}
DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(path.stat().st_size)),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FOLDERS = {
    "without state": lambda folder: shutil.rmtree(folder / "state"),
    "without data": lambda folder: shutil.rmtree(folder / "data"),
    "without a process": lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
    "with nothing": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no folder": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "of another step": lambda folder: shutil.copytree(
        folder.with_name(str(OLD)) / "state", folder / "state", dirs_exist_ok=True
    ),
}


def damages():
    for name, pattern in FILES.items():
        for how, damage in DAMAGES.items():
            yield pytest.param(lambda f, p=pattern, d=damage: d(largest(f, p)), id=f"{name} {how}")
    for name, damage in FOLDERS.items():
        yield pytest.param(damage, id=name)


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_whole_one_taken(damage, workdir, capsys):
    damage(workdir / FOLDER / str(NEW))
    is_folder = (workdir / FOLDER / str(NEW)).is_dir()
    left = files_of(workdir / FOLDER / str(NEW)) if is_folder else {}
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.newest()
        said = capsys.readouterr().out
        state, position, _ = checkpoints.restore(found, state_at(0))
    assert found == OLD and same(state, OLD) and position == {"batches": 30}
    assert said.count("\n") == 1 and f"/{NEW} is damaged (" in said
    assert f"renamed to damaged-{NEW}; the run goes back to step {OLD}" in said
    assert sorted(path.name for path in (workdir / FOLDER).iterdir()) == [str(OLD), f"damaged-{NEW}"]
    assert not is_folder or files_of(workdir / FOLDER / f"damaged-{NEW}") == left, "nothing of it is lost"


def test_steps_are_numbers_and_not_words(workdir):
    """10 comes after 9, for who reads and for what is removed."""
    for step, later in ((OLD, 9), (NEW, 10)):
        (workdir / FOLDER / str(step)).rename(workdir / FOLDER / str(later))
    assert moments_in(workdir / FOLDER) == [(9, 0), (10, 0)] and whole_moment(workdir) == latest(workdir) == (10, 0)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest() == Moment(10)
        checkpoints.save(state_at(11), {})
    assert moments_in(workdir / FOLDER) == [(10, 0), (11, 0)]


def test_a_run_that_went_back_saves_the_same_step_again(workdir):
    DAMAGES["emptied"](largest(workdir / FOLDER / str(NEW), FILES["values"]))
    for again in range(2):
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.newest() == (NEW if again else OLD)
            if not again:
                checkpoints.save(state_at(NEW), {})
    assert moments_in(workdir / FOLDER) == [OLD, NEW] and (workdir / FOLDER / f"damaged-{NEW}").is_dir()
    DAMAGES["emptied"](largest(workdir / FOLDER / str(NEW), FILES["values"]))
    assert Checkpoints(workdir).newest() == OLD
    assert (workdir / FOLDER / f"damaged-{NEW}-2").is_dir(), "the second one takes no other's place"


def test_two_damaged_ones_are_said_each(workdir, capsys):
    shutil.copytree(workdir / FOLDER / str(NEW), workdir / FOLDER / "9")
    for step in (NEW, 9):
        DAMAGES["removed"](workdir / FOLDER / str(step) / FILES["tree"])
    assert Checkpoints(workdir).newest() == OLD
    assert capsys.readouterr().out.splitlines() == [
        f"{workdir / FOLDER / str(step)} is damaged (state/_METADATA is missing) and was renamed to damaged-{step}; "
        f"the run goes back to step {OLD}"
        for step in (9, NEW)
    ]


def test_when_none_is_whole_a_line_says_what_to_do_and_all_stay(workdir):
    for step in (OLD, NEW):
        DAMAGES["emptied"](workdir / FOLDER / str(step) / FILES["position"])
    before = files_of(workdir)
    for reads in (lambda: Checkpoints(workdir).newest(), lambda: read_state(workdir)):
        with pytest.raises(UserError) as caught:
            reads()
        line = str(caught.value)
        assert "\n" not in line and f"no checkpoint is intact: {NEW} (data/metadata has 0 bytes, expected " in line
        assert f", {OLD} (" in line and line.endswith("copy an intact one here, or remove the folder to start over")
    assert files_of(workdir) == before


def test_a_file_that_may_not_be_read_is_no_damage(workdir, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match=rf"{NEW}/{checksums.FILE}: cannot be read: Permission denied; once this is"):
        Checkpoints(workdir).newest()
    assert moments_in(workdir / FOLDER) == [OLD, NEW]


def test_a_whole_checkpoint_is_read_without_a_word(workdir, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(read_state(workdir)["step"]) == NEW.step
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("damage", ["emptied", "garbage", "removed"])
def test_who_reads_another_runs_checkpoints_takes_the_whole_one_and_changes_nothing(damage, workdir):
    DAMAGES[damage](largest(workdir / FOLDER / str(NEW), FILES["values"]))
    before = files_of(workdir)
    with pytest.warns(Note, match=rf"/{NEW} is damaged \(.*\); the checkpoint of step {OLD} is used instead"):
        found = read_state(workdir)
    assert int(found["step"]) == OLD.step
    np.testing.assert_array_equal(found["params"]["net"]["w"], state_at(OLD).params["net"]["w"])
    with pytest.raises(UserError, match=rf"/{NEW} is damaged \(.*\), but required; copy it here again"):
        whole_moment(workdir, NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole_moment(workdir, OLD) == OLD
    assert files_of(workdir) == before


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_file_is_looked_at_by_one_of_the_processes(count, workdir):
    folder = workdir / FOLDER / str(NEW)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != checksums.FILE]:
        raw = path.read_bytes()
        path.write_bytes(raw + b" ")
        found = [checksums.fault(folder, index, count) for index in range(count)]
        assert [fault is not None for fault in found].count(True) == 1
        path.write_bytes(raw)


def test_shares_are_alike(tmp_path):
    (tmp_path / "step").mkdir()
    for number in range(40):
        (tmp_path / "step" / f"{number:02}").write_bytes(b"x" * (1000 + number))
    checksums.write(tmp_path / "step", [])
    for path in (tmp_path / "step").iterdir():
        if path.name != checksums.FILE:
            path.write_bytes(bytes(path.stat().st_size))
    found = [checksums.fault(tmp_path / "step", index, 4).split()[0] for index in range(4)]
    assert found == ["00", "10", "20", "30"], "each reads ten files that follow each other"


def test_a_process_sums_what_it_has_written(tmp_path):
    names = [
        *("_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0/d/a", "state/ocdbt.process_12/d/b"),
        *("state/array_metadatas/process_0", "state/array_metadatas/process_2", "state/ocdbt.process_2/manifest.ocdbt"),
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    sums = [checksums.of_process(tmp_path, index) for index in range(13)]
    assert set(sums[0]) == {"state/ocdbt.process_0/d/a", "state/array_metadatas/process_0"}
    assert set(sums[12]) == {"state/ocdbt.process_12/d/b"} and not sums[1]
    assert set(sums[2]) == {"state/array_metadatas/process_2", "state/ocdbt.process_2/manifest.ocdbt"}
    # The first one does not take it amiss that another has not seen its files, as may happen on a network.
    for told in (sums, sums[:2]):
        checksums.write(tmp_path, told)
        content = (tmp_path / checksums.FILE).read_text()
        assert sorted(json.loads(content[: content.rindex("}") + 1])) == sorted(names)
        assert checksums.fault(tmp_path) is None
        (tmp_path / checksums.FILE).unlink()


# Orbax leaves coroutines behind, of which Python tells when it collects them; a run has ended by then.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [0, 300, 3000, 30_000, 100_000])
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(size, workdir, caplog, capfd):
    """`size` decides which of the files is the first that does not fit."""
    before, state = files_of(workdir / FOLDER), state_at(9, width=400)
    gc.collect()  # what Orbax has left of the failure before, which would be told of meanwhile
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught, limited(size):  # noqa: SIM117
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(state, {})
            checkpoints.wait()
    line = str(caught.value)
    assert line.startswith(str(workdir / FOLDER)) and "cannot be written: File too large; make room there" in line
    assert "\n" not in line
    assert files_of(workdir / FOLDER) == before and not (workdir / FOLDER / UNFINISHED).exists()
    assert not caplog.records and capfd.readouterr() == ("", ""), "no page of Orbax's"
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest() == NEW


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_could_not_be_written_is_known_before_the_next_one(workdir):
    state = state_at(9, width=400)
    with Checkpoints(workdir) as checkpoints:
        with limited(30_000):
            checkpoints.save(state, {})
            futures.wait([checkpoints.saving])
        with pytest.raises(UserError, match="cannot be written"):
            checkpoints.check()
        checkpoints.check()
    assert whole_moment(workdir) == NEW


def test_what_a_killed_run_has_left_half_written_goes(workdir):
    left = workdir / FOLDER / UNFINISHED / "9.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    (left / "half").write_text("written")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest() == NEW
        checkpoints.save(state_at(9), {})
    assert sorted(path.name for path in (workdir / FOLDER).iterdir()) == [str(NEW), "9"]
