"""Encoded clips: what comes back is what the encoders gave; a folder is whole or absent, and knows its source."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.convert.image_processor import ImageProcessor
from vpae_jax.convert.settings import Defaults, Scheduler
from vpae_jax.data import latents
from vpae_jax.data.digits import MovingDigits
from vpae_jax.data.latents import encode_clips, fingerprint
from vpae_jax.data.pipeline import latent_batches, to_float
from vpae_jax.data.records import LatentRecords
from vpae_jax.data.tokenizer import build_tokenizer
from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.pipeline import Pipeline
from vpae_jax.types import Batch

COUNT, BATCH = 10, 4


def make_pipeline(tokenizer, seed: int = 0, image: bool = True) -> Pipeline:
    """A complete pipeline at the smallest sizes, with random weights."""
    rngs = nnx.Rngs(seed)
    vae = WanVAE(WanVAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1), rngs=rngs)
    text = UMT5Encoder(UMT5Config(384, 16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), rngs=rngs)
    vision = CLIPVision(CLIPVisionConfig(16, 16, 2, 2, image_size=16, patch_size=8), rngs=rngs)
    transformer = WanTransformerConfig(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=36 if image else 16,
        text_dim=16,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        image_dim=16 if image else None,
        added_kv_proj_dim=12 if image else None,
    )
    return Pipeline(
        transformer=WanTransformer(transformer, rngs=rngs),
        vae=vae,
        text_encoder=text,
        image_encoder=vision if image else None,
        tokenizer=tokenizer,
        image_processor=ImageProcessor(16, (16, 16)) if image else None,
        scheduler=Scheduler("euler", 1.0),
        defaults=Defaults(num_frames=5, height=16, width=16),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return make_pipeline(tokenizer)


@pytest.fixture(scope="module")
def clips():
    return MovingDigits("train", size=COUNT, frames=5, resolution=16)


@pytest.fixture(scope="module")
def folder(pipeline, clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "UNIT_CLIPS", 6)  # two units, the second of a partial batch
        return encode_clips(clips, pipeline, root, batch_size=BATCH)


def test_records_hold_what_the_encoders_give(folder, pipeline, clips):
    records = LatentRecords(folder)
    records.verify()
    assert len(records) == COUNT
    assert len(records.index["shards"]) == 2
    for index in (0, 5, 6, 9):
        clip, record = clips[index], records[index]
        video = jnp.asarray(to_float(clip["video"][None]))
        condition = pipeline.condition([clip["caption"]], clip["video"][None, 0], 5, 16, 16)
        close = {"latents": pipeline.vae.encode(video), "image": condition.image, "frames": condition.frames}
        for name, expected in {**close, "text": condition.text}.items():
            assert record[name].dtype == jnp.bfloat16
            np.testing.assert_allclose(np.float32(record[name]), expected[0], rtol=4e-3, atol=1e-6, err_msg=name)
        assert np.array_equal(record["text_mask"], condition.text_mask[0])
        assert not record["text"][~record["text_mask"]].any()
        expected_about = {name: clip[name] for name in ("caption", "digit", "direction", "id")}
        assert records.about(index) == expected_about
    null, mask = pipeline.encode_prompt([""])
    np.testing.assert_allclose(np.float32(records.null_text), null[0], rtol=4e-3, atol=1e-6)
    assert np.array_equal(records.null_mask, mask[0])


def test_latent_batches_are_records_and_continue_exactly(folder):
    records = LatentRecords(folder)
    batches = latent_batches([(records, 1.0)], batch_size=3, seed=0)
    first = next(batches)
    assert isinstance(first, Batch)
    assert first.latents.dtype == first.condition.text.dtype == jnp.float32
    assert first.latents.shape == (3, 2, 2, 2, 16)
    assert first.condition.frames.shape == (3, 2, 2, 2, 20)
    assert first.unconditional.text.shape == first.condition.text.shape
    for row in range(3):
        (index,) = [i for i in range(COUNT) if np.array_equal(records[i]["latents"], first.latents[row])]
        assert np.array_equal(records[index]["text"], first.condition.text[row])
        assert np.array_equal(records[index]["image"], first.condition.image[row])
    position = json.loads(json.dumps(batches.get_state()))
    ahead = [next(batches) for _ in range(5)]
    other = latent_batches([(LatentRecords(folder), 1.0)], batch_size=3, seed=0)
    other.set_state(position)
    for expected in ahead:
        found = next(other)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))


def test_text_to_video_records_have_no_image(tokenizer, clips, tmp_path):
    folder = encode_clips(clips, make_pipeline(tokenizer, image=False), tmp_path, batch_size=BATCH)
    batch = next(latent_batches([(LatentRecords(folder), 1.0)], 2, seed=0))
    assert batch.condition.image is None
    assert batch.condition.frames is None


def test_what_is_encoded_already_is_kept(folder, pipeline, clips):
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert encode_clips(clips, pipeline, folder.parent, batch_size=BATCH) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_other_clips_or_encoders_have_a_folder_of_their_own(pipeline, clips, tokenizer, tmp_path):
    other = MovingDigits("train", size=COUNT, seed=1, frames=5, resolution=16)
    sources = ((clips, pipeline), (other, pipeline), (clips, make_pipeline(tokenizer, seed=1)))
    folders = {encode_clips(*source, tmp_path, batch_size=BATCH) for source in sources}
    assert folders == set(tmp_path.iterdir()) and len(folders) == 3


def test_fingerprint_sees_every_part(pipeline, tokenizer):
    prints = {fingerprint(pipeline)}
    assert fingerprint(make_pipeline(tokenizer)) in prints, "the same weights, the same print"
    other = make_pipeline(tokenizer, seed=1)
    for part in ("vae", "text_encoder", "image_encoder"):
        prints.add(fingerprint(dataclasses.replace(pipeline, **{part: getattr(other, part)})))
    prints.add(fingerprint(dataclasses.replace(pipeline, image_processor=ImageProcessor(18, (16, 16)))))
    assert len(prints) == 5
    assert fingerprint(dataclasses.replace(pipeline, transformer=other.transformer)) in prints, "not the transformer"


class Breaks:
    """A source whose clips end early."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        if index > 5:
            raise OSError("disk gone")
        return self.clips[index]


def test_an_interrupted_encoding_leaves_nothing(pipeline, clips, tmp_path):
    with pytest.raises(OSError, match="disk gone"):
        encode_clips(Breaks(clips), pipeline, tmp_path, batch_size=BATCH)
    assert list(tmp_path.iterdir()) == []
