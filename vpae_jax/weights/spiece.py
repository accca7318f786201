"""Tokenizers of text encoders: checks a folder, or makes one from a sentencepiece model stored with weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vpae_jax.placeholders import placeholder_at
from vpae_jax.types import UserError
from vpae_jax.weights import dialects
from vpae_jax.weights.filenames import MAX_JSON
from vpae_jax.weights.tensors import Tensors

MAX_FILE = 2**26  # bytes; UMT5's largest file has 2**24
TEXT_LENGTH = 512  # the length in tokens that Wan pads prompts to
_SPECIAL = {"pad": 0, "eos": 1, "unk": 2}  # UMT5's special tokens
_START = 0x0A  # first byte of a serialised model: the tag of its first field


def import_transformers() -> Any:
    """The transformers library, imported on demand because it imports PyTorch if that is installed, which takes
    seconds; its warning that PyTorch is missing is suppressed, since tokenizers do not need it."""
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))
    import transformers

    return transformers


def check_files(folder: Path) -> None:
    """Raises `UserError` for anything in a tokenizer's folder that is not a regular file, or is far too large."""
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file, expected a tokenizer's; remove it or fetch it again")
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path}: has {size} bytes, expected a tokenizer's, of at most {MAX_FILE}; fetch it again")
        if (what := placeholder_at(path)) is not None:
            raise UserError(f"{path}: {what}")


def find_tokenizer(tensors: Tensors) -> str | None:
    """The name of the tensor that holds a sentencepiece model; None if there is no plausible one."""
    for name, stored in tensors.items():
        if dialects.is_tokenizer(name) and stored.dtype == np.uint8 and len(stored.shape) == 1:
            first = tensors.read(name, (slice(0, 1),))
            return name if first.tolist() == [_START] and stored.nbytes <= MAX_JSON else None
    return None


def write_tokenizer(model: bytes, where: str, folder: Path) -> None:
    """Writes a tokenizer folder that transformers and Diffusers read.

    Args:
      model: a serialised sentencepiece model.
      where: its origin, for messages.
      folder: an empty folder.

    Raises:
      UserError: it is not a sentencepiece model, or not one like UMT5's.
    """
    # Imported here, since they are rarely needed.
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
        special = {name: getattr(processor, f"{name}_id")() for name in _SPECIAL}
        if special != _SPECIAL:
            raise ValueError(f"its special tokens are {special}, expected UMT5's {_SPECIAL}")
        with TemporaryDirectory() as temporary:
            (Path(temporary) / "spiece.model").write_bytes(model)
            settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": TEXT_LENGTH, "extra_ids": 0}
            (Path(temporary) / "tokenizer_config.json").write_text(json.dumps(settings))
            import_transformers().T5Tokenizer.from_pretrained(temporary, local_files_only=True).save_pretrained(folder)
    except (RuntimeError, ValueError, TypeError, LookupError, OSError, DecodeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where} is not a tokenizer ({reason}); fetch the file again") from error
