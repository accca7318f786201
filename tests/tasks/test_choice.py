"""Which task a run has, and what it must import for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from vpae_jax import tasks
from vpae_jax.config import DataConfig
from vpae_jax.types import UserError

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
for name in ("mlxtend", "sklearn", "vpae_jax.tasks.digits"):
    sys.modules[name] = None  # makes an import of it fail
import vpae_jax.main, vpae_jax.encode, vpae_jax.sample, vpae_jax.evaluate, vpae_jax.convert, vpae_jax.planning.programs
from pathlib import Path
from vpae_jax import tasks
from vpae_jax.config import DataConfig
task = tasks.open_task(DataConfig(records="somewhere"), Path(), "tiny", {})
print(task.name, sorted(name for name in sys.modules if name.startswith(("mlxtend.", "sklearn."))))
"""


def test_a_run_on_records_imports_neither_the_digits_nor_what_they_need():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "video []\n", done.stderr


def test_clips_decide_the_task():
    assert tasks.name_of(DataConfig()) == "digits"
    assert tasks.name_of(DataConfig(videos="folder")) == tasks.name_of(DataConfig(records="folder")) == "video"
    assert tasks.open_task(DataConfig(), Path(), "tiny", {}).name == "digits"


def test_a_method_that_drops_first_frames_is_judged_in_both_modes():
    assert tasks.modes_of({"image_dropout": 0.5}) == ("t2v", "i2v")
    assert tasks.modes_of({"image_dropout": 0.0}) is None is tasks.modes_of({})


def test_held_out_folders_have_no_weights_and_no_digits():
    with pytest.raises(UserError, match="held_out_records is 'a=2'; give folders without weights"):
        DataConfig(records="b", held_out_records="a=2")
    with pytest.raises(UserError, match="held_out_records is given without records or videos"):
        DataConfig(held_out_records="a")
