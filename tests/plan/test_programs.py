"""Real programs, compiled here for this process's virtual devices, and in another process for TPUs and others."""

import dataclasses
import math
import os
import pickle
import subprocess
import sys

import jax
import pytest
from planning import CPU, DECODER, SHAPE, T5, config_of, facts_of, program_of, replaced

from alignment_gap.errors import UserError
from alignment_gap.jobs.config import LossConfig, OnlineConfig
from alignment_gap.models import RewardHead, count_parameters, make_policy
from alignment_gap.plan import programs
from alignment_gap.plan.programs import build, compile_here, compile_program, environment, exceeded_bytes
from alignment_gap.plan.steps import Program
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.sharding.chips import GIB, TPUS, parse_topology
from alignment_gap.training import OptimizerConfig

PARAMETERS = 4 * count_parameters(make_policy(DECODER))
V5E = parse_topology("v5e:2x4")


def axes_of(compiled):
    return {each.axes for each in compiled.collectives}


def bytes_of(compiled, kind):
    return sum(each.bytes for each in compiled.collectives if each.kind == kind)


@pytest.mark.parametrize(("layout", "parts"), [("data", 1), ("fsdp", 8)])
def test_the_state_of_an_update_is_split_by_its_layout(layout, parts, compiled):
    update = compiled("update", layout)
    part = PARAMETERS // parts
    assert update.parameters == part
    # Parameters and two moments; the new state replaces the old one. Beside them are seven numbers: the step, two
    # counts of the optimizer, and the four of the guard's memory.
    assert update.state == 3 * part + 7 * 4
    assert update.aliased == update.state
    batch = 4 * (24 + 2 * (1 + 2 * 16 + 2 + 2 * 16 + 1) + 8) * 1
    assert update.state < update.arguments < update.state + 2 * batch
    assert update.state <= update.outputs < update.state + 1024
    assert not update.exceeded


def test_the_peak_is_what_is_needed_at_once(compiled):
    update = compiled("update")
    assert update.temporaries > 0
    assert update.peak == update.arguments + update.outputs - update.aliased + update.temporaries + update.code


def test_a_program_that_only_reads_has_no_state(compiled):
    score = compiled("score")
    assert (score.state, score.aliased) == (0, 0)
    assert score.parameters == PARAMETERS // 8
    # A device scores one prompt: two responses of 16 tokens, in float32.
    assert score.outputs == 4 * 2 * 16


def test_copies_of_the_data_add_their_gradients_up(compiled):
    update = compiled("update", "data")
    assert axes_of(update) == {"data"}
    # Prompts and responses each give a gradient of every layer; the logits give a third one of the embedding. Each of
    # them is summed separately, that of the last norm once. The rest is a few numbers: the gradient's norm and metrics.
    embedding, last_norm = 4 * 256 * 64, 4 * 64
    gradients = 2 * (PARAMETERS - embedding - last_norm) + 3 * embedding + last_norm
    assert gradients <= bytes_of(update, "all-reduce") < gradients + 128
    assert compiled("score", "data").collectives == ()


def test_split_parameters_are_gathered_where_they_are_used(compiled):
    update, score = compiled("update"), compiled("score")
    assert axes_of(update) == axes_of(score) == {"fsdp"}
    matrices = PARAMETERS - 4 * 64 * 5  # All but the scales of five norms, which may stay whole.
    assert bytes_of(score, "all-gather") >= matrices - 4 * 256 * 64  # XLA may move rows of the embedding instead.


def test_a_tensor_layout_adds_up_activations_and_splits_no_batch(compiled):
    score = compiled("score", "tensor")
    assert axes_of(score) == {"model"}
    # Each layer sums the outputs of attention and MLP, for all tokens of the batch.
    stream = 4 * 8 * (24 + 2 * 16) * 64
    assert bytes_of(score, "all-reduce") >= 2 * stream - 4 * 8 * 24 * 64


def test_a_sampler_holds_no_state_and_returns_tokens_and_log_probs():
    sample = program_of("sample")
    found = compile_here(config_of(sample, layout="data", source=OnlineConfig()), sample)
    # A device samples two responses: tokens, two log-probs for each, and lengths.
    assert found.outputs == 2 * (16 + 2 * 16 + 1) * 4 + 4 * 8
    assert (found.state, found.parameters) == (0, PARAMETERS)


@pytest.mark.parametrize(
    ("kind", "source", "networks"),
    [("score", None, 1), ("divergence", None, 2), ("sample", OnlineConfig(mixture=0.5), 2)],
)
def test_the_networks_among_the_arguments_are_counted(kind, source, networks):
    program = replaced(program_of(kind), samples=1)
    found = compile_here(config_of(program, layout="data", **({"source": source} if source else {})), program)
    assert found.networks == networks
    # The texts and keys of a batch need a few more bytes.
    assert networks * PARAMETERS < found.arguments < networks * PARAMETERS + 4096


def arguments_of(program, **job):
    _, arguments, params = build(program, config_of(program, **job).job, make_mesh(MeshConfig()))
    return arguments, params


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("refresh_every", "copies"), [(1, 0), (4, 1), (0, 0)])
def test_a_sampler_that_lags_behind_has_parameters_of_its_own(refresh_every, copies):
    job = {"source": OnlineConfig(refresh_every=refresh_every)}
    (state, _), params = arguments_of(program_of("update"), **job)
    # A sampler that stays at the start reads the reference's parameters.
    assert size(state.copies) == copies * size(params)


def test_a_sampler_for_several_steps_takes_the_step_of_each_prompt():
    for steps, shape in ((1, ()), (4, (4 * program_of("sample").batch.batch,))):
        arguments, _ = arguments_of(program_of("sample").with_draws(steps), source=OnlineConfig(refresh_every=4))
        assert arguments[2].shape == shape and arguments[3].shape[0] == steps * program_of("sample").batch.batch


@pytest.mark.parametrize(("reference_every", "copies"), [(None, 0), (4, 1)])
def test_a_reference_that_moves_is_a_copy_in_the_state(reference_every, copies):
    (state, _), params = arguments_of(program_of("update"), reference_every=reference_every)
    assert size(state.copies) == copies * size(params)


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("sgd", 0)])
def test_an_optimizer_keeps_its_moments(optimizer, moments):
    (state, _), params = arguments_of(program_of("update"), optimizer=OptimizerConfig(optimizer))
    assert moments * size(params) <= size(state.optimizer_state) <= moments * size(params) + 2


def test_a_batch_has_what_the_sources_give():
    online = {"source": OnlineConfig()}
    (_, batch), _ = arguments_of(program_of("update"))
    assert batch.responses.shape == batch.reference_log_probs.shape == (8, 2, 16)
    assert batch.sampler_log_probs is batch.fresh is batch.mismatched is None
    (_, batch), _ = arguments_of(program_of("update"), loss=LossConfig("simpo"), **online)
    assert batch.sampler_log_probs.shape == (8, 2, 16)
    assert batch.reference_log_probs is None
    (_, batch), _ = arguments_of(program_of("update"), loss=LossConfig("kto"))
    assert batch.mismatched.reference_log_probs.shape == (8, 2, 16)
    one = dataclasses.replace(SHAPE, samples=1)
    hypo = Program("update", "update", facts_of(DECODER, fresh=one))
    (_, batch), _ = arguments_of(hypo, loss=LossConfig("hypo"), fresh=OnlineConfig(samples=1))
    assert batch.fresh.sampler_log_probs.shape == (8, 1, 16)


def test_recorded_streams_carry_the_log_probs_of_their_sampler():
    recorded = Program("update", "update", facts_of(DECODER, fields=("sampler_log_probs",)))
    (_, batch), _ = arguments_of(recorded, loss=LossConfig("rloo"))
    assert batch.sampler_log_probs.shape == (8, 2, 16)


@pytest.mark.parametrize(
    ("source", "kind", "networks"),
    [
        (OnlineConfig(), "sample", 1),
        (OnlineConfig(mixture=0.5), "sample", 2),
    ],
)
def test_a_mixture_takes_the_references_parameters_too(source, kind, networks):
    arguments, params = arguments_of(program_of(kind), source=source)
    trees = [each for each in arguments if jax.tree.structure(each) == jax.tree.structure(params)]
    assert len(trees) == networks


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_judge_scores_every_response(labels):
    judge = replaced(program_of("judge", T5, labels=labels), samples=3)
    function, arguments, _ = build(judge, config_of(judge).job, make_mesh(MeshConfig()))
    assert jax.eval_shape(function, *arguments).shape == (8, 3)


def test_a_reward_model_with_a_head_is_compiled_with_its_head():
    judge = program_of("judge", T5, labels="rewards")
    network = dataclasses.replace(judge.facts.network, kind="bradley_terry", markers=(), head=RewardHead())
    judge = dataclasses.replace(judge, facts=dataclasses.replace(judge.facts, network=network))
    function, arguments, params = build(judge, config_of(judge).job, make_mesh(MeshConfig()))
    assert jax.eval_shape(function, *arguments).shape == (8, 2)
    assert params["score"]["output"]["kernel"].shape == (T5.width, 1)


def test_a_batch_that_the_mesh_does_not_split_is_refused():
    program = replaced(program_of("update"), batch=12)
    with pytest.raises(UserError, match="batch_size is 12: it must be a multiple of"):
        compile_here(config_of(program), program)


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_same(compiled):
    update = program_of("update")
    found, here = compile_program(config_of(update), update), compiled("update")
    assert (found.parameters, found.state, found.arguments) == (here.parameters, here.state, here.arguments)
    assert (found.flops, found.model_flops) == (here.flops, here.model_flops)
    assert axes_of(found) == {"fsdp"}
    assert found.host_bytes > 0


@pytest.mark.slow
def test_a_tpu_without_a_tpu(libtpu):
    update = program_of("update", dataclasses.replace(DECODER, dtype="bfloat16"))
    found = compile_program(config_of(update, topology=V5E), update)
    assert found.parameters == PARAMETERS // 8
    assert found.code > 0
    assert found.traffic > found.state
    assert "fsdp" in axes_of(found)


def said_beside_libtpu(program):
    """The words that a program prints, in a process that may describe TPUs."""
    variables = os.environ | environment(V5E) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_table_of_chips_knows_a_tpus_devices_by_the_name_that_jax_has_for_them(libtpu):
    program = (
        "from alignment_gap.plan.programs import devices_of\n"
        "from alignment_gap.sharding.chips import CHIPS, DEVICE_KINDS, TPUS, parse_topology\n"
        "for kind in TPUS:\n"
        "    (name,) = {each.device_kind for each in devices_of(parse_topology(f'{kind}:{CHIPS[kind].shape}'))}\n"
        "    assert DEVICE_KINDS[name] == kind, (name, kind)\n"
        "print('all', *TPUS)\n"
    )
    assert said_beside_libtpu(program) == ["all", *TPUS]


def test_a_mesh_whose_sizes_are_no_axes_of_the_torus(libtpu):
    """The torus is 4 x 4 x 4, so 8 x 8 splits one of its axes. All other meshes equal those of `jax.make_mesh`."""
    program = (
        "import jax\n"
        "from alignment_gap.plan.programs import devices_of\n"
        "from alignment_gap.sharding import AXES, MeshConfig, make_mesh\n"
        "from alignment_gap.sharding.chips import parse_topology\n"
        "for name, shape in (('v5p:4x4x4', (1, 16, 4)), ('v5e:16x16', (1, 8, 32)), ('v4:4x4x4', (4, 4, 4))):\n"
        "    devices = devices_of(parse_topology(name))\n"
        "    types = (jax.sharding.AxisType.Auto,) * 3\n"
        "    usual = jax.make_mesh(shape, AXES, axis_types=types, devices=devices)\n"
        "    assert make_mesh(MeshConfig(*shape), devices).devices == usual, (name, shape)\n"
        "devices = devices_of(parse_topology('v5p:4x4x4'))\n"
        "found = make_mesh(MeshConfig(1, 8, 8), devices).devices.devices\n"
        "print(*found.shape, len({device.id for device in found.flat}))\n"
    )
    assert said_beside_libtpu(program) == ["1", "8", "8", "64"]


def test_what_a_tpu_has_no_room_for(libtpu):
    score = replaced(program_of("score"), batch=2**20, prompt=1024)
    found = compile_program(config_of(score, topology=V5E), score)
    assert found.exceeded > 15.75 * GIB
    assert found.peak == found.exceeded
    assert found.flops > 0


def test_more_devices_than_there_are_is_one_line():
    update = program_of("update")
    with pytest.raises(UserError, match="topology cpu:16: 8 cpu devices are present"):
        compile_here(config_of(update, topology=parse_topology("cpu:16")), update)


def run_as(monkeypatch, status, stderr, result=None):
    """Replaces the compiling process by one that ends like this."""

    def run(command, **settings):
        if result is not None:
            with open(command[-1], "wb") as file:
                pickle.dump(result, file)
        return subprocess.CompletedProcess(command, status, b"", stderr)

    monkeypatch.setattr(programs.subprocess, "run", run)


@pytest.mark.parametrize(
    ("status", "stderr", "says"),
    [
        (-9, b"", r"compiling update on cpu:8 was killed by signal 9: it may need more memory"),
        (1, b"Traceback\n  a line\nRuntimeError: no libtpu\n\n", r"compiling update on cpu:8: RuntimeError: no libtpu"),
        (1, b"\xff", r"compiling update on cpu:8: "),
        (0, b"", r"compiling update on cpu:8: no message"),
    ],
)
def test_a_process_that_ends_without_a_result_is_one_line(monkeypatch, status, stderr, says):
    run_as(monkeypatch, status, stderr)
    with pytest.raises(UserError, match=says) as caught:
        compile_program(config_of(), program_of("update"))
    assert "\n" not in str(caught.value)


def test_an_error_of_the_compiling_process_is_the_users(monkeypatch):
    run_as(monkeypatch, 0, b"", UserError("lower it"))
    with pytest.raises(UserError, match=r"^lower it$"):
        compile_program(config_of(), program_of("update"))


def test_what_the_compiling_process_is_asked_for_survives_the_way():
    config = config_of(loss=LossConfig("dpo", {"beta": 0.5}))
    assert pickle.loads(pickle.dumps((config, config.programs[0]))) == (config, config.programs[0])


def test_processes_may_run_side_by_side_and_reach_for_no_device():
    variables = environment(parse_topology("v5p:4x4x4"))
    assert variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert variables["JAX_PLATFORMS"] == "cpu"
    assert "device_count=8" in environment(CPU)["XLA_FLAGS"]
    assert environment(parse_topology("h100:8"))["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("the total memory required for HLO temporaries (120.50G) exceeds available HBM (15.75G).", 121.5),
        ("memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.7G. Total hbm usage >= 21.00G:", 21),
        ("memory space hbm. Used 512.0M of 15.75G hbm.", 0.5),
        ("memory space hbm. Used 1.5T of 15.75G hbm.", 1536),
    ],
)
def test_the_compilers_words_where_memory_ran_out(message, gib):
    assert exceeded_bytes(f"RESOURCE_EXHAUSTED: Ran out of {message}", int(GIB)) == int(gib * GIB)


def test_no_figure_no_guess():
    with pytest.raises(UserError, match="without a figure: RESOURCE_EXHAUSTED: no idea"):
        exceeded_bytes("RESOURCE_EXHAUSTED: no idea\nmore", 0)


def test_bytes_of_a_device_leave_random_keys_out():
    mesh = make_mesh(MeshConfig())
    arguments, _ = arguments_of(program_of("sample"), source=OnlineConfig())
    keys = [leaf for leaf in jax.tree.leaves(arguments) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert len(keys) == 1
    assert mesh.batch_parts == 8
    rows = math.prod((8, 24)) // 8 + 1 + 1 + 1  # Prompts, their ids and lengths, and the step.
    assert programs._shard_bytes(arguments) == PARAMETERS + 4 * rows
