"""The blocks of the Wan 2.1 transformer: self-attention, cross-attention to text and image, feed-forward.

Equal to Diffusers' `WanTransformerBlock`; parameter names follow its tensor names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vpae_jax.models.lora import Linear
from vpae_jax.models.norms import LayerNorm, RMSNorm, layer_norm
from vpae_jax.models.parallel import CausalAttention, MeshLayout, OwnPair, Pair
from vpae_jax.models.rotary import rotate
from vpae_jax.types import Tokens, UserError


@dataclass(frozen=True)
class WanTransformerConfig:
    """Field names and defaults of `transformer/config.json` (Diffusers' WanTransformer3DModel).

    Attributes:
      patch_size: latent frames, rows and columns of one token.
      num_attention_heads: heads of every attention.
      attention_head_dim: channels of a head, even; the width is heads times this.
      in_channels: input channels: 16, or 36 with 4 mask and 16 first-frame channels.
      out_channels: latent channels of the velocity.
      text_dim: width of the text encoder's states.
      freq_dim: width of the sinusoidal time embedding, even.
      ffn_dim: hidden width of the feed-forward layers.
      num_layers: number of blocks.
      cross_attn_norm: whether a layer norm with scale and bias precedes the cross-attention.
      qk_norm: only "rms_norm_across_heads" is supported.
      eps: of every norm in the blocks.
      image_dim: width of the image encoder's states; None for text-to-video.
      added_kv_proj_dim: the model's width if image tokens have their own keys and values; None for text-to-video.
      rope_max_seq_len: largest number of tokens along one axis.
      pos_embed_seq_len: number of image tokens with a learned position (first-and-last-frame models: 514), or None.
      text_len: number of text tokens that the cross-attention sees; shorter prompts are padded with zeros.

    Raises:
      UserError: a norm that Wan does not have, an odd size where pairs are needed, or only one of `image_dim` and
        `added_kv_proj_dim`.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    text_len: int = 512

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise UserError(f"transformer: qk_norm is {self.qk_norm!r}, expected 'rms_norm_across_heads'")
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise UserError(f"transformer: {name} is {getattr(self, name)}, expected an even number")
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise UserError(
                f"transformer: image_dim is {self.image_dim} and added_kv_proj_dim is {self.added_kv_proj_dim}; "
                "give both for image-to-video, neither for text-to-video"
            )
        if self.added_kv_proj_dim not in (None, self.width):
            raise UserError(
                f"transformer: added_kv_proj_dim is {self.added_kv_proj_dim}, expected the model's width {self.width}"
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Options(NamedTuple):
    """The keyword arguments that every layer passes to its parts."""

    rngs: nnx.Rngs
    dtype: DTypeLike
    param_dtype: DTypeLike


class Context(NamedTuple):
    """The inputs of every block in addition to the hidden states.

    Attributes:
      modulation: six rows (shift, scale, gate of the self-attention; shift, scale, gate of the feed-forward), float32;
        of the clip, or of each of its frames.
      text: projected text tokens, then one padding token if the prompt is shorter than Wan pads it to.
      text_bias: logit added for each text token.
      image: projected image tokens.
      cos: of the rotary embedding; zero for padding tokens, whose queries and keys are then zero, too.
      sin: of the rotary embedding.
      tokens: number of the clip's tokens without padding.
      layout: placement of the arrays.
      causal: attention of a causal model; None if all tokens see all others.
      keep: whether blocks return the keys and values that `causal` reads.
      frame: frame index of each token, if `modulation` differs between frames.
    """

    modulation: Float[Array, "b *f 6 d"]
    text: Float[Array, "b s d"]
    text_bias: Float[Array, "1 s"] | None
    image: Float[Array, "b n_image d"] | None
    cos: Float[Array, "n half"]
    sin: Float[Array, "n half"]
    tokens: int
    layout: MeshLayout
    causal: CausalAttention | None = None
    keep: bool = False
    frame: Int[Array, "n"] | None = None


class Attention(nnx.Module):
    """Wan's attention: queries and keys RMS-normalised over the full width, then split into heads.

    Cross-attention to image tokens has its own keys and values and reads the same normalised queries; both results
    are added before the output projection (Diffusers' WanAttnProcessor).
    """

    def __init__(self, config: WanTransformerConfig, image_keys: bool, options: Options):
        d, given = config.width, options._asdict()
        norm = {"eps": config.eps, "param_dtype": options.param_dtype}
        self.to_q = Linear(d, d, **given)
        self.to_k = Linear(d, d, **given)
        self.to_v = Linear(d, d, **given)
        self.to_out = Linear(d, d, **given)
        self.norm_q = RMSNorm(d, **norm)
        self.norm_k = RMSNorm(d, **norm)
        self.add_k_proj = Linear(d, d, **given) if image_keys else None
        self.add_v_proj = Linear(d, d, **given) if image_keys else None
        self.norm_added_k = RMSNorm(d, **norm) if image_keys else None
        self.heads = config.num_attention_heads

    def split(self, x: Float[Array, "b n d"]) -> Float[Array, "b n heads head_dim"]:
        return rearrange(x, "b n (heads head_dim) -> b n heads head_dim", heads=self.heads)

    def self_attention(self, x: Tokens, context: Context, past: Pair | None) -> tuple[Tokens, OwnPair | None]:
        q = self.split(self.norm_q(self.to_q(x)))
        k = self.split(self.norm_k(self.to_k(x)))
        v, own = self.split(self.to_v(x)), None
        if context.causal is None:
            q, k = (rotate(part, context.cos, context.sin) for part in (q, k))
            out = context.layout.self_attention(q, k, v, context.tokens)
        else:
            tables = context.cos, context.sin
            out, k, v = context.layout.all_tokens(context.causal, (q, k, v), past, tables)
            own = k, v
        return self.to_out(rearrange(out, "b n heads head_dim -> b n (heads head_dim)")), own

    def cross_attention(self, x: Tokens, context: Context) -> Tokens:
        text, image, attention = context.text, context.image, context.layout.cross_attention
        q = self.split(self.norm_q(self.to_q(x)))
        k = self.split(self.norm_k(self.to_k(text)))
        out = attention(q, k, self.split(self.to_v(text)), context.text_bias)
        if image is not None and self.add_k_proj and self.add_v_proj and self.norm_added_k:
            k = self.split(self.norm_added_k(self.add_k_proj(image)))
            out = out + attention(q, k, self.split(self.add_v_proj(image)))
        return self.to_out(rearrange(out, "b n heads head_dim -> b n (heads head_dim)"))


# The backward pass keeps the input of the activation, not the five arrays from which its gradient is computed. Blocks
# run in a scan, so that the compiler cannot merge the two computations.
_gelu = jax.checkpoint(jax.nn.gelu, prevent_cse=False, static_argnums=1)


class FeedForward(nnx.Module):
    """Linear, GELU, Linear."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, options: Options, approximate: bool = True):
        self.proj_in = Linear(d_in, d_hidden, **options._asdict())
        self.proj_out = Linear(d_hidden, d_out, **options._asdict())
        self.approximate = approximate

    def __call__(self, x: Float[Array, "b n d_in"]) -> Float[Array, "b n d_out"]:
        return self.proj_out(_gelu(self.proj_in(x), self.approximate))


class Block(nnx.Module):
    """Self-attention, cross-attention and feed-forward; the first and last are modulated by the timestep in float32.

    With `Context.causal`, self-attention reads the keys and values of earlier frames, and returns this block's own.
    """

    def __init__(self, config: WanTransformerConfig, options: Options):
        d = config.width
        self.attn1 = Attention(config, False, options)
        self.attn2 = Attention(config, config.added_kv_proj_dim is not None, options)
        self.norm2 = LayerNorm(d, eps=config.eps, param_dtype=options.param_dtype) if config.cross_attn_norm else None
        self.ffn = FeedForward(d, config.ffn_dim, d, options)
        table = jax.random.normal(options.rngs.params(), (1, 6, d), options.param_dtype)
        self.scale_shift_table = nnx.Param(table / d**0.5)
        self.eps = config.eps

    def __call__(self, x: Tokens, context: Context, past: Pair | None = None) -> tuple[Tokens, OwnPair | None]:
        table = self.scale_shift_table[...].astype(jnp.float32) + context.modulation
        rows = [of_tokens(row, context.frame) for row in jnp.split(table, 6, axis=-2)]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows
        wide = x.astype(jnp.float32)
        y = layer_norm(wide, 1 + scale, shift, self.eps).astype(x.dtype)
        y, own = self.attn1.self_attention(y, context, past)
        x = (wide + y * gate).astype(x.dtype)
        y = x if self.norm2 is None else self.norm2(x).astype(x.dtype)
        x = x + self.attn2.cross_attention(y, context)
        wide = x.astype(jnp.float32)
        y = layer_norm(wide, 1 + ffn_scale, ffn_shift, self.eps).astype(x.dtype)
        return (wide + self.ffn(y).astype(jnp.float32) * ffn_gate).astype(x.dtype), own


def of_tokens(row: Float[Array, "b *f 1 d"], frame: Int[Array, "n"] | None) -> Float[Array, "b n d"]:
    """A row of modulation for each token, or one row for all tokens of a clip."""
    return row if frame is None else _spread(row[:, :, 0], frame)


@jax.custom_vjp
def _spread(rows: Float[Array, "b f d"], frame: Int[Array, "n"]) -> Float[Array, "b n d"]:
    """Each token's row.

    The gradient is a product with a one-hot matrix. The gradient of a gather is a scatter, which a GPU sums in a
    different order in each run, and a TPU row by row.
    """
    return jnp.take(rows, frame, axis=1, mode="clip")


def _gathered(kept: tuple[Array, Array], grad: Float[Array, "b n d"]) -> tuple[Float[Array, "b f d"], None]:
    rows, frame = kept
    own = jax.nn.one_hot(frame, rows.shape[1], dtype=grad.dtype)
    return jnp.einsum("nf,bnd->bfd", own, grad, precision=jax.lax.Precision.HIGHEST), None


_spread.defvjp(lambda rows, frame: (_spread(rows, frame), (rows, frame)), _gathered)
