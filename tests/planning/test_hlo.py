"""Communication read from programs that are compiled here, on eight devices of a CPU, and from the forms that other
compilers print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vpae_jax.planning.hlo import axes_of, communication, type_bytes

P = PartitionSpec
SIZES = {"data": 2, "fsdp": 4}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def found(text, sizes=SIZES):
    return {(c.kind, c.axes): (c.count, c.bytes) for c in communication(text, sizes).collectives}


def test_gathers_in_a_scan_count_once_a_turn(mesh):
    def loss(weights, x):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(("data", "fsdp")))), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    text = jax.jit(loss).lower(weights, x).compile().as_text()
    size = 64 * 64 * 4
    assert found(text)["all-gather", ("fsdp",)] == (5, 5 * size * 3 / 4)
    assert communication(text, SIZES).unknown_loops == 0


def compiled(mesh, function):
    spec = P("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()


@pytest.mark.parametrize("axes", [("fsdp",), ("data",), ("data", "fsdp")])
def test_sums_over_named_axes(mesh, axes):
    group = int(np.prod([SIZES[axis] for axis in axes]))
    text = compiled(mesh, lambda x: jax.lax.psum(x, axes))
    assert found(text) == {("all-reduce", axes): (1, 2 * 4 * 8 * 4 * (group - 1) / group)}


def test_permutations_and_exchanges(mesh):
    assert found(compiled(mesh, lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))) == {
        ("collective-permute", ("data",)): (1, 4 * 8 * 4)
    }
    exchange = compiled(mesh, lambda x: jax.lax.all_to_all(x, "fsdp", 1, 1, tiled=True))
    assert found(exchange) == {("all-to-all", ("fsdp",)): (1, 4 * 8 * 4 * 3 / 4)}
    scatter = compiled(mesh, lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (4, 1)))
    assert found(scatter) == {("reduce-scatter", ("fsdp",)): (1, 4 * 8 * 4 * 3 / 4)}


def test_nothing_is_sent_by_a_program_of_one_device():
    text = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert found(text, {"data": 1}) == {}


# As a GPU's and a TPU's compiler print them; computations before those that call them, as XLA does.
FORMS = (
    """HloModule forms

%fused_start (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, INNER
}

%fused_done (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, INNER
}

%all-reduce-scatter.clone (p.2: f32[16,8]) -> f32[4,8] {
  %p.2 = f32[16,8]{1,0} parameter(0)
  %all-reduce.3 = f32[16,8]{1,0} all-reduce(%p.2), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice = f32[4,8]{1,0} dynamic-slice(%all-reduce.3)
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(6)
  %c = (s32[], bf16[4,8]) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.9), direction=LT
}

%body (b: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %b = (s32[], bf16[4,8]) parameter(0)
  %async-collective-start = bf16[16,8]{1,0} fusion(%b), kind=kCustom, calls=%fused_start
  %async-collective-done = bf16[16,8]{1,0} fusion(%b), kind=kCustom, calls=%fused_done
  ROOT %fusion.9 = f32[4,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.clone
}

%condition.2 (c.2: (s32[])) -> pred[] {
  ROOT %flag = pred[] parameter(0)
}

%body.2 (b.2: (s32[])) -> (s32[]) {
  %b.2 = (s32[]) parameter(0)
  ROOT %ar = f32[2]{0} all-reduce(%b.2), channel_id=12, replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: bf16[4,8]) -> f32[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[4,8]) while(%x), condition=%condition, body=%body
  %while.2 = (s32[]) while(%x), condition=%condition.2, body=%body.2
  %all-gather-start = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0)
  %all-gather-done = f32[8]{0} all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[16,8]{1,0}), f32[2,8]{1,0}) reduce-scatter-start(%x), channel_id=13, SCATTERED
  %reduce-scatter-done = f32[2,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %negate.3.remat2 = f32[2,8]{1,0} negate(%reduce-scatter-done)
  %copy.5 = f32[2,8]{1,0} copy(%negate.3.remat2), metadata={op_name="not.remat = anything"}
  ROOT %all-reduce.4 = f32[10]{0} all-reduce(%x), channel_id=10, OUTER
}
""".replace("INNER", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}")
    .replace("SCATTERED", "replica_groups=[1,8]<=[8], to_apply=%add")
    .replace("OUTER", "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add")
)


def test_forms_of_gpu_and_tpu():
    read = communication(FORMS, SIZES)
    assert {(c.kind, c.axes): (c.count, c.bytes) for c in read.collectives} == {
        ("all-gather", ("fsdp",)): (6, 6 * 16 * 8 * 2 * 3 / 4),  # one channel in two fusions, six turns
        ("reduce-scatter", ("fsdp",)): (6, 6 * 16 * 8 * 4 * 3 / 4),
        ("all-gather", ("data",)): (1, 8 * 4 / 2),
        ("reduce-scatter", ("data", "fsdp")): (1, 16 * 8 * 4 * 7 / 8),
        ("all-reduce", ("data",)): (1, 2 * 10 * 4 / 2),
        ("all-reduce", ("data", "fsdp")): (1, 2 * 2 * 4 * 7 / 8),
    }
    assert read.rematerialised == 1
    assert read.unknown_loops == 1  # the second loop does not say how often it turns


def test_a_long_line_is_read_at_once():
    filler = "  %fusion.{} = f32[8]{{0}} fusion(" + ", ".join(f"%p.{i}" for i in range(4000)) + "), calls=%none\n"
    text = FORMS + "".join(filler.format(i) for i in range(500))  # 17 MB
    assert len(communication(text, SIZES).collectives) == 6


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4], pred[3], s32[])", 15),
        ("f8e4m3fn[16]{0:T(256)}", 16),
        ("token[]", 0),
        ("u4[4]", 2),
    ],
)
def test_bytes_of_types(text, size):
    assert type_bytes(text) == size


def test_axes_of_groups():
    sizes = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    assert axes_of((0, 1), sizes) == ("context",)
    assert axes_of((0, 2), sizes) == ("fsdp",)
    assert axes_of((0, 4), sizes) == ("data",)
    assert axes_of((0, 1, 2, 3), sizes) == ("fsdp", "context")
    assert axes_of((0, 1, 4, 5), sizes) == ("data", "context")
