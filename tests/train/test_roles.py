"""Views of roles as networks: which weights each is bound to, and which of them are differentiated."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax import sharding
from vpae_jax.config import Experiment, MeshConfig
from vpae_jax.methods.base import Adapters, Average, Method, Role, Update, View
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.train.blueprint import draw_up
from vpae_jax.train.roles import check_roles
from vpae_jax.types import Batch, Condition, UserError

SIZES = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=16, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2
)


class Everything(Method):
    """A frozen base, adapters on it at several scales, adapters on a trained network, averages, constants."""

    batch: ClassVar[type] = Batch

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "base": Role("pretrained"),
            "student": Role("pretrained", True, averages={"ema": Average(0.9), "slow": Average(0.99)}),
            "low": Role("fresh", True, adapters=Adapters("base", 2, 4.0), averages={"ema": Average(0.9)}),
            "on_top": Role("fresh", True, adapters=Adapters("student", 2, 2.0)),
        }

    @property
    def views(self) -> Mapping[str, View]:
        return {
            "off": View("low", scale=0.0),
            "weak": View("low", scale=0.25),
            "still": View("student", constant=True),
            "low_still": View("low", constant=True),
        }

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("student", "low", "on_top"), lambda nets, batch, context: (jnp.zeros(1), {})),)


METHOD = Everything()


@pytest.fixture(scope="module")
def setting():
    experiment = Experiment(name="views", method={}, optimizers={}, steps=1, batch_size=1)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    blueprint = draw_up(experiment, METHOD, mesh, SIZES)
    rng = np.random.default_rng(0)
    draw = lambda tree: jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), tree)  # noqa: E731
    held = draw(blueprint.held)
    averages = {
        name: draw(blueprint.held[name.rpartition("_")[0]]) for name in ("student_ema", "student_slow", "low_ema")
    }
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs = normal(1, 1, 4, 4, 16), jnp.array([0.5]), Condition(normal(1, 3, 8), jnp.ones((1, 3), bool))
    return blueprint.models, held, averages, inputs


@pytest.fixture(scope="module")
def outputs(setting):
    """Every network's output, by name, with these weights and averages in place of the setting's."""
    models, own, kept, inputs = setting

    @jax.jit
    def run(held, averages):
        return {name: net(*inputs) for name, net in models.networks(held, averages).items()}

    return lambda held=own, averages=kept: jax.tree.map(np.asarray, run(held, averages))


@pytest.fixture(scope="module")
def unchanged(outputs):
    return outputs()


def test_every_role_average_and_view_is_a_network(unchanged):
    assert set(unchanged) == {
        *("base", "student", "low", "on_top", "student_ema", "student_slow", "low_ema"),
        *("off", "weak", "still", "low_still"),
    }


def moved(setting, outputs, name, kind="held"):
    """The networks that change with one set of weights."""
    _, held, averages, _ = setting
    trees = {"held": held, "averages": averages}
    trees[kind] = {**trees[kind], name: jax.tree.map(lambda x: 1.1 * x + 0.05, trees[kind][name])}
    before, after = outputs(), outputs(**trees)
    return {name for name in before if np.abs(before[name] - after[name]).max() > 1e-6}


def test_which_weights_each_network_is_bound_to(setting, outputs):
    assert moved(setting, outputs, "base") == {"base", "low", "low_ema", "off", "weak", "low_still"}
    assert moved(setting, outputs, "student") == {"student", "on_top", "still"}
    assert moved(setting, outputs, "low") == {"low", "weak", "low_still"}
    assert moved(setting, outputs, "on_top") == {"on_top"}
    assert moved(setting, outputs, "student_ema", "averages") == {"student_ema"}
    assert moved(setting, outputs, "student_slow", "averages") == {"student_slow"}
    assert moved(setting, outputs, "low_ema", "averages") == {"low_ema"}


def test_the_scale_of_adapters(setting, outputs, unchanged):
    """0 is the network without them; a quarter is what a quarter of their second matrix gives."""
    held, found = setting[1], unchanged
    np.testing.assert_allclose(found["off"], found["base"], rtol=1e-5, atol=1e-6)

    def quarter(path, leaf):
        return 0.25 * leaf if str(path[-1].key) == "lora_b" else leaf

    low = jax.tree_util.tree_map_with_path(quarter, held["low"])
    np.testing.assert_allclose(outputs({**held, "low": low})["low"], found["weak"], rtol=1e-5, atol=1e-6)
    assert np.abs(found["weak"] - found["low"]).max() > 1e-3


@pytest.mark.parametrize(
    ("view", "reached"),
    [
        ("student", {"student"}),
        ("still", set()),
        ("low", {"low"}),
        ("weak", {"low"}),
        ("low_still", set()),
        ("on_top", {"student", "on_top"}),
        ("student_ema", set()),
    ],
)
def test_what_is_differentiated_through_a_view(setting, view, reached):
    """Of an update that trains all three roles: constants pass no gradient to weights, but one to the input."""
    models, held, averages, (x, t, condition) = setting
    trains = METHOD.updates[0].trains

    def loss(own, x):
        nets = models.networks({**held, **own}, averages, held, trains)
        return (nets[view](x, t, condition) ** 2).sum()

    grads, back = jax.grad(loss, argnums=(0, 1))({role: held[role] for role in trains}, x)
    touched = {role for role, tree in grads.items() if any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))}
    assert touched == reached
    assert np.abs(back).max() > 0


def test_velocity_and_features_come_from_one_pass(setting):
    models, held, averages, (x, t, condition) = setting
    for trained in ((), ("student",)):
        net = models.networks(held, averages, held, trained)["student"]
        for taps in ((1,), (1, 2), (2,)):
            v, features = net.velocity_and_features(x, t, condition, taps)
            np.testing.assert_allclose(v, net(x, t, condition), rtol=1e-5, atol=1e-6)
            alone = net.features(x, t, condition, taps)
            assert len(features.taps) == len(taps)
            for one, other in zip(jax.tree.leaves(features), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    calls = str(jax.make_jaxpr(lambda x: net.velocity_and_features(x, t, condition, (1,))[0])(x))
    assert calls.count("scan[") == 2, "blocks before and after the tap, each once"


def test_adapters_sit_on_a_whole_network():
    class Wrong(Everything):
        on = "nobody"

        @property
        def roles(self):
            return {**super().roles, "low": Role("fresh", True, adapters=Adapters(self.on, 2, 4.0))}

    rates = dict.fromkeys(("student", "low", "on_top"))
    check_roles(METHOD, rates)
    for base in ("nobody", "on_top"):
        Wrong.on = base
        with pytest.raises(UserError, match=f"role low has adapters on '{base}'"):
            check_roles(Wrong(), rates)


@pytest.mark.parametrize(
    ("trains", "follower"),
    [
        (("student",), "low"),  # adapters
        (("low",), "student"),
        (("student",), "base"),  # frozen
        (("student",), "nobody"),
        (("student",), "student"),
        (("student", "other"), "low"),  # two to follow
    ],
)
def test_only_whole_trained_roles_follow_each_other(trains, follower):
    class Following(Everything):
        trains = ("student",)
        follower = "other"

        @property
        def roles(self):
            return {**super().roles, "other": Role("pretrained", True)}

        @property
        def updates(self):
            rest = tuple(name for name, role in self.roles.items() if role.trains and name not in self.trains)
            loss = super().updates[0].loss
            return Update(self.trains, loss, followers={self.follower: 0.97}), Update(rest, loss)

    rates = dict.fromkeys(("student", "low", "on_top", "other"))
    check_roles(Following(), rates)
    Following.trains, Following.follower = trains, follower
    with pytest.raises(UserError, match=rf"role {follower} follows {'.'.join(trains)}: both must be trained, full"):
        check_roles(Following(), rates)


@pytest.mark.parametrize("start", ["random", "fresh:low", ":x"])
def test_starts_are_checked(start):
    with pytest.raises(UserError, match=r"Role\.start is"):
        Role(start)


def test_a_role_may_start_from_another_of_the_phase_before():
    assert Role("previous").previous("generator") == "generator"
    assert Role("previous:student").previous("generator") == "student"
    assert Role("pretrained").previous("generator") is None
