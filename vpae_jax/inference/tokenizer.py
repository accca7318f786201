"""Prompts to token ids, by the tokenizer in a model directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vpae_jax.types import UserError

SHOWN = 80  # characters of a text that is too long


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder.

    Raises:
      UserError: there is none, or its files are damaged.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"no tokenizer in {folder}: tokenizer_config.json is missing")
    try:
        _check_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        limit = tokenizer.model_max_length
        if type(limit) is not int or limit < 1:
            raise ValueError(f"model_max_length is {limit!r}, expected at least 1")
        if tokenizer.pad_token_id is None:
            raise ValueError("it has no pad_token")
    except (ValueError, TypeError, AttributeError, LookupError, OSError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"no {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); fetch the model again") from error
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raises `ValueError` or `OSError` for what transformers would refuse with a bare `Exception`, or not at all."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"tokenizer_config.json holds a {type(config).__name__}, expected an object")
    kind = config.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"tokenizer_class is {kind!r}, expected a text")
    if (folder / "tokenizer.json").exists():
        raw = (folder / "tokenizer.json").read_bytes()
        values = json.loads(raw)
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("tokenizer.json: expected an object with a model")
        Tokenizer.from_buffer(raw)  # raises ValueError, where the same in a file is a bare Exception


class TooLong(UserError):
    """A text has more tokens than are read.

    Attributes:
      tokens: how many it has.
      limit: how many are read.
    """

    def __init__(self, text: str, tokens: int, limit: int) -> None:
        shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
        super().__init__(f"prompt too long: {tokens} tokens, at most {limit}: {shown!r}; shorten it")
        self.tokens, self.limit = tokens, limit


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[Int[np.ndarray, "b s"], Bool[np.ndarray, "b s"]]:
    """Token ids and mask, padded to the tokenizer's `model_max_length`.

    Raises:
      TooLong: for a text with more tokens than that.
    """
    limit = tokenizer.model_max_length
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    ids = np.full((len(encoded), limit), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(encoded), limit), bool)
    for row, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
        if len(tokens) > limit:
            raise TooLong(text, len(tokens), limit)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask
