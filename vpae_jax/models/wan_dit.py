"""The Wan 2.1 diffusion transformer, text-to-video and image-to-video.

Forward-exact with Diffusers' `WanTransformer3DModel` (checked by the tests). Parameter paths follow its tensor names;
the blocks are stacked along a leading layer axis under `blocks/...` and run by one `jax.lax.scan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vpae_jax.models import kernels
from vpae_jax.models.lora import PRODUCT, Linear, LoRASpec, attach_lora
from vpae_jax.models.norms import layer_norm
from vpae_jax.models.parallel import MeshLayout, OwnPair, gather
from vpae_jax.models.rotary import rope_table
from vpae_jax.models.stack import stack_layers
from vpae_jax.models.wan_blocks import Block, Context, Options, WanTransformerConfig, of_tokens
from vpae_jax.models.wan_embed import ConditionEmbedder, PatchEmbedding
from vpae_jax.sharding import TRANSFORMER_RULES, param_path
from vpae_jax.types import Condition, Features, FrameTimes, Latents, Params, Times, Tokens, UserError

CARRY = "carry"  # checkpoint name of a block's input
MANY_TAPS = 3  # more taps, if evenly spaced, are read in a scan; separate taps are compiled separately
REMAT_POLICIES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "full": jax.checkpoint_policies.nothing_saveable,
        # JAX's own policy for products would also save those inside attention, tiles of logits without batch axes.
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
        "attention": kernels.save_attention,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[CARRY],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
)


class WanTransformer(nnx.Module):
    """Maps noisy latents, timestep and condition to the velocity eps - x0.

    Args:
      config: sizes.
      rngs: source of the initial weights (Wan's initialisation: Xavier-uniform, zero output projection).
      dtype: compute dtype of the matrix products; norms, modulation, timestep embedding and softmax stay float32.
      param_dtype: dtype in which the weights are stored.
      remat: what the backward pass recomputes: nothing ("none"), the "full" block, all but the products of
        activations with weights ("dots"), or all but self-attention ("attention"); "offload" is "full" with the blocks'
        inputs kept in host memory.
      lora: adapters to attach; their initial effect is zero.
      mesh: where it runs, with the axes of `sharding`; None uses the devices of its arguments.

    Raises:
      UserError: an unknown `remat`, adapters that match no layer, or a mesh that does not divide the heads.
    """

    def __init__(
        self,
        config: WanTransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        lora: LoRASpec | None = None,
        mesh: Mesh | None = None,
    ):
        if remat not in ("none", *REMAT_POLICIES):
            raise UserError(f"remat is {remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}; choose one")
        d, options = config.width, Options(rngs, dtype, param_dtype)
        patch = math.prod(config.patch_size)
        kernel = nnx.initializers.xavier_uniform()(rngs.params(), (patch * config.in_channels, d), param_dtype)
        self.patch_embedding = PatchEmbedding(config, kernel, options)
        self.condition_embedder = ConditionEmbedder(config, options)
        self.blocks = stack_layers(
            lambda layer_rngs: Block(config, options._replace(rngs=layer_rngs)), config.num_layers, rngs
        )
        self.proj_out = Linear(d, config.out_channels * patch, kernel_init=nnx.initializers.zeros, **options._asdict())
        table = jax.random.normal(rngs.params(), (1, 2, d), param_dtype)
        self.scale_shift_table = nnx.Param(table / d**0.5)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.layout = MeshLayout(mesh, config.num_attention_heads)
        if lora is not None:
            attach_lora(self, lora, rngs=rngs)

    def __call__(self, x: Latents, t: Times, condition: Condition) -> Latents:
        """Velocity of `x` (the noisy channels only) at `t` in [0, 1], in the dtype of `x`.

        Raises:
          UserError: sizes that the patches do not divide, or a condition that lacks what this model reads.
        """
        hidden, embedding, context = self.enter(x, t, condition)
        return self.leave(self._run(hidden, context, 0, self.config.num_layers), embedding, x)

    def leave(
        self, hidden: Tokens, embedding: Float[Array, "b *f d"], x: Latents, frame: Int[Array, "n"] | None = None
    ) -> Latents:
        """Maps the last block's states to the velocity, in the shape and dtype of `x`."""
        table = self.scale_shift_table[...].astype(jnp.float32) + embedding[..., None, :]
        shift, scale = (of_tokens(row, frame) for row in jnp.split(table, 2, axis=-2))
        hidden = layer_norm(hidden, 1 + scale, shift, self.config.eps).astype(self.dtype)
        (pf, ph, pw), (f, h, w) = self.config.patch_size, self._grid(x)
        patches = self.layout.place_clips(self.proj_out(hidden))[:, : f * h * w]
        pattern = "b (f h w) (pf ph pw c) -> b (f pf) (h ph) (w pw) c"
        return rearrange(patches, pattern, f=f, h=h, w=w, pf=pf, ph=ph, pw=pw).astype(x.dtype)

    def features(
        self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...], trained: bool = False
    ) -> Features:
        """Hidden states after the blocks `taps` (counted from 1, rising) and the projected condition.

        Runs no block after the last tap, and keeps no other block's states.

        Args:
          trained: whether the weights are differentiated. If so, the weights of the blocks between two taps are copied;
            otherwise they are read in place, where a gradient would hold all weights once for each tap.

        Raises:
          UserError: as `__call__`, or the taps are not rising block numbers.
        """
        hidden, _, context = self.enter(x, t, condition)
        states, _ = self._tapped(hidden, context, taps, trained)
        return _features(states, context, condition, self._grid(x))

    def velocity_and_features(
        self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...], trained: bool = False
    ) -> tuple[Latents, Features]:
        """`__call__` and `features` in one forward pass; see there for arguments and errors."""
        hidden, embedding, context = self.enter(x, t, condition)
        states, hidden = self._tapped(hidden, context, taps, trained)
        if taps[-1] < self.config.num_layers:
            hidden = self._run(hidden, context, taps[-1], self.config.num_layers, copied=trained)
        return self.leave(hidden, embedding, x), _features(states, context, condition, self._grid(x))

    def readings(self, features: Features, x: Latents, t: Times) -> tuple[Latents, ...]:
        """The last layer applied to each tap's hidden states, with the modulation of `t`.

        The result is the velocity if the tapped block were the last one; for the last block it is that of `__call__`.

        Args:
          features: of `x`, at `t`.
        """
        embedding, _ = self.condition_embedder.time(t)
        return tuple(self.leave(states, embedding, x) for states in features.taps)

    def _tapped(
        self, hidden: Float[Array, "b padded d"], context: Context, taps: tuple[int, ...], trained: bool
    ) -> tuple[tuple[Tokens, ...], Float[Array, "b padded d"]]:
        """Hidden states after the tapped blocks, without padding, and those after the last tap with padding."""
        layers = self.config.num_layers
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] > layers:
            raise UserError(f"taps are {taps}, expected rising block numbers from 1 to {layers}; correct them")
        states, start = [], 0
        strides = {later - earlier for earlier, later in pairwise(taps)}
        unrolled = taps[:1] if len(taps) > MANY_TAPS and len(strides) == 1 else taps
        for tap in unrolled:
            hidden = self._run(hidden, context, start, tap, copied=trained)
            states.append(hidden)
            start = tap
        if len(unrolled) < len(taps):
            (stride,) = strides
            hidden, more = self._run_in_turns(hidden, context, start, stride, len(taps) - 1, trained)
            states.extend(more)
        return tuple(state[:, : context.tokens] for state in states), hidden

    def _grid(self, x: Latents) -> tuple[int, int, int]:
        (f, h, w), (pf, ph, pw) = x.shape[1:4], self.config.patch_size
        if f % pf or h % ph or w % pw:
            raise UserError(
                f"latents are {f}x{h}x{w}, expected multiples of the patch {pf}x{ph}x{pw}; crop or pad them"
            )
        grid = (f // pf, h // ph, w // pw)
        if max(grid) > self.config.rope_max_seq_len:
            limit = self.config.rope_max_seq_len
            raise UserError(f"latents make {grid} tokens, expected at most {limit} along an axis (rope_max_seq_len)")
        return grid

    def enter(
        self, x: Latents, t: Times | FrameTimes, condition: Condition, aligned: bool = True
    ) -> tuple[Tokens, Float[Array, "b *f d"], Context]:
        """Latents and condition to tokens, timestep embedding and `Context`; `aligned` as in `MeshLayout.padded`."""
        config, grid = self.config, self._grid(x)
        if condition.frames is not None:
            x = jnp.concatenate([x, condition.frames.astype(x.dtype)], axis=-1)
        if x.shape[-1] != config.in_channels:
            found = "no" if condition.frames is None else f"{condition.frames.shape[-1]}"
            raise UserError(
                f"the transformer got {x.shape[-1]} channels ({found} condition.frames channels among them), "
                f"expected in_channels = {config.in_channels}; give zeros where there is no image"
            )
        if (condition.image is None) != (config.image_dim is None):
            found = "missing" if condition.image is None else "given"
            raise UserError(
                f"condition.image is {found}, but image_dim is {config.image_dim}; "
                "give zeros to an image-to-video model without image, None to a text-to-video model"
            )
        length = condition.text.shape[1]
        if length > config.text_len:
            raise UserError(
                f"condition.text has {length} tokens, expected at most {config.text_len}; shorten the prompt"
            )
        hidden = self.patch_embedding(self.layout.place_clips(x))
        tokens = hidden.shape[1]
        padding = self.layout.padded(tokens, aligned) - tokens
        if padding:
            hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        hidden = self.layout.place(hidden)
        embedding, modulation = self.condition_embedder.time(t)
        text, text_bias = condition.text.astype(self.dtype), None
        if length < config.text_len:
            # All padding tokens are equal after the embedder: one of them with logit log(count) represents all.
            text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
            text_bias = jnp.zeros((1, length + 1)).at[:, -1].set(math.log(config.text_len - length))
        text = self.layout.place_clips(self.condition_embedder.text_embedder(self.layout.place_clips(text)))
        image = None
        if condition.image is not None and self.condition_embedder.image_embedder is not None:
            image = self.condition_embedder.image_embedder(self.layout.place_clips(condition.image))
            image = self.layout.place_clips(image)
        cos, sin = (jnp.pad(table, ((0, padding), (0, 0))) for table in rope_table(grid, config.attention_head_dim))
        return hidden, embedding, Context(modulation, text, text_bias, image, cos, sin, tokens, self.layout)

    def _run(self, hidden: Tokens, context: Context, start: int, stop: int, copied: bool = True) -> Tokens:
        """Runs blocks start to stop - 1 in one scan over their stacked weights, sliced or read in place by index."""
        return jax.lax.scan(self.block(context, copied), hidden, (self.layers(start, stop, copied), None))[0]

    def _run_in_turns(
        self, hidden: Tokens, context: Context, start: int, stride: int, turns: int, copied: bool
    ) -> tuple[Tokens, Float[Array, "turns b padded d"]]:
        """Runs `turns` times the next `stride` blocks from `start` on, and returns the hidden states after each turn.

        This is a scan of scans, which compiles as fast as one block.
        """
        block, layers = self.block(context, copied), self.layers(start, start + stride * turns, copied)

        def turn(carry: Tokens, own: Any) -> tuple[Tokens, Tokens]:
            carry = jax.lax.scan(block, carry, (own, None))[0]
            return carry, carry

        return jax.lax.scan(turn, hidden, jax.tree.map(lambda x: x.reshape(turns, stride, *x.shape[1:]), layers))

    def layers(self, start: int, stop: int, copied: bool) -> Any:
        """The argument of `block` for blocks start to stop - 1: their weights, or their indices."""
        if not copied:
            return jnp.arange(start, stop)
        weights = nnx.split(self.blocks)[1]
        if (start, stop) == (0, self.config.num_layers):
            return weights
        return jax.tree.map(lambda weight: weight[start:stop], weights)

    def block(self, context: Context, copied: bool) -> Callable[[Tokens, Any], tuple[Tokens, OwnPair | None]]:
        """The body of a scan over blocks, whose input is each block's weights (or index) and memory."""
        graph, weights = nnx.split(self.blocks)

        def body(carry: Tokens, given: Any) -> tuple[Tokens, OwnPair | None]:
            layer, past = given
            if not copied:
                number = layer
                layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), weights)
            layer = gather(_cast(layer, self.dtype), TRANSFORMER_RULES, self.layout.mesh, "blocks/", stacked=True)
            hidden, own = nnx.merge(graph, layer)(checkpoint_name(carry, CARRY), context, past)
            return self.layout.place(hidden), own if context.keep else None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return body


def _features(
    states: tuple[Tokens, ...], context: Context, condition: Condition, grid: tuple[int, int, int]
) -> Features:
    text = context.text[:, : condition.text.shape[1]]
    return Features(taps=states, text=text, text_mask=condition.text_mask, grid=grid, image=context.image)


def _cast(layer: Params, dtype: DTypeLike) -> Params:
    """A block's matrices in the compute dtype, cast before devices exchange them; norms and modulation unchanged."""

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf.astype(dtype) if param_path(path).endswith(("/kernel", "/lora_a", "/lora_b")) else leaf

    return jax.tree_util.tree_map_with_path(one, layer)
