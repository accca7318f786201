"""An encoding that is killed at any moment, and started again, ends with what one that was let alone ends with."""

import os
import random
import signal
import time

import pytest
from encoding_runs import WAIT, add_bad_videos, contents, files, hidden, living, make_videos, start, wait_until

ORPHANED = WAIT  # seconds until workers have seen that their parent is gone, on a machine that does much else


# Stays where it is, once it has begun to make the folder whole.
HELD = """
import time
from contextlib import contextmanager
from vpae_jax.encoding.units import Units
workspace = Units._workspace
@contextmanager
def held(self, label):
    with workspace(self, label) as hidden:
        if label == "finish" and self.pending() == []:
            time.sleep(10_000)
        yield hidden
Units._workspace = held
"""


def done(output) -> int:
    return len(list((output / "units").glob("*.json")))


def kill_at(output, moment, settings, before_it: str = "") -> str | None:
    """Starts the command, kills it at a moment, and looks after its workers; what it was doing, or None if it ended.

    `moment` is how many units it may write first, and how long to wait after that; where no unit is left, how long
    after it begins to make the folder whole. `before_it` is Python that its process runs first.
    """
    more, delay = moment
    before, units = done(output), settings["units"]
    process = start(before_it, **settings["arguments"], output=output)
    session = process.pid

    def begun() -> bool:
        if process.poll() is not None:
            return True
        if before == units:
            return any(name.startswith(".finish.") for name in os.listdir(output))
        working = any(name.startswith(".unit-") for name in hidden(output))
        return done(output) >= min(before + more, units) and (working or done(output) == units)

    assert wait_until(begun), "it neither works nor ends"
    time.sleep(delay)
    workers = len(living(session)) - 1
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=WAIT)
    assert wait_until(lambda: not living(session), ORPHANED), f"workers {living(session)} outlive it"
    if not killed:
        assert process.returncode == 0, (out, err)
        return None
    now, left = done(output), hidden(output)
    assert len(left) <= 1, "what was left by those before is swept"
    return f"{now - before} units, {workers} workers, in {left[0].split('.')[1] if left else 'between'}"


def survive(tmp_path, kills: int, videos: int, unit: int) -> list[str]:
    """Kills as often, then compares what there is with an encoding that was let alone."""
    folder = make_videos(tmp_path / "videos", videos)
    rejects = add_bad_videos(folder)
    units = -(-(videos + len(rejects)) // unit)
    settings = {"arguments": {"videos": folder, "unit": unit, "workers": 2}, "units": units}
    rng, deaths = random.Random(0), []
    whole, output = tmp_path / "whole", tmp_path / "killed"
    while len(deaths) < kills:
        finishing = done(output) == units
        if finishing:
            moment = 0, rng.choice((0, 1)) * rng.uniform(0, 0.02)
        else:
            more = min(rng.choice((0, 0, 1, 1, 2)), units - done(output))
            moment = more, rng.choice((0, 1)) * rng.uniform(0, 0.3 if more else 1.5)
        # One of those that make it whole is held there: on some machines the others are killed before or after.
        how = kill_at(
            output, moment, settings, HELD if finishing and not any("finish" in how for how in deaths) else ""
        )
        if how is None:
            (output / "index.json").unlink()  # as if it had been killed before it wrote it
        else:
            deaths.append(how)
            print(how, flush=True)
    for folder in (output, whole):
        process = start(**settings["arguments"], output=folder)
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0 and not living(process.pid), (out, err)
    assert len(contents(output)) == videos, "each clip once"
    found, expected = files(output), files(whole)
    # The page says what its folder is called, and nothing else differs.
    page = found.pop("summary.html").decode()
    assert page.replace("killed", "whole") == expected.pop("summary.html").decode()
    assert found == expected and not hidden(output)
    return deaths


@pytest.mark.long
def test_a_kill_loses_and_doubles_nothing(tmp_path):
    assert len(survive(tmp_path, kills=1, videos=3, unit=2)) == 1


@pytest.mark.long
def test_thirty_kills_lose_and_double_nothing(tmp_path):
    deaths = survive(tmp_path, kills=30, videos=45, unit=2)
    assert {"unit-", "finish"} <= {how.rpartition("in ")[2].rstrip("0123456789") for how in deaths}


@pytest.mark.long
def test_a_teacher_that_is_killed_makes_each_clip_once(tmp_path):
    """Once while it makes a unit, and once when some are done."""
    (captions := tmp_path / "captions.txt").write_text("".join(f"a three moves up {i}\n" for i in range(7)))
    settings = {"arguments": {"captions": captions, "unit": 2, "steps": 1, "guidance": 1}, "units": 4}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    deaths = [how for moment in ((0, 0.0), (1, 0.05)) if (how := kill_at(output, moment, settings))]
    assert deaths, "none was killed"
    for folder in (output, whole):
        process = start(**settings["arguments"], output=folder)
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0, (out, err)
    assert [record["about"]["seed"] for record in contents(output).values()] == list(range(7))
    found, expected = files(output), files(whole)
    assert found.pop("summary.html").decode().replace("killed", "whole") == expected.pop("summary.html").decode()
    assert found == expected and not hidden(output)


def test_ctrl_c_ends_it_in_one_line(tmp_path):
    folder, output = make_videos(tmp_path / "videos", 4), tmp_path / "records"
    # A shell that runs these tests in the background has its programs ignore the signal, unless they say otherwise.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(heed, videos=folder, unit=1, workers=2, output=output)
    assert wait_until(lambda: output.is_dir() and hidden(output)), "it never begins"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, (out, err)
    assert err.strip().splitlines()[-1:] == ["interrupted; what was saved is kept"] and "Traceback" not in err
    assert not hidden(output) and wait_until(lambda: not living(process.pid), ORPHANED)
