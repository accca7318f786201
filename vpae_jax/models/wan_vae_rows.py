"""Spreads the rows of a clip's frames over the devices of a mesh, if the autoencoder is too slow or large for one.

Each device holds a strip: a run of the rows of every array, which at every resolution belong to the same latent rows.
Strips exchange one row above and one below for each 3x3 convolution, and keys and values of the attention. If the
devices do not divide the number of latent rows, it is padded: convolutions read zeros there, as beyond a frame's edge,
and attention masks these rows.

Compiled for eight v5p chips, a latent frame at 720p in bfloat16 is decoded with 67 exchanges of rows and 2 gathers of
keys and values, and each chip does 1/7.5 of one chip's arithmetic (96 rows for 90).

The result equals that of one device up to the order of sums. Halo exchange for convolutions: Dryden et al.
(arXiv:1903.06681).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from vpae_jax.sharding import AXES

CLIP_AXES, ROW_AXES = ("data", "fsdp"), ("context", "tensor")
P = PartitionSpec
Frames = Float[Array, "_ _ _ _ _"]  # [b, t, rows, w, c]; each may change from input to output


@dataclass(frozen=True)
class Strip:
    """Describes a device's rows, inside a program that runs on each device.

    Attributes:
      devices: number of devices over which rows are spread, in order.
      valid, padded: number of latent rows of a frame, without and with padding.
    """

    devices: int
    valid: int
    padded: int

    def extended(self, x: Frames, above: int, below: int) -> Frames:
        """This device's rows, with zeros as padding, between the last rows of the strip above and the first of the
        strip below; zeros beyond a frame's edge."""
        own, last = x.shape[2], self.devices - 1
        if self.valid != self.padded:
            place = jax.lax.axis_index(ROW_AXES) * own + jnp.arange(own)
            x = jnp.where((place < self._valid(own))[:, None, None], x, 0)
        parts = [x]
        if above:
            down = [(i, i + 1) for i in range(last)]  # a device that receives nothing gets zeros
            parts.insert(0, jax.lax.ppermute(x[:, :, -above:], ROW_AXES, down))
        if below:
            up = [(i + 1, i) for i in range(last)]
            parts.append(jax.lax.ppermute(x[:, :, :below], ROW_AXES, up))
        return jnp.concatenate(parts, axis=2)

    def seen(self, own: int) -> Bool[Array, "rows"] | None:
        """Which of all rows are not padding, if a device has `own` rows; None if all."""
        return None if self.valid == self.padded else jnp.arange(own * self.devices) < self._valid(own)

    def _valid(self, own: int) -> int:
        """Rows of a frame without padding, if a device has `own` rows."""
        return self.valid * own * self.devices // self.padded

    def gathered(self, x: Frames) -> Frames:
        """All rows, including padding."""
        return jax.lax.all_gather(x, ROW_AXES, axis=2, tiled=True)


@dataclass(frozen=True)
class Rows:
    """Placement of an autoencoder's clips on a mesh: rows along `context` and `tensor`, clips along the other axes.

    Attributes:
      mesh: axes as in `sharding`.
    """

    mesh: Mesh

    @property
    def devices(self) -> int:
        """Number of devices over which the rows of a clip are spread."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    def run(
        self, function: Callable[..., tuple[Frames, Any]], weights: Any, x: Frames, carried: Any, latent_rows: int
    ) -> tuple[Frames, Any]:
        """Runs `function(weights, x, carried, strip)` on each device with its rows.

        Args:
          weights: the same on all devices.
          x: frames of clips.
          carried: second result of the call before, or None. Its arrays of five axes are frames, in padded strips;
            others are the same on all devices.
          latent_rows: number of the clip's latent rows, of which that of `x` is a multiple.

        Returns:
          Frames, and the `carried` of the next call.
        """
        padded = -(-latent_rows // self.devices) * self.devices
        strip, scale = Strip(self.devices, latent_rows, padded), x.shape[2] // latent_rows
        x = jnp.pad(x, ((0, 0), (0, 0), (0, (padded - latent_rows) * scale), (0, 0), (0, 0)))
        clips = math.prod(self.mesh.shape[axis] for axis in CLIP_AXES)
        frames = P(CLIP_AXES if x.shape[0] % clips == 0 else None, None, ROW_AXES)

        def places(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: frames if leaf.ndim == 5 else P(), tree)

        def local(weights: Any, x: Frames, carried: Any) -> Any:
            return function(weights, x, carried, strip)

        made = places(jax.eval_shape(lambda *given: function(*given, None), weights, x, carried))
        given = (jax.tree.map(lambda _: P(), weights), frames, places(carried))
        mapped = jax.shard_map(local, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False)
        out, carried = mapped(weights, x, carried)
        return out[:, :, : out.shape[2] * latent_rows // padded], carried


def all_devices_agree(flag: Bool[Array, ""], strip: Strip | None) -> Bool[Array, ""]:
    """Whether a flag is true on all devices, so that all take the same branch."""
    return flag if strip is None else jax.lax.pmin(flag.astype(jnp.int32), AXES) == 1
