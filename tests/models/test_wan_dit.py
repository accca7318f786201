"""The transformer against Diffusers' on random weights, and its own promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from jax import Array
from jaxtyping import Float

from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.types import Condition, UserError

TEXT_LEN = 512  # what Diffusers' image-to-video attention counts on
T2V = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=24, text_dim=20, freq_dim=32, ffn_dim=72, num_layers=3
)
I2V = dataclasses.replace(T2V, in_channels=36, image_dim=28, added_kv_proj_dim=48)


def reference(config: WanTransformerConfig) -> WanTransformer3DModel:
    """Diffusers' model with every parameter random, norms and tables and biases included."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{k: v for k, v in dataclasses.asdict(config).items() if k != "text_len"}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "scale_shift_table" not in name and "pos_embed" not in name:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn_like(weight) / fan_in**0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            else:
                weight.copy_(0.3 * torch.randn_like(weight))
    return model


def weights_of(model: WanTransformer3DModel) -> dict[str, np.ndarray]:
    """Diffusers' tensors under our paths and in our layouts."""
    renames = {"net.0.proj": "proj_in", "net.2": "proj_out", "to_out.0": "to_out"}
    single, stacked = {}, {}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        parts = name.split(".")
        if parts[-1] == "weight":
            parts[-1] = "scale" if value.ndim == 1 else "kernel"
            value = value.transpose(2, 3, 4, 1, 0) if value.ndim == 5 else value.T
        if parts[0] == "blocks":
            stacked.setdefault("/".join(["blocks", *parts[2:]]), []).append(value)
        else:
            single["/".join(parts)] = value
    return single | {path: np.stack(values) for path, values in stacked.items()}


def load(config: WanTransformerConfig, weights: dict[str, np.ndarray], **options) -> WanTransformer:
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), **options))
    graph, params = nnx.split(model, nnx.Param)
    names = {path: "/".join(str(part) for part in path) for path, _ in nnx.to_flat_state(params)}
    assert set(names.values()) == set(weights)
    for path, param in nnx.to_flat_state(params):
        assert param.shape == weights[names[path]].shape, path
    flat = [(path, nnx.Param(jnp.asarray(weights[name]))) for path, name in names.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def inputs(
    config: WanTransformerConfig, size: tuple[int, int, int], tokens: int = 16, batch: int = 2, n_image: int = 5
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b"], Condition]:
    """Random latents, one time a clip, and prompts of 3, 4, ... of `tokens` tokens."""
    draw = np.random.default_rng(1).standard_normal
    mask = np.arange(tokens) < np.arange(3, 3 + batch)[:, None]
    image, frames = None, None
    if config.image_dim is not None:
        image = jnp.asarray(draw((batch, n_image, config.image_dim)), jnp.float32)
        frames = jnp.asarray(draw((batch, *size, 20)), jnp.float32)
    return (
        jnp.asarray(draw((batch, *size, 16)), jnp.float32),
        jnp.linspace(0.93, 0.21, batch),
        Condition(
            text=jnp.asarray(draw((batch, tokens, config.text_dim)) * mask[..., None], jnp.float32),
            text_mask=jnp.asarray(mask),
            image=image,
            frames=frames,
        ),
    )


def torch_velocity(model: WanTransformer3DModel, x, t, condition: Condition, dtype=torch.float32) -> np.ndarray:
    """Diffusers' output for the same inputs, its text zero-padded to TEXT_LEN tokens."""
    if condition.frames is not None:
        x = jnp.concatenate([x, condition.frames], -1)
    text = np.pad(condition.text, ((0, 0), (0, TEXT_LEN - condition.text.shape[1]), (0, 0)))
    image = None
    if condition.image is not None:
        image = np.asarray(condition.image)
        if model.config.pos_embed_seq_len is not None:
            image = image.reshape(-1, image.shape[1] // 2, image.shape[2])  # it takes the two images in the batch axis
        image = torch.tensor(image).to(dtype)
    with torch.no_grad():
        out = model(
            hidden_states=torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3).to(dtype),
            timestep=torch.tensor(np.asarray(t) * 1000),
            encoder_hidden_states=torch.tensor(text).to(dtype),
            encoder_hidden_states_image=image,
        ).sample
    return out.permute(0, 2, 3, 4, 1).float().numpy()


def run(model: WanTransformer, *args):
    """The compiled model."""
    graph, weights = nnx.split(model)
    return jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))(weights, *args)


def error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


VARIANTS = {
    "t2v": (T2V, (3, 4, 6), {}),
    "t2v one frame, wide": (T2V, (1, 2, 10), {}),
    "t2v five frames, no cross-attention norm": (dataclasses.replace(T2V, cross_attn_norm=False), (5, 6, 4), {}),
    "t2v all 512 text tokens": (T2V, (2, 4, 4), {"tokens": TEXT_LEN}),
    "t2v patches of two frames": (dataclasses.replace(T2V, patch_size=(2, 2, 2)), (4, 4, 6), {}),
    "i2v": (I2V, (3, 6, 4), {"batch": 3}),
    "i2v one text token, no cross-attention norm": (
        dataclasses.replace(I2V, cross_attn_norm=False),
        (3, 4, 4),
        {"tokens": 1, "batch": 1},
    ),
    "first and last frame": (dataclasses.replace(I2V, pos_embed_seq_len=10), (3, 4, 4), {"n_image": 10}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_parity(variant):
    config, size, options = VARIANTS[variant]
    theirs = reference(config)
    ours = load(config, weights_of(theirs))
    x, t, condition = inputs(config, size, **options)
    found = run(ours, x, t, condition)
    assert error(found, torch_velocity(theirs, x, t, condition)) <= 1e-5


@pytest.mark.parametrize("config", [T2V, I2V], ids=["t2v", "i2v"])
def test_bfloat16_is_as_close_to_float32_as_pytorchs(config):
    theirs = reference(config)
    weights = weights_of(theirs)
    x, t, condition = inputs(config, (3, 4, 6))
    exact = torch_velocity(theirs, x, t, condition)
    for name, weight in theirs.named_parameters():  # as `from_pretrained(torch_dtype=torch.bfloat16)` loads it
        if not any(kept in name for kept in theirs._keep_in_fp32_modules):
            weight.data = weight.data.bfloat16()
    allowed = 1.5 * error(torch_velocity(theirs, x, t, condition, torch.bfloat16), exact)
    found = run(load(config, weights, dtype=jnp.bfloat16), x, t, condition)
    assert found.dtype == jnp.float32
    assert 1e-4 < error(found, exact) <= allowed


def test_features_are_the_states_after_the_tapped_blocks():
    theirs = reference(I2V)
    ours = load(I2V, weights_of(theirs))
    x, t, condition = inputs(I2V, (3, 4, 6))
    seen = {}
    for number, block in enumerate(theirs.blocks, start=1):
        block.register_forward_hook(lambda _, __, out, number=number: seen.__setitem__(number, out.numpy()))
    theirs.condition_embedder.register_forward_hook(lambda _, __, out: seen.update(text=out[2], image=out[3]))
    torch_velocity(theirs, x, t, condition)
    features = jax.jit(lambda *args: ours.features(*args, taps=(1, 3)))(x, t, condition)
    for tap, states in zip((1, 3), features.taps, strict=True):
        assert error(states, seen[tap]) <= 1e-5
    assert error(features.text, seen["text"][:, :16]) <= 1e-5
    assert error(features.image, seen["image"]) <= 1e-5
    np.testing.assert_array_equal(features.text_mask, condition.text_mask)


def test_features_run_no_block_after_the_last_tap():
    model = load(T2V, weights_of(reference(T2V)))
    x, t, condition = inputs(T2V, (1, 2, 2))
    jaxpr = jax.make_jaxpr(lambda *args: model.features(*args, taps=(1, 2)))(x, t, condition)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [1, 1]
    assert all(len(scan.outvars) == 1 for scan in scans)  # the hidden states, and no layer's kept beside them


@pytest.mark.parametrize(
    ("taps", "trained"),
    [
        pytest.param((1, 2, 3, 4, 5, 6), False, marks=pytest.mark.long),
        ((2, 4, 6, 8), True),
        pytest.param((1, 2, 3, 4, 5, 6), True, marks=pytest.mark.long),
        pytest.param((1, 3, 5, 7), True, marks=pytest.mark.long),
        pytest.param((2, 4, 6, 8), False, marks=pytest.mark.long),
    ],
)
def test_many_evenly_spaced_taps_compile_as_one_block_and_are_the_same(taps, trained):
    """Also in the gradient, to the input and to the weights."""
    config = dataclasses.replace(T2V, num_layers=8)
    model = WanTransformer(config, rngs=nnx.Rngs(0), remat="full")
    graph, params = nnx.split(model)
    given = inputs(config, (1, 4, 4))

    def states(params, x, taps):
        return nnx.merge(graph, params).features(x, *given[1:], taps, trained).taps

    together = states(params, given[0], taps)
    alone = [states(params, given[0], (tap,))[0] for tap in taps]
    for one, other in zip(together, alone, strict=True):
        assert error(one, other) <= 1e-5

    def loss(params, x, each):
        found = [state for one in each for state in states(params, x, one)]
        return sum((n + 1) * (state**2).mean() for n, state in enumerate(found))

    one, other = (jax.grad(loss, argnums=(0, 1))(params, given[0], each) for each in ((taps,), [(t,) for t in taps]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)
    text = str(jax.make_jaxpr(lambda x: states(params, x, taps))(given[0]))
    assert text.count("scan[") == 3, "up to the first tap, and turns of the strides that follow"


def test_velocity_beside_many_taps():
    config = dataclasses.replace(T2V, num_layers=6)
    model = WanTransformer(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda p: p + 0.01, nnx.state(model, nnx.Param)))
    given = inputs(config, (1, 4, 4))
    v, features = model.velocity_and_features(*given, (1, 2, 3, 4, 5))
    assert error(v, model(*given)) <= 1e-5 and len(features.taps) == 5


def test_readings_are_velocities_of_a_shorter_model():
    """The last layer on the states after each block: of the last one, the model's own velocity."""
    config = dataclasses.replace(T2V, num_layers=4)
    model = WanTransformer(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda p: p + 0.01, nnx.state(model, nnx.Param)))
    x, t, condition = inputs(config, (3, 4, 6))
    found = model.readings(model.features(x, t, condition, (2, 4)), x, t)
    assert [one.shape for one in found] == [x.shape, x.shape]
    np.testing.assert_array_equal(found[1], model(x, t, condition))
    weights = {name: value for name, value in flat_weights(model).items()}
    weights |= {name: value[:2] for name, value in weights.items() if name.startswith("blocks/")}
    short = load(dataclasses.replace(config, num_layers=2), weights)
    assert error(found[0], short(x, t, condition)) <= 1e-5 and error(found[0], found[1]) > 1e-3
    other = model.readings(model.features(x, t, condition, (4,)), x, 0.5 * t)
    assert error(other[0], found[1]) > 1e-3, "the last layer is told the time"


def flat_weights(model):
    found = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in found}


@pytest.mark.parametrize(
    "remat", ["dots", *(pytest.param(r, marks=pytest.mark.long) for r in ("none", "attention", "full"))]
)
def test_training_memory_grows_with_the_tokens_and_not_with_their_square(remat):
    """Four times the tokens: more than twice as many would be kept for each if tiles of logits were among it."""

    def kept(rows: int) -> int:
        model = nnx.eval_shape(lambda: WanTransformer(T2V, rngs=nnx.Rngs(0), remat=remat))
        graph, params = nnx.split(model)
        given = jax.eval_shape(lambda: inputs(T2V, (4, rows, 64)))

        def loss(params, x, t, condition):
            return jnp.sum(nnx.merge(graph, params)(x, t, condition) ** 2)

        quick = {"xla_backend_optimization_level": 0}
        program = jax.jit(jax.grad(loss), compiler_options=quick).lower(params, *given).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert kept(128) < 5 * kept(32)


def test_recomputation_changes_no_gradient():
    weights = weights_of(reference(T2V))
    x, t, condition = inputs(T2V, (1, 4, 4))
    gradients = {}
    for remat in ("none", "full", "dots"):
        graph, params = nnx.split(load(T2V, weights, remat=remat))

        def loss(params, graph=graph):
            return jnp.sum(nnx.merge(graph, params)(x, t, condition) ** 2)

        quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
        gradients[remat] = jax.tree.leaves(jax.jit(jax.grad(loss), compiler_options=quick)(params))
    for remat in ("full", "dots"):
        assert all(error(*pair) < 1e-5 for pair in zip(gradients[remat], gradients["none"], strict=True))


def test_fresh_weights():
    model = WanTransformer(T2V, rngs=nnx.Rngs(0))
    assert not model.proj_out.kernel[...].any()  # Wan starts its output layer at zero
    kernel = model.blocks.attn1.to_q.kernel[...]
    assert kernel.shape == (3, 48, 48)
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01  # layers start from different draws
    assert abs(float(kernel.std()) - 48**-0.5) < 0.01
    abstract = nnx.eval_shape(lambda: WanTransformer(T2V, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    assert shapes == {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))} == {jnp.dtype("bfloat16")}


BAD_CONFIGS = {
    "qk_norm is 'layer_norm', expected 'rms_norm_across_heads'": {"qk_norm": "layer_norm"},
    "attention_head_dim is 25, expected an even number": {"attention_head_dim": 25},
    "freq_dim is 31, expected an even number": {"freq_dim": 31},
    "image_dim is 28 and added_kv_proj_dim is None; give both": {"image_dim": 28},
    "added_kv_proj_dim is 40, expected the model's width 48": {"image_dim": 28, "added_kv_proj_dim": 40},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_named(message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(T2V, **BAD_CONFIGS[message])


def test_bad_inputs_are_named():
    def refused(message, model, x, t, condition, **options):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(
                lambda *args: model(*args) if not options else model.features(*args, **options), x, t, condition
            )

    model, size = WanTransformer(T2V, rngs=nnx.Rngs(0)), (1, 2, 2)
    refused("latents are 1x3x2, expected multiples of the patch 1x2x2", model, *inputs(T2V, (1, 3, 2)))
    refused("expected at most 1024 along an axis", model, *inputs(T2V, (1, 2, 2050)))
    refused("condition.text has 513 tokens, expected at most 512", model, *inputs(T2V, size, tokens=513))
    x, t, condition = inputs(T2V, size)
    frames, picture = jnp.zeros((2, *size, 20)), jnp.zeros((2, 5, 28))
    with_picture, with_frames = (
        dataclasses.replace(condition, **{name: value}) for name, value in (("image", picture), ("frames", frames))
    )
    refused("got 36 channels", model, x, t, with_frames)
    refused(
        "condition.image is given, but image_dim is None",
        model,
        x,
        t,
        with_picture,
    )
    for taps in ((), (0, 1), (2, 1), (1, 1), (4,)):
        refused("expected rising block numbers from 1 to 3", model, x, t, condition, taps=taps)
    model = WanTransformer(I2V, rngs=nnx.Rngs(0))
    refused("got 16 channels .no condition.frames", model, x, t, with_picture)
    refused("condition.image is missing, but image_dim is 28", model, x, t, with_frames)
    model = WanTransformer(dataclasses.replace(I2V, pos_embed_seq_len=10), rngs=nnx.Rngs(0))
    refused("condition.image has 5 tokens, expected 10", model, *inputs(I2V, size))
    with pytest.raises(UserError, match="remat is 'some', expected one of none, full, dots"):
        WanTransformer(T2V, rngs=nnx.Rngs(0), remat="some")
