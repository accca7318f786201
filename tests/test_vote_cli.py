"""The page on which people compare clips: what it serves, what it keeps, and keys pressed in a browser."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from browser import open_browser

from vpae_jax import cli
from vpae_jax.media import write_video
from vpae_jax.metrics.votes import read_votes
from vpae_jax.vote import Election, main, serve


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two rows of three clips; one row is bright."""
    folder = tmp_path_factory.mktemp("rows")
    for name, low in (("dark", 0), ("bright", 180)):
        for clip in ("a <cat>", "b", "c"):
            frames = np.random.default_rng(0).integers(low, low + 60, (5, 32, 48, 3)).astype(np.uint8)
            (folder / name).mkdir(exist_ok=True)
            write_video(folder / name / f"{clip}.mp4", frames, 8.0)
    return {name: folder / name for name in ("dark", "bright")}


@contextmanager
def served(election):
    with serve(election, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def post(address, body):
    return urllib.request.urlopen(urllib.request.Request(address, body.encode(), method="POST"))


def test_the_page_names_no_row_and_serves_both_sides(rows, tmp_path):
    election = Election(rows, tmp_path / "votes.jsonl", "anna")
    with served(election) as address:
        page = urllib.request.urlopen(address).read().decode()
        assert "dark" not in page.replace("prefers-color-scheme: dark", "").replace("light dark", "")
        assert "bright" not in page and "http://" not in page and "https://" not in page
        assert "<cat>" not in page and "a \\u003ccat\\u003e" in page  # a name is no markup
        for number, pair in enumerate(election.pairs):
            for side, row in (("left", pair.left), ("right", pair.right)):
                found = urllib.request.urlopen(f"{address}/{number}/{side}").read()
                assert found == (rows[row] / f"{pair.clip}.mp4").read_bytes()


def test_votes_are_kept_and_a_voter_goes_on(rows, tmp_path):
    file = tmp_path / "votes.jsonl"
    election = Election(rows, file, "anna")
    with served(election) as address:
        post(f"{address}/0", "left")
        post(f"{address}/1", "right")
        post(f"{address}/1", "same")
    first, second = election.pairs[:2]
    assert [(vote.pair, vote.choice) for vote in read_votes(file)] == [(first, "left"), (second, "same")]
    again = Election(rows, file, "anna")
    assert (again.pairs, again.done) == (election.pairs[2:], 2)
    assert len(Election(rows, file, "bert").pairs) == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [("/3", "left"), ("/x", "left"), ("/-1", "left"), ("/0", "both"), ("/0", "left" * 100), ("/0/left", "left")],
)
def test_what_is_no_vote_is_not_kept(rows, tmp_path, path, body):
    election = Election(rows, tmp_path / "votes.jsonl", "anna")
    with served(election) as address, pytest.raises(urllib.error.HTTPError, match="400"):
        post(address + path, body)
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize("path", ["/3/left", "/0/middle", "/../secret", "/0/left/x", "/favicon.ico"])
def test_nothing_else_is_served(rows, tmp_path, path):
    election = Election(rows, tmp_path / "votes.jsonl", "anna")
    with served(election) as address, pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address + path)


def test_votes_are_added_up(tmp_path, capsys):
    lines = [
        {"clip": str(i), "left": "student", "right": "teacher", "choice": c, "voter": "v"}
        for i, c in enumerate(("left", "left", "same", "right"))
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([f"--votes={tmp_path / 'votes.jsonl'}"])
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["student,", "over", "teacher", "+25%", "-50%", "to", "+100%", "2", "1", "1", "4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=x"], "one row was given; a comparison needs two or more"),
        (["a=x", "a=y"], "two rows are named 'a'"),
        (["x", "y"], "'x': expected NAME=DIR"),
        ([], "holds no votes yet; give rows"),
        (["a=/nowhere", "b=/nowhere"], "a=/nowhere: not a folder; give a folder of .mp4 files"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        cli.run(main, [*given, f"--votes={tmp_path / 'votes.jsonl'}"])
    line = capsys.readouterr().err
    assert message in line and line.startswith("error: ") and line.count("\n") == 1


def test_a_port_that_is_taken_is_named(rows, tmp_path, capsys):
    with served(Election(rows, tmp_path / "votes.jsonl", "anna")) as address:
        port = address.rpartition(":")[2]
        with pytest.raises(SystemExit):
            given = [f"{name}={folder}" for name, folder in rows.items()]
            cli.run(main, [*given, f"--votes={tmp_path / 'votes.jsonl'}", f"--port={port}"])
    assert f"error: --port={port}: " in capsys.readouterr().err


@pytest.mark.long
def test_keys_in_a_browser(rows, tmp_path):
    """Both clips play; an arrow is a vote, backspace takes one back, and the last one ends."""
    driver = open_browser()
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    election = Election(rows, tmp_path / "votes.jsonl", "anna")
    try:
        with served(election) as address:
            driver.get(address)
            body = driver.find_element(By.TAG_NAME, "body")

            def wait(condition):
                end = time.monotonic() + 120
                while not condition():
                    assert time.monotonic() < end, driver.find_element(By.TAG_NAME, "main").text
                    time.sleep(0.05)

            def shown(number):
                return lambda: driver.find_element(By.ID, "count").text == f"{number} of 3 pairs"

            moved = "return ['left', 'right'].every(id => document.getElementById(id).played.length > 0)"
            wait(lambda: driver.execute_script(moved))
            for key, number in ((Keys.ARROW_LEFT, 1), (Keys.ARROW_RIGHT, 2), (Keys.BACKSPACE, 1), (Keys.ARROW_DOWN, 2)):
                body.send_keys(key)
                wait(shown(number))
            driver.find_element(By.CSS_SELECTOR, ".keys button[data-choice=right]").click()
            wait(shown(3))
            assert driver.find_element(By.ID, "prompt").text == "Done. Thank you!"
            assert not driver.find_element(By.ID, "vote").is_displayed()
            body.send_keys(Keys.ARROW_LEFT)  # of nothing
    finally:
        driver.quit()
    votes = read_votes(tmp_path / "votes.jsonl")
    assert [(vote.pair, vote.choice) for vote in votes] == [
        (pair, choice) for pair, choice in zip(election.pairs, ("left", "same", "right"), strict=True)
    ]
