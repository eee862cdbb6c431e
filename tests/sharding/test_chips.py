"""Topologies by name, and the errors for wrong names."""

import types

import jax
import pytest

from alignment_gap.errors import UserError
from alignment_gap.sharding.chips import CHIPS, DEVICE_KINDS, TPUS, Topology, device_lines, parse_topology, peak_flops


@pytest.mark.parametrize(
    ("text", "slices", "devices"),
    [
        ("v5e:16x16", 1, 256),
        ("v5p:4x4x8", 1, 128),
        ("v5e:2x4", 2, 16),
        ("tpu7x:4x4x4", 1, 128),
        ("cpu:8", 1, 8),
        ("h200:4", 1, 4),
    ],
)
def test_a_name_says_how_many_devices_there_are(text, slices, devices):
    topology = parse_topology(text, slices)
    assert topology.devices == devices
    assert topology.name == text


@pytest.mark.parametrize(
    ("text", "slices", "says"),
    [
        ("v5:16x16", 1, r"'v5:16x16' is unknown: did you mean v5"),
        ("tpu", 1, "did you mean tpu7x:4x4x4"),
        ("snowball:8", 1, "there are v4, v5e"),
        ("cuda:8", 1, "does not say which GPU: give h100:8 or h200:8"),
        ("h100", 1, "give 1 size, such as h100:8"),
        ("h200:16", 1, "'h200:16': a host has 8 GPUs"),
        ("h100:8", 2, "slices is 2"),
        ("v5e:256", 1, "give 2 sizes, such as v5e:16x16"),
        ("v5p:4x4", 1, "give 3 sizes"),
        ("v5p-128", 1, "names 64 chips by their cores.*v5p:4x4x4"),
        ("cpu:0", 1, "give 1 size, such as cpu:8"),
        ("cpu:8", 2, "slices is 2"),
        ("v5e:16x16", 0, "slices is 0"),
    ],
)
def test_wrong_names_are_one_line_with_a_remedy(text, slices, says):
    with pytest.raises(UserError, match=says) as caught:
        parse_topology(text, slices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TPUS)
def test_a_chip_has_the_vendors_bandwidth_over_all_its_links(kind):
    # GB/s of all links of a chip together, in both directions, from the vendor's pages.
    both_ways = {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200}[kind]
    chip = CHIPS[kind]
    assert chip.devices * chip.link_bandwidth * 2 * 2 * chip.dimensions == both_ways * 1e9
    assert parse_topology(f"{kind}:{chip.shape}") == Topology(kind, tuple(map(int, chip.shape.split("x"))))


def kinds(*names):
    return [types.SimpleNamespace(device_kind=name) for name in names]


def test_the_peak_of_devices_is_the_sum_of_the_vendors_figures():
    assert peak_flops(kinds(*256 * ["TPU v5 lite"])) == 256 * 197e12
    # jax shows a TPU7x chip as two devices.
    assert peak_flops(kinds("TPU7x", "TPU7x")) == 2307e12


def test_devices_that_the_table_lacks_have_no_peak():
    assert peak_flops(jax.devices()) is None
    assert peak_flops(kinds("TPU v4", "TPU v9")) is None


def test_every_chip_but_the_made_up_one_is_known_by_its_device():
    assert {*DEVICE_KINDS.values()} == {*CHIPS} - {"cpu"}


def test_a_line_for_each_kind_of_device():
    def device(kind, stats):
        return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)

    v5e = device("TPU v5 lite", {"bytes_limit": 15.75 * 2**30})
    assert device_lines([v5e, v5e, device("thing", None)]) == [
        "2 x TPU v5 lite, 15.8 GiB each, in the table of chips as v5e",
        "1 x thing, not in the table of chips: metrics have no MFU",
    ]
