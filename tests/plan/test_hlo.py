"""Collectives and HBM traffic of compiled programs whose own are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignment_gap.plan import hlo
from alignment_gap.plan.chips import Topology
from alignment_gap.plan.roofline import describe, seconds, times


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def looped(mesh):
    """Five times in a loop: a sum over `model` of float32[6, 8] and a gather over `data` to float32[4, 32]."""

    def inner(x, y):
        def body(_, carry):
            x, y = carry
            gathered = jax.lax.all_gather(y, "data", axis=0, tiled=True)
            return jax.lax.psum(jnp.sin(x), "model"), jnp.cos(gathered[:2] + gathered[2:])

        return jax.lax.fori_loop(0, 5, body, (x, y))

    specs = (P("data", "model"), P("data"))
    function = jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
    shapes = zip(((12, 32), (4, 32)), specs, strict=True)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes]
    return hlo.parse(function.lower(*arguments).compile().as_text())


def test_collectives_count_as_often_as_their_loop_runs(looped, mesh):
    found = {each.kind: each for each in hlo.collectives(looped, 8)}
    assert found.keys() == {"all-reduce", "all-gather"}
    assert (found["all-reduce"].bytes, found["all-reduce"].count) == (6 * 8 * 4, 5)
    assert (found["all-gather"].bytes, found["all-gather"].count) == (4 * 32 * 4, 5)
    axes = {each.kind: (each.axes, each.devices) for each in describe([*found.values()], mesh, Topology("cpu", (8,)))}
    assert axes == {"all-reduce": ("model", 4), "all-gather": ("data", 2)}


def test_a_loop_without_a_known_count_takes_the_bound_of_its_condition(mesh):
    def unfinished(state):
        return (state[0] < 7) & (state[1].sum() < 1e6)

    def until(x):
        return jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, state[1] * 2), (0, x))[1]

    program = hlo.parse(jax.jit(until).lower(jnp.ones((16, 16))).compile().as_text())
    (loop,) = [i for c in program.computations.values() for i in c.values() if i.opcode == "while"]
    assert hlo.trip_count(program, loop) == 7


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        ("source_target_pairs={{3,1},{1,2}}", (3, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_in_every_notation(text, group):
    assert hlo._group(text, 8) == group


def test_tpu_forms_of_collectives():
    program = hlo.parse("""HloModule m
%all-reduce-scatter (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %d = f32[8]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={8}
}
%link.1 (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[64]{0} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, chain_id="0"
}
%link.2 (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  ROOT %all-gather.2 = f32[64]{0} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, chain_id="0"
}
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %s = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %g = f32[64]{0} fusion(%s), kind=kCustom, calls=%link.1
  ROOT %h = f32[64]{0} fusion(%s), kind=kCustom, calls=%link.2
}
""")
    found = [(each.kind, each.bytes, each.count) for each in hlo.collectives(program, 8)]
    assert sorted(found) == [("all-gather", 256, 1), ("reduce-scatter", 256, 1)]


def test_traffic_counts_slices_updates_and_what_stays_on_the_chip():
    program = hlo.parse("""HloModule m
%f (p0: f32[10,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %z = s32[] constant(0)
  %slice = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,64}
  ROOT %e = f32[1,64]{1,0} exponential(%slice)
}
ENTRY %main (x: f32[10,64], i: s32[]) -> f32[1,64] {
  %x = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%f
  %near = f32[1,64]{1,0:T(8,128)S(1)} negate(%row)
  %again = f32[1,64]{1,0} add(%near, %row)
  ROOT %w = f32[10,64]{1,0} dynamic-update-slice(%x, %again, %i, %i)
}
""")
    row = 64 * 4
    index = 4
    assert hlo.hbm_traffic(program) == (row + row + index) + row + 2 * row + 2 * row


def test_a_slice_in_a_fusion_within_a_fusion_counts_as_a_slice():
    program = hlo.parse("""HloModule m
%inner (p0: f32[10,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %slice = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,64}
}
%outer (q0: f32[10,64], q1: s32[], q2: f32[64,32]) -> f32[1,32] {
  %q0 = f32[10,64]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[64,32]{1,0} parameter(2)
  %row = f32[1,64]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%inner
  ROOT %dot = f32[1,32]{1,0} dot(%row, %q2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[10,64], i: s32[], w: f32[64,32]) -> f32[1,32] {
  %x = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[64,32]{1,0} parameter(2)
  ROOT %y = f32[1,32]{1,0} fusion(%x, %i, %w), kind=kOutput, calls=%outer
}
""")
    assert hlo.hbm_traffic(program) == 4 * (64 + 1 + 64 * 32 + 32)


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
    gather = hlo.Collective("all-gather", 1600, 1, (0, 1))
    assert seconds(gather, ring, topology) == pytest.approx(1600 * 15 / 16 / (2 * link))
    assert seconds(gather, line, topology) == pytest.approx(1600 * 3 / 4 / link)
    reduce = hlo.Collective("all-reduce", 1600, 1, (0, 1))
    assert seconds(reduce, ring, topology) == pytest.approx(2 * seconds(gather, ring, topology))
    plane = [Device(i, j, 0) for i in range(16) for j in range(16)]
    assert seconds(gather, plane, topology) == pytest.approx(1600 * 255 / 256 / (4 * link))
    permute = hlo.Collective("collective-permute", 1600, 1, (0, 1))
    assert seconds(permute, line[:2], topology) == pytest.approx(1600 / link)


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
