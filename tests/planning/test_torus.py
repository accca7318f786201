"""Where a mesh's axes lie in the torus, on libtpu's own descriptions of slices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from vpae_jax.config import MeshConfig
from vpae_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
# Of an axis that has a side of the torus, or several, for itself: nothing is further than the end of a row from the
# next one's beginning, two links.
WHOLE = ("v5p:2x2x4:4", "v5p:2x2x4:8", "v5p:4x4x4:4", "v6e:8x8:8", "tpu7x:2x2x4:8")
# Axes that share a side of it; and what the order in which JAX lists devices would give, links a step.
SHARED = {"v5p:4x4x4:8": 2.43, "v6e:16x16:8": 4.48}
SLICES = ("2*v5p:2x2x2:4", "2*v5p:2x2x2:16")


def test_neighbours_in_the_mesh_are_neighbours_in_the_torus():
    command = [sys.executable, str(Path(__file__).with_name("torus.py")), *WHOLE, *SHARED, *SLICES]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in WHOLE:
        assert found[name]["context"]["longest"] <= 2 and found[name]["fsdp"]["longest"] <= 2, (name, found[name])
    assert found["v6e:8x8:8"]["fsdp"]["longest"] == found["v6e:8x8:8"]["context"]["longest"] == 1
    assert found["v5p:4x4x4:4"]["context"]["longest"] == 1
    for name, listed in SHARED.items():
        assert found[name]["fsdp"]["mean"] < 0.7 * listed, found[name]
    assert found["2*v5p:2x2x2:4"]["context"]["slice"] and not found["2*v5p:2x2x2:4"]["fsdp"]["slice"]
    assert found["2*v5p:2x2x2:16"]["refused"].startswith("config.mesh: {'data': 1, 'fsdp': 1, 'context': 16")


def test_other_devices_keep_their_order():
    assert make_mesh(MeshConfig(fsdp=2, context=4)).devices.flatten().tolist() == jax.devices()
