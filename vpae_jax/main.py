"""Trains one phase.

    python -m vpae_jax.main --config=configs/phase1.py[:PRESET] [--config.KEY=VALUE ...] --workdir=DIR

Running the same command again continues from the workdir's newest checkpoint. SIGTERM saves one and ends with status 0.

The same command on several processes is one run (`launch/`): each is told of the others by --coordinator=HOST:PORT,
--num_processes=N and --process_id=I, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by SLURM, or,
with --detect_cluster, by a TPU pod. The workdir is on a file system that all of them share.
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

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a preset after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples, the model it makes.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run on several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
DETECT_CLUSTER = flags.DEFINE_bool("detect_cluster", False, "Let JAX find the other processes, as on a TPU pod.")
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", distributed.START_SECONDS, "Seconds to wait for the other processes at the start.", lower_bound=1
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
