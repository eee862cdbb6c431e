"""A named device mesh from a config."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from alignment_gap.errors import UserError

AXES = ("data", "fsdp", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 for at most one of them means all devices that are left.

    Attributes:
      data: copies of the model, each with its own part of the batch.
      fsdp: parts into which parameters are split along their width; the batch is split over data and fsdp.
      model: parts into which heads, MLP and vocabulary are split (tensor parallel).
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for this many devices; raises UserError where they do not fit."""
        sizes = (self.data, self.fsdp, self.model)
        written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {written}: sizes must be positive, and one of them may be -1 (all that is left)")
        known = math.prod(size for size in sizes if size != -1)
        if devices % known or (-1 not in sizes and known != devices):
            raise UserError(
                f"mesh {written} takes a multiple of {known} devices but {devices} are present: "
                "choose sizes whose product is the number of devices, or set one to -1"
            )
        data, fsdp, model = (devices // known if size == -1 else size for size in sizes)
        return data, fsdp, model


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns a mesh over all devices with the axes data, fsdp and model."""
    shape = config.shape(jax.device_count())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
