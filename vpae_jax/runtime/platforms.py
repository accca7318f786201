"""Settings made before JAX initialises its devices: the platform, compiler flags, and the use of GPU memory.

Every program calls `prepare` at startup (`cli.py`), so launchers and commands typed by hand get the same settings, and
`plan` compiles with the same flags. Any flag that the user has set in the environment is kept.

TPU_FLAGS lets the exchange of tokens for heads overlap with computation: without it, libtpu compiles all 27 all-to-alls
of a transformer's step on v5p as synchronous, with it none (v5p:2x2x1, fsdp 2 x context 2;
`tests/planning/test_overlap.py` counts those of a smaller block). Gathers of weights stay synchronous there. The
recipes of MaxDiffusion and MaxText fuse them with computation, by
xla_tpu_enable_async_collective_fusion_fuse_all_gather and five more flags, which libtpu 0.0.42 does for 21 of 34; but
libtpu 0.0.50 rejects this on v5p, because it may give wrong results or hang. On v6e everything is asynchronous without
any flag. Flags that move collectives to the SparseCore are omitted, because they are reported to hang on v5p. An
unknown flag ends a process at startup, so the tests start with each flag.

GPU_FLAGS gathers a block's weights while the previous block runs. XLA schedules for overlap anyway: a sharded block
compiles to the same text with the latency-hiding scheduler on or off. The threshold up to which collectives are
combined stays at XLA's 30 MiB: a matrix of 14B has 50 MiB or more, and gathering several at once would only cost
memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # PCI vendor id of TPUs; JAX looks for them in the same way
GPUS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))

# Fraction of a GPU's memory that XLA allocates at startup, and that `plan` assumes; JAX's default is 0.75. The rest is
# for the CUDA context and the buffers of NCCL and cuDNN.
GPU_MEMORY = 0.92
MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # XLA rejects both at once
Flags = Mapping[str, str]
TPU_FLAGS: Flags = MappingProxyType({"xla_tpu_enable_async_all_to_all": "true"})
GPU_FLAGS: Flags = MappingProxyType({"xla_gpu_enable_pipelined_all_gather": "true"})
CACHE = "JAX_COMPILATION_CACHE_DIR"


def compute_dtype() -> str:
    """Returns the default precision for sampling: bfloat16 on accelerators, where it is fast and the precision of Wan's
    own code, and float32 on CPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def found(pci: Path = PCI, gpus: tuple[Path, ...] = GPUS) -> Literal["tpu", "gpu"] | None:
    """Returns the kind of this machine's accelerators, without initialising them."""
    if any(vendor.read_text().strip() == GOOGLE for vendor in pci.glob("*/vendor")):
        return "tpu"
    return "gpu" if any(gpu.exists() for gpu in gpus) else None


def prepare(environment: MutableMapping[str, str], accelerator: Literal["tpu", "gpu"] | None) -> None:
    """Sets what the environment does not set. Must be called before JAX touches any device.

    Without an accelerator, JAX is restricted to the CPU. Otherwise, if libtpu is installed (for `plan` and the tests),
    JAX would look for TPUs and libtpu would print a page of errors. The user's JAX_PLATFORMS is kept.

    Args:
      environment: environment of this process.
      accelerator: as returned by `found`.
    """
    if accelerator == "tpu":
        environment["LIBTPU_INIT_ARGS"] = with_flags(environment.get("LIBTPU_INIT_ARGS", ""), TPU_FLAGS)
    elif accelerator == "gpu":
        if not any(name in environment for name in MEMORY_NAMES):
            environment[MEMORY_NAMES[0]] = f"{GPU_MEMORY:g}"
        environment["XLA_FLAGS"] = with_flags(environment.get("XLA_FLAGS", ""), GPU_FLAGS)
    else:
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if platforms is None and importlib.util.find_spec("libtpu") is not None:
            jax.config.update("jax_platforms", "cpu")


def with_flags(given: str, flags: Flags) -> str:
    """Adds flags to a variable, "--name=value --name=value", except those that it already contains."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    return " ".join([*given.split(), *(f"--{name}={value}" for name, value in flags.items() if name not in named)])


def keep_compiled(environment: Mapping[str, str], accelerator: Literal["tpu", "gpu"] | None, folder: Path) -> None:
    """Caches compiled programs in a folder for resumed runs, since large programs take minutes to compile.

    Of several processes, only the first writes them. On CPUs, where models are small, nothing is cached.
    JAX_COMPILATION_CACHE_DIR selects another folder, or an address in an object store; if empty, it disables the cache.

    Args:
      folder: must be on a file system shared by all processes; created when there is something to cache.
    """
    if accelerator is not None and CACHE not in environment:
        jax.config.update("jax_compilation_cache_dir", str(folder))
