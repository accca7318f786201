"""The server over real sockets, on the embedded model: requests, clips, and what is turned away."""

import io
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from served import serving

from vpae_jax.evaluation.rows import Entry
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import read_video
from vpae_jax.serving import limits, worker
from vpae_jax.serving.jobs import JobQueue
from vpae_jax.serving.models import make as make_clip
from vpae_jax.types import UserError

ENTRIES = [Entry("teacher", "tiny", 2, 2.0), Entry("student", "tiny", 1, 1.0)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(ENTRIES, tmp_path_factory.mktemp("clips")) as found:
        yield found


def png(height=40, width=40):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue(), pixels


def test_the_page_loads_nothing_from_elsewhere(server):
    status, headers, content = server.ask("GET", "/")
    text = content.decode()
    assert status == 200 and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Clips are made when you press Generate (--generate=button; " in text
    assert 'data-model="teacher"' in text and 'data-model="student"' in text
    status, headers, content = server.ask("GET", "/serve.js")
    assert status == 200 and headers["Content-Type"].startswith("text/javascript") and b"http" not in content


def test_clips_are_those_of_the_pipeline(server, tmp_path):
    found = server.clips(seed=3, models={"student": {"steps": 2, "guidance": 1.5}})
    assert found["state"] == "done" and [one["state"] for one in found["clips"]] == ["done", "done"]
    pipeline = load_pipeline("tiny", "float32")
    for one, (steps, guidance) in zip(found["clips"], [(2, 2.0), (2, 1.5)], strict=True):
        clip = one["clip"]
        assert (clip["frames"], clip["height"], clip["width"]) == (9, 48, 48)
        assert (clip["steps"], clip["guidance"], clip["evaluations"]) == ("2", guidance, 4)
        seconds = clip["seconds"]
        stages = [seconds[stage] for stage in ("encoding", "network", "decoding")]
        assert min(stages) > 0 and seconds["total"] == pytest.approx(sum(stages), abs=1e-3)
        status, headers, content = server.ask("GET", f"/clips/{clip['name']}.mp4")
        assert status == 200 and headers["Content-Type"] == "video/mp4"
        (tmp_path / "got.mp4").write_bytes(content)
        frames = pipeline("a three moves up", seed=3, steps=steps, guidance=guidance)
        shown = read_video(tmp_path / "got.mp4")
        # H.264 is lossy, and not the same in every encoding of the same frames.
        assert shown.shape == frames.shape and np.abs(shown.astype(int) - frames).mean() < 2
    # the student's settings were new, those of the teacher its own
    assert [one["clip"]["compiles"] for one in found["clips"]] == [False, True]
    again = server.clips(seed=4, models={"student": {"steps": 2, "guidance": 3}})  # any guidance above 1 is one program
    assert [one["clip"]["compiles"] for one in again["clips"]] == [False, False]


def test_frames_are_those_of_the_pipeline(server):
    _, picture = png(40, 80)
    teacher, sampler = server.worker.ready.models[0], Sampler.even(2, guidance=2.0)
    for image in (None, picture):
        made = make_clip(teacher, sampler, "a three moves up", 3, image)
        frames = teacher.pipeline("a three moves up", image, steps=2, guidance=2.0, seed=3)
        np.testing.assert_array_equal(made.frames, frames)


def test_a_part_of_a_clip(server):
    """Browsers seek in a video by asking for parts of it."""
    (clip, _) = server.clips()["clips"]
    address = f"/clips/{clip['clip']['name']}.mp4"
    whole = server.ask("GET", address)[2]
    status, headers, part = server.ask("GET", address, headers={"Range": "bytes=10-19"})
    assert (status, part) == (206, whole[10:20]) and headers["Content-Range"] == f"bytes 10-19/{len(whole)}"


def test_a_first_frame(server):
    content, _ = png(40, 40)
    status, found = server.json("POST", "/images", content)
    assert status == 201 and (found["height"], found["width"]) == (40, 40)
    with_image = server.clips(image=found["image"])["clips"]
    assert [one["state"] for one in with_image] == ["done", "done"]
    without = server.clips()["clips"]
    bytes_of = [server.ask("GET", f"/clips/{one['clip']['name']}.mp4")[2] for one in (with_image[0], without[0])]
    assert bytes_of[0] != bytes_of[1]


def test_the_image_decides_the_size(server):
    _, found = server.json("POST", "/images", png(40, 80)[0])
    clip = server.clips(image=found["image"])["clips"][1]["clip"]
    assert (clip["height"], clip["width"]) == load_pipeline("tiny", with_transformer=False).fit(40, 80) != (48, 48)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the request is not JSON"),
        ({"page": "p", "prompt": " "}, "prompt is empty"),
        ({"page": "p", "prompt": "a", "seed": -1}, "seed is -1"),
        ({"page": "p", "prompt": "a", "image": "../../etc/passwd"}, "image is not on the server any more; upload it"),
        ({"page": "p", "prompt": "a", "models": {"student": {"steps": 0}}}, "student: steps is 0"),
    ],
)
def test_bad_requests_are_turned_down_in_one_line(server, body, message):
    status, found = server.json("POST", "/requests", body)
    assert status == 400 and message in found["error"] and "\n" not in found["error"]


def test_bad_images_are_turned_down_in_one_line(server, monkeypatch):
    status, found = server.json("POST", "/images", b"no image")
    assert status == 400 and found["error"].startswith("image: ") and "not an image" in found["error"]
    assert "/" not in found["error"]  # no path of this machine
    monkeypatch.setattr(limits, "MAX_IMAGE_BYTES", 100)
    status, found = server.json("POST", "/images", b"x" * 101)
    assert (status, found["error"]) == (413, "image has more than 100 bytes; send less")
    status, found = server.json("POST", "/requests", b"x" * (limits.MAX_BODY + 1))
    assert status == 413 and "the request has more than 65536 bytes" in found["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/favicon.ico",
        "/clips/x.mp4",
        "/clips/..%2F..%2Fpage.css.mp4",
        "/clips/../serve.js.mp4",
        "/../../etc/passwd",
        "//etc/passwd",
        "/assets/page.css",
        "/requests/x",
        "/images",
    ],
)
def test_nothing_else_is_served(server, path):
    status, found = server.json("GET", path)
    assert status in (404, 405) and found["error"]


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:80"}],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/requests"), ("POST", "/images")])
def test_other_sites_are_turned_away(server, headers, method, path):
    status, found = server.json(method, path, headers=headers)
    assert status == 403 and ("is not this server's" in found["error"] or "is another site" in found["error"])
    assert server.ask("GET", "/", headers={"Origin": f"http://{server.netloc}"})[0] == 200


@pytest.fixture
def held(server, monkeypatch):
    """Holds the worker before its next clip until it is set free."""
    begun, free, order = threading.Event(), threading.Event(), []

    def make(model, sampler, prompt, *more):
        order.append((prompt, model.name))
        begun.set()
        assert free.wait(600)
        return make_clip(model, sampler, prompt, *more)

    monkeypatch.setattr(worker, "make", make)
    yield begun, free, order
    free.set()


def test_typing_does_not_fill_the_queue(server, held):
    """A page's newer request takes the older one's place, and ends the running one before its next clip."""
    begun, free, order = held

    def add(page, prompt):
        status, found = server.json("POST", "/requests", {"page": page, "prompt": prompt})
        assert status == 202
        return found["request"]

    def state(name):
        return server.json("GET", f"/requests/{name}")[1]

    first = add("a", "a")
    assert begun.wait(600)
    assert state(first)["state"] == "running"
    typed = [add("b", "a three"[: end + 1]) for end in range(7)]
    newest = add("a", "a three moves")
    assert [state(name)["state"] for name in typed] == ["superseded"] * 6 + ["waiting"]
    assert state(first)["state"] == "superseded"
    assert (state(typed[-1])["ahead"], state(newest)["ahead"]) == (1, 2)
    free.set()
    while state(newest)["state"] != "done":
        time.sleep(0.02)
    done = ["a three", "a three", "a three moves", "a three moves"]
    assert order == [("a", "student"), *zip(done, ["student", "teacher"] * 2, strict=True)]
    assert [one["state"] for one in state(first)["clips"]] == ["waiting", "done"]  # the teacher's was not begun


def test_a_full_queue_says_so(server, held, monkeypatch):
    begun, free, _ = held
    monkeypatch.setattr(server.worker.queue, "_places", 2)
    ask = {"prompt": "a three"}
    assert server.json("POST", "/requests", {"page": "a", **ask})[0] == 202
    assert begun.wait(600)
    statuses = [server.json("POST", "/requests", {"page": page, **ask})[0] for page in "bcb"]
    assert statuses == [202] * 3
    status, headers, content = server.ask("POST", "/requests", b'{"page": "d", "prompt": "a three"}')
    assert status == 503 and headers["Retry-After"] == "1"
    assert content == b'{"error":"the queue is full: 2 requests are waiting; try again in a moment"}'
    free.set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("the video is not finite; sample in float32"), "the video is not finite; sample in float32"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory"),
            "the device failed: RESOURCE_EXHAUSTED: out;",
        ),
    ],
)
def test_a_failure_is_told_and_the_queue_goes_on(server, monkeypatch, error, message):
    def make(model, *more):
        if model.name == "student":
            raise error
        return make_clip(model, *more)

    monkeypatch.setattr(worker, "make", make)
    found = server.clips()
    assert found["state"] == "done" and [one["state"] for one in found["clips"]] == ["done", "failed"]
    assert found["clips"][1]["error"].startswith(message)
    monkeypatch.undo()
    assert [one["state"] for one in server.clips()["clips"]] == ["done", "done"]


def test_until_it_is_ready(tmp_path, monkeypatch):
    loads, free = threading.Event(), threading.Event()

    def load_models(entries, say, **options):
        say("reading <tiny> ...")
        loads.set()
        assert free.wait(600)
        raise UserError("it is broken")

    monkeypatch.setattr(worker, "load_models", load_models)
    with serving(ENTRIES, tmp_path, ready=False) as server:
        assert loads.wait(600)
        status, headers, content = server.ask("GET", "/")
        assert status == 503 and headers["Retry-After"] == "1" and b"reading &lt;tiny&gt; ..." in content
        for path in ("/requests", "/images"):
            status, found = server.json("POST", path, {"page": "a", "prompt": "a"})
            assert status == 503 and "the models are not ready yet (reading <tiny> ...)" in found["error"]
        free.set()


def test_models_of_one_autoencoder_share_it(tmp_path, models):
    entries = [Entry("teacher", str(models["i2v"])), Entry("again", str(models["i2v"]), 1, 1.0)]
    copy = tmp_path / "student"
    copy.mkdir()
    for path in models["i2v"].iterdir():
        (copy / path.name).symlink_to(path)
    entries.append(Entry("student", str(copy), 1, 1.0))
    entries.append(Entry("t2v", str(models["t2v"])))
    with serving(entries, tmp_path, queue=JobQueue()) as server:
        first, again, student, other = server.worker.ready.models
        assert again.pipeline is first.pipeline
        assert (
            student.pipeline.vae is first.pipeline.vae and student.pipeline.text_encoder is first.pipeline.text_encoder
        )
        assert student.pipeline.transformer is not first.pipeline.transformer
        assert other.pipeline.text_encoder is not first.pipeline.text_encoder
        _, found = server.json("POST", "/images", png()[0])
        clips = server.clips(image=found["image"], prompt="a three")["clips"]
        assert [one["state"] for one in clips] == ["done", "done", "done", "failed"]
        assert clips[3]["error"] == "this is a text-to-video model; remove the image to see its clip"
