"""Looks for the fastest setting that fits: fsdp x context x accumulation x rematerialisation.

Every setting is quickly estimated in closed form. Those that may fit are compiled in order, fastest first, until no
remaining estimate is below the time of the fastest compiled setting that fits. Each compiled setting corrects the
estimates of later ones. Estimates only determine the order, and what is not worth compiling: the proposed setting was
compiled, and is the fastest of those compiled.

    memory   the sharded state, float32 gradients of the trained weights, and for every clip on the device and every
             token of its share, what a block saves for the backward pass (`SAVED`, in units of the hidden state)
    time     arithmetic including recomputation (`REPEATED`); for each network evaluation and part of the batch, weights
             gathered over fsdp x context, four all-to-alls per block among the devices that exchange tokens for heads,
             and keys and values once around the ring of the others
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vpae_jax.config import Experiment
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.planning import memory, roofline
from vpae_jax.planning.chips import Chip
from vpae_jax.planning.clips import ClipSize
from vpae_jax.planning.compiling import Say, make_plan
from vpae_jax.planning.hlo import Collective
from vpae_jax.planning.programs import REMATS, Programs, Setting, draw_up, transformer_of, with_setting
from vpae_jax.planning.result import Plan
from vpae_jax.planning.topology import Topology
from vpae_jax.types import UserError

# Number of hidden states that a block saves outside the feed-forward's hidden layer, and number of that hidden layer's.
SAVED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"none": (24.0, 3.0), "dots": (9.0, 1.0), "attention": (2.0, 0.0), "full": (1.0, 0.0), "offload": (0.0, 0.0)}
)
# Arithmetic relative to that without recomputation, for a step of which about half differentiates the network.
REPEATED: Mapping[str, float] = MappingProxyType(
    {"none": 1.0, "dots": 1.03, "attention": 1.1, "full": 1.17, "offload": 1.2}
)
# An estimate may exceed the capacity by this factor and still be tried.
SLACK = 1.15


@dataclass(frozen=True)
class Estimate:
    """A setting before it is compiled.

    Attributes:
      setting: what is estimated.
      kept: bytes on one device that are resident between programs.
      made: estimated bytes that the programs add.
      seconds: of one step.
    """

    setting: Setting
    kept: float
    made: float
    seconds: float


@dataclass(frozen=True)
class Tried:
    """A setting that was compiled, or is not possible.

    Attributes:
      setting: what was tried.
      expected: estimated bytes on one device and seconds per step; None if the setting is not possible.
      total: bytes on one device as compiled; None if it was rejected without a number, or is not possible.
      seconds: of a step as compiled, communication not hidden; None if it was rejected, or is not possible.
      outcome: "fits", "does not fit", "plain tiles" for attention without a kernel, or why training cannot run it.
    """

    setting: Setting
    expected: tuple[float, float] | None
    total: int | None
    seconds: float | None
    outcome: str


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
      plan: the fastest, by its compiled programs, of the settings that were tried and fit; None if none does.
      tried: what was tried, in order.
      settings: total number of settings.
    """

    plan: Plan | None
    tried: tuple[Tried, ...]
    settings: int

    def as_json(self) -> dict[str, Any]:
        return {
            "flags": None if self.plan is None else self.plan.setting.flags,
            "plan": None if self.plan is None else self.plan.as_json(),
            "settings": self.settings,
            "tried": [
                {
                    "flags": t.setting.flags,
                    "estimated_bytes": None if t.expected is None else t.expected[0],
                    "estimated_seconds": None if t.expected is None else t.expected[1],
                    "total": t.total,
                    "seconds": t.seconds,
                    "outcome": t.outcome,
                }
                for t in self.tried
            ],
        }


def settings(asked: Setting, devices: int, batch: int) -> Iterator[Setting]:
    """All settings of the devices with the given `data` and `tensor` in which every device has whole clips."""
    for fsdp in _divisors(devices // (asked.data * asked.tensor)):
        context = devices // (asked.data * asked.tensor * fsdp)
        if asked.data * fsdp * context * asked.tensor != devices or batch % (asked.data * fsdp):
            continue
        for accumulation in _divisors(batch // (asked.data * fsdp)):
            for remat in REMATS:
                yield Setting(asked.data, fsdp, context, asked.tensor, accumulation, remat)


def search(
    experiment: Experiment,
    clip: ClipSize,
    topology: Topology,
    devices: Sequence[Any],
    asked: Plan,
    say: Say,
    tries: int,
) -> SearchResult:
    """Searches for the fastest setting that fits.

    Args:
      experiment: the config.
      clip: size of the clips.
      topology: what to plan for.
      devices: the topology's.
      asked: the plan of the config as given, to which estimates are scaled.
      say: receives progress messages.
      tries: maximum number of settings to compile.
    """
    options = list(settings(asked.setting, len(devices), experiment.batch_size))
    estimates, tried = _estimates(experiment, clip, topology, devices, asked, options)
    scale, slower = _scale(asked, estimates), _slower(asked, estimates)
    best, quickest = None, math.inf
    for _ in range(tries):
        limit = SLACK * topology.chip.capacity
        estimate = next((e for e in estimates if e.kept + scale * e.made <= limit), None)
        if estimate is None or slower * estimate.seconds >= quickest:
            break
        estimates.remove(estimate)
        say(f"trying {estimate.setting.flags}")
        plan = asked
        if estimate.setting != asked.setting:
            changed = with_setting(experiment, estimate.setting)
            plan = make_plan(changed, clip, topology, devices, say, fail_fast=True)
        expected = (estimate.kept + scale * estimate.made, slower * estimate.seconds)
        seconds = plan.step(serial=True)
        outcome = "plain tiles" if plan.tiled else "fits" if plan.fits else "does not fit"
        tried.append(Tried(estimate.setting, expected, plan.total, seconds, outcome))
        if outcome == "fits" and seconds is not None and seconds < quickest:
            best, quickest = plan, seconds
        if not plan.fits and plan.total is not None:  # skip settings that are now known to be too large
            scale = max(scale, (plan.total - estimate.kept) / estimate.made)
    return SearchResult(best, tuple(tried), len(options))


def _estimates(
    experiment: Experiment,
    clip: ClipSize,
    topology: Topology,
    devices: Sequence[Any],
    asked: Plan,
    options: Sequence[Setting],
) -> tuple[list[Estimate], list[Tried]]:
    """Estimates of all settings that training can run, fastest first, and one entry for each mesh that it cannot."""
    config = transformer_of(experiment)
    drawn: dict[tuple[int, int], Programs | str] = {}
    estimates: list[Estimate] = []
    refused: list[Tried] = []
    for setting in options:
        mesh = (setting.fsdp, setting.context)
        if mesh not in drawn:
            drawn[mesh] = _draw(experiment, setting, clip, devices)
            reason = drawn[mesh]
            if isinstance(reason, str):
                refused.append(Tried(setting, None, None, None, reason))
        programs = drawn[mesh]
        if isinstance(programs, str) or not _runs(experiment, setting):
            continue
        largest = max(memory.tree_bytes(tree) for tree in programs.state.params.values())
        made = largest + activations(config, clip, experiment.batch_size, setting)
        kept = float(sum(memory.persistent(programs).values()))
        estimates.append(Estimate(setting, kept, made, seconds(config, clip, topology.chip, asked, setting)))
    return sorted(estimates, key=lambda e: (e.seconds, e.kept + e.made)), refused


def _scale(asked: Plan, estimates: Sequence[Estimate]) -> float:
    """Compiled over estimated memory of the given setting; 1 if unknown."""
    made = asked.memory["temporaries"]
    known = [e.made for e in estimates if e.setting == asked.setting]
    return made / known[0] if made and known else 1.0


def _slower(asked: Plan, estimates: Sequence[Estimate]) -> float:
    """Compiled over estimated time of the given setting; 1 if it was rejected."""
    compiled = asked.step(serial=True)
    known = [e.seconds for e in estimates if e.setting == asked.setting]
    return compiled / known[0] if compiled and known else 1.0


def _runs(experiment: Experiment, setting: Setting) -> bool:
    try:
        with_setting(experiment, setting)
    except UserError:
        return False
    return True


def _draw(experiment: Experiment, setting: Setting, clip: ClipSize, devices: Sequence[Any]) -> Programs | str:
    """The programs of a setting, or why it is not possible."""
    try:
        return draw_up(with_setting(experiment, setting), clip, devices)
    except UserError as error:
        return str(error)


def activations(config: WanTransformerConfig, clip: ClipSize, batch: int, setting: Setting) -> float:
    """Bytes on one device that the blocks save for the backward pass, plus those of the block being computed."""
    tokens = batch / (setting.data * setting.fsdp * setting.accumulation) * clip.tokens / setting.context
    wide = config.ffn_dim / config.width

    def held(remat: str) -> float:
        states, hidden = SAVED[remat]
        return (states + hidden * wide) * tokens * config.width * 2

    return config.num_layers * held(setting.remat) + held("none")


def seconds(config: WanTransformerConfig, clip: ClipSize, chip: Chip, asked: Plan, setting: Setting) -> float:
    """Estimated seconds of a step, communication not hidden."""
    devices, batch = asked.devices, asked.batch_size
    weights = config.num_layers * config.width * (8 * config.width + 2 * config.ffn_dim)
    forward = 2.0 * batch * clip.tokens * (weights + 2.0 * config.num_layers * clip.tokens * config.width)
    repeated = REPEATED[setting.remat]
    evaluations = asked.model_flops * repeated / forward
    arithmetic = sum(p.calls * roofline.arithmetic(chip, devices, p.work) for p in asked.programs)
    split = setting.fsdp * setting.context
    gathered = evaluations * setting.accumulation * 2.0 * weights / setting.tensor * (split - 1) / split
    # Bytes of one of queries, keys, values and results on a device, over all blocks and evaluations of its clips.
    share = 2.0 * batch / (setting.data * setting.fsdp) * clip.tokens * config.width * config.num_layers
    share *= evaluations / (setting.context * setting.tensor)
    ulysses = math.gcd(setting.context, config.num_attention_heads // setting.tensor)
    ring = setting.context // ulysses
    step = setting.tensor
    parts = [
        Collective("all-gather", ("fsdp", "context"), tuple(range(0, split * step, step)), 1, gathered),
        Collective(
            "all-to-all", ("context",), tuple(range(0, ulysses * step, step)), 1, 4 * share * (ulysses - 1) / ulysses
        ),
        Collective("collective-permute", ("context",), (0, ulysses * step), 1, 2 * share * (ring - 1)),
    ]
    hosts = [i // topology_host(chip) for i in range(devices)]
    sent = sum((part.bytes / (roofline.rate(chip, part, hosts) * roofline.LINK) for part in parts if part.bytes), 0.0)
    return arithmetic * repeated / REPEATED[asked.setting.remat] + sent


def topology_host(chip: Chip) -> int:
    """Number of devices that communicate at `chip.link`: a host's GPUs, a whole TPU slice."""
    return 8 if chip.platform == "cuda" else 2**30


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
