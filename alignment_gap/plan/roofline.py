"""How long a program takes at best: the longest of its arithmetic, its HBM traffic and its collectives.

Each alone at full speed, all three at once. A real step is slower; which of the three binds says what to change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment_gap.plan.hlo import Collective
from alignment_gap.sharding.chips import Chip, Topology


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: as in `hlo.Collective`.
      axes: mesh axes that they span, joined by "+".
      devices: in a group.
      count: runs in one call.
      bytes: of all of them, per device: the larger of operand and result.
      seconds: at the speed of the links that the group has.
    """

    kind: str
    axes: str
    devices: int
    count: int
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that each part of a device takes alone."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """All three at once."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def bound(self) -> str:
        """The name of the longest."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))


def times(chip: Chip, flops: float, traffic: float, collectives: Sequence[Moved]) -> Times:
    """Of one call, from a device's FLOPs, its bytes between chip and HBM, and its collectives."""
    return Times(flops / chip.flops, traffic / chip.hbm_bandwidth, sum(each.seconds for each in collectives))


def describe(collectives: Sequence[Collective], mesh: Any, topology: Topology) -> tuple[Moved, ...]:
    """Collectives by kind and mesh axes, with their time, the most bytes first.

    Args:
      collectives: of one program over all devices of the mesh.
      mesh: a `jax.sharding.Mesh`; partition ids count its devices in order.
      topology: what the links are.
    """
    devices, found = mesh.devices.ravel(), dict[tuple[str, str, int], list[float]]()
    for each in collectives:
        key = (each.kind, *_axes(each, mesh, topology))
        total = found.setdefault(key, [0, 0, 0.0])
        total[0] += each.count
        total[1] += each.count * each.bytes
        total[2] += each.count * seconds(each, [devices[index] for index in each.group], topology)
    moved = [Moved(*key, count=int(n), bytes=int(size), seconds=time) for key, (n, size, time) in found.items()]
    return tuple(sorted(moved, key=lambda each: -each.seconds))


def _axes(collective: Collective, mesh: Any, topology: Topology) -> tuple[str, int]:
    """Names of the mesh axes that a collective spans, and the devices of a group."""
    if not collective.group:
        return "slices", topology.slices
    positions = np.array([np.unravel_index(index, mesh.devices.shape) for index in collective.group])
    spanned = [name for axis, name in enumerate(mesh.axis_names) if len(set(positions[:, axis].tolist())) > 1]
    return "+".join(spanned), len(collective.group)


def seconds(collective: Collective, group: Sequence[Any], topology: Topology) -> float:
    """Of one collective: its bytes over the links of its group, and what crosses slices over the network's share.

    A ring passes (n - 1) / n of a gathered array through each device, an all-reduce twice that. An all-to-all among n
    in a ring costs a quarter of gathering all n parts, for an array goes half the way on average, either way.
    """
    n, size = len(group), float(collective.bytes)
    rounds = 2.0 if collective.kind == "all-reduce" else 1.0
    if not collective.group:  # Between slices: what is sent is a device's own part of a gathered array, else all.
        part = size if collective.kind == "all-gather" else size / topology.slices
        return rounds * part * (topology.slices - 1) / topology.chip.dcn_bandwidth
    slices = len({getattr(device, "slice_index", None) for device in group})
    if collective.kind == "collective-permute":
        return size / (topology.chip.dcn_bandwidth if slices > 1 else topology.chip.link_bandwidth)
    time = 0.0
    if slices > 1:
        # Each device sends and takes its part of what its slice has reduced or is to gather.
        part = size / max(n // slices, 1)
        time += rounds * part * (slices - 1) / slices / topology.chip.dcn_bandwidth
    inside = n // slices
    if inside > 1:
        wires, ring = _wires(group, topology)
        passed = size * ring / 4 if collective.kind.endswith("all-to-all") else size * (inside - 1) / inside
        time += rounds * passed / (wires * topology.chip.link_bandwidth)
    return time


def _wires(group: Sequence[Any], topology: Topology) -> tuple[float, float]:
    """Links that a device of the group takes in by at once, and the length of its rings.

    Both directions of every torus axis that the group fills and that closes; one of an axis that does not.
    """
    if not topology.chip.dimensions:
        return 1.0, len(group)
    first = getattr(group[0], "slice_index", None)
    coordinates = np.array([device.coords for device in group if getattr(device, "slice_index", None) == first])
    wires, lengths = 0.0, []
    for axis, whole in enumerate(topology.shape):
        length = len(set(coordinates[:, axis].tolist()))
        if length > 1:
            lengths.append(length)
            wires += 2.0 if length == whole and whole % topology.chip.wraps == 0 else 1.0
    return (wires or 1.0), math.prod(lengths) ** (1 / max(len(lengths), 1))
