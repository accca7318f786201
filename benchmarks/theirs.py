"""The PyTorch models of Diffusers and Transformers with random weights, and conversion of these weights to ours.

Torch is imported only when a model is created, so that our own models can be timed without it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vpae_jax.types import Params
from vpae_jax.weights.loading import read_part

Host = Float[np.ndarray, "..."]


def installed() -> bool:
    """Whether PyTorch, Diffusers and Transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))


def device() -> str:
    """The device that PyTorch uses."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make(part: str, config: Any, dtype: str) -> Any:
    """Creates a model with PyTorch's own random weights.

    Args:
      part: "transformer", "vae" or "text_encoder".
      config: our config.
      dtype: of the weights, except those that Diffusers keeps in float32.
    """
    import diffusers
    import torch
    import transformers

    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    torch.manual_seed(0)
    if part == "transformer":
        del fields["text_len"]  # Diffusers attends to text of any length
        model: Any = diffusers.WanTransformer3DModel(**fields)
    elif part == "vae":
        model = diffusers.AutoencoderKLWan(**fields)
    else:
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields))
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, weight in model.named_parameters():
        if not any(one in name for one in kept):
            weight.data = weight.data.to(getattr(torch, dtype))
    return model.eval().to(device())


def weights(part: str, model: Any, dtype: DTypeLike) -> Params:
    """A model's weights in our layout, through a saved folder, as for any user's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / part)
        return read_part(Path(folder), part, dtype)[1]


def gradients(part: str, model: Any) -> Params:
    """The gradients of all weights in our layout, saved and read like weights."""
    holder = copy.deepcopy(model)
    for weight, of in zip(holder.parameters(), model.parameters(), strict=True):
        weight.data = of.grad.clone()
    return weights(part, holder, "float32")


def tensor(x: Float[Array, "..."] | Host, dtype: str) -> Any:
    """An array as a PyTorch tensor, with channels second if it has five axes."""
    import torch

    made = torch.tensor(np.asarray(x, np.float32)).to(device(), getattr(torch, dtype))
    return made.permute(0, 4, 1, 2, 3).contiguous() if made.ndim == 5 else made


def array(x: Any) -> Host:
    """A tensor as a NumPy array, with channels last if it has five axes."""
    x = x.detach().float().cpu()
    return (x.permute(0, 2, 3, 4, 1) if x.ndim == 5 else x).numpy()


def synchronise() -> None:
    """Waits for the accelerator."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
