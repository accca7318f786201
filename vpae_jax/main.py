"""Trains one phase.

    python -m vpae_jax.main --config=configs/phase1.py[:PRESET] [--config.KEY=VALUE ...] --workdir=DIR

Running the same command again resumes from the newest checkpoint in the workdir. On SIGTERM the run saves a checkpoint
and exits with status 0.

The same command on several processes is one run (`launch/`). The processes find each other by --coordinator=HOST:PORT,
--num_processes=N and --process_id=I, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by SLURM's
variables, or, with --detect_cluster, by the metadata of a TPU pod. They must share the file system of the workdir.
"""

from __future__ import annotations

import os

from absl import flags
from ml_collections import config_flags

from vpae_jax import cli, config
from vpae_jax.files import local_path
from vpae_jax.run import keys
from vpae_jax.run.experiment import run
from vpae_jax.runtime import distributed, platforms, preemption

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: FILE.py or FILE.py:PRESET.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, previews and the resulting model.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run on several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes in the run.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
DETECT_CLUSTER = flags.DEFINE_bool("detect_cluster", False, "Let JAX find the other processes, as on a TPU pod.")
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", distributed.START_SECONDS, "Seconds to wait for the other processes at startup.", lower_bound=1
)


def main(argv: list[str]) -> None:
    del argv
    experiment = config.parse(CONFIG.value)
    workdir = local_path(str(WORKDIR.value))
    platforms.keep_compiled(os.environ, platforms.found(), workdir / "compiled")
    where: distributed.Where = distributed.AUTOMATIC
    if not DETECT_CLUSTER.value:
        where = distributed.find(os.environ, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    with distributed.joined(where, START_TIMEOUT.value), preemption.on_sigterm() as stop:
        run(experiment, workdir, stop=stop)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.launch(main, keys.check, keys.page)
