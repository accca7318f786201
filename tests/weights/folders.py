"""What the tests of conversion share: files of weights read, changed and compared by PyTorch and safetensors alone."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
import original_wan
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.writing import open_values

PARTS = ("transformer", "vae", "text_encoder", "image_encoder")
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
WAN_FILES = {
    "transformer": "diffusion_pytorch_model*.safetensors",
    "vae": original_wan.VAE_FILE,
    "text_encoder": original_wan.TEXT_FILE,
    "image_encoder": original_wan.IMAGE_FILE,
}

Bits = dict[str, tuple[torch.dtype, torch.Size, bytes]]


def files(folder: Path, part: str) -> list[Path]:
    """A part's files in a folder of either layout."""
    inner = folder / part
    return sorted(inner.glob(f"{STEMS[part]}*.safetensors") if inner.is_dir() else folder.glob(WAN_FILES[part]))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whatever its name."""
    return torch.load(path, weights_only=True) if path.read_bytes()[:2] == b"PK" else load_file(path)


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a safetensors file, or a PyTorch checkpoint if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value.clone().contiguous() for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(values, path, metadata={"format": "pt"})
    else:
        torch.save(values, path)
    return path


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Lets `change` work on a file's tensors."""
    tensors = read(path)
    change(tensors)
    return write(path, tensors)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """A part's tensors by name; CLIP's without the prefix that its older files have."""
    found = {name: value for path in files(folder, part) for name, value in read(path).items()}
    return {name.removeprefix("vision_model."): value for name, value in found.items()}


def bits(found: Mapping[str, Tensor]) -> Bits:
    """Tensors to the byte."""
    return {
        name: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in found.items()
    }


def values(model: ModelDirectory | Path, part: str) -> dict[str, np.ndarray]:
    """A part's weights by our paths and layers, from the files and with their dtypes."""
    model = model if isinstance(model, ModelDirectory) else find_model(model)
    with open_values(model, part) as found:
        shapes = found.shapes()
        stacked = {path for path in shapes if path.startswith(("blocks/", "layers/"))}
        return {
            f"{path}[{layer}]": found.read(path, layer)
            for path, shape in shapes.items()
            for layer in range(shape[0] if path in stacked else 1)
        }


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    """Whether both hold the same bits under the same paths."""
    return found.keys() == expected.keys() and all(
        found[path].dtype == value.dtype
        and found[path].shape == value.shape
        and found[path].tobytes() == value.tobytes()
        for path, value in expected.items()
    )


def mixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, some of them in bfloat16, so that layers of one parameter differ; q, k and v do not."""

    def narrow(name):
        return crc32(re.sub(r"\b[qkv]_proj\b", "qkv", name).encode()) % 2

    return {name: value.bfloat16() if narrow(name) else value for name, value in state.items()}
