"""A process that compares itself with the others of its job, as a run does, and then waits to be ended.

Usage: agreeing.py [KEY=VALUE ...]    version, records, or a number of the config
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import vpae_jax
from vpae_jax import cli, tasks
from vpae_jax.config import parse
from vpae_jax.configs import phase1
from vpae_jax.run.agreement import reads, require_same, started_with
from vpae_jax.runtime import distributed


def main(argv: list[str]) -> None:
    experiment = parse(phase1.get_config())
    for key, value in (argument.split("=") for argument in argv):
        if key == "version":
            vpae_jax.__version__ = value
        elif key == "records":
            experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, records=value))
        else:
            experiment = dataclasses.replace(experiment, **{key: int(value)})
    with distributed.joined(distributed.find(os.environ), 500):
        require_same("start", lambda: started_with(experiment))
        require_same("inputs", lambda: reads(None, tasks.digests(experiment.data, Path())))
        print("agreed", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
