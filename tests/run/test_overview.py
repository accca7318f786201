"""The table of roles in a run's log."""

import jax

from vpae_jax import sharding
from vpae_jax.config import parse
from vpae_jax.configs import phase1
from vpae_jax.methods import make_method
from vpae_jax.models import presets
from vpae_jax.run.overview import overview
from vpae_jax.train.blueprint import draw_up


def test_every_role_has_a_line_with_its_size():
    experiment = parse(phase1.get_config("i2v-14b-720p"))
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    transformer = presets.find("i2v-14b").transformer
    table = overview(draw_up(experiment, make_method(experiment.method), mesh, transformer))
    header, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line)
    assert header == ["Role", "Start", "Weights", "Parameters", "Dtype", "Memory", "Averages"]
    lines = {row[0]: row[1:] for row in rows}
    assert lines["generator"] == ["pretrained", "trained", "16,394,878,784", "float32", "61.1 GiB", "ema"]
    assert lines["teacher"] == ["pretrained", "frozen", "16,394,878,784", "bfloat16", "30.5 GiB", "-"]
    # A block has ten linear layers of width 5120, and two between it and 13824.
    rank = 128
    adapters = 40 * rank * (10 * 2 * 5120 + 2 * (5120 + 13824))
    assert lines["fake_score"] == ["fresh", "trained, rank 128 on teacher", f"{adapters:,}", "float32", "2.68 GiB", "-"]
