"""Times attention: against PyTorch's fused attention on CPU, and against attention written out on accelerators.

    python benchmarks/attention.py [--sizes=N:HEADS:HEAD_DIM,...] [--keys=M] [--dtype=float32] [--rounds=5]
        [--markdown=FILE]

Every round runs the peer and then ours in the same process, with as many threads as there are cores; ratios are within
a round, so that other load on the machine affects both. Values and gradients are compared first; if they differ, the
program exits with one line and status 1. Needs torch.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from report import machine, paste, ratios

from vpae_jax import cli
from vpae_jax.models import kernels
from vpae_jax.models.kernels import reference
from vpae_jax.types import UserError

SIZES = "1000:12:128,4096:12:128,4096:6:32,4096:6:64,8192:6:128,16384:6:64"
BEGIN = "<!-- made by benchmarks/attention.py -->"
Arrays = tuple[np.ndarray, ...]
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def torch_pair(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, dtype: str) -> Pair:
    """PyTorch's forward pass, and its forward and backward pass."""
    torch.set_num_threads(os.cpu_count() or 1)
    # Contiguous as [b, heads, n, head_dim], PyTorch's preferred layout; our time includes transpositions.
    q, k, v, d_out = (torch.tensor(x).to(getattr(torch, dtype)).transpose(1, 2).contiguous() for x in (q, k, v, d_out))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    fused = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            return [fused(*leaves).transpose(1, 2)]

    return forward, lambda: [x.transpose(1, 2) for x in torch.autograd.grad(fused(*leaves), leaves, d_out)]


def jax_pair(attention: Callable[..., Any], arrays: Arrays, dtype: str) -> Pair:
    """A kernel's forward pass, and its forward and backward pass, compiled."""
    q, k, v, d_out = (jnp.asarray(x, dtype) for x in arrays)
    forward = jax.jit(lambda q, k, v: [attention(q, k, v)])
    both = jax.jit(lambda q, k, v, d_out: jax.vjp(attention, q, k, v)[1](d_out))
    return (
        lambda: jax.block_until_ready(forward(q, k, v)),
        lambda: jax.block_until_ready(both(q, k, v, d_out)),
    )


def compare(
    theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int, tolerance: float
) -> list[tuple[float, float]]:
    """Seconds of theirs and ours in each round, after checking that their results are equal."""
    for expected, found in zip(theirs(), ours(), strict=True):
        expected = expected.detach().float().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
        expected, found = expected.astype(np.float32), np.asarray(found).astype(np.float32)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not error < tolerance:
            sys.exit(f"benchmarks/attention.py: results differ by {error:.1e}, expected at most {tolerance:.0e}")
    return [(_seconds(theirs), _seconds(ours)) for _ in range(rounds)]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(size: tuple[int, int, int], keys: int | None, dtype: str, rounds: int) -> str:
    """Measures one size, and returns a line of the Markdown table."""
    n, heads, head_dim = size
    m = n if keys is None else keys
    generator = np.random.default_rng(0)
    arrays = tuple(generator.standard_normal((1, t, heads, head_dim), np.float32) for t in (n, m, m, n))
    on_processor = jax.default_backend() == "cpu"
    peer = torch_pair(*arrays, dtype) if on_processor else jax_pair(reference.attention, arrays, dtype)
    kernel = kernels.choose(jax.default_backend(), arrays[0].shape, arrays[1].shape, dtype)
    cells = [f"{n:,} x {m:,}", str(heads), str(head_dim), kernel]
    for theirs, ours in zip(peer, jax_pair(kernels.attention, arrays, dtype), strict=True):
        times = compare(theirs, ours, rounds, 1e-5 if dtype == "float32" and on_processor else 3e-2)
        theirs, ours = zip(*times, strict=True)
        cells += [f"{statistics.median(ours):.3f}", ratios(ours, theirs)]
    return f"| {' | '.join(cells)} |"


def parse_sizes(text: str) -> list[tuple[int, int, int]]:
    """Parses "N:HEADS:HEAD_DIM,...".

    Raises:
      UserError: malformed text.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise UserError(f"--sizes: {part!r} is not of the form N:HEADS:HEAD_DIM, such as 4096:12:128")
        sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return sizes


def main(argv: list[str]) -> None:
    parser = cli.Parser("python benchmarks/attention.py", __doc__)
    parser.add_argument(
        "--sizes", type=parse_sizes, default=SIZES, help="queries, heads and channels per head for each size"
    )
    parser.add_argument("--keys", type=int, help="number of keys; by default as many as queries")
    parser.add_argument("--dtype", default="float32", choices=cli.DTYPES, help="precision of both")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    given = parser.parse_args(argv)
    device = jax.devices()[0].device_kind
    peer = "PyTorch's" if device == "cpu" else "attention written out"
    lines = [f"{given.dtype}, {given.rounds} rounds; peer: {peer}; {device}; {machine('jax', 'torch')}.", ""]
    head = ("queries x keys", "heads", "head_dim", "kernel", "forward, s", "ratio", "forward and backward, s", "ratio")
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for size in given.sizes:
        lines.append(row(size, given.keys, given.dtype, given.rounds))
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if given.markdown is not None:
        paste(given.markdown, "\n".join(("", *lines, "")), BEGIN)


if __name__ == "__main__":
    cli.run(main)
