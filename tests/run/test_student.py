"""A student put together from a run's weights: what is shown, judged, started from and written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax import sharding
from vpae_jax.config import Experiment, MeshConfig
from vpae_jax.flow.sampler import Sampler
from vpae_jax.methods.base import Adapters, Average, Method, Role, Student, Update, View
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.run.student import Maker
from vpae_jax.train.blueprint import draw_up
from vpae_jax.train.roles import merge_trees
from vpae_jax.train.state import TrainState
from vpae_jax.types import Batch

SIZES = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=16, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2
)
FEW = "^blocks/attn1/to_q$|^proj_out$"
EMA = {"ema": Average(0.9)}


class Three(Method):
    """A full student, one of adapters, and a pair of experts of which the second is adapters at half strength."""

    batch = Batch

    @property
    def roles(self):
        return {
            "teacher": Role("pretrained"),
            "generator": Role("previous", True, averages=EMA),
            "low": Role("previous", True, adapters=Adapters("teacher", 2, 4.0), averages=EMA),
            "detail": Role("previous", True, adapters=Adapters("generator", 2, 4.0)),
            "still": Role("previous:generator"),
            "fine": Role("fresh", True, adapters=Adapters("still", 2, 4.0, FEW), averages=EMA),
        }

    @property
    def views(self):
        return {"half": View("detail", scale=0.5)}

    @property
    def updates(self):
        return (Update(("generator", "low", "detail", "fine"), lambda nets, batch, context: (jnp.zeros(1), {})),)


@pytest.fixture(scope="module")
def setting():
    experiment = Experiment(name="student", method={}, optimizers={}, steps=1, batch_size=1)
    blueprint = draw_up(experiment, Three(), sharding.make_mesh(MeshConfig(), jax.devices()[:1]), SIZES)
    rng = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), tree)

    params, frozen = draw(blueprint.trained), draw(blueprint.frozen)
    averages = {f"{name}_ema": draw(blueprint.trained[name]) for name in ("generator", "low", "fine")}
    state = TrainState(jnp.int32(1), jax.random.key(0), params, {}, averages)
    return blueprint.models, frozen, state


def maker(setting, student):
    return Maker(setting[0], student, setting[1])


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_full_student(setting):
    _, _, state = setting
    made = maker(setting, Student("generator", Sampler()))
    assert made.roles == ("generator",)
    shown = made.shown(state)
    assert list(shown) == ["generator", "generator, average"]
    assert same(shown["generator"].weights, state.params["generator"])
    assert same(shown["generator, average"].weights, state.averages["generator_ema"])
    assert same(made.judged(state).weights, state.averages["generator_ema"])
    trained, low = made.exported(state.params, state.averages)
    assert same(trained.params, state.averages["generator_ema"]) and trained.lora is None and low is None


def test_a_student_without_an_average(setting):
    _, _, state = setting
    made = maker(setting, Student("generator", Sampler(), average=None))
    assert list(made.shown(state)) == ["generator"]
    assert same(made.judged(state).weights, state.params["generator"])
    assert same(made.exported(state.params, state.averages)[0].params, state.params["generator"])


def test_what_a_run_starts_from_is_its_own_average(setting):
    _, _, state = setting
    made = maker(setting, Student("generator", Sampler()))
    begin = {"generator": state.params["generator"]}
    assert same(made.of_start(begin).weights, begin["generator"])
    assert same(made.exported(begin)[0].params, begin["generator"])


def test_a_low_rank_student_sits_on_the_teacher(setting):
    _, frozen, state = setting
    made = maker(setting, Student("low", Sampler()))
    assert made.roles == ("low",)
    assert same(made.judged(state).weights, merge_trees(frozen["teacher"], state.averages["low_ema"]))
    trained, _ = made.exported(state.params, state.averages)
    assert same(trained.params, frozen["teacher"])
    (path, layer), adapter = next(iter(trained.lora.adapters.items()))
    assert adapter.rank == 2 and layer == 0
    names = path.split("/")
    leaf = state.averages["low_ema"]
    for name in names:
        leaf = leaf[name]
    expected = 2.0 * np.asarray(leaf["lora_a"][0]) @ np.asarray(leaf["lora_b"][0])
    np.testing.assert_allclose(trained.lora.change(path + "/kernel", 0), expected, rtol=1e-5, atol=1e-5)


def test_two_experts(setting):
    _, _, state = setting
    made = maker(setting, Student("generator", Sampler(), average=None, low="half", boundary=0.6))
    assert made.roles == ("generator", "detail")
    denoiser = made.judged(state)
    assert same(denoiser.weights, state.params["generator"]) and denoiser.boundary == 0.6
    _, weights = denoiser.low
    halved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.5 * leaf if path[-1].key == "lora_b" else leaf, state.params["detail"]
    )
    assert same(weights, merge_trees(state.params["generator"], halved))
    trained, low = made.exported(state.params, state.averages)
    assert trained.lora is None and same(trained.params, low.params)
    path, layer = next(iter(low.lora.adapters))
    full = maker(setting, Student("detail", Sampler(), average=None)).exported(state.params)[0].lora
    change = full.change(path + "/kernel", layer)
    np.testing.assert_allclose(low.lora.change(path + "/kernel", layer), 0.5 * change, rtol=1e-5, atol=1e-6)


def test_two_experts_of_which_one_is_frozen(setting):
    """It is neither in a checkpoint nor averaged: the other one's average is judged beside it, and so exported."""
    _, frozen, state = setting
    made = maker(setting, Student("still", Sampler(), low="fine", boundary=0.6))
    assert made.roles == ("fine",)
    shown = made.shown(state)
    assert all(same(one.weights, frozen["still"]) for one in shown.values())
    assert same(shown["generator"].low[1], merge_trees(frozen["still"], state.params["fine"]))
    assert same(made.judged(state).low[1], merge_trees(frozen["still"], state.averages["fine_ema"]))
    trained, low = made.exported(state.params, state.averages)
    assert same(trained.params, frozen["still"]) and same(low.params, frozen["still"]) and trained.lora is None
    assert {path for path, _ in low.lora.adapters} == {"blocks/attn1/to_q", "proj_out"}
    begin = {"fine": jax.tree.map(jnp.zeros_like, state.params["fine"])}
    trained, low = made.exported(begin)
    assert same(trained.params, frozen["still"])
    assert not any(adapter.product().any() for adapter in low.lora.adapters.values())
    assert same(made.of_start(begin).low[1], merge_trees(frozen["still"], begin["fine"]))
