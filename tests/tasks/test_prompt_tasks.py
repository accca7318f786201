"""Folders of prompts alone: what a run previews of them, by what it is judged, and which methods are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vpae_jax import tasks
from vpae_jax.config import DataConfig, Experiment
from vpae_jax.data.order import held_out
from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.encoding.units import Units
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.methods.dmd2 import DMD2
from vpae_jax.methods.magic import Magic
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo
from vpae_jax.metrics import networks
from vpae_jax.tasks.base import Feed, TooFew
from vpae_jax.tasks.video.task import Video
from vpae_jax.types import Batch, UserError

SIZE = (3, 6, 8, 16)
FEED = Feed(batch_size=4, seed=0, workers=0, rows=None, max_bad=0.0)


@pytest.fixture(autouse=True)
def without_networks(monkeypatch):
    """What is chosen does not depend on what is measured of it, and I3D takes a second for each clip."""
    for network in ("_i3d", "_alexnet"):
        monkeypatch.setattr(networks, network, lambda: None)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny", with_transformer=False)


def write(pipeline, folder, count, clips=False):
    """Records of noise that fit the tiny model, of prompts alone or of clips."""
    tokens, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.d_model
    image = pipeline.image_encoder.config
    made = Units(folder, {"encoders": fingerprint(pipeline), "clips": clips}, 1)
    with made.write(0) as writer:
        for number in range(count):
            rng = np.random.default_rng(number)
            frames = np.concatenate([np.zeros((*SIZE[:3], 4)), rng.standard_normal(SIZE)], -1).astype(np.float32)
            frames[0, ..., :4] = 1
            text, mask = rng.standard_normal((tokens, width)).astype(np.float32), np.arange(tokens) < 3
            text[3:] = 0
            picture = rng.standard_normal((image.num_tokens, image.hidden_size)).astype(np.float32)
            arrays = {"text": text, "text_mask": mask, "frames": frames, "image": picture}
            arrays |= {"latents": rng.standard_normal(SIZE).astype(np.float32)} if clips else {}
            writer.add(f"{number}", arrays, {"caption": f"number {number}"}, None if clips else SIZE)
    null = {"text": np.zeros((tokens, width), np.float32), "text_mask": np.arange(tokens) < 1}
    assert made.finish(null, {"text_tokens": tokens, "takes_image": True})
    return folder


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    return write(pipeline, root / "prompts", 100), write(pipeline, root / "clips", 24, clips=True)


def task(records, **more):
    return Video(DataConfig(records=str(records), **more), Path(records), "tiny", ("t2v", "i2v"))


def numbers(captions):
    return {int(caption.split()[1]) for caption in captions}


def test_previews_are_of_prompts_that_are_held_out(pipeline, folders):
    prompts = task(folders[0])
    found = prompts.held_out(pipeline, "preview", 4)
    out = {int(clip) for clip in held_out(100, 256)}
    found = prompts.with_real(found, pipeline)
    assert found.shape == SIZE and not found.clips and len(found) == 8 and not found.real
    assert numbers(found.captions) <= out and len(out) == 20
    records = LatentRecords(folders[0])
    for row, caption in enumerate(found.captions):
        record, given = records[int(caption.split()[1])], row >= found.parts[1].rows.start
        np.testing.assert_array_equal(found.condition.text[row], record["text"])
        np.testing.assert_array_equal(found.condition.frames[row], record["frames"] if given else 0 * record["frames"])
    batches = prompts.batches(Batch, pipeline, FEED)
    texts = {record["text"].tobytes() for record in (records[clip] for clip in out)}
    for _ in range(30):
        batch = next(batches)
        assert batch.latents is None and batch.size == SIZE
        assert not {np.asarray(text).tobytes() for text in batch.condition.text} & texts
    batches.close()


@pytest.mark.parametrize("purpose", ["guard", "evaluation"])
def test_nothing_is_judged_by_prompts_alone(pipeline, folders, purpose):
    with pytest.raises(
        TooFew, match=r"^.*/prompts contains prompts alone, without real clips to compare with; give .*"
    ):
        task(folders[0]).held_out(pipeline, purpose, 8)
    judging = task(folders[0], held_out_records=str(folders[1]))
    judged = judging.with_real(judging.held_out(pipeline, purpose, 8), pipeline)
    assert judged.real["features"].shape[0] == len(judged) and judged.others


def checked(method, records, **more):
    experiment = Experiment(name="run", method={"name": "any"}, optimizers={}, steps=1, batch_size=1)
    data = DataConfig(records=records, **more)
    tasks.check(replace(experiment, data=data), method, None, Path())


def test_methods_that_need_clips_are_refused_by_name_of_the_keys(folders):
    prompts, clips = map(str, folders)
    ends = r"or encode videos, or clips that a teacher makes \(python -m vpae_jax.encode --captions=...\)$"
    for method, keys in (
        (PhaseOne(), "--config.method.input=pure_noise"),
        (DMD2(), "--config.method.adversarial_weight=0.0 --config.method.disc_weight=0.0"),
        (
            DMD2(inputs="noised_real", adversarial_weight=0.0, disc_weight=0.0),
            "--config.method.inputs=simulated",
        ),
        (
            Magic(),
            "--config.method.inputs=simulated --config.method.truth_weight=0.0 --config.method.adversarial_weight=0.0",
        ),
    ):
        reason = (
            f"^run trains on real clips with these settings, but {prompts} contains prompts alone; set {keys}, {ends}"
        )
        with pytest.raises(UserError, match=reason):
            checked(method, prompts)
        checked(method, clips)
    with pytest.raises(
        UserError, match=f"^run trains on real clips, but {prompts} contains prompts alone; encode videos"
    ):
        checked(PhaseTwo(), prompts)
    checked(PhaseOne(input="pure_noise"), prompts)


def test_a_mixture_of_prompts_and_clips_is_refused(folders):
    prompts, clips = map(str, folders)
    method = PhaseOne(input="pure_noise")
    ends = f"{prompts} contains prompts alone, but {clips} clips; give folders of one kind$"
    for names in (f"{prompts},{clips}", f"{clips}=1,{prompts}=3"):
        with pytest.raises(UserError, match=f"^config.data.records: {ends}"):
            checked(method, names)
    with pytest.raises(UserError, match=f"^config.data.held_out_records: {ends}"):
        checked(method, prompts, held_out_records=f"{prompts},{clips}")
    checked(method, f"{prompts},{prompts}", held_out_records=clips)
