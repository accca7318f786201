"""Capabilities of one device of each kind, from published figures, and the fractions of peak that programs reach.

TPU: memory, bandwidth and bf16 peak from https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The
interconnect is given there in bytes per second of a chip over all its ports in both directions (v5e 400, v6e 800, v5p
and tpu7x 1200 GB/s with 4, 4, 6 and 6 ports; v4 has six of 50 GB/s each way, arXiv 2304.01433); `link` is what a device
sends along one axis of the torus, over the two ports of that axis. A TPU7x chip is two devices, each with half of
everything. `reserved` is what libtpu keeps for itself, according to its own out-of-memory messages.

GPU: H100, H200, B200: memory size and bandwidth, L2 and clocks as the driver reports them, from the device descriptions
in OpenXLA (xla/backends/gpu/target_config/specs/{h100_sxm,h200,b200}.txtpb); dense bf16 peaks from NVIDIA's data sheets
(H100 SXM and H200 989, HGX B200 2250 TFLOP/s, half of the sparse figure). H20: 78 SMs, 96 GB, 4.0 TB/s, 148 TFLOP/s,
60 MB of L2, NVLink 900 GB/s as published by resellers (NVIDIA has no public data sheet; 95 GiB of the 96 are usable);
its clock is the H100's. NVLink figures count both directions (900 or 1800 GB/s); `link` is one. `network` is the usual
eight 400 Gb/s adapters of a host of eight.
`reserved` of GPUs is for the CUDA context, NCCL's buffers and fragmentation: the part of the memory outside
`runtime.platforms.GPU_MEMORY`.

Hosts: devices and memory of Google Cloud's machine types (ct4p-hightpu-4t, ct5lp-hightpu-8t, ct5p-hightpu-4t,
ct6e-standard-4t, tpu7x-standard-4t, a3-highgpu-8g, a3-ultragpu-8g, a4-highgpu-8g); H20 hosts, which Google does not
offer, are assumed to equal an H100's.

Rates, as fractions of the peak:

    H100, H200   attention at 16k tokens and head dimension 128: cuDNN 9 reaches 595 TFLOP/s forward (FlashAttention-3's
                 chart, arXiv 2407.08608) and 516 backward. Products 665: FastVideo's whole Wan 14B forward pass at 720p
                 takes 9.8 s on an H200, 665 TFLOP/s.
    H20, B200    no figures for Wan: the H100's fractions. An H20 is easier to keep busy than that.
    v4, v5e, v5p products: MaxText's Llama 2 70B trains at 57, 57 and 65% (its getting_started/Run_Llama2.md).
    v6e, tpu7x   products: the v5e's.
    TPUs         attention: derived from MaxDiffusion's overall rate on Wan 14B at 720p, with 28% of FLOPs in products:
                 136 TFLOP/s per v5p (30%), 260 per v6e (28%), 384 per TPU7x device (33%, its pull request 487). This
                 gives 25, 24 and 28%. v4 and v5e: the v5p's. Backward as forward: no figure is known.
    tiles        plain tiles have no kernel, only thousands of small programs one after the other. 2% is a guess.

The rates are for kernels as run by others; none of ours has been timed on any of these chips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vpae_jax.runtime.platforms import GPU_MEMORY

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that XLA's compiler needs in addition to `Chip`.

    Attributes:
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      l2: bytes of the second-level cache.
      clock: GHz.
    """

    capability: tuple[int, int]
    cores: int
    l2: int
    clock: float


@dataclass(frozen=True)
class Rates:
    """The fractions of a device's peak that programs reach.

    Attributes:
      products: matrix products and convolutions.
      attention, attention_backward: attention kernels.
      tiled: attention in plain tiles, where no kernel is available.
    """

    products: float
    attention: float
    attention_backward: float
    tiled: float = 0.02


@dataclass(frozen=True)
class Host:
    """The machine that devices are attached to.

    Attributes:
      devices: number of JAX devices of one host.
      memory: host memory in bytes.
    """

    devices: int
    memory: int


@dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: as in topology names.
      platform: "tpu" or "cuda".
      memory: bytes of HBM.
      reserved: bytes of it that are not available to programs.
      flops: peak dense bf16 FLOP/s.
      rates: fractions of the peak that programs reach.
      host: the machine that it is attached to.
      bandwidth: HBM bytes/s.
      link: bytes/s that a device sends to devices of its own host (GPU) or along one axis of the torus (TPU).
      network: bytes/s that a device sends out of its host (GPU); 0 for a TPU, whose slice is one network.
      axes: number of dimensions in a topology's name.
      description: the device's full name.
      gpu: further properties of a GPU; None for a TPU.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    memory: int
    reserved: int
    flops: float
    rates: Rates
    host: Host
    bandwidth: float
    link: float
    network: float = 0.0
    axes: int = 1
    description: str = ""
    gpu: Gpu | None = None

    @property
    def capacity(self) -> int:
        """Bytes available to a program."""
        return self.memory - self.reserved


_HOPPER = Rates(0.67, 0.60, 0.52)


def _tpu(
    name: str,
    memory: float,
    usable: float,
    flops: float,
    rates: Rates,
    host: Host,
    bandwidth: float,
    link: float,
    axes: int,
) -> Chip:
    size = int(memory * GIB)
    reserved = size - int(usable * GIB)
    return Chip(name, "tpu", size, reserved, flops, rates, host, bandwidth, link, 0.0, axes, f"TPU {name}")


def _gpu(name: str, memory: int, flops: float, bandwidth: float, link: float, host: int, gpu: Gpu) -> Chip:
    reserved, description = memory - int(GPU_MEMORY * memory), f"NVIDIA {name.upper()}"
    machine = Host(8, host * GIB)
    return Chip(name, "cuda", memory, reserved, flops, _HOPPER, machine, bandwidth, link, 50e9, 1, description, gpu)


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _tpu("v4", 32.0, 30.75, 275e12, Rates(0.57, 0.25, 0.25), Host(4, 407 * GIB), 1.2e12, 100e9, 3),
            _tpu("v5e", 16.0, 15.75, 197e12, Rates(0.57, 0.25, 0.25), Host(8, 384 * GIB), 819e9, 100e9, 2),
            _tpu("v5p", 95.74, 95.74, 459e12, Rates(0.65, 0.25, 0.25), Host(4, 448 * GIB), 2.765e12, 200e9, 3),
            _tpu("v6e", 32.0, 31.25, 918e12, Rates(0.57, 0.24, 0.24), Host(4, 720 * GIB), 1.638e12, 200e9, 2),
            _tpu("tpu7x", 96.0, 94.75, 1153.5e12, Rates(0.57, 0.28, 0.28), Host(8, 960 * GIB), 3.69e12, 100e9, 3),
            _gpu("h20", 102_005_473_280, 148e12, 4.0e12, 450e9, 1872, Gpu((9, 0), 78, 62_914_560, 1.98)),
            _gpu("h100", 84_942_979_072, 989e12, 3.352e12, 450e9, 1872, Gpu((9, 0), 132, 52_428_800, 1.98)),
            _gpu("h200", 151_397_597_184, 989e12, 4.8e12, 450e9, 2952, Gpu((9, 0), 132, 52_428_800, 1.98)),
            _gpu("b200", 191_514_411_008, 2250e12, 7.672e12, 900e9, 3968, Gpu((10, 0), 148, 132_644_864, 1.965)),
        )
    }
)
