"""Which kinds of devices JAX looks for, and what their compilers and memory are told before it does.

Every program calls `prepare` when it begins (`cli.py`), so a command that is typed and a launcher get the same, and
`plan` compiles with the same flags. What the user has set in the environment stays, flag by flag.

TPU_FLAGS makes exchanges of tokens for heads run beside other work: without it libtpu compiles all 27 all-to-alls of a
transformer's step on v5p synchronous, with it none (v5p:2x2x1, fsdp 2 x context 2; `tests/planning/test_overlap.py`
counts those of a smaller block). Gathers of weights stay synchronous there. MaxDiffusion's and MaxText's recipes fuse
them with other work (xla_tpu_enable_async_collective_fusion_fuse_all_gather and five flags beside it), which libtpu
0.0.42 does for 21 of 34; but libtpu 0.0.50 refuses to on v5p, since it may give wrong results or hang. On v6e all is
asynchronous without any flag. Flags that move collectives to the SparseCore are left out: they are reported to hang on
v5p. A flag that is not known ends a process at its start, so tests start with each.

GPU_FLAGS gather a block's weights while the one before runs. XLA schedules for overlap anyhow: with its latency-hiding
scheduler asked for, or forbidden, a sharded block compiles to the same text. The thresholds up to which collectives are
combined stay XLA's, 30 MiB: a matrix of 14B has 50 MiB and more, and several at once would only cost memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # what TPUs give as their vendor; JAX looks for them in the same place
GPUS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))

# Share of a GPU's memory that XLA takes when it starts, and `plan` supposes; JAX's own default is .75. The rest is for
# the CUDA context, NCCL's buffers and cuDNN's.
GPU_MEMORY = 0.92
MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # XLA refuses both at once
Flags = Mapping[str, str]
TPU_FLAGS: Flags = MappingProxyType({"xla_tpu_enable_async_all_to_all": "true"})
GPU_FLAGS: Flags = MappingProxyType({"xla_gpu_enable_pipelined_all_gather": "true"})
CACHE = "JAX_COMPILATION_CACHE_DIR"


def compute_dtype() -> str:
    """The precision that networks are sampled in where nobody says: bfloat16 on accelerators, for which it is the fast
    one and Wan's own, and float32 on processors."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def found(pci: Path = PCI, gpus: tuple[Path, ...] = GPUS) -> Literal["tpu", "gpu"] | None:
    """The accelerators of this machine, without waking them."""
    if any(vendor.read_text().strip() == GOOGLE for vendor in pci.glob("*/vendor")):
        return "tpu"
    return "gpu" if any(gpu.exists() for gpu in gpus) else None


def prepare(environment: MutableMapping[str, str], accelerator: Literal["tpu", "gpu"] | None) -> None:
    """Sets what the environment leaves open. Call it before JAX touches any device.

    Without an accelerator JAX uses the processor alone: where libtpu is installed, as `plan` and the tests want it, JAX
    would look for TPUs, and libtpu print a page of errors. What the user has set (JAX_PLATFORMS) stays.

    Args:
      environment: of this process.
      accelerator: as `found`.
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
    """A variable of flags, "--name=value --name=value", with those that it does not name itself."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    return " ".join([*given.split(), *(f"--{name}={value}" for name, value in flags.items() if name not in named)])


def keep_compiled(environment: Mapping[str, str], accelerator: Literal["tpu", "gpu"] | None, folder: Path) -> None:
    """Keeps compiled programs in a folder, from which a run that continues takes them: large ones compile for minutes.

    Of several processes the first one alone writes them. On a processor, which compiles small models only, none are
    kept. JAX_COMPILATION_CACHE_DIR names another place, which may be an address in an object store, or switches it off
    where it is empty.

    Args:
      folder: on a file system that all processes share; made when there is something to keep.
    """
    if accelerator is not None and CACHE not in environment:
        jax.config.update("jax_compilation_cache_dir", str(folder))
