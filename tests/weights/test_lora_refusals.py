"""LoRA files that are refused, in one line that names the tensor."""

import numpy as np
import pytest
import torch
from lora_models import FILE
from safetensors.numpy import save_file

from vpae_jax.types import UserError
from vpae_jax.weights.lora_reading import read_lora

PAIR = {
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight": np.ones((4, 24), np.float32),
    "diffusion_model.blocks.0.self_attn.q.lora_up.weight": np.ones((24, 4), np.float32),
}
DOWN, UP = PAIR
Q = "diffusion_model.blocks.0.self_attn.q"
ONES = np.ones((24,), np.float32)
BROKEN = {
    "no LoRA": (
        {"blocks.0.self_attn.q.weight": ONES},
        r"none of its 1 tensors is part of a LoRA; is it a whole model\?",
    ),
    "kind": (
        {**PAIR, f"{Q}.dora_scale": ONES},
        rf"tensor '{Q}.dora_scale' is of unknown kind, expected one of lora_A",
    ),
    "layer": (
        {**PAIR, f"{Q}k.diff_b": ONES},
        rf"tensor '{Q}k.diff_b' is for a layer that this model does not have; is the",
    ),
    "number": (
        {k.replace("blocks.0", "blocks.2"): v for k, v in PAIR.items()},
        r"tensor 'diffusion_model.blocks.2.\S+' is for block 2, but the last of this model is 1",
    ),
    "kohya's number": (
        {"lora_unet_blocks_30_ffn_0.alpha": np.ones(1, np.float32)},
        r"'lora_unet_blocks_30_ffn_0.alpha' is for block 30, but the last of this model is 1",
    ),
    "no up": ({DOWN: PAIR[DOWN]}, rf"tensor '{DOWN}' has no matching lora_up \(or B\); the file is incomplete"),
    "no down": ({UP: PAIR[UP]}, rf"tensor '{UP}' has no matching lora_down \(or A\)"),
    "alpha alone": ({f"{Q}.alpha": np.ones(1, np.float32)}, r"tensor '\S+.alpha' has no matching lora_down"),
    "width of A": (
        {**PAIR, DOWN: np.ones((4, 23), np.float32)},
        rf"tensor '{DOWN}' has shape \[4, 23\], expected \[4, 24\]; is the LoRA for another model\?",
    ),
    "width of B": ({**PAIR, UP: np.ones((20, 4), np.float32)}, rf"'{UP}' has shape \[20, 4\], expected \[24, 4\]"),
    "axes": ({**PAIR, DOWN: np.float32(1)}, rf"'{DOWN}' has shape \[\], expected \[1, 24\]"),
    "no rank": (
        {DOWN: np.ones((0, 24), np.float32), UP: np.ones((24, 0), np.float32), f"{Q}.alpha": np.float32(1)},
        rf"'{DOWN}' has shape \[0, 24\], expected \[1, 24\]",
    ),
    "ranks": (
        {**PAIR, UP: np.ones((24, 5), np.float32)},
        rf"'{UP}' has rank 5, but '{DOWN}' has 4; fetch the file again",
    ),
    "shape of a difference": ({f"{Q}.diff_b": np.ones(23, np.float32)}, r"has shape \[23\], expected \[24\]"),
    "NaN": ({**PAIR, UP: np.full((24, 4), np.nan, np.float32)}, rf"'{UP}' holds NaN or infinity; the file is damaged"),
    "integers": (
        {**PAIR, UP: np.ones((24, 4), np.int8)},
        rf"'{UP}' has dtype int8, expected floating point; quantised",
    ),
    "alpha of several": ({**PAIR, f"{Q}.alpha": ONES}, r"alpha' of shape \[24\] is not one finite number"),
    "infinite alpha": ({**PAIR, f"{Q}.alpha": np.float32(np.inf)}, r"alpha' of shape \[\] is not one finite number"),
    "twice": (
        {**PAIR, "transformer.blocks.0.attn1.to_q.lora_A.weight": PAIR[DOWN]},
        r"tensor '\S+' and '\S+' are for the same layer; remove one",
    ),
    "product and difference": (
        {**PAIR, f"{Q}.diff": np.ones((24, 24), np.float32)},
        rf"'{Q}.\S+' and .* change one parameter, expected one kind of change; remove one",
    ),
    "adapter of a norm": (
        {"blocks.0.norm3.lora_A.weight": ONES, "blocks.0.norm3.lora_B.weight": ONES},
        "is half an adapter, but blocks/norm2/scale is not a linear layer",
    ),
    "bias without adapter": ({f"{Q}.lora_B.bias": ONES}, r"lora_B.bias' has no matching adapter"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_reading_refuses(case, t2v, tmp_path):
    tensors, message = BROKEN[case]
    save_file({name: np.asarray(value) for name, value in tensors.items()}, tmp_path / FILE)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / FILE, t2v.config)
    assert str(caught.value).startswith(str(tmp_path / FILE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"transformer.lora_alpha": ', "its PEFT configuration is not valid JSON"),
        ('{"transformer.use_dora": true}', "is a DoRA, .* expected a LoRA"),
        ('{"transformer.lora_alpha": [1]}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 1}}', "PEFT's alphas cannot be read"),
        (
            '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(.|.|.)+X": 1}}',
            r"alpha_pattern has '\(\.\|\.\|\.\)\+X', expected the name of a layer",
        ),
        ('{"transformer.lora_alpha": NaN}', "PEFT's alphas cannot be read .nan is not a finite float32"),
        ('{"transformer.lora_alpha": -Infinity}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1e300}', "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", "PEFT's alphas cannot be read"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"q": "NaN"}}', "PEFT's alphas cannot be read"),
    ],
)
def test_reading_refuses_a_configuration(metadata, message, t2v, tmp_path):
    save_file(PAIR, tmp_path / FILE, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / FILE, t2v.config)


def test_reading_refuses_a_configuration_beside(t2v, tmp_path):
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"adapter_config.json: not valid JSON: .utf-8. codec"):
        read_lora(tmp_path / "adapter_model.safetensors", t2v.config)


@pytest.mark.filterwarnings("error")
def test_reading_refuses_what_overflows_float32(t2v, tmp_path):
    for name, value, message in (
        (f"{Q}.alpha", np.asarray(1e300), r"alpha' of shape \[\] is not one finite number"),
        (f"{Q}.alpha", np.asarray(3e38, np.float32), r"lora_up.weight' times its scale 7.5e\+37 overflows float32"),
        (DOWN, np.full((4, 24), 1e300), "lora_down.weight' holds NaN or infinity"),
    ):
        save_file({**PAIR, UP: np.full((24, 4), 100, np.float32), name: value}, tmp_path / FILE)
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / FILE, t2v.config)


@pytest.mark.parametrize(
    "pattern, applies",
    [
        ("to_q", True),
        ("attn1.to_q", True),
        (r"attn1\\.to_q", True),
        ("^blocks.0.attn1.to_q$", True),
        ("to_q$", True),
        ("o_q", False),
        ("^attn1.to_q", False),
        ("to_k", False),
    ],
)
def test_patterns_of_alphas_are_names(pattern, applies, t2v, tmp_path):
    tensors = {k.replace(Q, "transformer.blocks.0.attn1.to_q"): v for k, v in PAIR.items()}
    text = f'{{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {{"{pattern}": 8}}}}'
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    assert read_lora(tmp_path / FILE, t2v.config).adapters["blocks/attn1/to_q", 0].b[0, 0] == (2 if applies else 1)


def test_a_checkpoint_of_pytorch_reads_too(t2v, tmp_path):
    torch.save({name: torch.tensor(value) for name, value in PAIR.items()}, tmp_path / "lora.pt")
    assert read_lora(tmp_path / "lora.pt", t2v.config).adapters.keys() == {("blocks/attn1/to_q", 0)}
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / FILE, t2v.config)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError):
        read_lora(tmp_path / FILE, t2v.config)
