"""Discriminator heads: map hidden states of a backbone's tapped blocks to logits of a clip, high for real.

V-PAE's multi-modal cross-attention head (arXiv 2508.21019v2, section 3.3), with APT's head (arXiv 2501.08316), per-tap
1x1 convolutions (PCM, LADD) and per-tap convolutions over space and time (DMD2-v in arXiv 2601.09881) for comparison.
`config.networks.heads.kind` selects the type (docs/methods/discriminators.md). The kind "ca_mm":

    z       = [q; W_i e_img; W_t e_text] + type embedding        learnable queries, projected condition of the backbone
    q       = q + SelfAttention(RMSNorm(z))                      only the queries' rows; padded text is masked
    q_k     = q_k + CrossAttention(RMSNorm(q_k), RMSNorm(hidden states of tap k))
    q_k     = q_k + MLP(RMSNorm(q_k))
    logit   = FFN(LayerNorm(concat_k q_k))

Keys and values of the hidden states are computed in the compute dtype. The rest is a few rows per clip and runs in true
float32, not in an accelerator's default for it (one bfloat16 pass on a TPU, TF32 on a GPU), because the discriminator's
penalty takes differences of nearby logits. The matrices for these rows are also rounded to the compute dtype, and
gathered in it: this changes the discriminator slightly, but equally for all clips, so that differences stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vpae_jax.models.kernels.reference import attention
from vpae_jax.models.lora import Linear
from vpae_jax.models.norms import LayerNorm, RMSNorm
from vpae_jax.models.parallel import gather
from vpae_jax.sharding import HEADS_RULES, param_path
from vpae_jax.types import Features, Tokens, UserError


@dataclass(frozen=True)
class HeadsConfig:
    """Type and size of the heads.

    Attributes:
      width: width of the backbone's hidden states.
      kind: "ca_mm" attends to image and text before the hidden states, "ca" does not; both give one logit. "conv" gives
        a logit for each token of each tap with 1x1 convolutions; "conv3d" gives one for every second token along
        frames, rows and columns, from that token and its neighbours.
      taps: the backbone's blocks whose hidden states are read, counted from 1, rising.
      hidden: width inside the heads; None uses the backbone's.
      num_heads: attention heads; must divide the width inside.
      queries: "per_tap" has one learnable query for each tap, "shared" has `num_queries` that are used for every tap.
      num_queries: number of shared queries.
      modality: how queries, image and text tokens are distinguished: by a learned "type_embedding", or by fixed
        "sinusoid" positions counted within each group.
      condition: "tokens" attends to every image and text token, "pooled" to the mean of each.
      mlp_ratio: hidden width of the MLP after each cross-attention, in units of the width inside.
      average: what is averaged over several logits: "losses", with a loss for each logit (PCM, LADD), or "logits".
      eps: of every norm.
    """

    width: int
    kind: Literal["ca_mm", "ca", "conv", "conv3d"] = "ca_mm"
    taps: tuple[int, ...] = (18, 29, 40)
    hidden: int | None = None
    num_heads: int = 4
    queries: Literal["per_tap", "shared"] = "per_tap"
    num_queries: int = 3
    modality: Literal["type_embedding", "sinusoid"] = "type_embedding"
    condition: Literal["tokens", "pooled"] = "tokens"
    mlp_ratio: int = 4
    average: Literal["losses", "logits"] = "losses"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        choices = {
            "kind": ("ca_mm", "ca", "conv", "conv3d"),
            "queries": ("per_tap", "shared"),
            "modality": ("type_embedding", "sinusoid"),
            "condition": ("tokens", "pooled"),
            "average": ("losses", "logits"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"heads: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("width", "num_heads", "num_queries", "mlp_ratio", "inner"):
            if getattr(self, name) < 1:
                raise UserError(f"heads: {name} is {getattr(self, name)}, expected at least 1")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 1:
            raise UserError(f"heads: taps are {self.taps}, expected rising block numbers, counted from 1")
        if self.kind in ("ca_mm", "ca") and self.inner % self.num_heads:
            raise UserError(
                f"heads: num_heads {self.num_heads} does not divide the inner width {self.inner}; change one"
            )
        if self.modality == "sinusoid" and self.inner % 2:
            raise UserError(f"heads: the inner width is {self.inner}, expected an even one for sinusoid positions")

    @property
    def inner(self) -> int:
        """Width inside the heads."""
        return self.width if self.hidden is None else self.hidden

    @property
    def num_tokens(self) -> int:
        """Learnable queries."""
        return len(self.taps) if self.queries == "per_tap" else self.num_queries


def even_taps(num_layers: int, count: int = 4) -> tuple[int, ...]:
    """The last block of each of `count` equal runs of blocks, counted from 1, without repetition.

    Of a vision transformer's 12 blocks these are 3, 6, 9 and 12, as in StyleGAN-T (2301.09515).

    Raises:
      UserError: there are no layers.
    """
    if num_layers < 1:
        raise UserError(f"num_layers is {num_layers}, expected at least 1")
    return tuple(sorted({-(-num_layers * run // count) for run in range(1, count + 1)}))


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Blocks 16, 26 and 36 of APT's 36, scaled to `num_layers` and rounded up; counted from 1, without repetition.

    Raises:
      UserError: there are no layers.
    """
    if num_layers < 1:
        raise UserError(f"num_layers is {num_layers}, expected at least 1")
    return tuple(sorted({-(-num_layers * tap // 36) for tap in (16, 26, 36)}))


class QueryAttention(nnx.Module):
    """Attention of a few queries to many tokens; both sides pre-normalised, queries and keys RMS-normalised again."""

    def __init__(self, config: HeadsConfig, d_keys: int, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, keys = config.inner, {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        norm = {"eps": config.eps, "param_dtype": param_dtype}
        self.norm_tokens = RMSNorm(d_keys, **norm)
        self.norm_queries = RMSNorm(d, **norm)
        self.to_q = Linear(d, d, rngs=rngs, param_dtype=param_dtype)
        self.to_k = Linear(d_keys, d, **keys)
        self.to_v = Linear(d_keys, d, **keys)
        self.norm_q = RMSNorm(d, **norm)
        self.norm_k = RMSNorm(d, **norm)
        self.to_out = Linear(d, d, rngs=rngs, param_dtype=param_dtype)
        self.heads = config.num_heads

    def __call__(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d_keys"],
        bias: Float[Array, "#b n"] | None = None,
    ) -> Float[Array, "b q d"]:
        tokens = self.norm_tokens(tokens)
        q = self.norm_q(self.to_q(self.norm_queries(queries)))
        k, v = self.norm_k(self.to_k(tokens)), self.to_v(tokens)
        split = "b n (heads head_dim) -> b n heads head_dim"
        q, k, v = (rearrange(x, split, heads=self.heads) for x in (q, k, v))
        out = attention(q.astype(k.dtype), k, v, bias)
        return self.to_out(rearrange(out, "b n heads head_dim -> b n (heads head_dim)"))


class TapHead(nnx.Module):
    """Reads one tap: cross-attention and MLP, each with a residual."""

    def __init__(self, config: HeadsConfig, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, given = config.inner, {"rngs": rngs, "param_dtype": param_dtype}
        self.attention = QueryAttention(config, config.width, rngs, dtype, param_dtype)
        self.norm = RMSNorm(d, eps=config.eps, param_dtype=param_dtype)
        self.proj_in = Linear(d, config.mlp_ratio * d, **given)
        self.proj_out = Linear(config.mlp_ratio * d, d, **given)

    def __call__(self, queries: Float[Array, "b q d_in"], tokens: Tokens) -> Float[Array, "b q d_in"]:
        queries = queries + self.attention(queries, tokens)
        return queries + self.proj_out(jax.nn.gelu(self.proj_in(self.norm(queries))))


class ModalityMixer(nnx.Module):
    """Lets the queries attend to the projected image and text tokens, before the hidden states."""

    def __init__(self, config: HeadsConfig, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, given = config.inner, {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.image_proj = Linear(config.width, d, **given)
        self.text_proj = Linear(config.width, d, **given)
        learned = config.modality == "type_embedding"
        self.type_embedding = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (3, d), param_dtype)) if learned else None
        )
        self.attention = QueryAttention(config, d, rngs, jnp.float32, param_dtype)
        self.pooled = config.condition == "pooled"

    def __call__(self, queries: Float[Array, "b q d"], features: Features) -> Float[Array, "b q d"]:
        if features.text is None or features.text_mask is None:
            raise UserError("heads: kind is 'ca_mm', but an image encoder reads no prompt; set kind to 'ca' or 'conv'")
        text, visible = features.text.astype(jnp.float32), features.text_mask
        image = None if features.image is None else features.image.astype(jnp.float32)
        if self.pooled:
            weight = visible[..., None].astype(jnp.float32)
            text = jnp.sum(text * weight, axis=1, keepdims=True) / jnp.maximum(jnp.sum(weight, 1, keepdims=True), 1)
            visible = jnp.any(visible, axis=1, keepdims=True)
            image = None if image is None else jnp.mean(image, axis=1, keepdims=True)
        groups = [self._mark(queries, 0)]
        seen = [jnp.ones(queries.shape[:2], bool)]
        if image is not None:
            groups.append(self._mark(self.image_proj(image).astype(jnp.float32), 1))
            seen.append(jnp.ones(image.shape[:2], bool))
        groups.append(self._mark(self.text_proj(text).astype(jnp.float32), 2))
        seen.append(visible)
        bias = jnp.where(jnp.concatenate(seen, axis=1), 0.0, -jnp.inf)
        return groups[0] + self.attention(groups[0], jnp.concatenate(groups, axis=1), bias)

    def _mark(self, x: Float[Array, "b n d"], modality: int) -> Float[Array, "b n d"]:
        if self.type_embedding is not None:
            return x + self.type_embedding[...].astype(jnp.float32)[modality]
        return x + sinusoid(x.shape[1], x.shape[2])


class QueryHeads(nnx.Module):
    """`ca_mm` and `ca`."""

    def __init__(self, config: HeadsConfig, outputs: int, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, given = config.inner, {"rngs": rngs, "param_dtype": param_dtype}
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.num_tokens, d), param_dtype))
        self.mixer = ModalityMixer(config, rngs, dtype, param_dtype) if config.kind == "ca_mm" else None
        self.taps = nnx.List([TapHead(config, rngs, dtype, param_dtype) for _ in config.taps])
        self.shared = config.queries == "shared"
        joined = len(config.taps) * d * (config.num_queries if self.shared else 1)
        self.norm = LayerNorm(joined, eps=config.eps, param_dtype=param_dtype)
        self.proj_in = Linear(joined, d, **given)
        # Small but not zero: zero weights would propagate no gradient to the clip.
        self.proj_out = Linear(d, outputs, kernel_init=nnx.initializers.normal(0.02), **given)

    def __call__(self, features: Features) -> Float[Array, "b k"]:
        b = features.taps[0].shape[0]
        query = self.query[...].astype(jnp.float32)
        queries = jnp.broadcast_to(query, (b, *query.shape))
        if self.mixer is not None:
            queries = self.mixer(queries, features)
        read = []
        for index, (head, hidden) in enumerate(zip(self.taps, features.taps, strict=True)):
            own = queries if self.shared else queries[:, index : index + 1]
            read.append(head(own, hidden).reshape(b, -1))
        joined = self.norm(jnp.concatenate(read, axis=-1))
        return self.proj_out(jax.nn.gelu(self.proj_in(joined)))


class ConvHeads(nnx.Module):
    """`conv`: a logit for each token of each tap, from two 1x1 convolutions."""

    def __init__(self, config: HeadsConfig, outputs: int, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, init, taps = config.inner, nnx.initializers.normal(0.02), config.taps
        given = {"rngs": rngs, "param_dtype": param_dtype}
        self.norms = nnx.List([RMSNorm(config.width, eps=config.eps, param_dtype=param_dtype) for _ in taps])
        self.projs_in = nnx.List([Linear(config.width, d, dtype=dtype, **given) for _ in taps])
        self.projs_out = nnx.List([Linear(d, outputs, kernel_init=init, **given) for _ in taps])

    def __call__(self, features: Features) -> Float[Array, "b k"]:
        heads = zip(self.norms, self.projs_in, self.projs_out, features.taps, strict=True)
        logits = [proj_out(jax.nn.gelu(proj_in(norm(hidden)))) for norm, proj_in, proj_out, hidden in heads]
        return rearrange(jnp.stack(logits), "taps b n k -> b (taps n k)")


class Conv3d(nnx.Module):
    """A 3 x 3 x 3 convolution over frames, rows and columns with stride 2, which halves each, rounded up."""

    def __init__(self, d: int, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3, 3, d, d), param_dtype))
        self.bias = nnx.Param(jnp.zeros((d,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b f h w d"]) -> Float[Array, "b _ _ _ d"]:
        kernel, layout = self.kernel[...].astype(self.dtype), ("NDHWC", "DHWIO", "NDHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (2, 2, 2), ((1, 1),) * 3, dimension_numbers=layout)
        return out + self.bias[...].astype(self.dtype)


class Conv3dHeads(nnx.Module):
    """`conv3d`: for each tap a projection, a convolution over space and time, and a logit at each output position."""

    def __init__(self, config: HeadsConfig, outputs: int, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        d, init, taps = config.inner, nnx.initializers.normal(0.02), config.taps
        given = {"rngs": rngs, "param_dtype": param_dtype}
        self.norms = nnx.List([RMSNorm(config.width, eps=config.eps, param_dtype=param_dtype) for _ in taps])
        self.projs_in = nnx.List([Linear(config.width, d, dtype=dtype, **given) for _ in taps])
        self.convs = nnx.List([Conv3d(d, rngs, dtype, param_dtype) for _ in taps])
        self.norms_out = nnx.List([RMSNorm(d, eps=config.eps, param_dtype=param_dtype) for _ in taps])
        self.projs_out = nnx.List([Linear(d, outputs, kernel_init=init, **given) for _ in taps])

    def __call__(self, features: Features) -> Float[Array, "b k"]:
        f, h, w = features.grid
        parts = zip(self.norms, self.projs_in, self.convs, self.norms_out, self.projs_out, features.taps, strict=True)
        logits = []
        for norm, proj_in, conv, norm_out, proj_out, hidden in parts:
            tokens = rearrange(proj_in(norm(hidden)), "b (f h w) d -> b f h w d", f=f, h=h, w=w)
            logits.append(proj_out(jax.nn.gelu(norm_out(conv(jax.nn.gelu(tokens))))))
        return rearrange(jnp.stack(logits), "taps b f h w k -> b (taps f h w k)")


KINDS: Mapping[str, Callable[..., nnx.Module]] = {
    "ca_mm": QueryHeads,
    "ca": QueryHeads,
    "conv": ConvHeads,
    "conv3d": Conv3dHeads,
}


class DiscriminatorHeads(nnx.Module):
    """Float32 logits of a clip from a transformer's features, or from an image encoder's.

    Args:
      config: kind and sizes.
      outputs: number of logits in place of each single one, for different discriminators of the same clip.
      rngs: source of the initial weights.
      dtype: compute dtype of the products with hidden states and condition tokens, and of all matrices.
      param_dtype: dtype in which the weights are stored.
      mesh: where they run, with the axes of `sharding`; None uses the devices of their arguments.
    """

    def __init__(
        self,
        config: HeadsConfig,
        outputs: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
    ):
        self.heads = KINDS[config.kind](config, outputs, rngs, dtype, param_dtype)
        self.outputs = outputs
        self.config = config
        self.dtype = dtype
        self.mesh = mesh

    def __call__(self, features: Features) -> Float[Array, "b k"]:
        """Logits, high for real: one per clip, or several whose losses are to be averaged (`HeadsConfig.average`).

        `outputs` is the fastest-varying dimension.

        Raises:
          UserError: the number of tapped hidden states differs from that of `HeadsConfig.taps`.
        """
        if len(features.taps) != len(self.config.taps):
            raise UserError(
                f"heads: {len(features.taps)} taps were given, {len(self.config.taps)} are expected; set heads.taps"
            )
        graph, weights = nnx.split(self.heads)
        weights = jax.tree_util.tree_map_with_path(self._rounded, weights)
        with jax.default_matmul_precision("float32"):  # does not affect bfloat16 products
            logits = nnx.merge(graph, gather(weights, HEADS_RULES, self.mesh, "heads/"))(features)
        if self.config.average == "losses":
            return logits
        return logits.reshape(len(logits), -1, self.outputs).mean(axis=1)

    def _rounded(self, path: tuple[Any, ...], weight: Array) -> Array:
        """A matrix in the compute dtype, cast before the gather, which moves half as much in 16 bits."""
        return weight.astype(self.dtype) if param_path(path).endswith("kernel") else weight


def sinusoid(length: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions: cosines, then sines, of n / 10000^(2i / width); float32."""
    frequencies = np.exp(-math.log(10000.0) * np.arange(width // 2) / (width // 2))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
