"""Plans of fake compilations add up to totals known by hand."""

import dataclasses
import math
import os

import jax
import pytest
from made_up import JUDGE, POLICY, compile_, online_config, plan_of, update_config
from planning import CPU, DECODER, T5, config_of, program_of, replaced

from alignment_gap.errors import UserError
from alignment_gap.jobs.config import OnlineConfig
from alignment_gap.models import DecoderConfig, compute_params
from alignment_gap.models.adapters import projections
from alignment_gap.plan.plan import cache_bytes, make_plan
from alignment_gap.plan.programs import Compiled
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import unbox
from alignment_gap.sharding.chips import GIB, parse_topology
from alignment_gap.training import OptimizerConfig


def gib(sizes):
    return {name: size / GIB for name, size in sizes.items()}


def test_an_offline_step_is_the_update_alone():
    plan = plan_of(update_config())
    assert [part.program.name for part in plan.parts] == ["update"]
    assert gib(plan.resident) == {"policy and optimizer": 3.0, "code": 0.25}
    assert plan.working == pytest.approx(6.4 * GIB)
    assert plan.needed == pytest.approx((3 + 0.25 + 6.4) * GIB)
    assert plan.fits
    assert plan.advice == ()
    assert plan.largest_batch is None


def test_online_all_networks_stay_and_one_program_works_at_a_time():
    plan = plan_of(online_config())
    assert [part.program.name for part in plan.parts] == ["update", "sample", "judge", "score"]
    assert gib(plan.resident) == {"policy and optimizer": 3.0, "judge": 0.25, "score": 1.0, "code": 4 * 0.25}
    assert plan.working == pytest.approx(6.4 * GIB)
    assert plan.needed == pytest.approx((4.25 + 1.0 + 6.4) * GIB)


def test_programs_that_hold_no_policy_of_a_step_have_no_state():
    plan = plan_of(update_config(programs=(program_of("judge", JUDGE, holds=True),), batch=64))
    assert gib(plan.resident) == {"judge": 0.25, "code": 0.25}


def test_the_time_of_a_step_is_that_of_its_programs_one_after_another():
    # Every program moves HBM for a second, and computes for half a second on each of the eight devices.
    plan = plan_of(online_config())
    assert [part.times.bound for part in plan.parts] == ["hbm"] * 4
    assert plan.step_seconds == pytest.approx(4.0)
    # The model needs three quarters of the update's FLOPs.
    assert plan.utilisation == pytest.approx((0.75 + 3) * 0.5 / 4.0)


def test_what_cannot_be_compiled_takes_for_ever():
    plan = plan_of(update_config(batch=256))
    assert plan.parts[0].times is None
    assert plan.step_seconds == math.inf
    assert not plan.fits


def test_a_sampler_tells_the_least_time_of_a_token():
    update, sample, *_ = plan_of(online_config()).parts
    assert (update.tokens, update.token_seconds) == (0, 0.0)
    assert sample.tokens == 128
    # Parameters are read in bfloat16, half the bytes of float32. Each device reads its part of the cache.
    cache = cache_bytes(sample.program) / 8
    assert sample.token_seconds == pytest.approx((0.5 * GIB + cache) / 819e9)


def test_weights_in_int8_are_a_byte_each_and_four_for_the_scale_of_an_output():
    config = online_config()
    sampled = dataclasses.replace(config.job, source=OnlineConfig(sampler=SamplerConfig(weights_dtype="int8")))
    wide, narrow = (plan_of(dataclasses.replace(config, job=job)).parts[1] for job in (config.job, sampled))
    policy = wide.program.facts.network.policy()
    saved = 0
    for box in projections(policy).values():
        layers, *sizes = box.value.shape
        outputs = sizes[-1:] if box.names[-1] == "embed" else sizes[1:]
        saved += layers * (math.prod(sizes) - 4 * math.prod(outputs))
    held = jax.eval_shape(lambda: compute_params(policy, unbox(policy.init(jax.random.key(0)))))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    gib = GIB * (1 - saved / whole)
    cache = cache_bytes(wide.program) / 8
    assert narrow.token_seconds == pytest.approx((0.5 * gib + cache) / 819e9)
    assert 0 < saved < 0.5 * whole


@pytest.mark.parametrize(("model", "heads"), [(T5, 8), (DECODER, 8), (dataclasses.replace(DECODER, kv_heads=2), 2)])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_cache_is_keys_and_values_of_prompts_and_samples(model, heads, dtype, width):
    sample = program_of("sample", dataclasses.replace(model, dtype=dtype))
    # Two layers; 8 prompts of 24 tokens, each once, and 16 samples of 16 tokens.
    keys_and_values = 2 * 2 * heads * 16 * (8 * 24 + 16 * 16) * width
    # And a few bytes for the length of each prompt.
    assert keys_and_values <= cache_bytes(sample) <= keys_and_values + 8 * 24


def test_prompts_in_int8_take_a_byte_for_each_number_and_four_for_each_scale():
    heads, size = 8, 16
    found = cache_bytes(program_of("sample", T5), "int8")
    prompts, responses = 2 * 2 * heads * (8 * 24) * (size + 4), 2 * 2 * heads * (16 * 16) * size * 4
    assert prompts + responses <= found <= prompts + responses + 8 * 24


def test_both_networks_of_a_divergence_count_once():
    """Two networks and the code of two programs stay in memory.

    The larger program also needs 0.05 GiB for each prompt.
    """
    programs = (program_of("sample", POLICY, holds=True), program_of("divergence", POLICY, holds=True))
    plan = plan_of(update_config(batch=64, programs=programs, source=OnlineConfig()))
    assert plan.working == int(0.05 * GIB * 64)
    assert plan.needed == pytest.approx((2 * 1 + 2 * 0.25 + 64 * 0.05) * GIB)


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_the_largest_batch_is_found_from_either_side(batch):
    # 3 + 0.25 GiB stay in memory. So (15.75 - 3.25) / 0.1 = 125 prompts fit, but the compiler refuses more than 120.
    asked = []

    def recorded(config, program):
        asked.append(program.batch.batch)
        return compile_(config, program)

    plan = make_plan(update_config(batch=batch, search=True), recorded)
    assert plan.largest_batch == 120
    assert 120 in asked
    assert len(asked) <= 5


def test_the_largest_batch_is_a_multiple_of_its_parts():
    plan = plan_of(update_config(batch=64, search=True, microbatches=4))
    # With four microbatches on eight devices 96 fit; 128 are more than 120.
    assert plan.largest_batch == 96


def test_every_program_is_compiled_with_the_largest_batch():
    """3 + 0.25 + 1 GiB of networks and four programs of 0.25 GiB stay, so 10.5 GiB are left for 0.1 GiB a prompt."""
    asked = []

    def recorded(config, program):
        asked.append((program.name, program.batch.batch))
        return compile_(config, program)

    plan = make_plan(dataclasses.replace(online_config(), search=True), recorded)
    assert plan.largest_batch == 104
    assert asked[:4] == [("update", 64), ("sample", 64), ("judge", 64), ("score", 64)]
    # The search itself compiles only the program that needs most.
    assert {name for name, batch in asked[4:] if batch != 104} == {"update"}
    assert sorted(name for name, batch in asked if batch == 104) == ["judge", "sample", "score", "update"]


@pytest.mark.parametrize("batch", [8, 64, 256, 512])
def test_another_program_may_need_most_at_the_largest_batch(batch):
    """The update needs 4 GiB and 0.01 a prompt, the sampler 0.05 a prompt: with 12.75 GiB left, 248 prompts fit."""
    asked = []

    def growing(config, program):
        asked.append((program.name, program.batch.batch))
        update = program.kind == "update"
        working = 4 + 0.01 * program.batch.batch if update else 0.05 * program.batch.batch
        state, temporaries = int(3 * GIB * update), int(working * GIB)
        return Compiled(parameters=int(GIB), state=state, arguments=state or int(GIB), temporaries=temporaries)

    programs = (program_of("update", POLICY), program_of("sample", POLICY))
    config = update_config(batch=batch, programs=programs, source=OnlineConfig(), search=True)
    assert make_plan(config, growing).largest_batch == 248
    assert len(asked) == len(set(asked)) <= 10


def test_no_batch_fits_where_the_state_alone_does_not():
    large = dataclasses.replace(POLICY, width=1024)
    plan = plan_of(update_config(model=large, batch=16, search=True))
    assert plan.largest_batch == 0
    assert not any("--batch" in line and "largest" in line for line in plan.advice)


def test_memory_that_does_not_grow_with_the_batch_ends_the_search():
    def constant(config, program):
        return Compiled(parameters=1, state=3, arguments=3, temporaries=5)

    plan = make_plan(update_config(batch=64, search=True), constant)
    assert plan.largest_batch > 64


def test_what_does_not_fit_says_what_would_help():
    plan = plan_of(update_config(batch=256, search=True))
    # 3 GiB of state and 25.6 GiB of temporaries. A compiler that gives up reports nothing else.
    assert plan.needed == pytest.approx((3 + 25.6) * GIB)
    assert [line.partition(":")[0] for line in plan.advice] == [
        "--microbatches=32",
        "--batch=120",
        "--layout=fsdp_tensor",
        "--optimizer=adafactor",
        "a slice of 16 devices",
    ]
    assert "saves 2.0 GiB" in plan.advice[3]
    assert f"{(3 + 25.6) / 15.75:.1f} times" in plan.advice[4]


def test_one_gpu_is_told_of_more_gpus_and_of_no_layout():
    large = dataclasses.replace(POLICY, width=1024)
    one, eight = (
        plan_of(update_config(model=large, batch=batch, layout="data", topology=parse_topology(name)))
        for name, batch in (("h100:1", 512), ("h100:8", 4096))
    )
    assert not one.fits and not eight.fits
    share = one.needed / one.capacity
    assert f"--topology=h100:{2 ** math.ceil(math.log2(share))}: the job needs {share:.1f} times" in one.advice[-1]
    assert not any("--layout" in line for line in one.advice)
    assert any("--layout=fsdp:" in line for line in eight.advice)
    assert not any("--topology" in line for line in eight.advice)


def test_settings_that_are_not_yet_taken_are_named():
    plan = plan_of(update_config(model=DecoderConfig(width=512), layout="data"))
    assert not plan.fits
    settings = {line.partition(":")[0] for line in plan.advice}
    assert {"--remat=full", "--layout=fsdp", "--dtype=bfloat16", "--batch=8"} <= settings
    adafactor = plan_of(update_config(batch=256, optimizer=OptimizerConfig("adafactor")))
    assert not any("optimizer" in line for line in adafactor.advice)


def test_a_job_that_trains_nothing_is_not_told_how_to_train():
    plan = plan_of(update_config(programs=(program_of("judge", JUDGE, holds=True),), batch=2048))
    assert not plan.fits
    assert not any(word in line for line in plan.advice for word in ("remat", "microbatches", "optimizer"))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_anything_is_compiled(microbatches):
    def never(config, program):
        raise AssertionError("compiled")

    batch = 12 if microbatches == 1 else 8
    with pytest.raises(UserError, match=rf"batch is {batch}: it must be a multiple of .* {8 * microbatches}"):
        make_plan(update_config(batch=batch, microbatches=microbatches), never)


def test_a_second_programs_batch_is_checked_too():
    small = replaced(program_of("score"), batch=4)
    with pytest.raises(UserError, match="batch is 4"):
        make_plan(config_of(program_of("update"), small), compile_)


def test_virtual_devices_share_the_memory_of_this_machine():
    plan = plan_of(dataclasses.replace(update_config(), topology=CPU))
    assert plan.capacity == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8
    assert plan_of(dataclasses.replace(update_config(), topology=parse_topology("v5p:2x2x2"))).capacity == 95 * GIB
