"""From a config and a topology to a plan: builds the programs, compiles each, and analyses the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vpae_jax.config import Experiment
from vpae_jax.planning import flops, hlo, memory, roofline
from vpae_jax.planning.clips import ClipSize
from vpae_jax.planning.programs import Program, Programs, draw_up, setting_of, transformer_of
from vpae_jax.planning.result import Plan, ProgramPlan
from vpae_jax.planning.topology import Topology
from vpae_jax.runtime.progress import working
from vpae_jax.train.state import TrainState
from vpae_jax.types import UserError

Say = Callable[[str], None]


def make_plan(
    experiment: Experiment,
    clip: ClipSize,
    topology: Topology,
    devices: Sequence[Any],
    say: Say,
    fail_fast: bool = False,
) -> Plan:
    """Compiles every update of the phase for the devices.

    Args:
      experiment: the config.
      clip: size of the clips.
      topology: what to plan for.
      devices: the topology's.
      say: receives progress messages.
      fail_fast: whether to stop after the first program that does not fit into memory; later ones are not in the plan.

    Raises:
      UserError: for a config that is inconsistent, or does not fit the devices.
    """
    programs = draw_up(experiment, clip, devices)
    setting, chip = setting_of(experiment, programs.mesh), topology.chip
    width = transformer_of(experiment).width
    workspace = memory.workspace(chip, clip, width, experiment.batch_size, setting)
    kept = memory.persistent(programs)
    made: list[ProgramPlan] = []
    for program in (*programs.updates, programs.preview):
        with working(f"compiling {program.name} for {topology.name}", say):
            made.append(_compile(program, programs, topology))
        held = sizes(kept, made, workspace)
        if fail_fast and (None in held.values() or sum(s or 0 for s in held.values()) > chip.capacity):
            break
    offloaded = max((p.footprint.offloaded for p in made if p.footprint is not None), default=0)
    return Plan(
        phase=experiment.name,
        topology=topology.name,
        chip=chip,
        devices=len(devices),
        setting=setting,
        clip=clip,
        batch_size=experiment.batch_size,
        steps=experiment.steps,
        memory=sizes(kept, made, workspace),
        host=memory.on_host(chip, len(devices), programs, offloaded),
        programs=tuple(made),
    )


def sizes(kept: dict[str, int], programs: Sequence[ProgramPlan], workspace: int = 0) -> dict[str, int | None]:
    """Memory by kind: the state, the largest temporaries of any program, the kernels' workspace, the code of all."""
    base = sum(kept.values())
    extra: list[int | None] = []
    for program in programs:
        if program.footprint is not None:
            extra.append(program.footprint.temporaries)
        else:  # the compiler's figure for a rejected program includes arguments
            extra.append(None if program.needed is None else max(program.needed - base, 0))
    temporaries = None if None in extra else max((size or 0 for size in extra), default=0)
    code = sum(p.footprint.code for p in programs if p.footprint)
    return {**kept, "temporaries": temporaries, "workspace": workspace, "code": code}


def trained_by(program: Program, state: TrainState) -> list[Any]:
    """The parts of the state that a program changes."""
    roles = program.trains
    averages = {name: tree for name, tree in state.averages.items() if name.rpartition("_")[0] in roles}
    return [averages, *({role: tree[role] for role in roles} for tree in (state.params, state.opt))]


def _compile(program: Program, programs: Programs, topology: Topology) -> ProgramPlan:
    mesh = programs.mesh
    hosts = [device.process_index for device in mesh.devices.flat]
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.jitted.trace(*program.arguments)
        work = flops.count(traced.jaxpr)
        trained = trained_by(program, programs.state)
        moved = roofline.traffic(work, mesh.size, memory.tree_bytes(trained))
        footprint = needed = sent = seconds = None
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                reason = str(error).split("\n", 1)[0]
                raise UserError(f"the compiler for {topology.name} failed on the {program.name}: {reason}") from error
            needed = memory.needed(str(error))
        else:
            footprint = memory.footprint(compiled)
            sent = hlo.communication(compiled.as_text() or "", dict(mesh.shape))
            seconds = roofline.estimate(topology.chip, mesh.size, work, moved, sent.collectives, hosts)
    spent = time.perf_counter() - start
    return ProgramPlan(program.name, program.calls, work, moved, footprint, needed, sent, seconds, spent)
