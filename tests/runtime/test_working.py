"""What is said while something takes long."""

import re
import time

import pytest

from vpae_jax.runtime.progress import duration, working


def test_says_what_begins_that_it_goes_on_and_how_long_it_took():
    said = []

    def slow():
        with working("compiling", said.append, every=0.001):
            while len(said) < 3:
                time.sleep(0.001)

    slow()
    assert said[0] == "compiling ..."
    assert all(re.fullmatch(r"compiling: [\d.]+ s so far", line) for line in said[1:-1]) and len(said) > 3
    assert re.fullmatch(r"compiling: [\d.]+ s", said[-1])
    count = len(said)
    time.sleep(0.01)
    assert len(said) == count


def test_what_fails_is_not_said_to_have_ended():
    said = []
    with pytest.raises(ValueError), working("compiling", said.append):
        raise ValueError
    assert said == ["compiling ..."]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (59.6, "1 min 0 s"), (754.4, "12 min 34 s")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
