"""The conversion tables cover every tensor of the released models, by name and shape (no weights are allocated)."""

import dataclasses
import json

import diffusers
import pytest
import torch
import transformers
from flax import nnx

from vpae_jax.convert.parts import PARTS
from vpae_jax.convert.table import plan
from vpae_jax.models.presets import PRESETS


def fields(config):
    """The config as config.json has it: lists in place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


CLASSES = {
    "transformer": lambda c: diffusers.WanTransformer3DModel(**fields(c)),
    "vae": lambda c: diffusers.AutoencoderKLWan(**fields(c)),
    "text_encoder": lambda c: transformers.UMT5EncoderModel(transformers.UMT5Config(**fields(c))),
    "image_encoder": lambda c: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields(c))),
}
CASES = [
    *[("transformer", preset) for preset in PRESETS],
    *[(part, "i2v-14b") for part in ("vae", "text_encoder", "image_encoder")],
]


@pytest.mark.parametrize("part, preset", CASES)
def test_every_tensor_has_its_row(part, preset):
    spec, config = PARTS[part], getattr(PRESETS[preset], part)
    ours = nnx.eval_shape(lambda: spec.model(config, rngs=nnx.Rngs(0)))
    shapes = {"/".join(map(str, keys)): leaf.shape for keys, leaf in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    found = {name.removeprefix(spec.prefix): e.shape for e in plan(spec.rows, shapes) for name in e.names}
    with torch.device("meta"):
        theirs = CLASSES[part](config).state_dict()
    assert found == {name: tuple(value.shape) for name, value in theirs.items() if name not in spec.aliases}
