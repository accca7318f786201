"""Wan 2.1 as its authors released it, at any size: random weights under the original names, and their outputs.

Nothing here knows of `vpae_jax` (but for the text tokenizer's files): the transformer and the two encoders are computed
by PyTorch modules whose `state_dict()` has the original names and shapes, and the autoencoder by diffusers' own, filled
block by block. Every module is made by torch's global generator, far from initial values so that every term is seen, in
float32, for inference. The original layout is

    config.json  diffusion_pytorch_model*.safetensors  models_t5_umt5-xxl-enc-bf16.pth  Wan2.1_VAE.pth
    google/umt5-xxl/  [models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth  xlm-roberta-large/]
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from original_vae import VAE, randomise, vae_reference
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from vpae_jax.tasks.digits.words import build_tokenizer

STEM = "diffusion_pytorch_model"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_TOKENIZER, IMAGE_TOKENIZER = "google/umt5-xxl", "xlm-roberta-large"


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, **options: Any) -> Tensor:
    """Multi-head attention over `[b, n, d]`, heads beside each other in d."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


# The transformer.


class Attention(nn.Module):
    """Attention with RMS-normalised queries and keys, which may attend to image tokens by keys and values apart."""

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        if image:
            self.k_img, self.v_img = (nn.Linear(dim, dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, context: Tensor, image: Tensor | None = None, turns: Tensor | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if turns is not None:
            q, k = (turn(y, turns, self.num_heads) for y in (q, k))
        y = attend(q, k, v, self.num_heads)
        if image is not None:
            y = y + attend(q, self.norm_k_img(self.k_img(image)), self.v_img(image), self.num_heads)
        return self.o(y)


def angles(grid: Sequence[int], head_dim: int) -> Tensor:
    """Rotary angles of a head's pairs of channels, `[tokens, head_dim / 2]`: time's, then the rows', the columns'."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    rates = [10000.0 ** -(torch.arange(count, dtype=torch.float64) / count) for count in counts]
    return torch.cat([positions[:, [axis]] * rate for axis, rate in enumerate(rates)], 1)


def turn(x: Tensor, turns: Tensor, num_heads: int) -> Tensor:
    """Rotates neighbouring channels of every head by its token's angles."""
    even, odd = x.double().unflatten(-1, (num_heads, -1, 2)).unbind(-1)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3).to(x.dtype)


class Block(nn.Module):
    """One layer. Of its three norms only `norm3`, before cross-attention, has weights."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, image: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.self_attn = Attention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = Attention(dim, num_heads, eps, image)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor | None, turns: Tensor) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).chunk(6, 1)
        y = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(y, y, turns=turns)
        x = x + self.cross_attn(self.norm3(x), text, image)
        return x + ffn_gate * self.ffn(self.norm(x) * (1 + ffn_scale) + ffn_shift)


class Transformer(nn.Module):
    """The diffusion transformer.

    Args:
      model_type: "t2v", "i2v", or "flf2v" (first and last frame, whose image tokens get positions).
      in_dim: channels of `x` and `y` together; None for the release's: `out_dim`, with an image `2 * out_dim + 4`.
      image_dim: width of the image encoder's states; 1280 in the release, whose config does not say it.
      image_tokens: tokens of one image; 257 in the release. Shapes the weights of "flf2v" only.
      Others are entries of the original config.json, or constants of the original code: `text_dim`, `patch_size`. With
        an image, that code works for a `text_len` of 512 only.
    """

    def __init__(
        self,
        model_type: str = "t2v",
        *,
        dim: int = 24,
        ffn_dim: int = 40,
        freq_dim: int = 16,
        in_dim: int | None = None,
        out_dim: int = 16,
        num_heads: int = 2,
        num_layers: int = 2,
        text_len: int = 512,
        eps: float = 1e-6,
        text_dim: int = 32,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        image_dim: int = 32,
        image_tokens: int = 17,
    ):
        super().__init__()
        image = model_type != "t2v"
        if in_dim is None:
            in_dim = 2 * out_dim + 4 if image else out_dim
        self.sizes = {
            "dim": dim,
            "eps": eps,
            "ffn_dim": ffn_dim,
            "freq_dim": freq_dim,
            "in_dim": in_dim,
            "model_type": model_type,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "out_dim": out_dim,
            "text_len": text_len,
        }
        self.patch_size, self.text_dim = patch_size, text_dim
        self.image_dim, self.image_tokens = image_dim, image_tokens
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps, image) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head = nn.ModuleDict({"head": nn.Linear(dim, out_dim * math.prod(patch_size))})
        self.head.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        if image:
            layers = (nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU())
            proj = nn.Sequential(*layers, nn.Linear(image_dim, dim), nn.LayerNorm(dim))
            self.img_emb = nn.ModuleDict({"proj": proj})
        if model_type == "flf2v":
            self.img_emb.emb_pos = nn.Parameter(torch.randn(1, 2 * image_tokens, image_dim))
        randomise(self)

    def config_json(self) -> dict[str, Any]:
        """The original config.json, which leaves out the widths of the text's and the image's states."""
        return {"_class_name": "WanModel", "_diffusers_version": "0.30.0", **self.sizes}

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The velocity.

        Args:
          x: `[b, out_dim, f, h, w]`.
          t: times `[b]`, in 0 .. 1000.
          text: states `[b, s, text_dim]`, at most `text_len` long; zeros make up the rest, and are attended to.
          image: states `[b, n, image_dim]`; for "flf2v" those of both frames in turn, or as `[2 b, n, image_dim]`.
          y: further channels of the input, `[b, in_dim - out_dim, f, h, w]`.
        """
        dim, freq_dim = self.sizes["dim"], self.sizes["freq_dim"]
        patches = self.patch_embedding(x if y is None else torch.cat([x, y], 1))
        grid = patches.shape[2:]
        turns = angles(grid, dim // self.sizes["num_heads"])
        rates = 10000.0 ** -(torch.arange(freq_dim // 2, dtype=torch.float64) / (freq_dim // 2))
        waves = torch.outer(t.double(), rates)
        time = self.time_embedding(torch.cat([waves.cos(), waves.sin()], 1).to(x.dtype))
        text = self.text_embedding(F.pad(text, (0, 0, 0, self.sizes["text_len"] - text.shape[1])))
        if image is not None:
            image = image.reshape(len(x), -1, image.shape[-1])
            image = self.img_emb["proj"](image + getattr(self.img_emb, "emb_pos", 0))
        hidden, modulation = patches.flatten(2).transpose(1, 2), self.time_projection(time).unflatten(1, (6, dim))
        for block in self.blocks:
            hidden = block(hidden, modulation, text, image, turns)
        shift, scale = (self.head.modulation + time[:, None]).chunk(2, 1)
        out = self.head["head"](self.norm(hidden) * (1 + scale) + shift)
        out = out.reshape(len(x), *grid, *self.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# The encoders of text and image.


class TextEncoder(nn.Module):
    """The UMT5 encoder, every layer of which has its own table of relative positions."""

    def __init__(
        self,
        *,
        vocab_size: int = 384,
        dim: int = 32,
        dim_attn: int = 24,
        dim_ffn: int = 48,
        num_heads: int = 4,
        num_layers: int = 2,
        num_buckets: int = 32,
    ):
        super().__init__()
        self.num_heads, self.num_buckets, self.dim = num_heads, num_buckets, dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(self._block(dim, dim_attn, dim_ffn) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        randomise(self)

    def _block(self, dim: int, dim_attn: int, dim_ffn: int) -> nn.ModuleDict:
        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        attn = {name: linear(dim, dim_attn) for name in "qkv"} | {"o": linear(dim_attn, dim)}
        gate = nn.Sequential(linear(dim, dim_ffn), nn.GELU(approximate="tanh"))
        parts = {
            "norm1": nn.RMSNorm(dim, eps=1e-6),
            "attn": nn.ModuleDict(attn),
            "norm2": nn.RMSNorm(dim, eps=1e-6),
            "ffn": nn.ModuleDict({"gate": gate, "fc1": linear(dim, dim_ffn), "fc2": linear(dim_ffn, dim)}),
            "pos_embedding": nn.ModuleDict({"embedding": nn.Embedding(self.num_buckets, self.num_heads)}),
        }
        return nn.ModuleDict(parts)

    def _buckets(self, length: int) -> Tensor:
        """Which row of the table serves a query (row) and a key (column)."""
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        half = self.num_buckets // 2
        exact = half // 2
        # In the original's order of operations, for its rounding decides where a bucket ends.
        far = torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(128 / exact) * (half - exact)
        bucket = torch.where(distance.abs() < exact, distance.abs(), (exact + far.long()).clamp(max=half - 1))
        return bucket + half * (distance > 0)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States `[b, s, dim]` of tokens `[b, s]`; the mask is 0 where there is padding."""
        x, buckets = self.token_embedding(ids), self._buckets(ids.shape[1])
        hidden = torch.where(mask.bool(), 0.0, torch.finfo(x.dtype).min)[:, None, None]
        for block in self.blocks:
            y, attn, ffn = block["norm1"](x), block["attn"], block["ffn"]
            bias = block["pos_embedding"]["embedding"](buckets).permute(2, 0, 1) + hidden
            y = attend(*(attn[name](y) for name in "qkv"), self.num_heads, attn_mask=bias.to(x.dtype), scale=1.0)
            x = x + attn["o"](y)
            y = block["norm2"](x)
            x = x + ffn["fc2"](ffn["fc1"](y) * ffn["gate"](y))
        return self.norm(x)


class ImageEncoder(nn.Module):
    """CLIP's vision tower, with the rest of its file: a text tower (of one layer here) and a scale, which Wan leaves.

    The release has 16 heads, which no tensor's shape tells, whence the number here.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 8,
        dim: int = 32,
        mlp_ratio: int = 4,
        num_heads: int = 16,
        num_layers: int = 3,
        out_dim: int = 20,
        text_dim: int = 12,
    ):
        super().__init__()
        self.num_heads, self.dim, self.num_tokens = num_heads, dim, (image_size // patch_size) ** 2 + 1
        parts = {
            "patch_embedding": nn.Conv2d(3, dim, patch_size, patch_size, bias=False),
            "pre_norm": nn.LayerNorm(dim),
            "transformer": nn.Sequential(*(self._block(dim, mlp_ratio * dim) for _ in range(num_layers))),
            "post_norm": nn.LayerNorm(dim),
        }
        self.visual = nn.ModuleDict(parts)
        self.visual.cls_embedding = nn.Parameter(torch.randn(1, 1, dim))
        self.visual.pos_embedding = nn.Parameter(torch.randn(1, self.num_tokens, dim))
        self.visual.head = nn.Parameter(torch.randn(dim, out_dim))
        self.textual = self._textual(text_dim, out_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        randomise(self)

    @staticmethod
    def _block(dim: int, hidden: int) -> nn.ModuleDict:
        attn = {"to_qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}
        mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        parts = {"norm1": nn.LayerNorm(dim), "attn": nn.ModuleDict(attn), "norm2": nn.LayerNorm(dim), "mlp": mlp}
        return nn.ModuleDict(parts)

    @staticmethod
    def _textual(dim: int, out_dim: int) -> nn.ModuleDict:
        attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in "qkvo"})
        ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        block = nn.ModuleDict({"attn": attn, "norm1": nn.LayerNorm(dim), "ffn": ffn, "norm2": nn.LayerNorm(dim)})
        middle = (dim + out_dim) // 2
        layers = (nn.Linear(dim, middle, bias=False), nn.GELU(), nn.Linear(middle, out_dim, bias=False))
        parts = {
            "token_embedding": nn.Embedding(40, dim),
            "type_embedding": nn.Embedding(1, dim),
            "pos_embedding": nn.Embedding(18, dim),
            "blocks": nn.ModuleList([block]),
            "norm": nn.LayerNorm(dim),
            "head": nn.Sequential(*layers),
        }
        return nn.ModuleDict(parts)

    def forward(self, pixels: Tensor) -> Tensor:
        """States before the last layer, `[b, 1 + patches, dim]`, of normalised pixels `[b, 3, h, w]`."""
        patches = self.visual["patch_embedding"](pixels).flatten(2).transpose(1, 2)
        first = self.visual.cls_embedding.expand(len(pixels), -1, -1)
        x = self.visual["pre_norm"](torch.cat([first, patches], 1) + self.visual.pos_embedding)
        for block in self.visual["transformer"][:-1]:
            q, k, v = block["attn"]["to_qkv"](block["norm1"](x)).chunk(3, -1)
            x = x + block["attn"]["proj"](attend(q, k, v, self.num_heads))
            x = x + block["mlp"](block["norm2"](x))
        return x


# Files.


@dataclass(frozen=True)
class Original:
    """The modules of a folder, in float32 and with the weights as stored there."""

    transformer: Transformer
    text_encoder: TextEncoder
    vae: diffusers.AutoencoderKLWan
    image_encoder: ImageEncoder | None


def save_folder(
    folder: Path,
    *,
    image: bool,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    shards: int = 2,
    **sizes: Mapping[str, Any],
) -> Original:
    """Writes a folder in the original layout, of random weights that depend on the arguments only.

    Args:
      folder: made if it is not there.
      image: whether it is an image-to-video model, with the image encoder.
      dtype: of the stored weights; or of each part's, by name, float32 where it does not say.
      shards: number of the transformer's files; 1 is written without an index, as the release's 1.3B.
      **sizes: keywords for `transformer`, `text_encoder`, `image_encoder` or `vae`, where not the defaults. The
        transformer fits the encoders without being told.
    """
    assert sizes.keys() <= {"transformer", "text_encoder", "image_encoder", "vae"}, sizes
    assert image or "image_encoder" not in sizes

    def stored(part: str, module: nn.Module) -> nn.Module:
        return module.to(dtype if isinstance(dtype, torch.dtype) else dtype.get(part, torch.float32))

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = stored("text_encoder", TextEncoder(**sizes.get("text_encoder", {})))
    torch.save(text.state_dict(), folder / TEXT_FILE)
    build_tokenizer(folder / TEXT_TOKENIZER)
    fitting: dict[str, Any] = {"text_dim": text.dim}
    vision = None
    if image:
        vision = stored("image_encoder", ImageEncoder(**sizes.get("image_encoder", {})))
        torch.save(vision.state_dict(), folder / IMAGE_FILE)
        _write_image_tokenizer(folder / IMAGE_TOKENIZER)
        fitting |= {"model_type": "i2v", "image_dim": vision.dim, "image_tokens": vision.num_tokens}
    vae = stored("vae", VAE(**sizes.get("vae", {})))
    torch.save(vae.state_dict(), folder / VAE_FILE)
    transformer = stored("transformer", Transformer(**(fitting | dict(sizes.get("transformer", {})))))
    (folder / "config.json").write_text(json.dumps(transformer.config_json(), indent=2) + "\n")
    _write_shards(folder, transformer.state_dict(), shards)
    return Original(
        transformer.float(),
        text.float(),
        vae_reference(vae.float().state_dict(), **sizes.get("vae", {})),
        vision and vision.float(),
    )


def single_file(path: Path, transformer: Transformer, prefix: str = "model.diffusion_model.") -> None:
    """Writes the transformer alone into one safetensors file, as ComfyUI's models are repackaged."""
    tensors = {prefix + name: value for name, value in transformer.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _write_shards(folder: Path, state: Mapping[str, Tensor], count: int) -> None:
    """One safetensors file without an index, or several with one."""
    names = list(state)
    where: dict[str, str] = {}
    for i in range(count):
        file = f"{STEM}.safetensors" if count == 1 else f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[i * len(names) // count : (i + 1) * len(names) // count]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if count > 1:
        size = sum(value.numel() * value.element_size() for value in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_image_tokenizer(folder: Path) -> None:
    """The tokenizer of CLIP's text tower, which Wan does not use."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [(piece, 0.0) for piece in special.values()] + [("\u2581", -1.0), ("a", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
