"""`python -m vpae_jax.sample`: a video from a model directory, one line for bad input, nothing left behind."""

import dataclasses
import json
import re

import av
import numpy as np
import pytest
import random_model
from PIL import Image

from vpae_jax import cli, sample
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import read_image, write_video
from vpae_jax.weights.settings import Defaults, Scheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=True)
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(5, 32, 32, 8.0))))
    scheduler = Scheduler("unipc", 3.0, steps=3, guidance=2.5)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.to_json()))
    return folder


@pytest.fixture(scope="module")
def causal(model, tmp_path_factory):
    """The same as a causal student of three steps, whose clips have two chunks."""
    folder = tmp_path_factory.mktemp("causal")
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    scheduler = Scheduler("consistency", 3.0, 3, 1.0, chunks=Chunks(1))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.to_json()))
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


@pytest.mark.parametrize("name", ["CLIP.MP4", "clip.png"])
def test_writes_a_video(model, run, tmp_path, name):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "first.jpg")
    output = tmp_path / "out" / name
    code, err = run(model=model, prompt="a three moves up", image=tmp_path / "first.jpg", output=output)
    assert not code, err
    assert [path.name for path in output.parent.iterdir()] == [name]
    if name.endswith("png"):
        assert read_image(output).shape == (33, 98, 3)  # 5 frames of 16x32 in rows of 3
        return
    with av.open(str(output)) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shapes == [(16, 32, 3)] * 5


def test_says_how_the_author_samples_it(model, run, tmp_path):
    options = dict(model=model, prompt="a three moves up", output=tmp_path / "clip.png")
    note = "note: this model's own setting is --steps=3 --guidance=2.5"
    assert run(**options, steps=1)[1].splitlines() == [note]
    assert run(**options, steps=2, guidance=2.5)[1].splitlines() == [note]
    assert run(**options, steps=3)[1] == ""


def test_says_what_takes_long(model, tmp_path, capsys):
    cli.run(sample.main, [f"--model={model}", "--prompt=a three", "--num_frames=1", f"--output={tmp_path / 'a.png'}"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"reading {model} ..." and out[1].startswith(f"reading {model}: ")
    assert out[2] == "compiling, and making the video ..." and out[3].startswith("compiling, and making the video: ")
    assert out[4:] == [f"{tmp_path / 'a.png'}: 1 frame of 32x32"]


def test_says_that_the_picture_decides_the_size(model, run, tmp_path):
    options = dict(model=model, prompt="a three moves up", output=tmp_path / "clip.png", image=tmp_path / "first.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "first.png")
    note = (
        "note: the video is 16x32, to match the image's aspect ratio; --height=32 --width=32 gives the model's own size"
    )
    assert run(**options)[1].splitlines() == [note]
    assert run(**options, height=32, width=32)[1] == ""
    Image.new("RGB", (40, 40)).save(tmp_path / "first.png")
    assert run(**options)[1] == ""


def test_a_stream_is_written_as_it_is_made(model, tmp_path, capsys):
    output = tmp_path / "out" / "clip.mp4"
    flags = ["--prompt=a three", "--num_frames=13", "--height=16", "--width=32", "--seed=4", f"--output={output}"]
    given = sample.parser().parse_args([*flags, "--stream"])
    pipeline, sampler = load_pipeline(model), Sampler(chunks=Chunks(1, window=2))
    sample.stream(pipeline, sampler, None, given)
    assert [path.name for path in output.parent.iterdir()] == ["clip.mp4"]
    with av.open(str(output)) as container:
        written = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == 8
    made = pipeline.stream("a three", None, sampler, 4, None, 13, 16, 32)
    write_video(tmp_path / "whole.mp4", np.concatenate(list(made)), 8.0)
    assert written.shape == (13, 16, 32, 3) and output.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0] == "compiling, and making the first frames as a warm-up ..."
        and out[2] == "making and writing the video ..."
    )
    told = re.fullmatch(
        re.escape(f"{output}: 13 frames of 16x32; the first ") + r"after (.*) s, then (.*) frames/s", out[4]
    )
    assert 0 < float(told[1]) < 60 and float(told[2]) > 0


def test_a_stream_of_one_chunk_has_no_pace(model, tmp_path, capsys):
    given = sample.parser().parse_args(
        ["--prompt=a three", "--num_frames=1", f"--output={tmp_path / 'a.mp4'}", "--stream"]
    )
    sample.stream(load_pipeline(model), Sampler(chunks=Chunks(1)), None, given)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(re.escape(f"{tmp_path / 'a.mp4'}: 1 frame of 32x32; the first after ") + r"\d+\.\d\d s", last)


@pytest.mark.parametrize(
    "name, message",
    [
        ("clip.png", "--output=clip.png: --stream writes .mp4 only, since a .png needs all frames at once"),
        ("clip.mp4", "this model generates all frames of a video at once, and cannot stream; load a causal model, or"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(model, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.run(sample.main, [f"--model={model}", "--prompt=a three", f"--output={name}", "--stream"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and not list(tmp_path.iterdir())


def test_flags_reach_the_pipeline(model, run, tmp_path):
    def frames(**options):
        code, err = run(model=model, prompt="a three moves up", output=tmp_path / "clip.png", **options)
        assert not code, err
        return read_image(tmp_path / "clip.png").astype(int)

    # By default the model's own: UniPC, 3 steps, guidance 2.5, shift 3, and the empty negative prompt.
    by_itself = frames()
    np.testing.assert_array_equal(frames(steps=3, guidance=2.5), by_itself)
    np.testing.assert_array_equal(frames(steps=3, guidance=2.5, solver="unipc", shift=3, negative_prompt=""), by_itself)
    for change in ({"solver": "euler"}, {"shift": 8}, {"negative_prompt": "the digit seven"}):
        assert (frames(steps=3, guidance=2.5, **change) != by_itself).any()
    assert frames(height=16, width=48, num_frames=1).shape == (16, 48, 3)


def test_devices_share_a_video(model, run, tmp_path, monkeypatch):
    """They make the frames of one device, and 8 of them hold an eighth of the weights each."""
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "first.png")
    loaded = []

    def load(*given, **options):
        loaded.append(load_pipeline(*given, **options))
        return loaded[-1]

    monkeypatch.setattr(sample, "load_pipeline", load)

    def frames(**options):
        asked = dict(prompt="a three moves up", image=tmp_path / "first.png", steps=1, guidance=1)
        code, err = run(model=model, output=tmp_path / "clip.png", **asked, **options)
        assert not code, err
        return read_image(tmp_path / "clip.png").astype(int)

    alone = frames()
    assert np.abs(frames(devices=8) - alone).max() <= 1 and alone.std() > 5
    kernel = loaded[1].transformer.blocks.attn1.to_q.kernel.get_value()
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size and kernel.dtype == "float32"
    code, err = run(model=model, prompt="a three", output=tmp_path / "clip.png", devices=7)
    assert code == 2 and len(err.splitlines()) == 1 and "is not divisible by fsdp x context=7" in err


def test_a_causal_model(causal, run, tmp_path):
    """Its first chunk in more steps than the others, and clips of more chunks than it was made for."""

    def made(**options):
        code, err = run(model=causal, prompt="a three moves up", output=tmp_path / "clip.png", **options)
        assert not code, err
        return read_image(tmp_path / "clip.png").astype(int), err.splitlines()

    (own, none), (one, note), (mixed, _) = made(), made(steps=1), made(steps="3,1")
    assert none == [] and note == ["note: this model's own setting is --steps=3 --guidance=1.0"]
    first = (slice(32), slice(32))  # the first frame
    assert np.abs(mixed[first] - own[first]).max() <= 1 and (mixed[first] != one[first]).any()
    assert (mixed != own).any()
    long, note = made(num_frames=13)
    assert note == ["note: this model was trained for 5 frames; --window=1 limits how far it looks back"]
    windowed, none = made(num_frames=13, window=1)
    assert none == [] and windowed.shape == long.shape and (windowed != long).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": "none.png"}, "image none.png: no such file"),
        ({"image": __file__}, "not an image of a known format"),
        ({"output": "clip.gif"}, "--output=clip.gif: expected a name that ends in .mp4 or .png"),
        ({"output": f"{__file__}/clip.mp4"}, "clip.mp4: cannot be written: "),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"devices": 9}, "--devices=9: this process has 8; give a number from 1 to 8"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": "four"}, "--steps=four: expected a number of steps, or for a causal model"),
        ({"steps": "4,1"}, "steps is 4,1, but this model is not causal"),
        ({"window": 3}, "window is 3, but this model is not causal"),
        ({"solver": "heun"}, "heun"),
        ({"shift": 0}, "shift is 0.0, expected a positive number"),
        ({"guidance": 0}, "guidance is 0.0, expected at least 1"),
        ({"guidance": "inf"}, "--guidance: 'inf' is not a finite number"),
        ({"guidance": 1e39}, "guidance is 1e+39, expected at most 1000"),
        ({"guidance": "nan"}, "--guidance: 'nan' is not a finite number"),
        ({"shift": "1e999"}, "--shift: '1e999' is not a finite number"),
        ({"shift": "three"}, "--shift: 'three' is not a finite number"),
        ({"seed": -1}, "--seed is -1, expected a number from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed is 4294967296, expected a number from 0 to 4294967295"),
        ({"seed": 2**64}, "--seed is 18446744073709551616, expected a number from 0 to 4294967295"),
        ({"num_frames": 8}, "num_frames is 8, expected 1 + a multiple of 4, such as 9"),
        ({"height": 40}, "height is 40, expected a multiple of 16, such as 32"),
        ({"guidance": 2, "negative_prompt": "a three " * 17}, "negative_prompt: prompt too long"),
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
