"""Measures one action in a process of its own: its time, its memory, and the bytes that it reads.

    python benchmarks/measure.py '{"action": "ours", "folder": "MODEL", "dtype": "bfloat16"}'

prints the measurement as JSON on its last line. Each action is a function of this module: it imports and initialises
what it needs, and returns what is to be measured (`Action`). Memory and bytes come from Linux: the peak of the resident
set, and the bytes that the process requested to read.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

PART = "transformer"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Action:
    """What is measured, and what happens before and after.

    Attributes:
      run: what is measured.
      describe: gives facts about its result, afterwards.
      ready: called just before, to wait for other processes.
    """

    run: Callable[[], Any]
    describe: Callable[[Any], Facts] = lambda _: {"held": 0}
    ready: Callable[[], object] = lambda: None


def measure(*specs: Mapping[str, Any], touch: int = 0) -> list[Facts]:
    """Measures actions concurrently, each in a new process.

    Args:
      specs: name and arguments of each action.
      touch: bytes of memory to use and release just before; see `_touch`.

    Returns:
      The result of `_measured` for each.

    Raises:
      RuntimeError: an action failed; with its process's output.
    """
    command = [sys.executable, str(Path(__file__).resolve())]
    variables = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    running = [
        subprocess.Popen(
            [*command, json.dumps({**spec, "touch": touch // len(specs)})],
            env={**inherited, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for spec in specs
    ]
    outputs = [process.communicate()[0] for process in running]
    for spec, process, output in zip(specs, running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{spec} failed:\n{output}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def diffusers(folder: str, dtype: str, copy: bool = False) -> Action:
    """Diffusers loads a checkpoint, and every value is read once, since its tensors are only mapped pages until then.

    Args:
      folder: the model directory.
      dtype: of the result.
      copy: whether the tensors are then copied to memory of their own, like ours.
    """
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    def load() -> Any:
        model = WanTransformer3DModel.from_pretrained(f"{folder}/{PART}", torch_dtype=getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                if copy:
                    parameter.data = parameter.data.clone()
                else:
                    parameter.sum()
        return model

    return Action(load, lambda model: {"held": sum(p.nbytes for p in model.parameters())})


def diffusers_convert(folder: str, target: str) -> Action:
    """Diffusers loads a checkpoint and saves it again in its own layout, the only one that it writes."""
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    def convert() -> None:
        model = WanTransformer3DModel.from_pretrained(f"{folder}/{PART}", torch_dtype=torch.bfloat16)
        model.save_pretrained(f"{target}/{PART}")

    return Action(convert)


def diffusers_verify(folder: str, target: str) -> Action:
    """Diffusers loads two checkpoints, and torch compares them."""
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    def verify() -> int:
        first, second = (
            WanTransformer3DModel.from_pretrained(f"{one}/{PART}", torch_dtype=torch.bfloat16).state_dict()
            for one in (folder, target)
        )
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        return len(first)

    return Action(verify, lambda count: {"held": 0, "compared": count})


def ours(
    folder: str, dtype: str, devices: int = 1, repeat: bool = False, digest: str = "", rank: int = 0, address: str = ""
) -> Action:
    """We load a checkpoint onto devices.

    Args:
      folder: the model directory.
      dtype: of the result.
      devices: number of devices of this process; several form an fsdp mesh.
      repeat: whether to measure the second load of the process.
      digest: which checksums to return: "whole", of every array; "shards", of every shard; or none if empty.
      rank: index of this process, of two.
      address: coordinator address of the two; empty for a single process.
    """
    import jax
    from jax.experimental import multihost_utils

    from vpae_jax.weights.loading import read_part

    jax.config.update("jax_num_cpu_devices", devices)
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=rank)
    place = _place() if len(jax.devices()) > 1 else None
    model, read = _watched(folder)

    def load() -> Any:
        return jax.block_until_ready(read_part(model, PART, dtype, place)[1])

    if repeat:
        load()
        read.clear()

    def describe(params: Any) -> Facts:
        shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
        held = sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())
        digests = _digests(params, digest == "shards") if digest else {}
        if address:
            jax.distributed.shutdown()
        return {"held": held, "bytes_read": sum(read), "digests": digests}

    return Action(load, describe, lambda: multihost_utils.sync_global_devices("ready") if address else None)


def convert(folder: str, target: str, form: str) -> Action:
    """We rewrite a checkpoint in either layout."""
    from vpae_jax.weights.find import find_model
    from vpae_jax.weights.writing import open_values, write_part

    def run() -> None:
        with open_values(find_model(Path(folder)), PART) as values:
            write_part(Path(target), PART, values, form)  # type: ignore[arg-type]

    return Action(run)


def verify(folder: str, target: str) -> Action:
    """We check that two checkpoints are bit-identical."""
    from vpae_jax.weights.find import find_model
    from vpae_jax.weights.writing import open_values, verify_part

    def run() -> int:
        with open_values(find_model(Path(folder)), PART) as values:
            return verify_part(find_model(Path(target)), PART, values, None)

    return Action(run, lambda count: {"held": 0, "compared": count})


ACTIONS: Mapping[str, Callable[..., Action]] = {
    action.__name__: action for action in (diffusers, diffusers_convert, diffusers_verify, ours, convert, verify)
}


def _place() -> Any:
    """The placement of each parameter if all devices of all processes form one fsdp mesh."""
    import jax

    from vpae_jax import sharding
    from vpae_jax.config import MeshConfig

    mesh = sharding.make_mesh(MeshConfig())

    def place(path: str, shape: tuple[int, ...]) -> Any:
        leaf = jax.ShapeDtypeStruct(shape, "float32")
        return sharding.param_shardings({path: leaf}, sharding.TRANSFORMER_RULES, mesh)[path]

    return place


def _watched(folder: str) -> tuple[Any, list[int]]:
    """A model, and a list that receives the bytes of tensors read whenever its transformer is closed."""
    from vpae_jax.weights.directory import StoredPart
    from vpae_jax.weights.find import find_model

    read: list[int] = []

    class Watched(StoredPart):
        @contextmanager
        def open(self):  # type: ignore[override]
            with super().open() as tensors:
                yield tensors
                read.append(tensors.bytes_read)

    model = find_model(Path(folder))
    part = model.part(PART)
    watched = Watched(**{field.name: getattr(part, field.name) for field in fields(part)})
    return replace(model, parts={PART: watched}), read


def _digests(params: Any, shards: bool) -> dict[str, int]:
    """Checksums of every array, or of its shards in this process, without replicas."""
    from vpae_jax.weights.parts import flat

    result = {}
    for path, value in flat(params).items():
        if not shards:
            result[path] = _checksum(value)
            continue
        for shard in value.addressable_shards:
            if shard.replica_id == 0:
                starts = [index.indices(size)[0] for index, size in zip(shard.index, value.shape, strict=True)]
                result[f"{path}{starts}"] = _checksum(shard.data)
    return result


def _checksum(value: Any) -> int:
    import numpy as np

    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)


def _measured(action: Action, touch: int) -> Facts:
    """Runs an action; for `touch`, see `measure`.

    Returns:
      `seconds`; `cpu`, the CPU seconds; `extra`, the peak growth of the resident set in bytes, minus the arrays that
      are the result (`held`); `rchar`, the bytes that the process requested to read for any purpose; and the facts
      about the result.
    """
    gc.collect()
    if touch:
        _touch(touch)
    action.ready()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, read, cpu, start = _status("VmRSS"), _rchar(), time.process_time(), time.perf_counter()
    result = action.run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    read, peak = _rchar() - read, _status("VmHWM")
    facts = action.describe(result)
    return {"seconds": seconds, "cpu": cpu, "extra": peak - before - facts["held"], "rchar": read, **facts}


def _touch(size: int) -> None:
    """Uses this much memory and releases it, since a virtual machine gets memory from its host only on first use."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def main(argv: Sequence[str]) -> None:
    spec = json.loads(argv[0])
    action, touch = ACTIONS[spec.pop("action")], spec.pop("touch", 0)
    facts = _measured(action(**spec), touch)
    print(f"\n{json.dumps(facts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
