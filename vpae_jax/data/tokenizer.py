"""The tokenizer of the embedded tiny model: a unigram vocabulary over the captions of `vpae_jax.data.digits`.

It follows SentencePiece and T5, as UMT5's tokenizer does (padding 0, end of sentence 1, unknown 2, no beginning of
sentence, words marked by a leading U+2581, 256 byte pieces for all else), so any Unicode text has tokens and every word
of a caption is one token. Its folder loads with `transformers.AutoTokenizer.from_pretrained`, without a network.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vpae_jax.data.digits import captions
from vpae_jax.types import UserError

MAX_LENGTH = 16
SHOWN = 80  # characters of a text that is too long
SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "\u2581"


def build_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Writes the tokenizer's files into `folder` and returns it as loaded from there.

    The result depends on nothing but the captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(vocabulary(), unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return load_tokenizer(folder)


def vocabulary() -> list[tuple[str, float]]:
    """Pieces in the order of their ids, with log probabilities: special pieces, bytes, words, letters."""
    words = Counter(SPACE + word for text in captions() for word in text.split())
    total = sum(words.values())
    special = [(piece, 0.0) for piece in SPECIAL]
    raw = [(f"<0x{value:02X}>", 0.0) for value in range(256)]
    known = [(word, math.log(count / total)) for word, count in sorted(words.items())]
    # Less likely than any word, so that a word is never spelt out when it is known as a whole.
    rare = -math.log(total)
    letters = [(letter, rare) for letter in [SPACE, *string.ascii_lowercase]]
    return special + raw + known + letters


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
