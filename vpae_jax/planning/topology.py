"""Devices you do not have: topology names, and the compilers for them.

v5p:2x2x4, v6e:16x16, tpu7x:2x2x4      chips along each axis of a TPU slice (libtpu compiles)
h100:8, h20:32                         GPUs, in hosts of eight (JAX's CUDA plugin compiles)
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from vpae_jax.config import nearest
from vpae_jax.planning.chips import CHIPS, Chip
from vpae_jax.runtime.platforms import GPU_FLAGS, TPU_FLAGS, with_flags
from vpae_jax.types import UserError

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Topology:
    """A set of devices.

    Attributes:
      name: as given by the user.
      chip: the kind of device.
      shape: chips along each axis of a TPU slice; the number of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def hosts(self) -> tuple[int, int]:
        """Number of hosts, and of GPUs in each."""
        count = math.prod(self.shape)
        return max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST)


def parse(name: str) -> Topology:
    """Parses a topology's name.

    Raises:
      UserError: for a chip that is not in `CHIPS`, or a shape that its slices do not have.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {name!r}: unknown chip {kind!r}{nearest(kind, CHIPS)}")
    chip = CHIPS[kind]
    example = f"{kind}:{'x'.join(['4'] * chip.axes)}" if chip.platform == "tpu" else f"{kind}:8"
    parts = sizes.split("x")
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) != chip.axes:
        raise UserError(f"topology {name!r}: expected {chip.axes} sizes after the colon, such as {example}")
    shape = tuple(int(part) for part in parts)
    if chip.platform == "cuda" and shape[0] > GPUS_PER_HOST and shape[0] % GPUS_PER_HOST:
        raise UserError(f"topology {name!r}: GPUs come in hosts of {GPUS_PER_HOST}; give a multiple of {GPUS_PER_HOST}")
    return Topology(name, chip, shape)


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    parent = module.rpartition(".")[0]
    return (not parent or installed(parent)) and importlib.util.find_spec(module) is not None


def prepare(topology: Topology) -> None:
    """Sets up this process to compile for devices that it does not have, with the flags that a program on them uses.
    Call it before JAX initialises any device.

    Raises:
      UserError: if the package that compiles for them is not installed.
    """
    # Hide the devices of this machine, and keep the TPU compiler from looking for its machine's metadata.
    settings = {"CUDA_VISIBLE_DEVICES": "-1"}
    if topology.chip.platform == "tpu":
        if not installed("libtpu"):
            raise UserError(f"planning for {topology.name} needs libtpu; pip install 'jax[tpu]=={jax.__version__}'")
        settings |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_LOG_DIR": "disabled",
            "LIBTPU_INIT_ARGS": with_flags(os.environ.get("LIBTPU_INIT_ARGS", ""), TPU_FLAGS),
        }
    else:
        if not (installed("jax_plugins.xla_cuda12") or installed("jax_plugins.xla_cuda13")):
            raise UserError(
                f"planning for {topology.name} needs JAX's CUDA plugin (5.5 GB, no GPU); "
                f"pip install 'jax[cuda12]=={jax.__version__}'"
            )
        # There is no device to time kernels on; without timing, Triton's products fail to compile for some shapes, but
        # cuBLAS's do not.
        untimed = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        settings["XLA_FLAGS"] = f"{with_flags(os.environ.get('XLA_FLAGS', ''), GPU_FLAGS)} {untimed}"
    settings["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.update(settings)
    jax.config.update("jax_platforms", "cpu")
    # Programs for other devices cannot be read back from this device's compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)


def devices(topology: Topology) -> Sequence[Any]:
    """The topology's devices, to build a mesh on and compile for. Call `prepare` first.

    Raises:
      UserError: for a shape that the compiler does not know.
    """
    jax.devices()  # JAX discovers its plugins on the first request for devices
    try:
        return _describe(topology).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"topology {topology.name!r} is not supported by its compiler: {reason}") from error


def _describe(topology: Topology) -> Any:
    chip = topology.chip
    if chip.platform == "tpu":
        # The two cores of a v4 chip act as one device; for later chips this is the default.
        options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    hosts, each = topology.hosts
    return topologies.get_topology_desc(
        platform="cuda", topology_name=chip.name, target_config=target_config(chip), topology=f"1x{hosts}x{each}"
    )


def target_config(chip: Chip) -> str:
    """The description of a GPU for XLA's compiler (the text form of its GpuTargetConfigProto).

    Limits of blocks, registers and shared memory are those of compute capabilities 9.0 and 10.0, which agree (CUDA C++
    programming guide, table of technical specifications).
    """
    gpu = chip.gpu
    if gpu is None:
        raise UserError(f"{chip.name} is not a GPU")
    major, minor = gpu.capability
    return (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
        "shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128 "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        "shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
        f"core_count: {gpu.cores} memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {gpu.l2} "
        f"clock_rate_ghz: {gpu.clock} device_memory_size: {chip.memory} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        "runtime_version { major: 12 minor: 9 patch: 0 } "
        f'device_description_str: "{chip.description}"'
    )
