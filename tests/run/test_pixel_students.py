"""Students whose discriminator looks at pixels, on the embedded model, and encoders that do not come from it."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
from einops import rearrange
from flax import nnx
from short_runs import small

from vpae_jax.config import parse
from vpae_jax.configs import add_pixels, phase2_pixels
from vpae_jax.methods import make_method
from vpae_jax.run import experiment, image_encoders
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import Features, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_encoders import StoredEncoder
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.locate import embedded_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FROZEN = ("teacher", "vae", "image_encoder")


def run(config, folder):
    """Metrics of the last step, and the state that is left."""
    metrics, pipe = short_runs.run(config, folder)
    assert pipe.image_encoder is not None
    return metrics, read_state(folder, items=("params", "opt"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "method"), [(add_pixels, {}), (phase2_pixels, {"init": "pretrained", "disc_updates": 1})]
)
def test_a_student_that_is_judged_by_its_frames(module, method, tmp_path, capsys):
    """Frozen networks are in the table of the run, and in no checkpoint."""
    metrics, state = run(small(module, disc_warmup=0, **method), tmp_path / "run")
    assert set(state["params"]) == set(state["opt"]) == {"generator", "heads"}
    assert metrics["generator/adv_grad"] > 0 and {"heads/logit_gap", "heads/penalty"} <= metrics.keys()
    table = capsys.readouterr().out
    assert all(any(name in line and "frozen" in line for line in table.splitlines()) for name in FROZEN)


@pytest.mark.long
def test_bfloat16(tmp_path):
    config = small(add_pixels, disc_warmup=0)
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    metrics, _ = run(config, tmp_path / "run")
    assert metrics["generator/adv_grad"] > 0 and metrics["heads/update_norm"] > 0


def finding(config, source="tiny", workdir=Path()):
    parsed = parse(config)
    return image_encoders.find(parsed, make_method(parsed.method), find_model(source), workdir)


def test_the_models_own_encoder_is_the_default():
    config = small(add_pixels)
    found = finding(config)
    assert (found.config.width, found.config.depth) == (64, 3)
    assert found.config.preprocessing.size == found.config.preprocessing.crop_size[0] == 32
    config.method.backbone, config.method.noise.kind = "frozen_teacher", "shared"
    assert finding(config) is None


def without_encoder(folder):
    """A model directory's parts but for the image encoder, as of a text-to-video model."""
    whole = find_model("tiny")
    parts = {name: part for name, part in whole.parts.items() if name != "image_encoder"}
    return dataclasses.replace(whole, path=folder, parts=parts)


def test_a_model_without_an_image_encoder_borrows_one(tmp_path):
    config, source = small(add_pixels), without_encoder(tmp_path)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: no image_encoder, .*; set config\.model\.image_encoder to a model"
    ):
        finding(config, source)
    assert isinstance(source, ModelDirectory)
    config.model.image_encoder = "tiny"
    borrowed = finding(config, source)
    assert borrowed.files == find_model("tiny").part("image_encoder").files
    copy = shutil.copytree(embedded_model(), tmp_path / "runs" / "other")
    config.model.image_encoder = "{workdir}/../other"
    assert finding(config, source, tmp_path / "runs" / "mine").files[0].is_relative_to(copy)


def test_an_unknown_kind_is_refused():
    config = small(add_pixels)
    config.model.image_encoder = "dinov9:models/dino"
    with pytest.raises(
        UserError, match=r"config\.model\.image_encoder: unknown kind 'dinov9' of image encoder; known: clip"
    ):
        finding(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 192, "heads.width is 192, but the image encoder's is 64"),
        ("taps", (1, 4), r"heads.taps are \(1, 4\), but the image encoder has 3 blocks"),
        ("kind", "ca_mm", "heads.kind is 'ca_mm', but the image encoder reads no prompt; set it to 'ca' or 'conv'"),
    ],
)
def test_heads_have_to_fit_the_encoder(field, value, message, tmp_path):
    config = small(add_pixels, disc_warmup=0)
    config.networks.heads[field] = value
    with pytest.raises(UserError, match=message):
        experiment.run(parse(config), tmp_path / "run", jax.devices()[:1])
    assert not (tmp_path / "run").exists()


# An encoder of another kind: what docs/architecture.md asks of one, at its smallest.


@dataclasses.dataclass(frozen=True)
class PatchesConfig:
    width: int = 8
    depth: int = 2

    def make(self, rngs, dtype):
        return Patches(self, rngs, dtype)


class Patches(nnx.Module):
    """Linear layers on patches of 8x8."""

    def __init__(self, config, rngs, dtype):
        sizes = [(192, config.width)] + [(config.width, config.width)] * (config.depth - 1)
        self.layers = nnx.List([nnx.Linear(*size, dtype=dtype, rngs=rngs) for size in sizes])

    def features(self, video, place, taps):
        grid = (video.shape[1], video.shape[2] // 8, video.shape[3] // 8)
        x, states = rearrange(video, "b t (h p) (w q) c -> b (t h w) (p q c)", p=8, q=8), []
        for layer in self.layers:
            x = jnp.tanh(layer(x))
            states.append(x)
        return Features(tuple(states[tap - 1] for tap in taps), None, None, grid=grid)


def patches(path):
    """Of a file of arrays."""

    def read(dtype, place):
        stored = np.load(path)

        def one(name):
            return jax.device_put(jnp.asarray(stored[name], dtype), place(name, stored[name].shape))

        layers = {i: {kind: one(f"layers/{i}/{kind}") for kind in ("kernel", "bias")} for i in range(2)}
        return {"layers": layers}

    return StoredEncoder(PatchesConfig(), read, (path,))


@pytest.mark.long
def test_an_encoder_of_another_kind_is_one_file_and_one_line(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = {"layers/0/kernel": (192, 8), "layers/0/bias": (8,), "layers/1/kernel": (8, 8), "layers/1/bias": (8,)}
    np.savez(tmp_path / "patches.npz", **{name: 0.2 * rng.normal(size=size) for name, size in sizes.items()})
    monkeypatch.setattr(image_encoders, "KINDS", {**image_encoders.KINDS, "patches": patches})
    config = small(add_pixels, disc_warmup=0)
    config.model.image_encoder = f"patches:{tmp_path / 'patches.npz'}"
    config.networks.heads.width, config.networks.heads.taps = 8, (1, 2)
    metrics, _ = run(config, tmp_path / "run")
    assert metrics["generator/adv_grad"] > 0


def test_weights_are_read_into_their_places_and_dtype():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    read = finding(small(add_pixels)).read(jnp.dtype(jnp.bfloat16), lambda path, shape: place)
    leaves = jax.tree.leaves(read)
    assert {(leaf.dtype, leaf.sharding) for leaf in leaves} == {(jnp.dtype(jnp.bfloat16), place)}
    exact = jax.tree.leaves(read_part(find_model("tiny"), "image_encoder")[1])
    for one, other in zip(leaves, exact, strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))
