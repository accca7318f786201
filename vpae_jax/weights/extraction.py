"""Low-rank extraction: a student's change relative to its teacher as adapters, and how much of it they retain."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Float32, Key, Shaped
from tqdm import tqdm

from vpae_jax.types import UserError
from vpae_jax.weights import matching
from vpae_jax.weights.lora import KERNEL_SUFFIX, Adapter, Lora
from vpae_jax.weights.names import TRANSFORMER_ROWS
from vpae_jax.weights.writing import Values

# A matrix with a side of at most this length is decomposed exactly: 0.7 s for 1536 x 8960 on two cores. 5120 x 13824
# would take half a minute; subspace iteration takes some seconds and retains at most 0.3% less energy, even if singular
# values fall slowly.
EXACT_SIDE = 2048
SPARE, ITERATIONS = 32, 6


@dataclass(frozen=True)
class Energy:
    """How much of one layer's change its adapter retains.

    Attributes:
      path: the layer ("blocks/attn1/to_q").
      layer: index in the stack.
      rank: of its adapter; 0 without an adapter, if nothing changed.
      change: Frobenius norm of student minus teacher.
      retained: fraction of the squared norm that the adapter retains; 1 if nothing changed.
    """

    path: str
    layer: int
    rank: int
    change: float
    retained: float


@dataclass(frozen=True)
class Extraction:
    """A student's change relative to its teacher.

    Attributes:
      lora: adapters of the linear layers that changed, and differences of other parameters if requested.
      energies: of all linear layers.
      outside: fraction of the squared change of all parameters that lies outside linear layers: in biases, norms,
        modulation and the patch embedding.
      whole: whether `lora` includes that part, too.
    """

    lora: Lora
    energies: tuple[Energy, ...]
    outside: float
    whole: bool

    @property
    def retained(self) -> float:
        """Fraction of the linear layers' squared change that the adapters retain."""
        total = sum(energy.change**2 for energy in self.energies)
        held = sum(energy.retained * energy.change**2 for energy in self.energies)
        return held / total if total else 1.0


def extract(student: Values, teacher: Values, rank: int, differences: bool = False) -> Extraction:
    """Computes the best adapters of a rank for a student's change, with one layer in memory at a time.

    Args:
      student: a transformer's weights.
      teacher: the weights that it was trained from.
      rank: of every adapter, limited by the shorter side of each layer.
      differences: whether to keep the whole change of all other parameters.

    Raises:
      UserError: a rank below 1; different architectures; NaN in either.
    """
    if rank < 1:
        raise UserError(f"rank is {rank}, expected at least 1; 64 is a common choice")
    _check_alike(student, teacher)
    adapters: dict[tuple[str, int], Adapter] = {}
    others: dict[tuple[str, int], Shaped[np.ndarray, "..."]] = {}
    energies: list[Energy] = []
    outside = 0.0
    parameters = matching.match(TRANSFORMER_ROWS, student.shapes(), "diffusers")
    pieces = [(parameter, layer) for parameter in parameters for _, layer in parameter.layers]
    for parameter, layer in tqdm(pieces, desc="extracting", unit="layer", leave=False, disable=None):
        change = _difference(student, teacher, parameter.path, layer)
        squared = _squared(change)
        if not np.isfinite(squared):
            raise UserError(f"{parameter.path} of layer {layer}: student or teacher holds NaN; its weights are damaged")
        if parameter.op.kernel and change.ndim == 2:
            path = parameter.path.removesuffix(KERNEL_SUFFIX)
            held, size = squared, 0
            if squared:
                adapters[path, layer], held = low_rank(change, rank)
                size = adapters[path, layer].rank
            energies.append(Energy(path, layer, size, squared**0.5, min(held / squared, 1.0) if squared else 1.0))
        else:
            outside += squared
            if differences and squared:
                others[parameter.path, layer] = change
    total = outside + sum(energy.change**2 for energy in energies)
    return Extraction(Lora(adapters, others), tuple(energies), outside / total if total else 0.0, differences)


def low_rank(change: Float32[np.ndarray, "d_in d_out"], rank: int, seed: int = 0) -> tuple[Adapter, float]:
    """The adapter closest to a matrix, and the squared norm of its product.

    Singular values are split evenly between A and B, so that both fit a narrow dtype. The product is the matrix
    projected on an orthonormal basis; at full rank it is the matrix itself, up to rounding.

    Args:
      change: the matrix; not all zero.
      rank: at least 1; limited by the shorter side.
      seed: for the start of subspace iteration, used if both sides are longer than `EXACT_SIDE`.
    """
    if change.shape[0] > change.shape[1]:
        turned, held = low_rank(np.ascontiguousarray(change.T), rank, seed)
        return Adapter(np.ascontiguousarray(turned.b.T), np.ascontiguousarray(turned.a.T)), held
    side = change.shape[0]
    rank = min(rank, side)
    if side <= EXACT_SIDE or rank + SPARE >= side // 4:
        values = change.astype(np.float64)
        basis = _leading(values, rank)
    else:
        values = change
        wide = np.asarray(_subspace(jnp.asarray(change), jax.random.key(seed), rank + SPARE))
        basis = wide @ _leading((wide.T @ change).astype(np.float64), rank)
    rows = basis.T @ values
    sizes = np.linalg.norm(rows, axis=1)
    roots = np.sqrt(sizes)
    b = rows / np.where(roots > 0, roots, 1)[:, None]
    adapter = Adapter((basis * roots).astype(np.float32), b.astype(np.float32))
    return adapter, float(np.sum(sizes.astype(np.float64) ** 2))


def format_energies(extraction: Extraction) -> str:
    """The retained energies as text: one line for each kind of layer, then the totals."""
    energies = extraction.energies
    kinds: dict[str, list[Energy]] = defaultdict(list)
    for energy in energies:
        kinds[energy.path].append(energy)
    width = max(len("linear layer"), *(len(path) for path in kinds))
    lines = [f"{'linear layer':{width}}  layers  min retained  mean retained"]
    lines += [_summary(path, group, width) for path, group in kinds.items()]
    lines += [_summary("all", energies, width), *_totals(extraction)]
    return "\n".join(lines)


def _summary(name: str, energies: Sequence[Energy], width: int) -> str:
    retained = [energy.retained for energy in energies]
    return f"{name:{width}}  {len(retained):6}  {min(retained):12.4f}  {sum(retained) / len(retained):13.4f}"


def _totals(extraction: Extraction) -> Iterator[str]:
    yield ""
    count, changed = len(extraction.energies), len(extraction.lora.adapters)
    held = f"the adapters retain {extraction.retained:.2%} of their squared change"
    yield f"{changed} of {count} linear layers changed; {held}"
    kept = "written in full" if extraction.whole else "lost in Diffusers' form, and written in ComfyUI's (--format=wan)"
    where = "in biases, norms, modulation and the patch embedding"
    yield f"{extraction.outside:.2%} of the squared change of all parameters is {where}: {kept}"


def _check_alike(student: Values, teacher: Values) -> None:
    """Raises `UserError` if the two have different architectures."""
    for field in dataclasses.fields(student.config):
        ours, theirs = getattr(student.config, field.name), getattr(teacher.config, field.name)
        if ours != theirs:
            raise UserError(
                f"the student's {field.name} is {ours!r}, the teacher's {theirs!r}; give this student's teacher"
            )


def _difference(student: Values, teacher: Values, path: str, layer: int) -> Float32[np.ndarray, "..."]:
    """Student minus teacher."""
    return student.read(path, layer).astype(np.float32) - teacher.read(path, layer).astype(np.float32)


def _squared(change: Float32[np.ndarray, "..."]) -> float:
    """The squared norm, summed in pieces to avoid a float64 copy of a large matrix."""
    return sum(float(np.sum(np.square(part.astype(np.float64)))) for part in np.atleast_1d(change))


def _leading(values: Float[np.ndarray, "side long"], rank: int) -> Float[np.ndarray, "side rank"]:
    """The left singular vectors of the largest singular values, from the eigenvectors of a Gram matrix."""
    side = values.shape[0]
    _, vectors = scipy.linalg.eigh(values @ values.T, subset_by_index=[side - rank, side - 1], check_finite=False)
    return vectors[:, ::-1]


@partial(jax.jit, static_argnums=2)
def _subspace(values: Float[Array, "side long"], key: Key[Array, ""], size: int) -> Float[Array, "side size"]:
    """An orthonormal basis that approximately contains the leading left singular vectors (subspace iteration)."""
    # By default, accelerators multiply with less than float32 precision.
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(jax.random.normal(key, (values.shape[0], size), values.dtype))[0]
        for _ in range(ITERATIONS):
            basis = jnp.linalg.qr(values @ jnp.linalg.qr(values.T @ basis)[0])[0]
        return basis
