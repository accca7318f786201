"""Causal models as folders: they say how their chunks are sampled, and Diffusers does not load them."""

import dataclasses
import json

import diffusers
import numpy as np
import pytest
import random_model

from vpae_jax import cli
from vpae_jax.convert import main
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler, parse_steps, typed
from vpae_jax.run.export import Trained, write_student
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import LORA_FILE, Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import Adapter, Lora
from vpae_jax.weights.settings import Scheduler, read_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
CHUNKS = Chunks(3, window=6, sink=3)
STUDENT = dataclasses.replace(Sampler.even(4, 5.0, 1.0, "consistency"), chunks=CHUNKS)
DIFFUSION = dataclasses.replace(Sampler.even(20, 5.0, 3.0), chunks=Chunks(1))
LISTED = Sampler("consistency", (1.0, 0.9, 0.4, 0.3, 0.0), chunks=Chunks(3, first=1), first=(1.0, 0.5, 0.0))


def written(folder, values):
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("sampler", [STUDENT, DIFFUSION, LISTED], ids=["student", "diffusion", "listed"])
def test_a_scheduler_tells_the_chunks_and_the_first_ones_times(tmp_path, sampler):
    scheduler = Scheduler.of(sampler, 5.0)
    assert scheduler.sampler() == sampler
    assert read_scheduler(written(tmp_path / "a", scheduler.to_json())) == scheduler
    (tmp_path / "vpae_jax.json").write_text(json.dumps({"scheduler": dataclasses.asdict(scheduler)}))
    assert read_scheduler(tmp_path) == scheduler  # as the layouts without a scheduler's folder have it


def test_a_student_of_n_steps_takes_the_first_of_its_times():
    """Self-Forcing trains it to end after each of them."""
    scheduler, own = Scheduler.of(STUDENT), STUDENT.times
    for steps in (1, 2, 3, 4):
        assert scheduler.sampler(steps) == dataclasses.replace(STUDENT, times=(*own[:steps], 0.0))
    assert scheduler.sampler(2).times != Sampler.even(2, 5.0).times
    assert scheduler.sampler(5).times == Sampler.even(5, 5.0).times
    assert scheduler.sampler(2, shift=3.0).times == Sampler.even(2, 3.0).times
    assert scheduler.sampler(2, solver="euler") == dataclasses.replace(STUDENT, solver="euler", times=(*own[:2], 0.0))
    assert scheduler.sampler(2, solver="unipc").times == Sampler.even(2, 5.0, solver="unipc").times
    assert Scheduler.of(LISTED).sampler(2).times == (1.0, 0.9, 0.0)
    # A diffusion model is trained at all times; and what makes whole clips is as it was.
    assert Scheduler.of(DIFFUSION).sampler(2).times == Sampler.even(2, 5.0).times
    assert Scheduler("consistency", 5.0, 4, 1.0).sampler(2) == Sampler.even(2, 5.0, 1.0, "consistency")


def test_the_first_chunk_in_more_steps_than_the_others():
    scheduler, own = Scheduler.of(STUDENT), STUDENT.times
    found = scheduler.sampler((4, 1))
    assert (found.first, found.times, found.chunks) == (own, (1.0, 0.0), CHUNKS)
    assert (found.asked, found.evaluations) == ((4, 1), 4)
    assert scheduler.sampler((2, 2)) == scheduler.sampler(2)
    assert scheduler.sampler((6, 2)).first == Sampler.even(6, 5.0).times
    listed = Scheduler.of(LISTED, 5.0)
    assert listed.sampler().asked == (2, 4) and listed.sampler((2, 1)).first == LISTED.first
    assert listed.sampler(4) == dataclasses.replace(LISTED, first=())
    assert listed.sampler(shift=3.0).first == Sampler.even(2, 3.0).times


def test_a_window_in_place_of_the_models():
    scheduler = Scheduler.of(STUDENT)
    assert scheduler.sampler(window=9).chunks == dataclasses.replace(CHUNKS, window=9)
    assert scheduler.sampler(window=0, sink=0).chunks == Chunks(3)
    with pytest.raises(UserError, match="sink is 3, but there is no window"):
        scheduler.sampler(window=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": (4, 1)}, "steps is 4,1, but this model is not causal: it has no chunks; give one number"),
        ({"window": 0}, "window is 0, but this model is not causal: all frames see each other; leave it out"),
        ({"sink": 2}, "sink is 2, but this model is not causal"),
    ],
)
def test_what_only_a_causal_model_has_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Scheduler("euler", 3.0, 4, 1.0).sampler(**given)


def test_steps_as_they_are_typed():
    for text, steps in (("4", 4), ("4,1", (4, 1))):
        assert parse_steps(text, "--steps") == steps and typed(steps) == text
    for text in ("", "four", "4,", "4,2,1", "1.5"):
        with pytest.raises(UserError, match=rf"--steps={text}: expected a number of steps, or .* such as 4,1"):
            parse_steps(text, "--steps")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_chunks": 3}, "chunks: expected"),
        ({"_chunks": {"size": 0}}, "chunks.size is 0, expected 1 or more"),
        ({"_chunks": {"length": 3}}, "chunks.length: unknown key"),
        ({"_first_chunk_times": [1.0, 1.0, 0.0]}, "expected numbers that fall from 1 to 0"),
        ({"_chunks": None, "_first_chunk_times": [1.0, 0.5, 0.0]}, "the model makes whole clips; leave them out"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, changes, message):
    folder = written(tmp_path, {**Scheduler.of(STUDENT).to_json(), **changes})
    with pytest.raises(UserError, match=message) as error:
        read_scheduler(folder)
    assert "scheduler_config.json" in str(error.value) and "\n" not in str(error.value)


# Folders.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    random_model.pipeline(folder, image=False)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """What a run of Self-Forcing leaves."""
    trained = Trained(read_part(teacher, "transformer", None)[1])
    return write_student(tmp_path_factory.mktemp("run"), find_model(teacher), trained, STUDENT)


def test_diffusers_does_not_load_it(student):
    with pytest.raises(AttributeError, match="CausalWanPipeline"):
        diffusers.DiffusionPipeline.from_pretrained(student)
    with pytest.raises(ValueError, match="CausalWanTransformer3DModel"):  # not even when it is told which pipeline
        diffusers.WanPipeline.from_pretrained(student)


def test_its_card_says_so(student):
    card = (student / "README.md").read_text()
    assert "# A causal Wan 2.1 text-to-video model" in card and "library_name" not in card and "diffusers" not in card
    for told in (
        "| layout | vpae_jax |",
        "| sampling | consistency, 4 steps a chunk, guidance 1, shift 5 |",
        "| chunks | 3 latent frames; each sees the 6 before it and the first 3 |",
        "python -m vpae_jax.sample --model=. --prompt=... --output=out.mp4",
        "`--steps=4,1`",
        "`--window=N`",
        "`python -m vpae_jax.convert . ../student.pt --format=self_forcing`",
    ):
        assert told in card


def test_a_model_of_whole_clips_is_as_it_was(teacher, tmp_path):
    write_model(tmp_path / "out", Contents(find_model(teacher)))
    assert "causal" not in (tmp_path / "out" / "README.md").read_text()
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"), diffusers.WanPipeline)


def test_it_goes_through_our_own_layout(student, tmp_path):
    main([str(student), str(tmp_path / "out"), "--format=orbax", "--verify"])
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "CausalWanPipeline"
    assert read_scheduler(tmp_path / "out") == Scheduler.of(STUDENT)
    assert find_model(tmp_path / "out").part("transformer").config == find_model(student).part("transformer").config


@pytest.mark.parametrize(
    ("form", "who"), [("diffusers", "Diffusers' Wan pipelines let"), ("wan", "Wan's own program lets")]
)
def test_it_is_not_written_for_those_whose_frames_see_each_other(student, tmp_path, capsys, form, who):
    with pytest.raises(SystemExit):
        cli.run(main, [str(student), str(tmp_path / "out"), f"--format={form}"])
    line = capsys.readouterr().err
    assert line.startswith(f"error: --format={form}: {student} is a causal model") and line.count("\n") == 1
    assert f"{who} all frames see each other; --format=orbax writes" in line and "--format=self_forcing" in line
    assert not list(tmp_path.iterdir())


def test_a_lora_of_it_comes_with_a_warning_and_not_by_itself(teacher, student, tmp_path, capsys):
    params = read_part(teacher, "transformer", None)[1]
    width, out = params["proj_out"]["kernel"].shape
    lora = Lora({("proj_out", 0): Adapter(np.ones((width, 1), np.float32), np.ones((1, out), np.float32))})
    folder = write_student(tmp_path, find_model(teacher), Trained(params, lora), STUDENT)
    assert not (folder / LORA_FILE).exists()
    cli.run(
        main,
        [str(folder), str(tmp_path / "x.safetensors"), "--format=wan", "--as-lora", "--rank=1", f"--base={teacher}"],
    )
    assert "note: the model is causal, which a LoRA file cannot say" in capsys.readouterr().err


def test_a_causal_index_needs_a_scheduler_with_chunks(student, tmp_path):
    for name in ("model_index.json", "scheduler"):
        (tmp_path / name).symlink_to(student / name)
    assert read_scheduler(tmp_path).chunks == CHUNKS
    (tmp_path / "scheduler").unlink()
    written(tmp_path, Scheduler("consistency", 5.0, 4, 1.0).to_json())
    with pytest.raises(
        UserError, match=r"scheduler_config.json: has no _chunks, without which a causal model .* cannot"
    ):
        read_scheduler(tmp_path)
