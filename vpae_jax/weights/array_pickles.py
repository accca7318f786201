"""Pickles of plain NumPy arrays in nested dictionaries, as older JAX packages keep weights; read without running code.

A pickle may name any function and call it. This reader knows three names, those that NumPy writes for an array, and
refuses all others; what it returns is checked to be dictionaries of float arrays.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vpae_jax.types import UserError
from vpae_jax.weights.safetensors_file import one_line

# By dotted path, as "params/conv/kernel".
Arrays = dict[str, Float[np.ndarray, "..."]]
DEPTH = 16  # dictionaries in dictionaries


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An array that the pickle then fills. NumPy writes shape (0,) here; another would claim memory for nothing."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(f"an array of shape {shape!r} without content")
    return np.ndarray((0,), np.int8)


# NumPy 1 has called its module numpy.core, NumPy 2 numpy._core.
KNOWN = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy._core.multiarray", "_reconstruct"): _empty,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_arrays(path: Path) -> Arrays:
    """The arrays of a file, under their keys joined by slashes.

    Raises:
      UserError: a file that cannot be read, names anything but arrays, or holds anything but float arrays in nested
        dictionaries with text for keys.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        why = one_line(str(error))
        raise UserError(
            f"{path}: refused: holds more than arrays, or is damaged ({why}); install its package again"
        ) from error
    except Exception as error:  # a damaged pickle makes any of its few calls fail in any way
        why = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: cannot be read as a pickle of arrays ({why}); install its package again") from error
    arrays: Arrays = {}
    _collect(path, found, (), arrays)
    return arrays


def _collect(path: Path, found: Any, keys: tuple[str, ...], arrays: Arrays) -> None:
    at = "/".join(keys) or "the file"
    if type(found) is np.ndarray and found.dtype.kind == "f":
        arrays["/".join(keys)] = found
    elif type(found) is dict and len(keys) < DEPTH and all(type(key) is str for key in found):
        for key, value in found.items():
            _collect(path, value, (*keys, key), arrays)
    else:
        what = f"{type(found).__name__} of {found.dtype}" if isinstance(found, np.ndarray) else type(found).__name__
        raise UserError(f"{path}: {at} is a {what}, expected float arrays in dictionaries; install its package again")
