"""Reads pickles of NumPy arrays in nested dictionaries, as older JAX packages store weights, without running code.

A pickle may name and call any function. This reader accepts only the three names that NumPy writes for an array, and
rejects all others. They are replaced by its own classes, which only record their arguments: NumPy's classes trust what
a pickle says about a dtype, and a damaged pickle can break float64 for the whole process. Arrays are created afterwards
from the recorded bytes.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vpae_jax.types import UserError
from vpae_jax.weights.pickles import DAMAGE
from vpae_jax.weights.safetensors_file import one_line

# Arrays by their keys joined by slashes, such as "params/conv/kernel".
Arrays = dict[str, Float[np.ndarray, "..."]]
FLOATS = ("f2", "f4", "f8")
DEPTH = 16  # maximum nesting of dictionaries


class _DType:
    """A dtype as recorded in a pickle."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """An array as recorded in a pickle."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reconstruct:
    """Stands in for the function that creates an array."""

    def __new__(cls, *_: Any) -> Any:
        return _Array()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function is given a state")


# NumPy 1 calls its module numpy.core, NumPy 2 numpy._core.
KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_arrays(path: Path) -> Arrays:
    """Reads the arrays of a file, under their keys joined by slashes.

    Raises:
      UserError: a file that cannot be read, names anything but arrays, or holds anything but float arrays in nested
        dictionaries with string keys.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        why = one_line(str(error))
        raise UserError(
            f"{path}: refused: holds more than arrays, or is damaged ({why}); install its package again"
        ) from error
    except DAMAGE as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: cannot be read as a pickle of arrays ({why}); install its package again") from error
    arrays: Arrays = {}
    _collect(path, found, (), arrays)
    return arrays


def _collect(path: Path, found: Any, keys: tuple[str, ...], arrays: Arrays) -> None:
    if type(found) is dict and len(keys) < DEPTH and all(type(key) is str for key in found):
        for key, value in found.items():
            _collect(path, value, (*keys, key), arrays)
    elif type(found) is _Array and (array := _array(found.state)) is not None:
        arrays["/".join(keys)] = array
    else:
        at, what = one_line("/".join(keys)) or "the file", type(found).__name__.strip("_").lower()
        raise UserError(f"{path}: {at} is not a float array ({what}); install its package again")


def _array(state: Any) -> Float[np.ndarray, "..."] | None:
    """The array of a state as NumPy writes it (version, shape, dtype, Fortran order, bytes); None for another kind of
    state, or if the bytes do not match the shape."""
    match state:
        case (int(), tuple() as shape, _DType() as dtype, bool() as fortran, bytes() as content):
            whole = all(type(size) is int and size >= 0 for size in shape)
            if not whole or dtype.code not in FLOATS or dtype.order not in ("<", ">", "="):
                return None
            kind = np.dtype(dtype.order + dtype.code)
            if math.prod(shape) * kind.itemsize != len(content):
                return None
            return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C").copy()
    return None
