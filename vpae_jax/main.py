"""Trains one phase.

    python -m vpae_jax.main --config=configs/phase1.py[:PRESET] [--config.KEY=VALUE ...] --workdir=DIR

Running the same command again continues from the workdir's newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vpae_jax import cli, config
from vpae_jax.experiment import run
from vpae_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a preset after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples, the model it makes.")


def main(argv: list[str]) -> None:
    del argv
    try:
        experiment = config.parse(CONFIG.value)
    except OSError as error:  # how ml_collections says that there is no such config file
        raise UserError(" ".join(str(error).split())) from error
    run(experiment, Path(str(WORKDIR.value)))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.launch(main)
