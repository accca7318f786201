"""The conversion tables: invertible operations, and one line for every kind of mismatch."""

import numpy as np
import pytest

from vpae_jax.convert.table import Row, check, gather, plan, scatter, their_shape, to_ours, to_theirs
from vpae_jax.types import UserError

ROWS = (
    Row("blocks/(a|b)/kernel", r"layers.{i}.\1.weight", "kernel"),
    Row("head/(.+)/gamma", r"top.\1.gamma", "gamma3"),
    Row("table", "table"),
)
SHAPES = {"blocks/a/kernel": (3, 5, 7), "head/x/y/gamma": (4,), "table": (1, 2, 3)}
THEIRS = {
    "layers.0.a.weight": (7, 5),
    "layers.1.a.weight": (7, 5),
    "layers.2.a.weight": (7, 5),
    "top.x.y.gamma": (4, 1, 1, 1),
    "table": (1, 2, 3),
}


@pytest.mark.parametrize(
    "op, ours, theirs",
    [
        ("same", (2, 3), (2, 3)),
        ("kernel", (5, 7), (7, 5)),
        ("kernel", (3, 4, 5, 7), (7, 5, 3, 4)),
        ("kernel", (2, 3, 4, 5, 7), (7, 5, 2, 3, 4)),
        ("gamma2", (6,), (6, 1, 1)),
        ("gamma3", (6,), (6, 1, 1, 1)),
    ],
)
def test_operations_are_inverse(op, ours, theirs):
    assert their_shape(op, ours) == theirs
    value = np.arange(np.prod(theirs)).reshape(theirs)
    converted = to_ours(op, value)
    assert converted.shape == ours
    np.testing.assert_array_equal(to_theirs(op, converted), value)


def test_kernel_is_a_convolution_in_both_layouts():
    weight = np.arange(7 * 5 * 2 * 3).reshape(7, 5, 2, 3)  # out, in, rows, columns
    assert to_ours("kernel", weight)[1, 2, 4, 6] == weight[6, 4, 1, 2]


def test_gather_and_scatter_are_inverse():
    rng = np.random.default_rng(0)
    files = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in THEIRS.items()}
    entries = plan(ROWS, SHAPES)
    back = {}
    for entry in entries:
        value = gather(entry, files.__getitem__, np.dtype(np.float32))
        assert value.shape == SHAPES[entry.path]
        back |= dict(scatter(entry, value))
    assert set(back) == set(files)
    for name, value in files.items():
        np.testing.assert_array_equal(back[name], value)


def test_layers_of_different_precision_keep_the_widest():
    files = {name: np.full(shape, 1 / 3, np.float16) for name, shape in THEIRS.items()}
    files["layers.1.a.weight"] = np.full((7, 5), 1 / 3, np.float32)
    value = gather(plan(ROWS, SHAPES)[0], files.__getitem__, None)
    assert value.dtype == np.float32
    assert value[1, 0, 0] == np.float32(1 / 3) and value[0, 0, 0] == np.float16(1 / 3)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"unheard/of": (1,)}, "0 rows describe parameter 'unheard/of'"),
        ({"table": (1,), "blocks/table/kernel": (1,)}, "0 rows"),
    ],
)
def test_a_parameter_without_a_row_is_a_mistake(shapes, message):
    with pytest.raises(ValueError, match=message):
        plan(ROWS, shapes)


def test_ambiguous_rows_are_a_mistake():
    with pytest.raises(ValueError, match="2 rows describe parameter 'table'"):
        plan((*ROWS, Row("tab.*", "other")), {"table": (1,)})
    with pytest.raises(ValueError, match="two parameters claim tensor 'one'"):
        plan((Row("a|b", "one"),), {"a": (1,), "b": (1,)})


def found(**changes):
    shapes = {**THEIRS, **changes}
    return {name.replace("__", "."): shape for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    "shapes, message",
    [
        (found(table=None), "folder: tensor 'table' of shape [1, 2, 3] is missing"),
        (
            {"table": (1, 2, 3)},
            "folder: tensor 'layers.0.a.weight' of shape [7, 5] is missing (and 3 more)",
        ),
        (
            found(layers__3__a__weight=(7, 5)),
            "file: tensor 'layers.3.a.weight' of shape [7, 5] is unknown to this architecture; "
            "does config.json belong to these weights?",
        ),
        (
            found(table=(1, 3, 2)),
            "file: tensor 'table' has shape [1, 3, 2], expected [1, 2, 3]; does config.json belong to these weights?",
        ),
    ],
)
def test_mismatches_are_one_line(shapes, message):
    with pytest.raises(UserError) as error:
        check(plan(ROWS, SHAPES), shapes, dict.fromkeys(shapes, "file"), "folder")
    assert str(error.value) == message


def test_a_match_passes():
    check(plan(ROWS, SHAPES), THEIRS, dict.fromkeys(THEIRS, "file"), "folder")
