"""The tokenizer of the embedded tiny model: a unigram vocabulary over the captions of `tasks.digits.clips`.

It follows SentencePiece and T5, like UMT5's tokenizer (padding 0, end of sentence 1, unknown 2, no beginning of
sentence, words marked by a leading U+2581, 256 byte pieces for everything else), so any Unicode text can be tokenised,
and every word of a caption is one token. Its folder loads with `transformers.AutoTokenizer.from_pretrained`, without
network access.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vpae_jax.inference.tokenizer import PreTrainedTokenizerBase, load_tokenizer
from vpae_jax.tasks.digits.clips import captions

MAX_LENGTH = 16
SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "\u2581"


def build_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Writes the tokenizer's files to `folder`, and returns the tokenizer loaded from there.

    The result depends only on the captions.
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
    """Returns the pieces in the order of their ids, with log probabilities: special pieces, bytes, words, letters."""
    words = Counter(SPACE + word for text in captions() for word in text.split())
    total = sum(words.values())
    special = [(piece, 0.0) for piece in SPECIAL]
    raw = [(f"<0x{value:02X}>", 0.0) for value in range(256)]
    known = [(word, math.log(count / total)) for word, count in sorted(words.items())]
    # Less likely than any word, so that a known word is never split into letters.
    rare = -math.log(total)
    letters = [(letter, rare) for letter in [SPACE, *string.ascii_lowercase]]
    return special + raw + known + letters
