"""Converts prompts to token ids with the tokenizer of a model directory."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ftfy
import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from vpae_jax.types import UserError
from vpae_jax.weights.safetensors_file import one_line
from vpae_jax.weights.spiece import check_files, import_transformers

# Transformers is imported when a tokenizer is loaded (`weights.spiece.import_transformers`).
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

SHOWN = 80  # characters of an overlong text shown in the message
# Maximum number of characters that these steps produce from one: Unicode's normal forms, and bytes as characters.
_GROWTH = {
    "NFKC": 18.0,
    "NFKD": 18.0,
    "NFC": 3.0,
    "NFD": 4.0,
    "Lowercase": 3.0,
    "BertNormalizer": 4.0,
    "ByteLevel": 4.0,
}
MAX_GROWTH = 10_000.0


class _Panics:
    """Context manager that turns a panic in the tokenizer's Rust code, whose class cannot be imported, into a
    `UserError`. A regular expression panics when a match takes more than ten million steps, about half a second.

    Args:
      what: the problem, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and kind.__name__ == "PanicException":
            reason = one_line(str(error))
            raise UserError(f"{self.what} ({reason}); use the tokenizer that belongs to the model") from error


def clean_prompt(prompt: str) -> str:
    """Repairs broken encodings, unescapes HTML twice and collapses white space, as Wan and Diffusers do.

    ftfy matters to Chinese prompts: it replaces full-width punctuation, which changes the tokens.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder.

    Raises:
      UserError: there is none, its files are damaged, or its output could be far longer than the text.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"no tokenizer in {folder}: tokenizer_config.json is missing")
    check_files(folder)
    try:
        with _Panics(f"{folder}: the tokenizer cannot be read"):
            _check_content(folder)
            tokenizer: Any = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
        _check_growth(_state(backend.normalizer), _state(backend.pre_tokenizer))
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


def _check_content(folder: Path) -> None:
    """Raises `ValueError` or `OSError` for files that transformers rejects with a bare `Exception`, or not at all."""
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
        _check_growth(values.get("normalizer"), values.get("pre_tokenizer"))  # they run on added tokens when loading
        Tokenizer.from_buffer(raw)  # raises ValueError, while loading from a file raises a bare Exception


def _state(step: Any) -> Any:
    """A step of a tokenizer as JSON; None if the tokenizer does not have it."""
    return None if step is None else json.loads(step.__getstate__())


def _check_growth(*steps: Any) -> None:
    """Raises `ValueError` for steps whose output for a text could fill the memory."""
    growth = math.prod(map(_growth, steps))
    if growth > MAX_GROWTH:
        raise ValueError(f"it makes up to {growth:.0e} characters from one, expected at most {MAX_GROWTH:.0e}")


def _growth(step: Any) -> float:
    """Maximum number of characters that a step of a tokenizer produces from one."""
    if not isinstance(step, dict):
        return 1.0
    inner = step.get("normalizers") or step.get("pretokenizers")
    if isinstance(inner, list):
        return math.prod(map(_growth, inner), start=1.0)
    kind = step.get("type")
    if kind == "Replace":
        pattern = step["pattern"]
        shortest = len(pattern["String"]) if isinstance(pattern, dict) and "String" in pattern else 0
        return max(1.0, len(step["content"]) / shortest if shortest else len(step["content"]) + 1.0)
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "Precompiled":
        charsmap = base64.b64decode(step["precompiled_charsmap"])
        table = 4 + int.from_bytes(charsmap[:4], "little")  # end of the trie; zero-terminated replacements follow
        return float(max(map(len, charsmap[table:].split(b"\0")))) or 1.0
    return _GROWTH.get(str(kind), 1.0)


def check_ids(largest: int, vocabulary: int) -> None:
    """Raises `UserError` if the largest token id has no embedding in the text encoder."""
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer has a token {largest}, but the text encoder's vocab_size is {vocabulary}; use the "
            "tokenizer that belongs to it"
        )


class TooLong(UserError):
    """A text has more tokens than the text encoder reads.

    Attributes:
      tokens: number of its tokens.
      limit: maximum number of tokens.
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
      TooLong: a text has more tokens than that.
      UserError: the tokenizer's regular expressions fail on a text.
    """
    limit = tokenizer.model_max_length
    with _Panics("the tokenizer failed on a text"):
        encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    ids = np.full((len(encoded), limit), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(encoded), limit), bool)
    for row, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
        if len(tokens) > limit:
            raise TooLong(text, len(tokens), limit)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask
