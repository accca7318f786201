"""Estimates what a phase would need on devices you do not have, before you queue for them.

    python -m vpae_jax.plan --config=configs/phase2.py:i2v-14b-720p --topology=v5p:2x2x4 [--config.KEY=VALUE ...]
                            [--frames=N] [--search [--tries=N]] [--json]

The phase's own update programs are compiled for the named devices on a machine without them; docs/plan.md explains the
output. Topologies: v4, v5p, tpu7x:AxBxC, v5e, v6e:AxB (TPU chips along each axis; needs libtpu, from jax[tpu]), h20,
h100, h200, b200:N (GPUs, in hosts of eight; needs jax[cuda12]).

`--json` prints one object:

    schema        1; a key's meaning never changes within a schema, keys may be added
    phase, topology, devices, batch_size, chip {name, memory, capacity: bytes}
    setting       {data, fsdp, context, tensor, accumulation, remat}, and the same as `flags`
    clip          {frames, height, width, text_tokens, tokens}
    memory        bytes on one device: parameters, optimizer, averages, frozen, decoder, batch, temporaries, workspace,
                  code; null: unknown
    total, peak   bytes on one device: the sum, and XLA's own count of the peak; null: unknown
    host          bytes of one host's memory: checkpoint, offloaded, and the host's capacity
    fits          true or false
    programs      a list of {name, calls (per step; 0: between steps), flops and model_flops (all devices, one run),
                  memory_bytes (traffic of one device), footprint {arguments, temporaries, code, peak, offloaded:
                  bytes} or null if the compiler rejected it, needed (bytes, of a rejected one), communication [{kind,
                  axes, count, bytes}] or null, seconds {compute, memory, communication} or null, rematerialised
                  (number of instructions that XLA rematerialises by itself), unknown_loops, compile_seconds}
    step          {flops, model_flops, seconds_overlapped, seconds_serial, mfu_overlapped, mfu_serial}
    run           {steps, device_hours_overlapped, device_hours_serial}
    search        with --search: {flags, plan (as above), settings, tried [{flags, estimated_bytes, estimated_seconds,
                  total, seconds, outcome}]}

The exit status is 0 whether the setting fits or not.
"""

from __future__ import annotations

import json
import sys

from absl import flags
from ml_collections import config_flags

from vpae_jax import cli, config
from vpae_jax.planning import clips, report, topology
from vpae_jax.planning.compiling import make_plan
from vpae_jax.planning.search import search
from vpae_jax.run import keys

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a preset after a colon.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Devices: v5p:2x2x4, v6e:16x16, tpu7x:2x2x4, h100:8, h20:32, ...")
FRAMES = flags.DEFINE_integer("frames", None, "Video frames per clip, instead of the preset's.")
SEARCH = flags.DEFINE_bool("search", False, "Look for the fastest setting that fits.")
TRIES = flags.DEFINE_integer("tries", 6, "Maximum number of settings that a search compiles.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv: list[str]) -> None:
    del argv
    experiment = config.parse(CONFIG.value)
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    clip = clips.size_of(path.partition(":")[2] or "tiny", FRAMES.value)
    named = topology.parse(str(TOPOLOGY.value))
    topology.prepare(named)
    devices = topology.devices(named)
    plan = make_plan(experiment, clip, named, devices, _say)
    found = search(experiment, clip, named, devices, plan, _say, TRIES.value) if SEARCH.value else None
    if JSON.value:
        print(json.dumps(plan.as_json() | ({} if found is None else {"search": found.as_json()}), indent=2))
        return
    print(report.page(plan))
    if found is not None:
        print(f"\n{report.proposal(found)}")
        if found.plan is not None and found.plan is not plan:
            print(f"\n{report.page(found.plan)}")
    elif not plan.fits:
        print("\nadd --search to look for a setting that fits")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.launch(main, keys.check, keys.page)
