"""CLIP vision tower (Radford et al. 2021; equal to transformers' `CLIPVisionModel`), read at its hidden states.

Wan conditions on the hidden states before the last layer, class token first. The last layer runs only for a
discriminator that reads it; the final norm never runs, and is kept so that a model directory survives a round trip.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vpae_jax.models.stack import scan_layers, stack_layers
from vpae_jax.types import UserError

# Statistics of the images that it was trained on, for values in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HiddenStates = Float[Array, "b n e"]


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sigmoid approximation of GELU in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU of OpenCLIP's ViT-H, which Wan uses."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Fields of transformers' `CLIPVisionConfig` that shape the tower; same names, same defaults.

    Raises:
      UserError: an activation other than "gelu" or "quick_gelu", or sizes that do not divide each other.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise UserError(f"CLIP: hidden_act is {self.hidden_act!r}, expected one of {sorted(_ACTIVATIONS)}")
        if self.num_channels != 3:
            raise UserError(f"CLIP: num_channels is {self.num_channels}, only 3 (RGB) is supported")
        if self.image_size % self.patch_size:
            raise UserError(f"CLIP: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise UserError(f"CLIP: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the output: the class token and one per patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Embeddings(nnx.Module):
    """Patches, class token and learned positions."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        c = config
        self.dtype = dtype
        normal = nnx.initializers.normal
        self.class_embedding = nnx.Param(normal(c.hidden_size**-0.5)(rngs.params(), (c.hidden_size,), param_dtype))
        self.patch_embedding = nnx.Conv(
            c.num_channels,
            c.hidden_size,
            (c.patch_size, c.patch_size),
            strides=c.patch_size,
            padding="VALID",
            use_bias=False,
            kernel_init=normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(
            c.num_tokens,
            c.hidden_size,
            embedding_init=normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        patches = self.patch_embedding(pixels)
        b, _, _, e = patches.shape
        first = jnp.broadcast_to(self.class_embedding.get_value().astype(self.dtype), (b, 1, e))
        tokens = jnp.concatenate([first, rearrange(patches, "b h w e -> b (h w) e")], axis=1)
        return tokens + self.position_embedding.embedding.get_value().astype(self.dtype)


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        c, width = config, config.hidden_size
        self.config = config
        in_std = (width**-0.5) * (2 * c.num_hidden_layers) ** -0.5

        def linear(inputs: int, outputs: int, std: float) -> nnx.Linear:
            init = nnx.initializers.normal(std)
            return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.layer_norm1 = _layer_norm(config, rngs, dtype, param_dtype)
        self.q_proj = linear(width, width, in_std)
        self.k_proj = linear(width, width, in_std)
        self.v_proj = linear(width, width, in_std)
        self.out_proj = linear(width, width, width**-0.5)
        self.layer_norm2 = _layer_norm(config, rngs, dtype, param_dtype)
        self.fc1 = linear(width, c.intermediate_size, (2 * width) ** -0.5)
        self.fc2 = linear(c.intermediate_size, width, in_std)

    def __call__(self, x: Float[Array, "b n e"]) -> Float[Array, "b n e"]:
        h = self.layer_norm1(x)
        split, heads = "b n (heads head_dim) -> b n heads head_dim", self.config.num_attention_heads
        q, k, v = (rearrange(project(h), split, heads=heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = jax.nn.dot_product_attention(q, k, v)
        x = x + self.out_proj(rearrange(attended, "b n heads head_dim -> b n (heads head_dim)"))
        return x + self.fc2(_ACTIVATIONS[self.config.hidden_act](self.fc1(self.layer_norm2(x))))


class CLIPVision(nnx.Module):
    """Maps pixels to hidden states, by default the penultimate ones.

    Args:
      config: sizes.
      rngs: a "params" stream for the initial weights.
      dtype: compute dtype; norms and softmax are always float32.
      param_dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.pre_layrnorm = _layer_norm(config, rngs, dtype, param_dtype)  # transformers' spelling
        self.layers = stack_layers(
            lambda layer_rngs: Layer(config, rngs=layer_rngs, dtype=dtype, param_dtype=param_dtype),
            config.num_hidden_layers,
            rngs,
        )
        self.post_layernorm = _layer_norm(config, rngs, dtype, param_dtype)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Hidden states before the last layer, class token first: transformers' `hidden_states[-2]`.

        Args:
          pixels: images of side `image_size`, already normalised by the image processor's mean and std.

        Raises:
          UserError: the images have another size.
        """
        return self.hidden_states(pixels, (self.config.num_hidden_layers - 1,))[0]

    def hidden_states(self, pixels: Float[Array, "b h w 3"], taps: tuple[int, ...]) -> tuple[HiddenStates, ...]:
        """Hidden states after some layers, class token first: transformers' `hidden_states[tap]`.

        Pixels and errors as for a call.

        Args:
          taps: rising layer numbers, counted from 1; 0 is the input of the first layer.
        """
        side = self.config.image_size
        if pixels.shape[1:3] != (side, side):
            raise UserError(f"CLIP: images are {pixels.shape[1]}x{pixels.shape[2]}, expected {side}x{side}")
        states, x = [], self.pre_layrnorm(self.embeddings(pixels))
        for start, tap in pairwise((0, *taps)):
            x = scan_layers(self.layers, x, lambda layer, x: layer(x), tap, start)
            states.append(x)
        return tuple(states)


def _layer_norm(config: CLIPVisionConfig, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
