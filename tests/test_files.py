"""Files that are there whole or not at all, and what killed processes leave of them."""

import os
from pathlib import Path

import pytest

from vpae_jax import files
from vpae_jax.files import atomically, put_aside, remove_leftovers, resolve, temporary_beside, write_text
from vpae_jax.types import UserError

DEAD = 2**22 + 1  # more than Linux gives


def leftover(path, kind="tmp", host=None, pid=DEAD):
    """What a killed process leaves of `path`."""
    return path.with_name(f".{path.name}.{host or files.here()}-{pid}-0badcafe.{kind}")


def test_what_a_dead_process_left_of_a_path_goes_when_it_is_written_again(tmp_path):
    path = tmp_path / "a.model"
    dead, living, elsewhere, other = (
        leftover(path),
        leftover(path, pid=os.getpid()),
        leftover(path, host="0123abcd"),
        leftover(tmp_path / "b.model"),
    )
    dead.mkdir()
    (dead / "weights").write_text("half")
    for file in (living, elsewhere, other):
        file.write_text("half")
    write_text(path, "whole")
    assert set(tmp_path.iterdir()) == {path, living, elsewhere, other}
    remove_leftovers(tmp_path, everything=True)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "whole"


def test_what_was_there_before_a_killed_replacement_is_back(tmp_path):
    path = tmp_path / "model"
    leftover(path, "old").mkdir()
    (leftover(path, "old") / "before").touch()
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "before"]
    leftover(path, "old").mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path], "the new one is there"


def test_leftovers_that_are_links_do_not_lead_away(tmp_path):
    away, folder = tmp_path / "away", tmp_path / "folder"
    (away / "kept").mkdir(parents=True)
    folder.mkdir()
    leftover(folder / "file").symlink_to(away)
    remove_leftovers(folder)
    assert not list(folder.iterdir()) and (away / "kept").is_dir()


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    """The name cannot be guessed; were it, the target would still not be touched."""
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_text("precious")
    assert temporary_beside(path) != temporary_beside(path)
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0badcafe")
    temporary_beside(path).symlink_to(target)
    with pytest.raises(UserError, match=f"^{path}: cannot be written: File exists"):
        write_text(path, "text")
    assert target.read_text() == "precious"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise ValueError("not of a write")

    with pytest.raises(ValueError, match="not of a write"):
        atomically(tmp_path / "new" / "file", write)
    assert list((tmp_path / "new").iterdir()) == []


def test_damaged_files_are_put_aside_under_names_of_their_own(tmp_path):
    for number in ("", "-2", "-3"):
        (tmp_path / "a.json").touch()
        assert put_aside(tmp_path / "a.json") == tmp_path / f"damaged-a.json{number}"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_path_of_a_config_is_what_a_shell_makes_of_it_unless_it_leads_from_the_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "runs" / "phase2"
    assert resolve("{workdir}/../phase1", workdir) == tmp_path / "runs" / "phase1"
    assert resolve("{workdir}/data", workdir) == workdir / "data"
    for typed in ("../elsewhere", "data", "./data", "/data", "..", "{workdir}"):
        assert resolve(typed, workdir) == Path(typed)
    with pytest.raises(UserError, match="gs://b/x: an address"):
        resolve("gs://b/x", workdir)
