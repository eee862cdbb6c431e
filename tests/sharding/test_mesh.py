"""Meshes by hand and by their properties: sizes of a layout, sizes that do not fit, and slices."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from alignment_gap.errors import UserError
from alignment_gap.sharding import AXES, LAYOUTS, STANDARD, MeshConfig, check_batch_size, make_mesh
from alignment_gap.sharding.mesh import _over_slices


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 2, -1), (1, 2, 4)),
        (MeshConfig(8, 1, 1), (8, 1, 1)),
        (MeshConfig(layout="fsdp"), (1, 8, 1)),
        (MeshConfig(layout="tensor"), (1, 1, 8)),
        (MeshConfig(layout="fsdp_tensor"), (1, 2, 4)),
        (MeshConfig(layout="sequence", model=2), (1, 4, 2)),
        (MeshConfig(data=2, layout="fsdp"), (2, 4, 1)),
        # An explicit -1 takes the remaining devices, in place of the layout's own open axis.
        (MeshConfig(data=-1, fsdp=2, layout="tensor"), (4, 2, 1)),
        (MeshConfig(data=-1, layout="fsdp_tensor"), (2, 1, 4)),
        (MeshConfig(fsdp=-1, layout="fsdp_tensor"), (1, 2, 4)),
        (MeshConfig(model=-1, layout="fsdp_tensor"), (1, 1, 8)),
        # With two slices, the data axis crosses the network between them.
        (MeshConfig(layout="fsdp", slices=2), (2, 4, 1)),
        (MeshConfig(layout="fsdp_tensor", slices=2), (2, 1, 4)),
        (MeshConfig(slices=4), (8, 1, 1)),
    ],
)
def test_mesh_shapes(config, shape):
    assert config.shape(8) == shape
    if config.slices > 1:
        return
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "model"), shape, strict=True))
    assert mesh.batch_parts == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("layout", "slices", "shapes"),
    [
        # Shapes for 1, 4, 16 and 256 devices of one slice; None if there are not enough devices for a model axis of 4.
        ("data", 1, [(1, 1, 1), (4, 1, 1), (16, 1, 1), (256, 1, 1)]),
        ("fsdp", 1, [(1, 1, 1), (1, 4, 1), (1, 16, 1), (1, 256, 1)]),
        ("tensor", 1, [(1, 1, 1), (1, 1, 4), (1, 1, 16), (1, 1, 256)]),
        ("fsdp_tensor", 1, [None, (1, 1, 4), (1, 4, 4), (1, 64, 4)]),
        ("sequence", 1, [None, (1, 1, 4), (1, 4, 4), (1, 64, 4)]),
        ("data", 4, [None, (4, 1, 1), (16, 1, 1), (256, 1, 1)]),
        ("fsdp", 4, [None, (4, 1, 1), (4, 4, 1), (4, 64, 1)]),
        ("fsdp_tensor", 4, [None, None, (4, 1, 4), (4, 16, 4)]),
    ],
)
def test_sizes_that_the_layout_gives(layout, slices, shapes):
    config = MeshConfig(layout=layout, slices=slices)
    for devices, shape in zip((1, 4, 16, 256), shapes, strict=True):
        if shape is not None:
            assert config.shape(devices) == shape
            continue
        with pytest.raises(UserError, match=r"mesh data=.*"):
            config.shape(devices)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    sizes=strategies.tuples(*[strategies.integers(1, 6)] * 3),
    left_open=strategies.sampled_from([None, 0, 1, 2]),
    layout=strategies.sampled_from(sorted(LAYOUTS)),
    other=strategies.integers(1, 300),
)
def test_sizes_that_are_given_are_kept_and_one_may_be_left_open(sizes, left_open, layout, other):
    """For any layout. A number of devices is refused if the given sizes do not divide it."""
    given_sizes = [-1 if axis == left_open else size for axis, size in enumerate(sizes)]
    config, devices = MeshConfig(*given_sizes, layout=layout), math.prod(sizes)
    assert config.shape(devices) == sizes
    known = math.prod(size for size in given_sizes if size != -1)
    if (other % known == 0) if left_open is not None else (other == known):
        assert math.prod(config.shape(other)) == other
    else:
        with pytest.raises(UserError, match=f"multiple of {known} devices but {other} are present"):
            config.shape(other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "data=3, fsdp=1, model=1 takes a multiple of 3 devices but 8 are present"),
        (MeshConfig(4, 1, 1), "takes a multiple of 4 devices but 8 are present"),
        (MeshConfig(-1, 16, 1), "takes a multiple of 16 devices"),
        (MeshConfig(-1, -1, 1), "one of them may be -1"),
        (MeshConfig(-2, 1, 1), "sizes must be positive"),
        (MeshConfig(model=0), r"mesh data=None, fsdp=None, model=0: sizes must be positive or None"),
        (MeshConfig(layout="zero"), "layout 'zero' is unknown: choose one of data, fsdp, tensor"),
        (MeshConfig(rules={"embed": "modl"}), "rule embed='modl': a mesh has the axes data, fsdp, model"),
        (
            MeshConfig(rules={"embeds": None}),
            "mesh.rules has 'embeds', which is not a logical axis: did you mean embed",
        ),
        (MeshConfig(rules={"mlp": 5}), "rule mlp=5: a mesh has the axes"),
        (MeshConfig(rules={"mlp": ("data", "data")}), r"rule mlp=\('data', 'data'\): a mesh has the axes"),
        (MeshConfig(rules={"mlp": ("data", "columns")}), r"rule mlp=\('data', 'columns'\): a mesh has the axes"),
        (MeshConfig(slices=0), "slices is 0"),
        (MeshConfig(data=1, fsdp=8, slices=2), "data=1 is not a multiple of slices=2"),
        (MeshConfig(slices=2), "slices is 2 but the devices are of 1: set slices=1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_a_mesh_may_have_a_part_of_the_devices():
    mesh = make_mesh(MeshConfig(2, 1, -1), jax.devices()[:4])
    assert mesh.shape == {"data": 2, "fsdp": 1, "model": 2} and mesh.batch_parts == 2
    assert {device.id for device in mesh.devices.devices.flat} == {0, 1, 2, 3}


def test_a_configs_own_rules_come_first_and_keep_their_order():
    config = MeshConfig(layout="tensor", rules={"length": "model", "embed": ["fsdp", "model"], "kv": None})
    assert config.all_rules() == (("length", "model"), ("embed", ("fsdp", "model")), ("kv", None), *STANDARD)
    assert MeshConfig().all_rules() == STANDARD


def test_every_layout_names_axes_that_meshes_have():
    for layout, (rules, sizes) in LAYOUTS.items():
        assert sizes.count(-1) == 1 and min(sizes) == -1, layout
        for name, axes in rules:
            assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(AXES), (layout, name)
    # Only this layout splits positions; its rule comes after the other rules of the model axis.
    names = [name for name, _ in LAYOUTS["sequence"].rules]
    assert names[-1] == "length" and names.count("length") == 1
    assert dict(LAYOUTS["sequence"].rules) == dict(STANDARD) | {"length": "model"}


class Chip:
    """The attributes of a device that mesh_utils reads."""

    def __init__(self, number, slice_index=None, process=None):
        self.id, self.process_index = number, number if process is None else process
        if slice_index is not None:
            self.slice_index = slice_index
        self.platform, self.device_kind = "cpu", "cpu"


def test_slices_lie_along_the_data_axis():
    devices = _over_slices(2, (4, 2, 1), [Chip(number, number % 2) for number in range(8)])
    assert devices.shape == (4, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(devices)
    np.testing.assert_array_equal(slices[:, :, 0], [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_devices_without_slices_count_as_one_for_each_process():
    """Also if all chips name the same slice, as chips of one slice do."""
    for index in (None, 3):
        chips = [Chip(number, index, number % 4) for number in range(8)]
        devices = _over_slices(4, (4, 1, 2), chips)
        processes = np.vectorize(lambda device: device.process_index)(devices)
        np.testing.assert_array_equal(processes[:, 0], [[0, 0], [1, 1], [2, 2], [3, 3]])
        with pytest.raises(UserError, match="slices is 2 but the devices are of 4: set slices=4"):
            _over_slices(2, (4, 1, 2), chips)


def test_batches_that_a_mesh_does_not_divide_are_refused():
    check_batch_size("batch_size", 16, 4, 4)
    with pytest.raises(UserError, match=r"batch_size is 6: it must be a multiple of data \* fsdp = 4"):
        check_batch_size("batch_size", 6, 4)
    with pytest.raises(UserError, match=r"batch_size is 8: .* data \* fsdp \* microbatches = 16"):
        check_batch_size("batch_size", 8, 4, 4)
