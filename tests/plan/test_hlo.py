"""Collectives and HBM traffic of compiled programs equal those known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignment_gap.plan import hlo


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def looped(mesh):
    """A loop of five steps: a sum over `model` of float32[6, 8], and a gather over `data` to float32[4, 32]."""

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


def test_collectives_count_as_often_as_their_loop_runs(looped):
    found = {each.kind: each for each in hlo.collectives(looped, 8)}
    assert found.keys() == {"all-reduce", "all-gather"}
    assert (found["all-reduce"].bytes, found["all-reduce"].count) == (6 * 8 * 4, 5)
    assert (found["all-gather"].bytes, found["all-gather"].count) == (4 * 32 * 4, 5)
    assert (found["all-reduce"].group, found["all-gather"].group) == ((0, 1, 2, 3), (0, 4))


def test_a_loop_without_a_known_count_takes_the_bound_of_its_condition(mesh):
    def unfinished(state):
        return (state[0] < 7) & (state[1].sum() < 1e6)

    def until(x):
        return jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, state[1] * 2), (0, x))[1]

    program = hlo.parse(jax.jit(until).lower(jnp.ones((16, 16))).compile().as_text())
    (loop,) = [i for c in program.computations.values() for i in c.values() if i.opcode == "while"]
    assert hlo.trip_count(program, loop) == 7


@pytest.mark.parametrize(
    ("added", "trips"),
    [
        ("%more = u32[] add(%count, %two)", 4),
        ("%more = u32[] fusion(%count, %two), kind=kLoop, calls=%sum", 4),
        ("%more = u32[] add(%count, %rest)", 7),
    ],
)
def test_a_loop_that_counts_in_steps_of_two_runs_half_as_often(added, trips):
    program = hlo.parse(f"""HloModule m
%sum (a: u32[], b: u32[]) -> u32[] {{
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %c = u32[] add(%a, %b)
}}
%condition (c: (f32[4], u32[])) -> pred[] {{
  %c = (f32[4]{{0}}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=1
  %end = u32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}}
%body (state: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %state = (f32[4]{{0}}, u32[]) parameter(0)
  %two = u32[] constant(2)
  %x = f32[4]{{0}} get-tuple-element(%state), index=0
  %count = u32[] get-tuple-element(%state), index=1
  %rest = u32[] partition-id()
  {added}
  ROOT %next = (f32[4]{{0}}, u32[]) tuple(%x, %more)
}}
ENTRY %main (x: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %x = (f32[4]{{0}}, u32[]) parameter(0)
  ROOT %loop = (f32[4]{{0}}, u32[]) while(%x), condition=%condition, body=%body
}}
""")
    assert hlo.trip_count(program, program.computations["main"]["loop"]) == trips


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        # The ids lie in an array of their own: 2 x 4, turned to 4 x 2.
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, x={}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_0'}", (0, 2, 4, 6)),
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[10,64]{1,0}", 4 * 640),
        ("bf16[3]", 6),
        ("f32[]", 4),
        ("pred[8]{0}", 8),
        ("s4[6]{0:T(8)}", 3),
        ("f8e4m3fn[5]", 5),
        ("c64[2]", 16),
        ("token[]", 0),
        ("(f32[2]{0}, (bf16[4]{0}, u8[3]{0}), token[])", 8 + 8 + 3),
    ],
)
def test_bytes_of_a_type(text, size):
    assert hlo.type_bytes(text) == size


def test_what_lies_on_the_chip_is_not_in_hbm():
    text = "(f32[2]{0:T(128)S(1)}, f32[4]{0:T(128)})"
    assert (hlo.type_bytes(text), hlo.type_bytes(text, hbm_only=True)) == (24, 16)


def test_an_instruction_is_taken_apart():
    program = hlo.parse("""HloModule m
ENTRY main (x: (f32[4], s32[])) -> f32[4] {
  %x = (f32[4]{0}, s32[]) parameter(0)
  %a.1 = f32[4]{0} get-tuple-element(%x), index=0
  ROOT %w = (f32[4]{0}, /*index=1*/s32[]) custom-call(%a.1, %x), custom_call_target="f(x)", calls={%c, %d}
}
""")
    assert program.entry == "main"
    root = program.computations["main"]["w"]
    assert (root.opcode, root.type, root.operands) == ("custom-call", "(f32[4]{0}, /*index=1*/s32[])", ("a.1", "x"))
    assert root.is_root
    assert root.called("calls") == ["c", "d"]
    assert root.called("body") == []


def test_the_attributes_of_a_kernel_may_go_over_several_lines():
    program = hlo.parse("""HloModule m
ENTRY main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %a = f32[4]{0} custom-call(%x), custom_call_target="f", frontend_attributes={kernel_metadata={
"size":"{}"
}}, metadata={op_name="f"}
  ROOT %b = f32[4]{0} negate(%a)
}
""")
    assert program.computations["main"]["b"].is_root
    assert hlo.hbm_traffic(program) == 2 * 16 + 2 * 16


def test_a_computation_runs_once_for_every_place_that_calls_it():
    program = hlo.parse("""HloModule m
%leaf (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}
%branch (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %f = f32[4]{0} fusion(%q), kind=kLoop, calls=%leaf
}
%body (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} call(%r), to_apply=%branch
}
%condition (s: f32[4]) -> pred[] {
  %s = f32[4]{0} parameter(0)
  ROOT %t = pred[] constant(true)
}
ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[4]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %z = f32[4]{0} call(%w), to_apply=%branch
}
""")
    found = sorted(hlo.executed(program))
    assert found == [
        ("body", 6, False),
        ("branch", 1, False),
        ("branch", 6, False),
        ("condition", 6, False),
        ("leaf", 1, True),
        ("leaf", 6, True),
        ("main", 1, False),
    ]


@pytest.mark.parametrize(
    "branches", ["branch_computations={%much, %little}", "true_computation=%little, false_computation=%much"]
)
def test_of_two_branches_the_one_with_less_traffic_runs(branches):
    program = hlo.parse(f"""HloModule m
%much (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %n = f32[4]{{0}} negate(%p)
  ROOT %m = f32[4]{{0}} negate(%n)
}}
%little (q: f32[4]) -> f32[4] {{
  %q = f32[4]{{0}} parameter(0)
  ROOT %k = f32[4]{{0}} negate(%q)
}}
ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %z = f32[4]{{0}} conditional(%i, %x, %x), {branches}
}}
""")
    assert sorted(hlo.executed(program)) == [("little", 1, False), ("main", 1, False)]


def test_a_started_collective_counts_its_operand_or_its_result_and_not_both():
    program = hlo.parse("""HloModule m
ENTRY %main (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %d = f32[64]{0} all-gather-done(%s)
  %one = f32[64]{0} all-reduce(%d), channel_id=2, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %p = f32[64]{0} collective-permute(%d), channel_id=3, source_target_pairs={{0,1},{1,0}}
}
""")
    found = [(each.kind, each.bytes, each.count, each.group) for each in hlo.collectives(program, 8)]
    # A collective of one device does not count.
    assert found == [("all-gather", 256, 1, tuple(range(8))), ("collective-permute", 256, 1, (0, 1))]


def test_a_slice_of_another_view_of_an_operand_is_read_alone():
    """So the compiler for TPUs reads a layer of a stack in int8."""
    program = hlo.parse("""HloModule m
%view (p: s8[24,64]) -> s8[24,64] {
  %p = s8[24,64]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[24,64]{1,0:T(8,128)(4,1)} copy(%p)
}
%layer (q: s8[24,64], i: s32[]) -> s8[1,64] {
  %q = s8[24,64]{1,0:T(32,128)(4,1)} parameter(0)
  %v = s8[24,64]{1,0:T(8,128)(4,1)} fusion(%q), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view
  %i = s32[] parameter(1)
  ROOT %d = s8[1,64]{1,0:T(8,128)(4,1)} dynamic-slice(%v, %i, %i), dynamic_slice_sizes={1,64}
}
ENTRY %main (x: s8[24,64], n: s32[]) -> s8[1,64] {
  %x = s8[24,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %f = s8[1,64]{1,0} fusion(%x, %n), kind=kLoop, calls=%layer
}
""")
    # It reads 64 bytes and the four of the place, and writes 64.
    assert hlo.hbm_traffic(program) == 64 + 4 + 64


def test_the_working_memory_of_a_library_is_no_traffic():
    program = hlo.parse(
        """ENTRY %main (x: bf16[4,8], y: bf16[8,2]) -> bf16[4,2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,2]{1,0} parameter(1)
  %product = (bf16[4,2]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul"
  ROOT %result = bf16[4,2]{1,0} get-tuple-element(%product), index=0
}
"""
    )
    assert hlo.hbm_traffic(program) == 2 * (4 * 8 + 8 * 2 + 4 * 2)


def test_a_compiled_product_reads_both_factors_and_writes_the_result():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 64), (64, 32))]
    program = hlo.parse(jax.jit(jnp.matmul).lower(*shapes).compile().as_text())
    assert hlo.hbm_traffic(program) == 4 * (128 * 64 + 64 * 32 + 128 * 32)


def test_a_compiled_loop_over_layers_reads_each_layer_once():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64), (10, 64, 64))]
    program = hlo.parse(jax.jit(layers).lower(*shapes).compile().as_text())
    weights, stream = 4 * 10 * 64 * 64, 4 * 10 * 16 * 64
    # The product and tanh both read and write the stream, which may also be copied. The stack is not read ten times.
    assert weights + 2 * stream < hlo.hbm_traffic(program) < 3 * weights + 8 * stream
