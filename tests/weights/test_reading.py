"""Parts of model directories, read as diffusers and transformers write them."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from folders import PARTS, STEMS, bits, edit, edit_json, files, read, same, values, write

from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import build, load_part, read_part
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import from_tree, open_values, write_part


@pytest.fixture
def copy(diffusers_folder, tmp_path):
    """A part's folder that a test may spoil."""

    def make(part):
        shutil.copytree(diffusers_folder / part, tmp_path / "model" / part)
        return tmp_path / "model"

    return make


def edit_weights(folder, part, change):
    return edit(folder / part / f"{STEMS[part]}.safetensors", change)


def assert_same(folder, source, part):
    """The part is read from both folders to the same config and weights."""
    assert find_model(folder).part(part).config == find_model(source).part(part).config
    assert same(values(folder, part), values(source, part))


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_those_of_the_files(diffusers_folder, part):
    """In the tree they have our paths, our shapes, and the numbers of the files."""
    config, params = read_part(diffusers_folder, part)
    found, expected = flat(params), values(diffusers_folder, part)
    assert config == find_model(diffusers_folder).part(part).config
    assert {path.partition("[")[0] for path in expected} == set(found)
    for path, value in expected.items():
        name, layer = path.removesuffix("]").split("[")
        whole = np.asarray(found[name])
        np.testing.assert_array_equal(whole[int(layer)] if whole.ndim > value.ndim else whole, value)


def test_models_are_loaded_and_built(diffusers_folder):
    model = find_model(diffusers_folder)
    config, params = read_part(model, "text_encoder", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    built = build("text_encoder", config, params, jnp.bfloat16)
    one, other = (load_part(model, "text_encoder", jnp.bfloat16) for _ in range(2))
    assert built.config == one.config == config and one.shared.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one.shared.embedding[...], built.shared.embedding[...])
    one.shared.embedding[...] = jnp.zeros_like(one.shared.embedding[...])  # each model has weights of its own
    assert np.asarray(other.shared.embedding[...]).any() and np.asarray(built.shared.embedding[...]).any()


def test_shards_of_other_libraries_are_read(diffusers_folder, tmp_path):
    model = transformers.UMT5EncoderModel.from_pretrained(diffusers_folder / "text_encoder")
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
    assert_same(tmp_path, diffusers_folder, "text_encoder")


@pytest.mark.parametrize("same", [True, False])
def test_a_repeated_embedding_must_be_the_same(copy, diffusers_folder, same):
    folder = copy("text_encoder")

    def repeat(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + (0 if same else 1)

    path = edit_weights(folder, "text_encoder", repeat)
    if same:
        assert_same(folder, diffusers_folder, "text_encoder")
    else:
        with pytest.raises(UserError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'") as error:
            read_part(folder, "text_encoder")
        assert str(path) in str(error.value)


def test_an_embedding_may_have_its_other_name(copy, diffusers_folder):
    folder = copy("text_encoder")
    edit_weights(folder, "text_encoder", lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    assert_same(folder, diffusers_folder, "text_encoder")


UNUSED = {
    "transformer": {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)},
    "text_encoder": {
        "spiece_model": torch.arange(7, dtype=torch.uint8),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 4),
        "decoder.final_layer_norm.weight": torch.full((32,), 3.0),
        "lm_head.weight": torch.ones(384, 32),
    },
    "image_encoder": {
        "embeddings.position_ids": torch.arange(17)[None],
        "visual_projection.weight": torch.ones(5, 24),
        "text_model.final_layer_norm.weight": torch.ones(9),
        "text_projection.weight": torch.ones(5, 9),
        "logit_scale": torch.tensor(2.5),
    },
}


@pytest.mark.parametrize("part", UNUSED)
def test_unused_tensors_are_kept_for_their_layout(copy, diffusers_folder, tmp_path, part):
    folder = copy(part)
    edit_weights(folder, part, lambda t: t.update(UNUSED[part]))
    assert_same(folder, diffusers_folder, part)
    with open_values(find_model(folder), part) as given:
        write_part(tmp_path / "again", part, given)
        write_part(tmp_path / "wan", part, given, "wan")
    (again,) = files(tmp_path / "again", part)
    assert bits({name: read(again)[name] for name in UNUSED[part]}) == bits(UNUSED[part])
    assert_same(tmp_path / "again", diffusers_folder, part)
    (wan,) = files(tmp_path / "wan", part)
    assert len(read(wan)) < len(read(again)) and not {name for name in UNUSED[part] if name in read(wan)}


def test_prefixes_of_older_files(copy, diffusers_folder):
    folder = copy("image_encoder")
    edit_weights(folder, "image_encoder", lambda t: [t.update({f"vision_model.{n}": t.pop(n)}) for n in list(t)])
    assert find_model(folder).part("image_encoder").prefix == "vision_model."
    assert_same(folder, diffusers_folder, "image_encoder")


TENSOR = "blocks.1.attn1.to_q.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop(TENSOR),
            f"diffusion_pytorch_model.safetensors: tensor '{TENSOR}' of shape [24, 24] is missing",
        ),
        (
            lambda t: t.update({TENSOR: torch.zeros(24, 23)}),
            f"diffusion_pytorch_model.safetensors: tensor '{TENSOR}' has shape [24, 23], expected [24, 24]",
        ),
        (
            lambda t: t.update({"blocks.1.norm4.weight": torch.zeros(24)}),
            "diffusion_pytorch_model.safetensors: tensor 'blocks.1.norm4.weight' of shape [24] is unknown",
        ),
        (
            lambda t: t.update({"blocks.2.norm2.weight": torch.zeros(24)}),
            "config.json: num_layers is 2, but the weights imply 3; which of them is wrong?",
        ),
        (
            lambda t: t.update({TENSOR: torch.zeros(24, 24, dtype=torch.int8)}),
            f"diffusion_pytorch_model.safetensors: tensor '{TENSOR}' has dtype int8, expected floating point",
        ),
        (
            lambda t: t.update({TENSOR: torch.full((24, 24), torch.inf)}),
            f"diffusion_pytorch_model.safetensors: tensor '{TENSOR}' holds NaN or infinity; the weights are damaged",
        ),
    ],
    ids=["missing", "misshapen", "unknown", "another layer", "integers", "infinity"],
)
def test_spoilt_weights_are_one_line(copy, change, message):
    folder = copy("transformer")
    edit_weights(folder, "transformer", change)
    with pytest.raises(UserError) as error:
        read_part(folder, "transformer")
    assert message in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 3000, -1])
def test_a_truncated_file_is_one_line(copy, keep):
    folder = copy("vae")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: truncated or not a safetensors file"):
        read_part(folder, "vae")


def test_a_tensor_in_two_shards_is_refused(diffusers_folder, tmp_path):
    with open_values(find_model(diffusers_folder), "text_encoder") as given:
        write_part(tmp_path, "text_encoder", given, shard_bytes=20_000)
    first, second = files(tmp_path, "text_encoder")[:2]
    name = next(iter(read(first)))
    write(second, read(second) | {name: read(first)[name]})
    with pytest.raises(UserError, match=f"{second.name}: tensor '{name}' is also in .*{first.name}; remove one"):
        read_part(tmp_path, "text_encoder")
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name}: no such file; the weights are incomplete"):
        read_part(tmp_path, "text_encoder")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"num_layer": 3}, r"config.json.num_layer: unknown key; did you mean 'num_layers'"),
        ("transformer", {"num_layers": "3"}, r"config.json.num_layers: expected int, found '3'"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, r"expected 'WanTransformer3DModel'"),
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("vae", {"is_residual": True}, "is_residual is True"),
        ("text_encoder", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu', only 'gelu_new' is supported"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5', expected 'umt5'"),
        ("image_encoder", {"hidden_act": "tanh"}, "config.json: CLIP: hidden_act is 'tanh'"),
    ],
)
def test_an_unsupported_config_is_one_line(copy, part, changes, message):
    folder = copy(part)
    edit_json(folder / part / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        read_part(folder, part)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_private_keys_of_a_config_are_ignored(copy, diffusers_folder):
    folder = copy("transformer")
    edit_json(folder / "transformer" / "config.json", _name_or_path="elsewhere", _new={"a": 1})
    assert_same(folder, diffusers_folder, "transformer")


def test_missing_files_are_one_line(copy, tmp_path):
    with pytest.raises(UserError, match=r"no vae \(found: no part of a Wan model\)"):
        read_part(tmp_path, "vae")
    folder = copy("vae")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="no vae"):
        read_part(folder, "vae")
    path.write_bytes(content)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        read_part(folder, "vae")
    (folder / "vae" / "config.json").unlink()
    assert find_model(folder).part("vae").config.base_dim == 4  # from the shapes


# Our own arrays.


@pytest.fixture(scope="module")
def ours(diffusers_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    with open_values(find_model(diffusers_folder), "text_encoder") as given:
        write_part(folder, "text_encoder", given, "orbax")
    return folder


def test_our_arrays_are_placed_and_cast(ours, diffusers_folder):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    config, params = read_part(
        ours, "text_encoder", jnp.bfloat16, lambda path, shape: rows if path == "shared/embedding" else everywhere
    )
    table = params["shared"]["embedding"]
    assert table.sharding.is_equivalent_to(rows, 2) and table.addressable_shards[0].data.shape == (48, 32)
    expected = values(diffusers_folder, "text_encoder")["shared/embedding[0]"]
    np.testing.assert_array_equal(np.asarray(table), expected.astype(jnp.bfloat16))
    plain = from_tree("text_encoder", *read_part(ours, "text_encoder", None))
    assert plain.config == config and plain.dtype("shared/embedding", 0) == np.float32
    assert_same(ours, diffusers_folder, "text_encoder")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 3}, "has shape"),
        ({"num_layers": 10**12}, "has shape"),
        ({"d_ff": 47}, r"blocks/feed_forward/w.* has shape .*, expected .*does config.json belong to these weights"),
        ({"vocab_size": 3}, r"shared/embedding has shape \(384, 32\), expected \(3, 32\)"),
        ({"num_layers": -1}, "num_layers"),
    ],
)
def test_our_arrays_of_another_config_are_refused(ours, tmp_path, changes, message):
    folder = shutil.copytree(ours, tmp_path / "model")
    edit_json(folder / "text_encoder" / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        read_part(folder, "text_encoder")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "which, keep", [("largest", 100), ("largest", None), ("_METADATA", 100), ("_METADATA", None), ("manifest.ocdbt", 0)]
)
def test_damaged_arrays_of_ours_are_one_line(ours, tmp_path, which, keep):
    folder = shutil.copytree(ours, tmp_path / "model")
    params = folder / "text_encoder" / "params"
    largest = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path = largest if which == "largest" else params / which
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cannot be restored \(.*; convert the model again") as error:
        read_part(folder, "text_encoder")
    assert str(params) in str(error.value) and "\n" not in str(error.value)
    del error
    gc.collect()  # coroutines that Orbax did not wait for, of which Python warns


def test_unfinished_arrays_of_ours_are_none(ours, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "model")
    (folder / "text_encoder" / "params" / "_CHECKPOINT_METADATA").unlink()  # Orbax writes it last
    with pytest.raises(UserError, match="no text_encoder"):
        read_part(folder, "text_encoder")
