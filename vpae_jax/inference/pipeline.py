"""From a model directory to videos: prompt and image in, frames out.

    pipe = vpae_jax.load_pipeline("path/to/model")        # or "tiny", the model inside this package
    frames = pipe("a three moves up", seed=1)             # uint8 [frames, height, width, 3]

The directory may be in any layout (`weights/find.py`); its `vpae_jax.json` specifies the default clip
(`weights/settings.py`). Everything from prompt and image to frames matches Diffusers' WanPipeline and
WanImageToVideoPipeline; the tests compare the frames.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from vpae_jax import sharding
from vpae_jax.flow.draws import check_seed, noise_of_seed
from vpae_jax.flow.sampler import Sampler, Solver, Steps
from vpae_jax.inference import experts, samplers, streaming
from vpae_jax.inference.pictures import Pictures, first_frames
from vpae_jax.inference.samplers import MASK_CHANNELS, Denoiser
from vpae_jax.inference.sizes import ClipSizes
from vpae_jax.inference.tokenizer import (
    PreTrainedTokenizerBase,
    check_ids,
    clean_prompt,
    tokenize,
)
from vpae_jax.models.clip import CLIPVision
from vpae_jax.models.tiny_decoder import TinyDecoder
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.models.wan_vae_rows import Rows
from vpae_jax.train.roles import split
from vpae_jax.types import Condition, Latents, Mask, PRNGKey, UserError, Video
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.image_processor import ImageProcessor
from vpae_jax.weights.settings import Defaults, Scheduler
from vpae_jax.weights.stream import Merge


@dataclass(frozen=True)
class Pipeline:
    """A model directory's parts, and operations on them.

    Attributes:
      transformer, vae, text_encoder: models. With two experts, `transformer` is the one for timesteps from `boundary`
        upwards.
      image_encoder, image_processor: None for a text-to-video model.
      tokenizer: its `model_max_length` is the text length, at most 512.
      scheduler: the directory's recommended sampling, used by default.
      defaults: the clip size of a call without sizes, and the negative prompt.
      transformer_2: the other expert; None if one network covers all timesteps.
      boundary: timestep in (0, 1) that separates the experts; 0 with one network.
      small_decoder: decodes latents instead of the VAE; None to use the VAE.
      directory: where its parts were loaded from.
    """

    transformer: WanTransformer
    vae: WanVAE
    text_encoder: UMT5Encoder
    image_encoder: CLIPVision | None
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor | None
    scheduler: Scheduler
    defaults: Defaults
    transformer_2: WanTransformer | None = None
    boundary: float = 0.0
    small_decoder: TinyDecoder | None = None
    directory: ModelDirectory | None = None

    @property
    def decoder(self) -> WanVAE | TinyDecoder:
        """The model that decodes latents to frames."""
        return self.small_decoder or self.vae

    @property
    def takes_image(self) -> bool:
        """Whether the transformer reads a first frame in addition to the noisy latents."""
        return self.transformer.config.in_channels > self.transformer.config.out_channels

    @cached_property
    def denoiser(self) -> Denoiser:
        """The transformers, split once: splitting for every clip would take a tenth of a tiny network evaluation."""
        low = None if self.transformer_2 is None else split(self.transformer_2)
        return Denoiser(*split(self.transformer), low, self.boundary)

    def without_encoders(self) -> Pipeline:
        """The same pipeline without the weights of text and image encoder, for use once all prompts are encoded."""
        image = None if self.image_encoder is None else _shapes_of(self.image_encoder)
        return dataclasses.replace(self, text_encoder=_shapes_of(self.text_encoder), image_encoder=image)

    def with_transformer(
        self, model: ModelDirectory, dtype: DTypeLike, mesh: Mesh | None = None, merge: Merge | None = None
    ) -> Pipeline:
        """The same pipeline, which was loaded without a transformer, with the transformer of its model directory.

        Args:
          model: the model directory.
          dtype, mesh: as for `load_pipeline`; the VAE is placed on the mesh, too.
          merge: what to add to the transformer's weights (`weights.merging.open_merging`).
        """
        first, second = experts.load(model, dtype, mesh, merge)
        vae = self.vae if mesh is None else experts.load_vae(model, self.vae.dtype, mesh)
        return dataclasses.replace(self, transformer=first, transformer_2=second, vae=vae)

    def over(self, mesh: Mesh) -> Pipeline:
        """The same pipeline with its VAE replicated over a mesh, across which it splits the rows of clips."""
        if self.vae.rows is not None and self.vae.rows.mesh == mesh:
            return self
        graph, weights = nnx.split(self.vae)
        vae = nnx.merge(graph, sharding.replicate(weights, mesh))
        vae.rows = Rows(mesh)
        return dataclasses.replace(self, vae=vae)

    def on(self, device: Any) -> Pipeline:
        """The same pipeline with everything except the transformer on one device."""

        def moved(model: Any) -> Any:
            graph, weights = nnx.split(model)
            return nnx.merge(graph, jax.device_put(weights, device))

        image = None if self.image_encoder is None else moved(self.image_encoder)
        small = None if self.small_decoder is None else moved(self.small_decoder)
        return dataclasses.replace(
            self,
            vae=moved(self.vae),
            text_encoder=moved(self.text_encoder),
            image_encoder=image,
            small_decoder=small,
        )

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Float[Array, "b s d"], Mask]:
        """Text states, zero beyond each prompt's end, and the mask that is true at the prompts' tokens.

        Raises:
          UserError: a prompt with more tokens than the tokenizer's `model_max_length`.
        """
        ids, mask = self.tokenize(prompts)
        states = samplers.apply(self.text_encoder, jnp.asarray(ids), jnp.asarray(mask))
        return jnp.where(mask[..., None], states, 0), jnp.asarray(mask)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "b s"], Bool[np.ndarray, "b s"]]:
        """Token ids of the cleaned prompts, and the mask that is true at them.

        Raises:
          UserError: a prompt with more tokens than the tokenizer's `model_max_length`, or a token that the text encoder
            does not know.
        """
        ids, mask = tokenize(self.tokenizer, [clean_prompt(prompt) for prompt in prompts])
        check_ids(int(ids.max(initial=0)), self.text_encoder.config.vocab_size)
        return ids, mask

    def encode_image(self, pictures: Pictures) -> Float[Array, "b n e"]:
        """Image-encoder states of uint8 images of any size.

        Raises:
          UserError: this is a text-to-video model.
        """
        if self.image_encoder is None or self.image_processor is None:
            raise UserError("this model directory has no image_encoder/; it is a text-to-video model")
        return samplers.apply(self.image_encoder, jnp.asarray(self.image_processor(pictures)))

    def condition_frames(
        self,
        first: Video | None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
    ) -> Latents:
        """The condition frames that the transformer reads with the noisy latents: 4 mask channels, then 16 latent
        channels.

        The mask is 1 on the first latent frame; the latents are those of the first frame followed by grey (zero)
        frames. Without a first frame everything is zero.

        Args:
          first: clips in [-1, 1] at the video's height and width; only their first frame is used. None without one.
          num_frames: length of the video, 1 + a multiple of 4; by default the model's.
          height, width, batch: used without a first frame.
        """
        if first is not None:
            batch, _, height, width, _ = first.shape
        shape = self.latent_shape(batch, num_frames, height, width)
        if first is None:
            return jnp.zeros((*shape[:-1], MASK_CHANNELS + shape[-1]))
        return samplers.encode_first_frame(self.vae, first[:, :1], shape[1])[0]

    def condition(
        self,
        prompts: Sequence[str],
        pictures: Pictures | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Condition:
        """Everything that the transformer is conditioned on, from one prompt and at most one image per clip.

        Args:
          prompts: one per clip.
          pictures: first frames of any size, stretched to the video's; None for text-to-video.
          num_frames, height, width: the video's; by default the model's.
        """
        num_frames, height, width = self._sizes.clip(num_frames, height, width)
        condition = self._encode(prompts, pictures)
        if not self.takes_image:
            return condition
        first = None if pictures is None else first_frames(pictures, height, width)
        frames = self.condition_frames(first, num_frames, height, width, len(prompts))
        return dataclasses.replace(condition, frames=frames)

    def sampler(
        self,
        steps: Steps | None = None,
        guidance: float | None = None,
        solver: Solver | None = None,
        shift: float | None = None,
        window: int | None = None,
        sink: int | None = None,
    ) -> Sampler:
        """The model's own sampler, with any arguments overridden (`Scheduler.sampler`)."""
        return self.scheduler.sampler(steps, guidance, solver, shift, window, sink)

    def sample(
        self,
        noise: Latents,
        condition: Condition,
        unconditional: Condition | None = None,
        sampler: Sampler | None = None,
        key: PRNGKey | None = None,
        denoiser: Denoiser | None = None,
        given: Float[Array, "b first h w c"] | None = None,
    ) -> Latents:
        """Clean latents from noise.

        Args:
          noise: standard normal, of `latent_shape`.
          condition: one per clip.
          unconditional: what guidance moves away from; required above guidance 1, ignored at 1.
          sampler: by default the model's own.
          key: for the "consistency" solver's fresh noise; one for each clip, or one for all.
          denoiser: networks of the same architecture to sample instead of the model's own.
          given: latents of a causal model's first chunk, which it continues instead of generating them.

        Raises:
          UserError: guidance without an unconditional condition, a solver that draws noise without a key, or given
            latents that are not a first chunk.
        """
        sampler = self.sampler() if sampler is None else sampler
        if sampler.guidance > 1 and unconditional is None:
            raise UserError(f"guidance is {sampler.guidance}, but no unconditional condition was given")
        if sampler.solver == "consistency" and key is None:
            raise UserError("solver 'consistency' draws fresh noise: give it a key")
        if given is not None and sampler.chunks is None:
            raise UserError("latents of a first chunk were given, but the sampler makes whole clips; leave them out")
        other = unconditional if sampler.guidance > 1 else None
        key = jax.random.key(0) if key is None else key  # read by no other solver
        return samplers.sample(denoiser or self.denoiser, sampler, noise, condition, other, key, given)

    def decode(self, latents: Latents) -> UInt8[Array, "b t height width 3"]:
        """Decodes latents to pixels.

        Raises:
          UserError: latents or pixels are not finite.
        """
        frames, finite = samplers.decode(self.decoder, latents)
        samplers.check_finite(finite)
        return frames

    def latent_shape(
        self, batch: int, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int, int]:
        """Shape of the latents of `batch` clips; sizes default to the model's. Raises `UserError` for a size that the
        model cannot generate."""
        num_frames, height, width = self._sizes.clip(num_frames, height, width)
        space, frames = self.vae.config.scale_factor_spatial, self._sizes.latent_frames(num_frames)
        return batch, frames, height // space, width // space, self.vae.config.z_dim

    def prepare(
        self,
        prompt: str,
        image: UInt8[np.ndarray, "image_height image_width 3"] | None = None,
        steps: Steps | None = None,
        guidance: float | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        solver: Solver | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        noise: Latents | None = None,
        window: int | None = None,
        sink: int | None = None,
    ) -> partial[Latents]:
        """Generates one video: `prepare` encodes what it shows and returns the call that samples its latents, `pieces`
        yields its frames while later ones are being decoded, and calling the pipeline returns all frames at once.

        Args:
          prompt: describes the video.
          image: its first frame, of any size; stretched to the video's. None for text-to-video. A causal text-to-video
            model continues it: the frame is a chunk of its own.
          steps, guidance, solver, shift: see `flow.sampler.Sampler`; by default the model's own (`scheduler`). For a
            causal model, steps may be two numbers: for the first chunk and for each later one.
          seed: determines the noise.
          negative_prompt: what guidance above 1 moves away from, by default the model's; the image is kept, as in Wan.
          num_frames: 1 + a multiple of 4; by default the model's. A causal model generates a whole number of chunks,
            which may be more than it was trained on; if it continues an image, the default is the number closest to its
            own.
          height, width: multiples of 8 times the transformer's patch; by default the model's. With an image and neither
            given, the image's aspect ratio at the model's area (see `fit`).
          noise: standard normal, of `latent_shape(1, ...)`, instead of the seed's.
          window, sink: for a causal model: how many of the latest earlier latent frames a chunk sees, 0 for all, and
            how many of the first ones in addition (`flow.chunks.Chunks`); by default the model's own.

        Raises:
          UserError: an argument that this model cannot use.
        """
        height, width = self._fitted(image, height, width)
        sampler, given = self.sampler(steps, guidance, solver, shift, window, sink), None
        if image is not None and self._continues(sampler):
            sampler, given = self._continuing(sampler, image, height, width)
            num_frames = self._sizes.in_chunks(sampler.chunks) if num_frames is None else num_frames
            image = None
        shape = self.latent_shape(1, num_frames, height, width)
        if sampler.chunks is not None:
            self._sizes.check_chunks(sampler.chunks, shape[1])
        if noise is not None and noise.shape != shape:
            raise UserError(f"noise has shape {noise.shape}, expected {shape}: one clip's latents, channels last")
        drawn, key = noise_of_seed(seed, shape)
        noise = drawn if noise is None else noise
        pictures = None if image is None else image[None]
        condition = self.condition([prompt], pictures, num_frames, height, width)
        unconditional = self._unconditional(condition, negative_prompt) if sampler.guidance > 1 else None
        return partial(self.sample, noise, condition, unconditional, sampler, key[None], given=given)

    pieces = streaming.in_pieces(prepare)
    __call__ = streaming.joined(pieces)

    def stream(
        self,
        prompt: str,
        image: UInt8[np.ndarray, "image_height image_width 3"] | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        num_frames: int | float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[streaming.Piece]:
        """Generates one video with a causal model, and yields each chunk's frames while the next chunks are being
        generated.

        The frames are the same as those of a call. With a window, memory does not grow with the number of frames.

        Args:
          sampler: with `chunks`; by default the model's own.
          num_frames: as for a call, or `math.inf` for an endless video, if the model has a window.
          prompt, image, seed, negative_prompt, height, width: as for a call.

        Raises:
          UserError: a model that is not causal, or an argument that it cannot use.
        """
        check_seed(seed)
        height, width = self._fitted(image, height, width)
        sampler, given = self.sampler() if sampler is None else sampler, None
        if image is not None and self._continues(sampler):
            sampler, given = self._continuing(sampler, image, height, width)
            num_frames = self._sizes.in_chunks(sampler.chunks) if num_frames is None else num_frames
            image = None
        latent_frames = sys.maxsize if num_frames == math.inf else self._sizes.latent_frames(num_frames)
        if sampler.chunks is not None and num_frames != math.inf:
            self._sizes.check_chunks(sampler.chunks, latent_frames)
        held = streaming.frames_held(sampler.chunks, latent_frames)
        space = self.latent_shape(1, self._sizes.num_frames(held), height, width)[2:]
        pictures = None if image is None else image[None]
        condition = self._encode([prompt], pictures)
        unconditional = self._unconditional(condition, negative_prompt) if sampler.guidance > 1 else None
        first = None if pictures is None else first_frames(pictures, *self._sizes.clip(1, height, width)[1:])
        clip = (condition, unconditional, first, given, (1, latent_frames, *space), seed)
        return streaming.Stream(self.vae, self.decoder, self.denoiser, sampler, self.takes_image, *clip).frames()

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The video size for an image: its aspect ratio at the model's own area (`pictures.fitted`). Raises `UserError`
        for an image too elongated for that."""
        return self._sizes.fit(height, width)

    @property
    def units(self) -> tuple[int, int]:
        """What a video's height and width must be multiples of, in pixels."""
        return self._sizes.units

    @property
    def _sizes(self) -> ClipSizes:
        return ClipSizes(self.defaults, self.vae.config, self.transformer.config.patch_size)

    def _encode(self, prompts: Sequence[str], pictures: Pictures | None) -> Condition:
        """Encodes text and images, without the condition frames."""
        if pictures is not None and not self.takes_image:
            raise UserError("an image was given, but this is a text-to-video model; leave the image out")
        text, mask = self.encode_prompt(prompts)
        image = None
        if self.image_encoder is not None:
            config = self.image_encoder.config
            shape = (len(prompts), config.num_tokens, config.hidden_size)
            image = jnp.zeros(shape) if pictures is None else self.encode_image(pictures)
        return Condition(text=text, text_mask=mask, image=image)

    def _continues(self, sampler: Sampler) -> bool:
        """Whether a given first frame becomes a chunk of its own, which the other chunks continue."""
        return sampler.chunks is not None and not self.takes_image

    def _continuing(
        self,
        sampler: Sampler,
        image: UInt8[np.ndarray, "image_height image_width 3"],
        height: int | None,
        width: int | None,
    ) -> tuple[Sampler, Latents]:
        """The sampler of a clip that continues an image, and the latents of its first chunk."""
        assert sampler.chunks is not None
        first = first_frames(image[None], *self._sizes.clip(1, height, width)[1:])
        latents = samplers.encode_first_frame(self.vae, first, 1)[0][..., MASK_CHANNELS:]
        chunks = dataclasses.replace(sampler.chunks, first=1)
        return dataclasses.replace(sampler, chunks=chunks, first=()), latents

    def _unconditional(self, condition: Condition, given: str | None) -> Condition:
        """What guidance moves a clip away from: the given negative prompt, by default the model's."""
        try:
            text, mask = self.encode_prompt([self.defaults.negative_prompt if given is None else given])
        except UserError as error:
            whose = " (the model's own, as none was given)" if given is None else ""
            raise UserError(f"negative_prompt{whose}: {error}") from error
        return dataclasses.replace(condition, text=text, text_mask=mask)

    def _fitted(
        self, image: UInt8[np.ndarray, "image_height image_width 3"] | None, height: int | None, width: int | None
    ) -> tuple[int | None, int | None]:
        """The video's height and width if they are given, else those that fit its first frame."""
        if self.transformer.config.pos_embed_seq_len is not None:
            raise UserError(
                "this is a first-and-last-frame model (pos_embed_seq_len is set), which can be converted, but not "
                "sampled; load a text-to-video or an image-to-video model"
            )
        if image is not None and height is None and width is None:
            return self.fit(*image.shape[:2])
        return height, width


def _shapes_of(model: nnx.Module) -> Any:
    return nnx.eval_shape(lambda: model)
