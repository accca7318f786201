"""`convert` of models of which a part comes from elsewhere, cannot be read, or lies with others in one file."""

import io
import json
import shutil

import diffusers
import pytest
import torch
from finding import prefixed
from folders import PARTS, read, same, tensors, values, write
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from vpae_jax import cli
from vpae_jax.convert import main
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.tokenizer import load_tokenizer
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.spiece import write_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
WORDS = [first + last for first in "abcdefghij" for last in ("one", "two", "three", "four", "moves", "left")]


def run(*arguments):
    cli.run(main, [str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit):
        run(*arguments)
    return capsys.readouterr().err


# A part that cannot be read


@pytest.mark.parametrize("part", ["vae", "image_encoder"])
def test_a_part_that_cannot_be_read_is_left_out_or_taken_from_the_base(
    theirs, diffusers_folder, tmp_path, capsys, part
):
    (path,) = (theirs / part).glob("*.safetensors")
    path.write_bytes(POINTER)
    run(theirs, tmp_path / "a", "--format=diffusers")
    assert capsys.readouterr().err.startswith(f"note: the {part} is left out: {path}: is a Git LFS pointer")
    assert set(find_model(tmp_path / "a").parts) == set(PARTS) - {part}
    assert not (tmp_path / "a" / "model_index.json").exists()
    run(theirs, tmp_path / "b", "--format=diffusers", f"--base={diffusers_folder}")
    assert capsys.readouterr().err.startswith(f"note: the {part} is taken from --base: {path}: is a Git LFS pointer")
    assert same(values(tmp_path / "b", part), values(diffusers_folder, part))
    assert diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path / "b").image_encoder is not None


def test_a_transformer_that_cannot_be_read_is_not_replaced(theirs, diffusers_folder, tmp_path, capsys):
    (path,) = (theirs / "transformer").glob("*.safetensors")
    path.write_bytes(POINTER)
    line = refused(capsys, theirs, tmp_path / "out", "--format=diffusers", f"--base={diffusers_folder}")
    assert line.startswith(f"error: {path}: is a Git LFS pointer") and not (tmp_path / "out").exists()


def test_a_model_of_which_nothing_can_be_read(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wan.safetensors").write_bytes(b"GGUF\3\0\0\0")
    line = refused(capsys, tmp_path / "model", tmp_path / "out", "--format=wan")
    assert line.startswith(f"error: {tmp_path / 'model' / 'wan.safetensors'}: is a GGUF file")


def test_one_of_several_sets_is_converted(tmp_path, wide, capsys):
    torch.save({"generator": wide, "critic": wide}, tmp_path / "x.pt")
    line = refused(capsys, tmp_path / "x.pt", tmp_path / "out", "--format=wan")
    assert line == (
        f"error: {tmp_path / 'x.pt'}: generator and critic in it both hold the transformer; convert one of them with "
        "--weights=generator\n"
    )
    run(tmp_path / "x.pt", tmp_path / "out", "--format=wan", "--weights=generator")
    found = read(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wide.items())


# Image-to-video without an image encoder, as Wan 2.2


@pytest.fixture
def expert(tmp_path):
    """One expert of Wan 2.2's image-to-video: 36 channels, and no image encoder."""
    torch.manual_seed(0)
    sizes = {"text_dim": 32, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1, "in_channels": 36}
    model = diffusers.WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **sizes)
    return write(tmp_path / "low.safetensors", model.state_dict())


@pytest.mark.parametrize("base", ["t2v", "i2v"])
def test_an_expert_with_a_base_is_an_image_to_video_pipeline(expert, base, request, tmp_path):
    run(expert, tmp_path / "out", "--format=diffusers", f"--base={request.getfixturevalue(base).folder}")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is diffusers.WanImageToVideoPipeline
    assert pipe.transformer.config.in_channels == 36 and pipe.image_encoder is None


def test_one_of_two_experts_alone_keeps_its_boundary(expert, tmp_path):
    """The second one: Wan 2.2's image-to-video changes from one to the other at another time than text-to-video."""
    (tmp_path / "model" / "low_noise_model").mkdir(parents=True)
    expert.rename(tmp_path / "model" / "low_noise_model" / "diffusion_pytorch_model.safetensors")
    run(tmp_path / "model", tmp_path / "out", "--format=diffusers")
    assert json.loads((tmp_path / "out" / "vpae_jax.json").read_text())["boundary"] == 0.9
    assert find_model(tmp_path / "out").part("transformer_2").config.in_channels == 36
    assert "Parts of a Wan 2.1 image-to-video model" in (tmp_path / "out" / "README.md").read_text()


# All in one file


@pytest.fixture(scope="module")
def spiece():
    """A small sentencepiece model of UMT5's kind, serialised."""
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]),
        model_writer=file,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return file.getvalue()


def test_a_text_encoder_of_comfyui_brings_its_tokenizer(t2v, spiece, tmp_path):
    """Scaled float8, with its sentencepiece model as a tensor, as `umt5_xxl_fp8_e4m3fn_scaled.safetensors` has it."""
    found, expected = {}, {}
    for name, value in tensors(t2v.folder, "text_encoder").items():
        found[name] = expected[name] = value
        if value.ndim == 2 and "block" in name and "relative" not in name:
            found[name], scale = (value / 0.003).clamp(-448, 448).to(torch.float8_e4m3fn), torch.tensor(0.003)
            found[f"{name.removesuffix('weight')}scale_weight"] = scale
            expected[name] = found[name].float() * scale
    marks = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn), "spiece_model": bytes_of(spiece)}
    path = write(tmp_path / "umt5.safetensors", found | marks)
    run(path, tmp_path / "out", "--format=diffusers", f"--base={t2v.folder}")
    written = tensors(tmp_path / "out", "text_encoder")
    assert written.keys() == {*expected, "spiece_model"}
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    tokenizer, processor = load_tokenizer(tmp_path / "out" / "tokenizer"), SentencePieceProcessor(model_proto=spiece)
    assert len(tokenizer) == processor.get_piece_size() and tokenizer.model_max_length == 512
    for text in ("aone btwo moves left", "cthree, dfour!", "unknown ☃ words"):
        assert tokenizer(text)["input_ids"] == [*processor.encode(text), 1]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.tokenizer("aone moves")["input_ids"] == [*processor.encode("aone moves"), 1]


def bytes_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_all_in_one_file_is_a_whole_model(t2v, spiece, wan_folder, tmp_path):
    """With what ComfyUI's checkpoints hold beside the weights, as it saves them."""
    torch.manual_seed(0)
    sizes = {"text_dim": 32, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1}
    transformer = diffusers.WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **sizes).state_dict()
    text = tensors(t2v.folder, "text_encoder")
    state = prefixed("model.diffusion_model.", transformer) | prefixed("vae.", tensors(wan_folder, "vae"))
    state |= prefixed("text_encoders.umt5xxl.transformer.", text)
    state |= {"text_encoders.umt5xxl.logit_scale": torch.tensor(4.6), "text_encoders.spiece_model": bytes_of(spiece)}
    path = write(tmp_path / "all.safetensors", state)
    assert load_pipeline(path, with_transformer=False).tokenizer("aone moves")["input_ids"][-1] == 1
    run(path, tmp_path / "out", "--format=diffusers", "--verify")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is diffusers.WanPipeline and pipe.tokenizer.pad_token_id == 0
    assert tensors(tmp_path / "out", "text_encoder").keys() == text.keys()


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-100], lambda raw: b"\x0a\x05hello", lambda raw: raw[:1] + raw[9:]]
)
def test_a_tensor_that_is_no_tokenizer(spiece, tmp_path, change):
    with pytest.raises(UserError, match=r"^here is not a tokenizer \(.+\); fetch the file again$"):
        write_tokenizer(change(spiece), "here", tmp_path)


def test_a_tokenizer_of_another_kind(tmp_path):
    file = io.BytesIO()
    sentences = iter([" ".join(WORDS)] * 9)
    SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=file, vocab_size=40, minloglevel=2)
    with pytest.raises(UserError, match=r"its special tokens are .* expected UMT5's"):
        write_tokenizer(file.getvalue(), "here", tmp_path)


def test_a_tokenizer_comes_from_the_base_where_there_is_none(t2v, tmp_path):
    shutil.copytree(t2v.folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    run(tmp_path / "model", tmp_path / "out", "--format=diffusers", f"--base={t2v.folder}")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["tokenizer"]
