"""The search for the fastest settings, with a fake compiler: so the best settings are known by hand."""

import dataclasses

import pytest
from made_up import POLICY, V5E, update_config
from planning import program_of

from alignment_gap.cli import gin_files
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import OnlineConfig
from alignment_gap.plan.best import Choice, find_best
from alignment_gap.plan.programs import Compiled
from alignment_gap.plan.report import gin_text
from alignment_gap.sharding.chips import GIB
from alignment_gap.training import OptimizerConfig

MODEL = dataclasses.replace(POLICY, heads=8)
THREE_HEADS = program_of("update", dataclasses.replace(POLICY, heads=3))
# Milliseconds of an update, and GiB of activations in one microbatch, by the setting of remat.
MILLISECONDS, ACTIVATIONS = {"full": 400, "dots": 320, "none": 300}, {"full": 4, "dots": 10, "none": 28}
BANDWIDTH = 819e9


class Compiler:
    """Returns made-up figures, and records its calls.

    The update is fastest with fsdp; each doubling of the model axis adds 100 ms. The state is 8 GiB, split over fsdp
    and model. A quarter of it is first moments; in bfloat16 they need half. A sampler takes 600 ms, but 50 ms on a
    mesh with a model axis.
    """

    def __init__(self, state=8.0):
        self.state, self.asked = state, []

    def __call__(self, config, program):
        job = config.job
        self.asked.append((program.kind, job.mesh, program.model.remat, job.microbatches))
        _, fsdp, model = job.mesh.shape(8)
        split = 1.0 / (fsdp * model) if job.mesh.layout != "data" else 1.0
        if program.kind != "update":
            return self.compiled(GIB * split, 0, 1, 600 if model == 1 else 50)
        halved = 1 / 8 if job.optimizer.moment_dtype == "bfloat16" else 0
        state = self.state * split * (1 - halved) * GIB
        time = MILLISECONDS[program.model.remat] * (1 + 0.05 * (job.microbatches - 1)) + 100 * (model.bit_length() - 1)
        time += 500 if job.mesh.layout in ("data", "sequence") else 0
        return self.compiled(state / 3, state, ACTIVATIONS[program.model.remat] / job.microbatches * GIB, time)

    def compiled(self, parameters, state, working, milliseconds):
        held = int(state or parameters)
        return Compiled(
            int(parameters),
            int(state),
            1,
            1,
            1,
            held,
            held,
            held,
            int(working),
            traffic=int(milliseconds / 1e3 * BANDWIDTH),
        )


def search(config, compiler, compiles=100):
    return find_best(config, compiles, compiler, say=lambda line: None)


def offline(**settings):
    return update_config(programs=(program_of("update", MODEL),), **settings)


def test_offline_the_least_recomputed_that_fits_in_the_fewest_microbatches_wins():
    """In two microbatches 28 GiB of activations fit v5e's 15.75 GiB. They take 315 ms; "dots" takes 320 ms in one."""
    compiler = Compiler()
    found = search(offline(), compiler)
    assert found.best.choice == Choice("fsdp", (1, 8, 1), "none", 2, "float32", 1)
    assert found.best.plan.step_seconds == pytest.approx(0.315)
    assert found.is_complete and found.compiled == len(compiler.asked) == len(found.trials)
    assert len({*map(str, compiler.asked)}) == len(compiler.asked)


def test_online_the_whole_step_decides():
    """The fastest update is that on fsdp, but its sampler is slow. With a model axis of 2 the whole step is faster."""
    programs = (program_of("update", MODEL), program_of("sample", MODEL), program_of("judge", MODEL, holds=True))
    found = search(update_config(programs=programs, source=OnlineConfig()), Compiler())
    assert found.best.choice.layout == "fsdp_tensor" and found.best.choice.sizes == (1, 4, 2)
    assert len(found.best.plan.parts) == 3
    assert found.best.plan.step_seconds == pytest.approx((315 + 100 + 50 + 50) / 1e3)


@pytest.mark.parametrize(
    ("refresh_every", "fastest", "steps", "milliseconds"), [(1, 8, 1, 50), (0, 4, 4, 20), (16, 8, 8, 10), (6, 8, 2, 35)]
)
def test_a_sampler_draws_for_more_steps_while_each_takes_less(refresh_every, fastest, steps, milliseconds):
    """A step's part of a draw takes 50, 35, 20 and 10 ms for 1, 2, 4 and 8 steps; from `fastest` on, no less."""

    class Drawing(Compiler):
        def __call__(self, config, program):
            if program.kind != "sample":
                return super().__call__(config, program)
            self.asked.append((program.kind, config.job.mesh, program.steps))
            assert program.batch.batch == 64 * program.steps
            each = {1: 50, 2: 35, 4: 20, 8: 10}[min(program.steps, fastest)]
            return self.compiled(GIB / 8, 0, 1, each * program.steps)

    compiler = Drawing()
    programs = (program_of("update", MODEL), program_of("sample", MODEL))
    found = search(update_config(programs=programs, source=OnlineConfig(refresh_every=refresh_every)), compiler)
    assert found.best.choice == Choice("fsdp", (1, 8, 1), "none", 2, "float32", steps)
    assert found.best.plan.config.job.source.steps_per_draw == steps
    assert found.best.plan.step_seconds == pytest.approx((315 + milliseconds) / 1e3)
    assert len({*map(str, compiler.asked)}) == len(compiler.asked) == found.compiled
    line = f"STEPS_PER_DRAW = {steps}"
    assert (line in gin_text(found, "alignment-gap plan", "t5_small")) == (steps > 1)


def test_moments_in_bfloat16_are_tried_only_where_nothing_else_fits():
    found = search(offline(), Compiler())
    assert {trial.choice.moment_dtype for trial in found.trials} == {"float32"}
    # 12.5 GiB on a chip do not fit with 4 GiB of activations, but seven eighths of them do. Then "dots" fits in four
    # microbatches, with 10.9 and 2.5 GiB, and takes 368 ms instead of 400.
    found = search(offline(), Compiler(state=8 * 12.5))
    assert found.best.choice == Choice("fsdp", (1, 8, 1), "dots", 4, "bfloat16", 1)
    assert found.best.plan.step_seconds == pytest.approx(0.368)
    without = search(offline(optimizer=OptimizerConfig("adafactor")), Compiler(state=8 * 12.5))
    assert without.best is None and not any(trial.plan.fits for trial in without.trials)


def test_no_more_is_compiled_than_was_asked_for():
    whole = search(offline(), Compiler())
    compiler = Compiler()
    found = search(offline(), compiler, compiles=3)
    assert len(compiler.asked) == found.compiled == 3 and not found.is_complete
    assert found.best.choice == Choice("fsdp", (1, 8, 1), "full", 1, "float32", 1)
    assert whole.compiled > 3


def test_meshes_split_the_batch_and_the_heads():
    meshes = {trial.choice.sizes for trial in search(offline(batch=4), Compiler()).trials}
    assert meshes == {(1, 4, 2), (1, 2, 4), (1, 1, 8)}
    config = update_config(programs=(THREE_HEADS,))
    assert {trial.choice.sizes for trial in search(config, Compiler()).trials} == {(8, 1, 1), (1, 8, 1)}


@pytest.mark.parametrize(
    ("config", "compiles", "message"),
    [
        (update_config(programs=(program_of("sample", MODEL),)), 9, "best is set, but this job trains nothing"),
        (offline(), 0, "compiles is 0: it must be at least 1"),
        (update_config(programs=(THREE_HEADS,), batch=4), 9, "batch is 4: no mesh of 8 devices can split it: give a"),
    ],
)
def test_what_cannot_be_searched_is_one_line(config, compiles, message):
    with pytest.raises(UserError, match=message) as error:
        search(config, Compiler(), compiles)
    assert "\n" not in str(error.value)


def test_the_gin_file_sets_what_was_found(tmp_path):
    found = search(offline(topology=V5E), Compiler())
    file = tmp_path / "best.gin"
    file.write_text(gin_text(found, "alignment-gap plan --best=best.gin", "t5_small"))
    words = ["DATASET=pairs", "START=runs/sft"]
    job = gin_files.read_config(["gin/runs/offline_ipo.gin", str(file)], words)
    assert (job.mesh.layout, job.mesh.data, job.mesh.fsdp, job.mesh.model) == ("fsdp", 1, 8, 1)
    assert (job.model.remat, job.model.dtype, job.model.width) == ("none", "bfloat16", 512)
    assert (job.microbatches, job.source.batch_size, job.optimizer.moment_dtype) == (2, 64, "float32")
    # Without a named size the model comes from START. So the file sets all fields of the model, which lets remat take
    # effect.
    file.write_text(gin_text(found, "alignment-gap plan --best=best.gin", None))
    job = gin_files.read_config(["gin/runs/offline_ipo.gin", str(file)], words)
    assert job.model == dataclasses.replace(MODEL, remat="none")
