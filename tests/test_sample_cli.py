"""`python -m vpae_jax.sample`: a video from a model directory, one line for bad input, nothing left behind."""

import dataclasses
import json

import av
import pytest
import random_model
from PIL import Image

from vpae_jax import cli, sample
from vpae_jax.convert.settings import Defaults
from vpae_jax.data.video import read_image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=True)
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(5, 32, 32, 8.0))))
    return folder


@pytest.fixture
def run(capsys):
    """Runs the program in this process; returns its exit status and standard error."""

    def call(**options):
        arguments = [f"--{name}={value}" for name, value in options.items()]
        code = 0
        try:
            cli.run(sample.main, arguments)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("name", ["clip.mp4", "clip.png"])
def test_writes_a_video(model, run, tmp_path, name):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "first.jpg")
    output = tmp_path / "out" / name
    code, err = run(model=model, prompt="a three moves up", image=tmp_path / "first.jpg", output=output)
    assert not code, err
    assert [path.name for path in output.parent.iterdir()] == [name]
    if name.endswith("png"):
        assert read_image(output).shape == (65, 98, 3)  # 5 frames in rows of 3
        return
    with av.open(str(output)) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shapes == [(32, 32, 3)] * 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": "none.png"}, "image none.png: no such file"),
        ({"image": __file__}, "not an image of a known format"),
        ({"output": "clip.gif"}, "--output=clip.gif: expected a name that ends in .mp4 or .png"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"solver": "heun"}, "heun"),
        ({"prompt": "a three moves up " * 9}, "tokens, at most 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_status_2(model, run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    code, err = run(**{"model": model, "prompt": "a three moves up", "output": "clip.mp4", **changes})
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
