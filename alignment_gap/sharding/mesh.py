"""A named device mesh with the rules of its layout, made from a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from alignment_gap.checks import nearest
from alignment_gap.errors import UserError
from alignment_gap.sharding.rules import AXES, LAYOUTS, Rules


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """A layout by name, and the sizes of its mesh axes.

    Attributes:
      data: number of model copies, each with its own part of the batch. For each of the three sizes, -1 uses all
        remaining devices (one size only), and None uses the layout's default.
      fsdp: number of parts into which parameters are split along their width; data and fsdp split the batch.
      model: number of parts into which heads, MLP and vocabulary are split (tensor parallel).
      layout: "data", "fsdp", "tensor", "fsdp_tensor" or "sequence"; gives the rules, and the sizes that are None.
      slices: number of TPU slices, joined by the data-centre network. It must divide `data`, the only axis that crosses
        this network.
      rules: extra rules: the name of a logical axis, and the mesh axis or axes that split it, or None. They go before
        the layout's rules.
    """

    data: int | None = None
    fsdp: int | None = None
    model: int | None = None
    layout: str = "data"
    slices: int = 1
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for this many devices; raises UserError if they do not fit."""
        self._check()
        given = (self.data, self.fsdp, self.model)
        default = dict(zip(AXES, LAYOUTS[self.layout].sizes, strict=True))
        if default["data"] != -1:
            default["data"] = self.slices
        if -1 in given:
            default = {axis: max(size, 1) for axis, size in default.items()}
        sizes = {axis: default[axis] if size is None else size for axis, size in zip(AXES, given, strict=True)}
        written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        known = math.prod(size for size in sizes.values() if size != -1)
        if devices % known or (-1 not in sizes.values() and known != devices):
            raise UserError(
                f"mesh {written} takes a multiple of {known} devices but {devices} are present: "
                "choose sizes whose product is the number of devices, or set one to -1",
                page="sharding.md#layouts",
            )
        data, fsdp, model = (devices // known if size == -1 else size for size in sizes.values())
        if data % self.slices:
            raise UserError(
                f"mesh data={data} is not a multiple of slices={self.slices}: each slice holds an equal part of data"
            )
        return data, fsdp, model

    def all_rules(self) -> Rules:
        """The config's own rules, then the layout's rules; raises UserError for an unknown mesh axis."""
        self._check()
        known = {name for layout in LAYOUTS.values() for name, _ in layout.rules}
        for name, axes in self.rules.items():
            if name not in known:
                choice = nearest(str(name), sorted(known))
                raise UserError(f"mesh.rules has {name!r}, which is not a logical axis: {choice}")
            named = () if axes is None else (axes,) if isinstance(axes, str) else axes
            if not isinstance(named, list | tuple) or any(named.count(axis) > 1 or axis not in AXES for axis in named):
                raise UserError(f"mesh rule {name}={axes!r}: a mesh has the axes {', '.join(AXES)}; None is whole")
        own = tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in self.rules.items())
        return own + LAYOUTS[self.layout].rules

    def _check(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"mesh layout {self.layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
        given = (self.data, self.fsdp, self.model)
        if any(size is not None and size != -1 and size < 1 for size in given) or given.count(-1) > 1:
            written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, given, strict=True))
            raise UserError(
                f"mesh {written}: sizes must be positive or None (the layout's own), and one of them may be -1 (all "
                "that is left)"
            )
        if self.slices < 1:
            raise UserError(f"mesh slices is {self.slices}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class LogicalMesh:
    """A device mesh and the rules that lay logical axes over it.

    Attributes:
      devices: the mesh, with the axes data, fsdp and model.
      rules: maps logical axis names to mesh axes; see `alignment_gap.sharding.rules`.
    """

    devices: Mesh
    rules: Rules

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the mesh axes by name."""
        return dict(self.devices.shape)

    @property
    def batch_parts(self) -> int:
        """Number of parts that a batch is split into; it must divide the batch size."""
        return self.shape["data"] * self.shape["fsdp"]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> LogicalMesh:
    """A mesh over the given devices, or all devices, with the axes data, fsdp and model.

    Raises:
      UserError: the sizes do not fit the devices, or the devices belong to another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape, rules = config.shape(len(devices)), config.all_rules()
    # An axis of the torus is split only if no whole axes have the sizes, as for 8 x 8 on a torus of 4 x 4 x 4.
    placed = (
        mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        if config.slices == 1
        else _over_slices(config.slices, shape, devices)
    )
    return LogicalMesh(Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES)), rules)


def _over_slices(slices: int, shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in mesh order: the slices lie along the data axis, so that no other axis crosses their network.

    Devices without slices, such as CPUs, count as one slice for each process.
    """
    of_slices = len({getattr(device, "slice_index", None) for device in devices}) > 1
    found = len({device.slice_index if of_slices else device.process_index for device in devices})
    if found != slices:
        raise UserError(f"mesh slices is {slices} but the devices are of {found}: set slices={found}")
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within,
        (slices, 1, 1),
        devices=devices,
        process_is_granule=not of_slices,
        allow_split_physical_axes=True,
    )


def check_batch_size(name: str, size: int, parts: int, microbatches: int = 1) -> None:
    """Raises UserError if data * fsdp = `parts`, times the microbatches, does not divide the batch size `name`."""
    if size % (parts * microbatches):
        product = f" * microbatches = {parts * microbatches}" if microbatches > 1 else f" = {parts}"
        raise UserError(f"{name} is {size}: it must be a multiple of data * fsdp{product}, its parts on this mesh")
