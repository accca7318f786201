"""The autoencoder of Wan 2.1 as its authors named its weights: random ones, and what diffusers computes with them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter away from its initial value, and freezes it."""
    module.eval().requires_grad_(False)
    for weight in module.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    return module


class Gamma(nn.Module):
    """An RMS norm's weight, followed by axes of size 1."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))


def _residual(inputs: int, outputs: int) -> nn.ModuleDict:
    first = (Gamma(inputs, 3), nn.SiLU(), nn.Conv3d(inputs, outputs, 3))
    second = (Gamma(outputs, 3), nn.SiLU(), nn.Dropout(), nn.Conv3d(outputs, outputs, 3))
    block = nn.ModuleDict({"residual": nn.Sequential(*first, *second)})
    if inputs != outputs:
        block["shortcut"] = nn.Conv3d(inputs, outputs, 1)
    return block


def _resample(inputs: int, outputs: int, time_outputs: int | None) -> nn.ModuleDict:
    block = nn.ModuleDict({"resample": nn.Sequential(nn.Identity(), nn.Conv2d(inputs, outputs, 3))})
    if time_outputs is not None:
        block["time_conv"] = nn.Conv3d(inputs, time_outputs, (3, 1, 1))
    return block


def _middle(dim: int) -> nn.Sequential:
    attention = {"norm": Gamma(dim, 2), "to_qkv": nn.Conv2d(dim, 3 * dim, 1), "proj": nn.Conv2d(dim, dim, 1)}
    return nn.Sequential(_residual(dim, dim), nn.ModuleDict(attention), _residual(dim, dim))


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Gamma(inputs, 3), nn.SiLU(), nn.Conv3d(inputs, outputs, 3))


class VAE(nn.Module):
    """The names and shapes of the autoencoder's weights, each level's blocks in one flat list; it computes nothing."""

    def __init__(
        self,
        *,
        base_dim: int = 4,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 1,
        temperal_downsample: Sequence[bool] = (False, True, True),
    ):
        super().__init__()
        self.sizes = {
            "base_dim": base_dim,
            "z_dim": z_dim,
            "dim_mult": list(dim_mult),
            "num_res_blocks": num_res_blocks,
            "temperal_downsample": list(temperal_downsample),
        }
        dims = [base_dim * factor for factor in dim_mult]
        downsamples: list[nn.Module] = []
        width = base_dim
        for level, dim in enumerate(dims):
            for _ in range(num_res_blocks):
                downsamples.append(_residual(width, dim))
                width = dim
            if level < len(dims) - 1:
                downsamples.append(_resample(dim, dim, dim if temperal_downsample[level] else None))
        upsamples: list[nn.Module] = []
        for level, dim in reversed(list(enumerate(dims))):
            for _ in range(num_res_blocks + 1):
                upsamples.append(_residual(width, dim))
                width = dim
            if level > 0:
                upsamples.append(_resample(dim, dim // 2, 2 * dim if temperal_downsample[level - 1] else None))
                width = dim // 2
        encoder = {
            "conv1": nn.Conv3d(3, base_dim, 3),
            "downsamples": nn.Sequential(*downsamples),
            "middle": _middle(dims[-1]),
            "head": _head(dims[-1], 2 * z_dim),
        }
        decoder = {
            "conv1": nn.Conv3d(z_dim, dims[-1], 3),
            "middle": _middle(dims[-1]),
            "upsamples": nn.Sequential(*upsamples),
            "head": _head(dims[0], 3),
        }
        self.encoder = nn.ModuleDict(encoder)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = nn.ModuleDict(decoder)
        randomise(self)


def vae_state(**sizes: Any) -> dict[str, Tensor]:
    """Random weights of the autoencoder by original name. Arguments as `VAE`."""
    return dict(VAE(**sizes).state_dict())


def vae_reference(state: Mapping[str, Tensor], **sizes: Any) -> diffusers.AutoencoderKLWan:
    """Diffusers' autoencoder with these weights, in float32. Arguments as `VAE`."""
    ours = VAE(**sizes)
    ours.load_state_dict(state)
    halvings = ours.sizes["temperal_downsample"]
    factors = {"scale_factor_spatial": 2 ** len(halvings), "scale_factor_temporal": 2 ** sum(halvings)}
    theirs = diffusers.AutoencoderKLWan(**ours.sizes, **factors)
    theirs.eval().requires_grad_(False)
    for weight in theirs.parameters():
        weight.fill_(torch.nan)
    for source, target in _pairs(ours, theirs):
        target.load_state_dict(source.state_dict())
    empty = [name for name, weight in theirs.named_parameters() if weight.isnan().any()]
    count = sum(weight.numel() for weight in theirs.parameters())
    assert not empty and count == sum(weight.numel() for weight in ours.parameters()), empty
    return theirs


def _pairs(ours: VAE, theirs: diffusers.AutoencoderKLWan) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of the same weights, in which both sides use the same names."""
    yield ours.conv1, theirs.quant_conv
    yield ours.conv2, theirs.post_quant_conv
    # Of a decoder's level diffusers keeps the residual blocks and the upsampling in two lists.
    upsamples = [block for level in theirs.decoder.up_blocks for block in (*level.resnets, *(level.upsamplers or ()))]
    for half, other, blocks, others in (
        (ours.encoder, theirs.encoder, ours.encoder["downsamples"], theirs.encoder.down_blocks),
        (ours.decoder, theirs.decoder, ours.decoder["upsamples"], upsamples),
    ):
        yield half["conv1"], other.conv_in
        yield half["head"][0], other.norm_out
        yield half["head"][2], other.conv_out
        middle = other.mid_block
        for pair in zip(half["middle"], (middle.resnets[0], middle.attentions[0], middle.resnets[1]), strict=True):
            yield from _block_pairs(*pair)
        for pair in zip(blocks, others, strict=True):
            yield from _block_pairs(*pair)


def _block_pairs(ours: nn.ModuleDict, theirs: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    if "residual" not in ours:
        yield ours, theirs
        return
    layers = ours["residual"]
    yield from zip((layers[0], layers[2]), (theirs.norm1, theirs.conv1), strict=True)
    yield from zip((layers[3], layers[6]), (theirs.norm2, theirs.conv2), strict=True)
    if "shortcut" in ours:
        yield ours["shortcut"], theirs.conv_shortcut
