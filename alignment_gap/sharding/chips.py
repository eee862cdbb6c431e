"""A table of accelerators (memory, FLOP/s, bandwidths), and topologies by name.

`plan` computes with this table. A training job uses it for its model FLOPs utilisation (MFU).

The figures come from the vendor's public pages, and are per device as XLA sees it (a TPU7x chip has two devices):
https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. The pages give the bidirectional interconnect
bandwidth of all links of a chip together. Half of it, divided by the number of links, is one link's one-way bandwidth.
A hop over a TPU's link takes about a microsecond: https://jax-ml.github.io/scaling-book/sharding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from alignment_gap.errors import UserError

GIB, TERA, GIGA, MICRO = 2.0**30, 1e12, 1e9, 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      hbm: bytes that a program can use. If known, this is the compiler's limit, a little below the nominal size.
      flops: FLOP/s of dense bfloat16 products.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one interconnect link, one way.
      dimensions: dimensions of the torus, with two links each; 0 without a torus.
      wraps: a torus axis closes to a ring if its size is a multiple of this.
      dcn_bandwidth: bytes/s of a device's share of the data-centre network between slices, one way.
      shape: an example of a topology.
      devices: number of devices in a chip, as XLA counts them.
      hop: seconds that a message of any size takes at least from one device to the next; 0 if unknown.
    """

    hbm: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wraps: int
    dcn_bandwidth: float
    shape: str
    devices: int = 1
    hop: float = MICRO


CHIPS: dict[str, Chip] = {
    # 32 GiB, 275 TFLOP/s, 1200 GB/s, 6 links of 50 GB/s; multiples of 4 close to a ring. DCN 50 Gbit/s per chip.
    "v4": Chip(30.75 * GIB, 275 * TERA, 1200 * GIGA, 50 * GIGA, 3, 4, 6.25 * GIGA, "4x4x4"),
    # 16 GB, 197 TFLOP/s, 819 GB/s, 400 GB/s over 4 links both ways; only 16 closes to a ring. DCN 6.4 Tbit/s per 256.
    "v5e": Chip(15.75 * GIB, 197 * TERA, 819 * GIGA, 50 * GIGA, 2, 16, 3.125 * GIGA, "16x16"),
    # 95 GiB, 459 TFLOP/s, 2765 GB/s, 1200 GB/s over 6 links both ways. DCN 50 Gbit/s per chip.
    "v5p": Chip(95 * GIB, 459 * TERA, 2765 * GIGA, 100 * GIGA, 3, 4, 6.25 * GIGA, "4x4x4"),
    # 32 GB, 918 TFLOP/s, 1640 GB/s, 800 GB/s over 4 links both ways. DCN 25.6 Tbit/s per pod of 256.
    "v6e": Chip(31.25 * GIB, 918 * TERA, 1640 * GIGA, 100 * GIGA, 2, 16, 12.5 * GIGA, "16x16"),
    # 192 GiB, 2307 TFLOP/s, 7380 GB/s, 1200 GB/s over 6 links both ways, DCN 100 Gbit/s; two devices share all of it.
    "tpu7x": Chip(94.75 * GIB, 1153.5 * TERA, 3690 * GIGA, 50 * GIGA, 3, 4, 6.25 * GIGA, "4x4x4", devices=2),
    # To try a plan on a laptop: one core of a desktop computer, and its part of the memory.
    "cpu": Chip(4 * GIB, 0.1 * TERA, 10 * GIGA, 10 * GIGA, 0, 1, 1 * GIGA, "8", hop=0.0),
    # SXM modules: 80 and 141 GB, of which the driver keeps a part; 989 TFLOP/s, 3350 and 4800 GB/s, NVLink 450 GB/s one
    # way. https://www.nvidia.com/en-us/data-center/h100 and /h200
    "h100": Chip(74 * GIB, 989 * TERA, 3350 * GIGA, 450 * GIGA, 0, 1, 50 * GIGA, "8", hop=0.0),
    "h200": Chip(131 * GIB, 989 * TERA, 4800 * GIGA, 450 * GIGA, 0, 1, 50 * GIGA, "8", hop=0.0),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.dimensions)
GPUS = ("h100", "h200")
# GPUs that NVLink joins in a host.
GPUS_OF_A_HOST = 8
# jax's names of these devices. The figures of "cpu" describe no real CPU, so it is not listed here.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def hops(devices: int, *, ring: bool) -> int:
    """Hops to the farthest of some devices along one axis: half of a ring, or a line from end to end."""
    return devices // 2 if ring else devices - 1


def peak_flops(devices: Iterable[Any]) -> float | None:
    """Total FLOP/s of these jax devices, for dense bfloat16 products; None if the table lacks one of them."""
    kinds = [DEVICE_KINDS.get(device.device_kind) for device in devices]
    return None if None in kinds else math.fsum(CHIPS[kind].flops for kind in kinds if kind)


def device_lines(devices: Iterable[Any]) -> list[str]:
    """A line for each kind of jax device: the number, the memory of each in GiB if known, and the name in the table."""
    found: dict[str, list[Any]] = {}
    for device in devices:
        found.setdefault(device.device_kind, []).append(device)
    return [f"{len(alike)} x {kind}, {_about(alike[0])}" for kind, alike in found.items()]


def _about(device: Any) -> str:
    memory = (device.memory_stats() or {}).get("bytes_limit")
    name = DEVICE_KINDS.get(device.device_kind)
    known = f"in the table of chips as {name}" if name else "not in the table of chips: metrics have no MFU"
    return f"{memory / GIB:.1f} GiB each, {known}" if memory else known


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices by name.

    Attributes:
      kind: a name in CHIPS.
      shape: shape of one slice's torus, or the number of devices.
      slices: number of slices, which the data-centre network joins.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The kind of each device."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """Jax's name of the compiler for them."""
        return "tpu" if self.kind in TPUS else "cuda" if self.kind in GPUS else "cpu"

    @property
    def devices(self) -> int:
        """Number of devices in all slices."""
        return math.prod(self.shape) * self.slices * self.chip.devices

    @property
    def name(self) -> str:
        """The compiler's name of one slice."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parses "v5e:16x16", "v5p:4x4x8" or "cpu:8"; for an unknown name, raises UserError with the nearest one."""
    kind, _, sizes = text.partition(":")
    if cores := re.fullmatch(r"(v4|v5p)-(\d+)", text):
        chips = int(cores[2]) // 2
        raise UserError(
            f"topology {text!r} names {chips} chips by their cores, not how they are joined: give the shape, such as "
            f"{cores[1]}:{CHIPS[cores[1]].shape} for {cores[1]}-128"
        )
    if kind in ("cuda", "gpu"):
        raise UserError(f"topology {text!r} does not say which GPU: give {' or '.join(f'{name}:8' for name in GPUS)}")
    if kind not in CHIPS:
        near = get_close_matches(kind, CHIPS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}:{CHIPS[near[0]].shape}?" if near else f"there are {', '.join(CHIPS)}"
        raise UserError(f"topology {text!r} is unknown: {hint}")
    chip = CHIPS[kind]
    wanted = max(chip.dimensions, 1)
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{wanted - 1}}}", sizes):
        raise UserError(f"topology {text!r}: give {wanted} size{'s' * (wanted > 1)}, such as {kind}:{chip.shape}")
    if kind in GPUS and int(sizes) > GPUS_OF_A_HOST:
        raise UserError(f"topology {text!r}: a host has {GPUS_OF_A_HOST} GPUs, and plan knows no networks of hosts")
    if slices < 1:
        raise UserError(f"slices is {slices}: it must be at least 1")
    if slices > 1 and not chip.dimensions:
        raise UserError(f"slices is {slices}, but {kind} is no TPU: set it to 1")
    return Topology(kind, tuple(map(int, sizes.split("x"))), slices)
