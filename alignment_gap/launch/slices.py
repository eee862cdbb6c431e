"""TPU slices: their names in Google's services, and their hosts."""

from __future__ import annotations

import dataclasses
import math

from alignment_gap.errors import UserError
from alignment_gap.sharding.chips import Topology, parse_topology

# For each kind: its name in GKE's node selectors, the prefix of its accelerator types, the number that accelerator
# types count for each chip, and the runtime of its TPU VMs.
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and https://cloud.google.com/tpu/docs/runtimes
_NAMES = {
    "v4": ("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    # Not offered as a queued resource.
    "tpu7x": ("tpu7x", "tpu7x", 2, None),
}
# Chips of a host in slices of several hosts, and chips of the largest slice with a single host.
_CHIPS_OF_A_HOST, _SINGLE_HOST = 4, {"v5e": 8, "v6e": 8}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      topology: its chips and how they are connected.
      accelerator: the value of GKE's node selector.
      accelerator_type: its name for queued resources and xpk, such as v5litepod-16.
      runtime: software of its TPU VMs; None if there are no TPU VMs of this kind.
      chips: number of chips of one host.
      hosts: number of hosts, with one process each.
    """

    topology: Topology
    accelerator: str
    accelerator_type: str
    runtime: str | None
    chips: int
    hosts: int

    @property
    def shape(self) -> str:
        """The topology as GKE writes it, such as 4x4."""
        return "x".join(map(str, self.topology.shape))


def slice_of(topology: str) -> Slice:
    """The slice of a topology such as v5e:4x4.

    Raises:
      UserError: the topology is not a TPU's, or its chips do not fill whole hosts.
    """
    parsed = parse_topology(topology)
    if parsed.kind not in _NAMES:
        raise UserError(f"topology {topology!r} is not a TPU slice: give one of {', '.join(_NAMES)}, such as v5e:4x4")
    accelerator, prefix, counted, runtime = _NAMES[parsed.kind]
    count = math.prod(parsed.shape)
    chips = count if count <= _SINGLE_HOST.get(parsed.kind, _CHIPS_OF_A_HOST) else _CHIPS_OF_A_HOST
    if count % chips:
        raise UserError(f"topology {topology!r} has {count} chips, but a host has {chips}: give a multiple of that")
    return Slice(parsed, accelerator, f"{prefix}-{count * counted}", runtime, chips, count // chips)
