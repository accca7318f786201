"""The tiny tokenizer: T5's ids, whole words, any Unicode, one folder that transformers loads offline."""

import base64
import json
import shutil
import struct

import numpy as np
import pytest
from transformers import AutoTokenizer

from vpae_jax.inference.tokenizer import check_ids, load_tokenizer, tokenize
from vpae_jax.tasks.digits.clips import captions
from vpae_jax.tasks.digits.words import MAX_LENGTH, build_tokenizer
from vpae_jax.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_t5_conventions(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer.model_max_length == MAX_LENGTH
    assert len(tokenizer) <= 384


def test_every_caption_is_its_words_and_an_end(tokenizer):
    texts = captions()
    ids, mask = tokenize(tokenizer, texts)
    assert ids.shape == mask.shape == (len(texts), MAX_LENGTH)
    for text, row, seen in zip(texts, ids, mask, strict=True):
        count = len(text.split()) + 1
        assert seen.sum() == count and seen[:count].all()
        assert row[count - 1] == tokenizer.eos_token_id
        assert not row[count:].any()
    assert len({row.tobytes() for row in ids}) == len(texts)


def test_transformers_loads_the_folder_and_pads(folder, tokenizer):
    auto = AutoTokenizer.from_pretrained(folder)
    texts = ["a three moves left", "the digit eight is moving up and to the right"]
    batch = auto(texts, padding="max_length", truncation=True, return_tensors="np")
    ids, mask = tokenize(tokenizer, texts)
    assert np.array_equal(batch["input_ids"], ids)
    assert np.array_equal(batch["attention_mask"].astype(bool), mask)


def test_any_unicode_has_tokens_and_comes_back(tokenizer):
    for text in ("grüße", "数字 3 🙂", "a threefold zigzag, twice!"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("A Three")["input_ids"] == tokenizer("a three")["input_ids"], "case does not matter"


def test_build_is_deterministic(folder, tmp_path):
    build_tokenizer(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_long_prompt_is_refused(tokenizer):
    with pytest.raises(UserError, match=f"prompt too long: 21 tokens, at most {MAX_LENGTH}"):
        tokenize(tokenizer, ["a three moves left", "the " * 20])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tokenizer.json", "{}", "expected an object with a model"),
        ("tokenizer.json", "[", "Expecting value"),
        ("tokenizer.json", '{"model": {}}', "Cannot instantiate"),
        ("tokenizer_config.json", "", "Expecting value"),
        ("tokenizer_config.json", "[]", "holds a list, expected an object"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "tokenizer_class is 3, expected a text"),
        ("tokenizer_config.json", {"padding_side": "up"}, "Padding side"),
        ("tokenizer_config.json", {"pad_token": 3}, "pad_token"),
        ("tokenizer_config.json", {"pad_token": None}, "it has no pad_token"),
        ("tokenizer_config.json", {"model_max_length": []}, "model_max_length is []"),
        ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0, expected at least 1"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(folder, tmp_path, name, text, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if isinstance(text, dict):
        text = json.dumps(json.loads((copy / name).read_text()) | text)
    (copy / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(copy)
    line = str(error.value)
    assert line.startswith(f"{copy}: the tokenizer cannot be read (") and line.endswith("; fetch the model again")
    assert message in line and "\n" not in line


def grown(step, count):
    """A step of a tokenizer as often as that, in nested sequences."""
    inner = step
    for _ in range(count - 1):
        inner = {"type": "Sequence", "normalizers": [step, inner]}
    return inner


CHARSMAP = base64.b64encode(struct.pack("<II", 4, 0) + b"a" * 20_000 + b"\0").decode()
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
GROWING = {
    "replacements": ("normalizer", grown(REPLACE, 9)),
    "by expressions": ("normalizer", grown({**REPLACE, "pattern": {"Regex": ""}}, 9)),
    "of nothing": ("normalizer", grown({**REPLACE, "pattern": {"String": ""}}, 9)),
    "prefixes": ("normalizer", {"type": "Prepend", "prepend": "x" * 20_000}),
    "precompiled": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
    "forms": ("normalizer", grown({"type": "NFKD"}, 5)),
    "bytes": (
        "pre_tokenizer",
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ]
            * 30,
        },
    ),
}


@pytest.mark.parametrize("case", GROWING)
def test_a_tokenizer_that_makes_text_grow_is_refused(folder, tmp_path, case):
    copy, (key, step) = shutil.copytree(folder, tmp_path / "copy"), GROWING[case]
    path = copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: step}))
    with pytest.raises(UserError, match=r"it makes up to \S+ characters from one, expected at most 1e\+04"):
        load_tokenizer(copy)


def test_usual_steps_do_not_grow(folder, tmp_path):
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}, {**REPLACE, "pattern": {"Regex": " {2,}"}, "content": "▁"}]
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Sequence", "normalizers": steps}})
    )
    assert load_tokenizer(copy)("a  three")["input_ids"]


@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer"])
def test_a_regular_expression_that_backtracks_for_ever_is_one_line(folder, tmp_path, step):
    """It is given up after a number of steps, which the library takes for a panic."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    replace = {"type": "Replace", "content": "x"}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    change = {"pattern": {"Regex": "(a+)+$"}, **(replace if step == "normalizer" else split)}
    path.write_text(json.dumps({**json.loads(path.read_text()), step: change}))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenize(tokenizer, ["b"])[0].any()
    with pytest.raises(UserError) as error:
        tokenize(tokenizer, ["a" * 40 + "b"])
    message = str(error.value)
    assert message.startswith("the tokenizer failed on a text (") and "retry-limit" in message and "\n" not in message


def test_tokens_that_have_no_embedding_are_refused():
    check_ids(383, 384)
    with pytest.raises(UserError, match="has a token 384, but the text encoder's vocab_size is 384; use the tokenizer"):
        check_ids(384, 384)
