"""How long a program takes at best: the longest of its arithmetic, its HBM traffic and its collectives.

This assumes that each runs at full speed, and that all three overlap. A real step is slower. The longest of the three
shows what to change.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment_gap.plan.hlo import Collective
from alignment_gap.sharding.chips import Chip, Topology, hops


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: as in `hlo.Collective`.
      axes: the mesh axes that they span, joined by "+".
      devices: number of devices in a group.
      count: number of runs in one call.
      bytes: total bytes per device; for each collective, the larger of operand and result.
      seconds: total time on the group's links, for the bytes or for the hops, whichever is longer.
    """

    kind: str
    axes: str
    devices: int
    count: int
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that arithmetic, HBM traffic and collectives would take alone."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The time if all three overlap: the longest."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def bound(self) -> str:
        """The name of the longest of the three."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))


def times(chip: Chip, flops: float, traffic: float, collectives: Sequence[Moved]) -> Times:
    """The times of one call, from a device's FLOPs, its bytes between chip and HBM, and its collectives."""
    return Times(flops / chip.flops, traffic / chip.hbm_bandwidth, sum(each.seconds for each in collectives))


def describe(collectives: Sequence[Collective], mesh: Any, topology: Topology) -> tuple[Moved, ...]:
    """Collectives by kind and mesh axes, with their times, the longest first.

    Permutes to different devices use different links at the same time. So of all permutes over the same axes, only
    those to one device count, the ones that take longest.

    Args:
      collectives: collectives of one program over all devices of the mesh.
      mesh: a `jax.sharding.Mesh`; partition ids number its devices in order.
      topology: gives the links.
    """
    devices = mesh.devices.ravel()
    found = dict[tuple[str, str, int], list[Collective]]()
    for each in collectives:
        found.setdefault((each.kind, *_axes(each, mesh, topology)), []).append(each)
    moved = []
    for key, group in found.items():
        by_links = collections.defaultdict[tuple[int, ...], float](float)
        for each in group:
            links = each.group if each.kind == "collective-permute" else ()
            by_links[links] += each.count * seconds(each, [devices[index] for index in each.group], topology)
        count, size = sum(each.count for each in group), sum(each.count * each.bytes for each in group)
        moved.append(Moved(*key, count=count, bytes=size, seconds=max(by_links.values())))
    return tuple(sorted(moved, key=lambda each: -each.seconds))


def _axes(collective: Collective, mesh: Any, topology: Topology) -> tuple[str, int]:
    """Names of the mesh axes that a collective spans, and the number of devices in a group."""
    if not collective.group:
        return "slices", topology.slices
    positions = np.array([np.unravel_index(index, mesh.devices.shape) for index in collective.group])
    spanned = [name for axis, name in enumerate(mesh.axis_names) if len(set(positions[:, axis].tolist())) > 1]
    return "+".join(spanned), len(collective.group)


def seconds(collective: Collective, group: Sequence[Any], topology: Topology) -> float:
    """The time of one collective: its bytes over the group's links, plus its part between slices over the network.

    If the bytes are few, it takes at least the time of its hops instead (https://jax-ml.github.io/scaling-book/sharding,
    "A note on ICI latency"). The latency of the network between slices is unknown and left out.

    A ring passes (n - 1) / n of a gathered array through each device; an all-reduce passes twice that. In a ring of n
    devices, an all-to-all costs a quarter of gathering all n arrays: with both directions in use, data travels a
    quarter of the ring on average.
    """
    n, size, hop = len(group), float(collective.bytes), topology.chip.hop
    rounds = 2.0 if collective.kind == "all-reduce" else 1.0
    if not collective.group:  # Between slices: a gather sends a device's own part, other collectives the whole array.
        part = size if collective.kind == "all-gather" else size / topology.slices
        return rounds * part * (topology.slices - 1) / topology.chip.dcn_bandwidth
    slices = len({getattr(device, "slice_index", None) for device in group})
    if collective.kind == "collective-permute":
        if slices > 1:
            return size / topology.chip.dcn_bandwidth
        return max(size / topology.chip.link_bandwidth, hop)
    time = 0.0
    if slices > 1:
        # Each device exchanges its part of the array that its slice has reduced or will gather.
        part = size / max(n // slices, 1)
        time += rounds * part * (slices - 1) / slices / topology.chip.dcn_bandwidth
    inside = n // slices
    if inside > 1:
        wires, ring, path = _wires(group, topology)
        passed = size * ring / 4 if collective.kind.endswith("all-to-all") else size * (inside - 1) / inside
        time += rounds * max(passed / (wires * topology.chip.link_bandwidth), path * hop)
    return time


def _wires(group: Sequence[Any], topology: Topology) -> tuple[float, float, int]:
    """The links over which a device of the group receives at once, the length of its rings, and its longest path.

    A torus axis that the group fills, and that closes to a ring, counts both directions; any other axis counts one. The
    path to the farthest device goes along one axis after the other.
    """
    if not topology.chip.dimensions:
        return 1.0, len(group), hops(len(group), ring=False)
    first = getattr(group[0], "slice_index", None)
    coordinates = np.array([device.coords for device in group if getattr(device, "slice_index", None) == first])
    wires, lengths, path = 0.0, [], 0
    for axis, whole in enumerate(topology.shape):
        length = len(set(coordinates[:, axis].tolist()))
        if length > 1:
            is_ring = length == whole and whole % topology.chip.wraps == 0
            lengths.append(length)
            wires += 2.0 if is_ring else 1.0
            path += hops(length, ring=is_ring)
    return (wires or 1.0), math.prod(lengths) ** (1 / max(len(lengths), 1)), path


def milliseconds(seconds: float) -> str:
    """A time in milliseconds: three digits, or all digits before the point."""
    return f"{1e3 * seconds:,.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"
