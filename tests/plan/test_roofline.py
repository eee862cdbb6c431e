"""The time of collectives on links of known bandwidth, and the time of programs with one bottleneck."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from alignment_gap.plan import hlo
from alignment_gap.plan.roofline import Moved, describe, milliseconds, seconds, times
from alignment_gap.sharding.chips import Topology, parse_topology


class Mesh16:
    devices = np.arange(16).reshape(2, 8, 1)
    axis_names = ("data", "fsdp", "model")


class Device:
    def __init__(self, *coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def test_a_ring_takes_from_both_sides_and_a_line_from_one():
    topology = Topology("v5e", (16, 16))
    ring, line = [Device(0, i, 0) for i in range(16)], [Device(0, i, 0) for i in range(4)]
    link = topology.chip.link_bandwidth
    gather = hlo.Collective("all-gather", 1_600_000_000, 1, (0, 1))
    assert seconds(gather, ring, topology) == pytest.approx(1.6e9 * 15 / 16 / (2 * link))
    assert seconds(gather, line, topology) == pytest.approx(1.6e9 * 3 / 4 / link)
    reduce = hlo.Collective("all-reduce", 1_600_000_000, 1, (0, 1))
    assert seconds(reduce, ring, topology) == pytest.approx(2 * seconds(gather, ring, topology))
    plane = [Device(i, j, 0) for i in range(16) for j in range(16)]
    assert seconds(gather, plane, topology) == pytest.approx(1.6e9 * 255 / 256 / (4 * link))
    permute = hlo.Collective("collective-permute", 1_600_000_000, 1, (0, 1))
    assert seconds(permute, line[:2], topology) == pytest.approx(1.6e9 / link)


@pytest.mark.parametrize(
    ("shape", "hops"),
    [
        # A ring of 16 reaches its farthest device in 8 hops, a line of 4 its end in 3; two axes one after the other.
        ([(0, i) for i in range(16)], 8),
        ([(0, i) for i in range(4)], 3),
        ([(0, 3), (0, 7)], 1),
        ([(i, j) for i in range(16) for j in range(16)], 16),
        ([(i, j) for i in range(4) for j in range(16)], 11),
    ],
)
def test_a_small_array_takes_as_long_as_its_hops(shape, hops):
    topology = Topology("v5e", (16, 16))
    group = [Device(*place, 0) for place in shape]
    gather, reduce, exchange = (
        hlo.Collective(kind, 64, 1, (0, 1)) for kind in ("all-gather", "all-reduce", "all-to-all")
    )
    assert seconds(gather, group, topology) == pytest.approx(hops * 1e-6)
    assert seconds(reduce, group, topology) == pytest.approx(2 * hops * 1e-6)
    assert seconds(exchange, group, topology) == pytest.approx(hops * 1e-6)


def test_a_small_permute_is_one_hop_and_other_chips_have_no_known_hop():
    permute, pair = hlo.Collective("collective-permute", 64, 1, (0, 1)), [Device(0, 0, 0), Device(0, 1, 0)]
    assert seconds(permute, pair, Topology("v5e", (16, 16))) == pytest.approx(1e-6)
    for name in ("h100:8", "cpu:8"):
        topology = parse_topology(name)
        assert seconds(permute, pair, topology) == pytest.approx(64 / topology.chip.link_bandwidth)


def test_between_slices_the_networks_share_counts():
    topology = Topology("v5e", (2, 4), slices=2)
    group = [Device(0, 0, 0, slice_index=i) for i in range(2)]
    reduce = hlo.Collective("all-reduce", 1000, 1, (0, 8))
    assert seconds(reduce, group, topology) == pytest.approx(2 * 1000 / 2 / topology.chip.dcn_bandwidth)


def test_a_tpu_sends_to_other_slices_by_transfers_of_the_host():
    program = hlo.parse("""HloModule m
ENTRY %main (x: f32[250]) -> f32[250] {
  %x = f32[250]{0} parameter(0)
  %t = token[] after-all()
  ROOT %s = (f32[250]{0}, u32[], token[]) send(%x, %t), _xla_megascale_transfer_type="ALL_REDUCE"
}
""")
    (found,) = hlo.collectives(program, 16)
    assert (found.kind, found.bytes, found.count, found.group) == ("all-reduce", 1000, 1, ())
    topology = Topology("v5e", (2, 4), slices=2)
    (moved,) = describe([found], Mesh16(), topology)
    assert (moved.axes, moved.devices) == ("slices", 2)
    assert moved.seconds == pytest.approx(1000 / topology.chip.dcn_bandwidth)


def test_the_longest_of_three_binds():
    chip = Topology("v5e", (2, 4)).chip
    found = times(chip, flops=197e12 * 0.5, traffic=819e9 * 0.75, collectives=())
    assert np.allclose([found.compute, found.hbm, found.interconnect], [0.5, 0.75, 0.0])
    assert (found.seconds, found.bound) == (found.hbm, "hbm")


@pytest.mark.parametrize(
    ("bound", "work"),
    [
        ("compute", {"flops": 2e12, "traffic": 1.0}),
        ("hbm", {"flops": 1.0, "traffic": 1e12}),
        ("interconnect", {"flops": 1.0, "traffic": 1.0}),
    ],
)
def test_each_part_may_bind(bound, work):
    moved = (Moved("all-gather", "fsdp", 8, 1, 10, 1e-6), Moved("all-reduce", "fsdp", 8, 1, 10, 2e-6))
    found = times(Topology("v5e", (2, 4)).chip, **work, collectives=moved)
    assert found.bound == bound
    assert found.interconnect == pytest.approx(3e-6)
    assert found.seconds == max(found.compute, found.hbm, found.interconnect)


def ring_hops(n):
    """The load of the busiest one-way link of a ring. Each device sends one unit to every other, the shorter way.

    To the opposite device it sends half in each direction.
    """
    load = np.zeros((2, n))
    for source in range(n):
        for target in range(n):
            distance = (target - source) % n
            for direction, hops, share in ((0, distance, distance <= n / 2), (1, n - distance, distance >= n / 2)):
                if distance and share:
                    part = 0.5 if distance == n / 2 else 1.0
                    for hop in range(hops):
                        link = (source + hop) % n if direction == 0 else (source - hop) % n
                        load[direction, link] += part
    return load.max()


def test_an_all_to_all_in_a_ring_passes_what_its_links_carry():
    topology = Topology("v5e", (16, 16))
    ring = [Device(0, i, 0) for i in range(16)]
    exchange = hlo.Collective("all-to-all", 1_600_000_000, 1, (0, 1))
    # Every device holds 1.6 GB, a sixteenth for each device.
    assert seconds(exchange, ring, topology) == pytest.approx(1e8 * ring_hops(16) / topology.chip.link_bandwidth)


def test_an_all_reduce_over_slices_is_one_within_them_and_one_between():
    topology = Topology("v5e", (2, 4), slices=2)
    group = [Device(i, j, 0, slice_index=s) for s in range(2) for i in range(2) for j in range(4)]
    reduce, chip = hlo.Collective("all-reduce", 1_600_000_000, 1, tuple(range(16))), topology.chip
    # Neither axis of a 2x4 is a ring, so each has one link. Between slices each device sends its eighth.
    within = 2 * 1.6e9 * 7 / 8 / (2 * chip.link_bandwidth)
    between = 2 * (1.6e9 / 8) / 2 / chip.dcn_bandwidth
    assert seconds(reduce, group, topology) == pytest.approx(within + between)


def test_a_permute_to_another_slice_takes_the_network():
    topology = Topology("v5e", (2, 4), slices=2)
    permute = hlo.Collective("collective-permute", 1_600_000_000, 1, (0, 8))
    pair = [Device(0, 0, 0, slice_index=i) for i in range(2)]
    assert seconds(permute, pair, topology) == pytest.approx(1.6e9 / topology.chip.dcn_bandwidth)


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5p:4x4x4"])
def test_a_cube_takes_in_by_six_links(name):
    topology = parse_topology(name)
    cube = [Device(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    gather = hlo.Collective("all-gather", 6_400_000_000, 1, tuple(range(64)))
    expected = 6.4e9 * 63 / 64 / (6 * topology.chip.link_bandwidth)
    assert seconds(gather, cube, topology) == pytest.approx(expected)


def test_devices_without_a_torus_have_one_link():
    topology = parse_topology("h100:8")
    gather = hlo.Collective("all-gather", 800, 1, tuple(range(8)))
    assert seconds(gather, [Device()] * 8, topology) == pytest.approx(700 / topology.chip.link_bandwidth)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def test_collectives_of_one_kind_and_axes_are_one_row(mesh):
    topology = parse_topology("cpu:8")
    link = topology.chip.link_bandwidth
    found = [
        hlo.Collective("all-gather", 100, 3, (0, 2)),  # Partition 2 is the next one along fsdp.
        hlo.Collective("all-gather", 50, 2, (0, 2)),
        hlo.Collective("all-gather", 8000, 1, (0, 1)),
        hlo.Collective("all-reduce", 10, 1, (0, 2, 4, 6)),
        hlo.Collective("all-reduce", 10, 1, tuple(range(8))),
    ]
    rows = describe(found, mesh, topology)
    assert [(each.kind, each.axes, each.devices, each.count, each.bytes) for each in rows] == [
        ("all-gather", "model", 2, 1, 8000),
        ("all-gather", "fsdp", 2, 5, 400),
        ("all-reduce", "data+fsdp+model", 8, 1, 10),
        ("all-reduce", "data+fsdp", 4, 1, 10),
    ]
    assert [each.seconds for each in rows] == pytest.approx(
        [4000 / link, 200 / link, 2 * 10 * 7 / 8 / link, 2 * 10 * 3 / 4 / link]
    )


def test_permutes_to_both_neighbours_run_at_the_same_time():
    topology = Topology("v5e", (2, 8))
    devices = np.array([Device(row, column, 0) for row in range(2) for column in range(8)]).reshape(2, 8)
    mesh = types.SimpleNamespace(devices=devices, axis_names=("data", "fsdp"))
    there, back = (hlo.Collective("collective-permute", 1_000_000, n, (0, to)) for n, to in ((4, 1), (5, 7)))
    (moved,) = describe([there, back], mesh, topology)
    assert (moved.axes, moved.count, moved.bytes) == ("fsdp", 9, 9_000_000)
    assert moved.seconds == pytest.approx(5 * 1_000_000 / topology.chip.link_bandwidth)


def test_times_scale_with_the_topology():
    slow, fast = (parse_topology(name).chip for name in ("v5e:16x16", "v5p:4x4x4"))
    ratio = times(slow, 1e12, 1e9, ()).compute / times(fast, 1e12, 1e9, ()).compute
    assert ratio == pytest.approx(459 / 197)


def test_milliseconds_never_have_an_exponent():
    told = [milliseconds(seconds) for seconds in (0.0000316, 0.01, 0.3916, 0.9994, 0.9996, 1.0698, 26.4)]
    assert told == ["0.0316", "10", "392", "999", "1,000", "1,070", "26,400"]
