"""TAEHV's decoder in PyTorch, with the names of its published files: what they are computed with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS, GROWS = (256, 128, 64, 64), (1, 2, 2)


class Block(nn.Module):
    """Sees every frame and the one before."""

    def __init__(self, width: int):
        super().__init__()
        convolutions = [nn.Conv2d(inputs, width, 3, padding=1) for inputs in (2 * width, width, width)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return torch.relu(self.conv(torch.cat([x, past], 1)) + x)


class Grow(nn.Module):
    """Several frames of each."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.conv = nn.Conv2d(width, times * width, 1, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, self.width, *x.shape[2:])


class OriginalTAEHV(nn.Module):
    """Normalised latents [f, 16, h, w] to video [1 + 4 (f - 1), 3, 8 h, 8 w] in [0, 1]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, grows: tuple[int, ...] = GROWS):
        super().__init__()
        first = nn.Conv2d(16, widths[0], 3, padding=1)
        layers: list[nn.Module] = [nn.Identity(), first, nn.ReLU()]
        for width, to, times in zip(widths[:-1], widths[1:], grows, strict=True):
            layers += [Block(width), Block(width), Block(width), nn.Upsample(scale_factor=2), Grow(width, times)]
            layers.append(nn.Conv2d(width, to, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))
        # As published files have it, too, though no decoding needs it.
        self.encoder = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(3 * torch.tanh(x / 3)).clamp(0, 1)[3:]


def random_taehv(widths: tuple[int, ...] = WIDTHS) -> OriginalTAEHV:
    """One whose weights are all away from their initial values, and whose frames reach from black to white."""
    torch.manual_seed(0)
    model = OriginalTAEHV(widths).eval().requires_grad_(False)
    for weight in model.parameters():
        nn.init.kaiming_normal_(weight) if weight.ndim == 4 else nn.init.normal_(weight, std=0.1)
    last = model.decoder[-1]
    last.weight.mul_(0.02)
    last.bias.fill_(0.5)
    return model
