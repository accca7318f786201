"""Which kinds of devices JAX looks for, and what networks run in on them.

Where libtpu is installed, as `plan` and the tests want it, JAX looks for TPUs on every machine, and libtpu prints a
page of errors on one that has none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # what TPUs give as their vendor; JAX looks for them in the same place
GPUS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def compute_dtype() -> str:
    """The precision that networks are sampled in where nobody says: bfloat16 on accelerators, for which it is the fast
    one and Wan's own, and float32 on processors."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def skip_absent_tpus(pci: Path = PCI, gpus: tuple[Path, ...] = GPUS) -> None:
    """Has JAX use the processor alone where libtpu is installed and there is neither a TPU nor a GPU.

    What the user has set (JAX_PLATFORMS) stays. Call it before JAX touches any device.
    """
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms is not None or importlib.util.find_spec("libtpu") is None:
        return
    tpu = any(vendor.read_text().strip() == GOOGLE for vendor in pci.glob("*/vendor"))
    if not tpu and not any(gpu.exists() for gpu in gpus):
        jax.config.update("jax_platforms", "cpu")
