"""The programs of every kind of job equal lists made by hand."""

import dataclasses

import pytest
from planning import DECODER, T5, config_of, facts_of, program_of, write_run

from alignment_gap.checkpoints import Network
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.errors import UserError
from alignment_gap.jobs.assembly import BatchShape
from alignment_gap.jobs.compose import ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EvaluateConfig
from alignment_gap.jobs.generate import GenerateConfig
from alignment_gap.jobs.label import LabelConfig
from alignment_gap.jobs.reference import ReferenceConfig
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import AdapterConfig
from alignment_gap.plan.known import MARKERS, Known, Overrides
from alignment_gap.plan.steps import Program, programs_of
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.sharding.chips import parse_topology

# None of these folders exists. The user gives lengths and sizes.
KNOWN = Known(given=Overrides(judge="t5_small", prompt_length=40, response_length=20))
PROMPTS = DatasetConfig("prompts", batch_size=8)
JUDGE = JudgeConfig("runs/judge")


def shape(samples):
    return BatchShape(8, 40, samples, 20)


def planned(config, known=KNOWN):
    """(name, kind, batch, whether it holds parameters) of every program."""
    return [(each.name, each.kind, each.batch, each.holds) for each in programs_of(config, known)[1]]


def policy_job(**settings):
    return JobConfig(**({"model": T5, "start": "runs/sft", "source": PROMPTS} | settings))


def online_job(loss="ipo", **source):
    return policy_job(loss=LossConfig(loss), source=OnlineConfig(PROMPTS, judge=JUDGE, **source))


def test_supervised_training_is_the_update_alone():
    job = JobConfig(model=T5, loss=LossConfig("sft"), source=PROMPTS)
    assert planned(job) == [("update", "update", shape(2), False)]


def test_a_preference_model_is_the_update_alone():
    (update,) = programs_of(policy_job(kind="pairwise"), KNOWN)[1]
    assert update.kind == "update"
    assert update.facts.network == Network("pairwise", T5, MARKERS)


@pytest.mark.parametrize(("reference_log_probs", "is_scored"), [("auto", True), ("each_step", True), ("stored", False)])
def test_offline_the_reference_scores_what_is_not_stored(reference_log_probs, is_scored):
    reference = [("reference", "score", shape(2), True)] if is_scored else []
    job = policy_job(reference_log_probs=reference_log_probs)
    assert planned(job) == [("update", "update", shape(2), False), *reference]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_reference_that_moves_is_held_by_the_state(rank):
    """With adapters, the reference has adapters too."""
    job = policy_job(reference_every=4, adapter=AdapterConfig(rank))
    assert planned(job) == [("update", "update", shape(2), False), ("reference", "score", shape(2), False)]
    update, reference = programs_of(job, KNOWN)[1]
    assert reference.facts.network == update.facts.network and not reference.shares


def test_kto_scores_the_mismatched_responses_too():
    assert planned(policy_job(loss=LossConfig("kto"))) == [
        ("update", "update", shape(2), False),
        ("reference", "score", shape(2), True),
        ("reference, mismatched", "score", shape(2), False),
    ]
    # Their log-probs are never stored, so the reference stays in memory.
    assert planned(policy_job(loss=LossConfig("kto"), reference_log_probs="stored")) == [
        ("update", "update", shape(2), False),
        ("reference, mismatched", "score", shape(2), True),
    ]


@pytest.mark.parametrize("refresh_every", [0, 1, 4])
def test_online_ipo(refresh_every):
    assert planned(online_job(refresh_every=refresh_every)) == [
        ("update", "update", shape(2), False),
        ("sampling", "sample", shape(2), False),
        ("judge", "judge", shape(2), True),
        ("reference", "score", shape(2), True),
    ]


def test_a_sampler_that_draws_for_four_steps_has_four_times_the_prompts_and_a_quarter_of_the_calls():
    _, programs = programs_of(dataclasses.replace(online_job(refresh_every=4, steps_per_draw=4), steps=10), KNOWN)
    one = shape(2)
    assert [(each.name, each.batch.batch // one.batch, each.steps, each.calls) for each in programs] == [
        ("update", 1, 1, 10),
        ("sampling", 4, 4, 3),
        ("judge", 1, 1, 10),
        ("reference", 1, 1, 10),
    ]
    larger = programs[1].with_batch(2 * one.batch)
    assert (larger.batch.batch, larger.steps) == (8 * one.batch, 4)
    again = programs[1].with_draws(2)
    assert (again.batch.batch, again.steps, again.calls) == (2 * one.batch, 2, 6)


def test_the_best_and_the_worst_of_eight():
    job = online_job(samples=8, keep="best_and_worst")
    assert planned(job) == [
        ("update", "update", shape(2), False),
        ("sampling", "sample", shape(8), False),
        ("judge", "judge", shape(8), True),
        ("reference", "score", shape(2), True),
    ]


def test_a_judge_on_the_host_is_no_program():
    rubric = OnlineConfig(PROMPTS, samples=4, judge=JudgeConfig("rubric", labels="rewards"))
    job = policy_job(loss=LossConfig("grpo"), source=rubric)
    assert [name for name, *_ in planned(job)] == ["update", "sampling", "reference"]
    assert programs_of(job, KNOWN)[1][0].facts.rewards


def test_nash_md_asks_for_one_opponent_a_prompt():
    assert planned(online_job("nash_md", samples=4, against="mixture", mixture=0.5)) == [
        ("update", "update", shape(4), False),
        ("sampling", "sample", shape(4), False),
        ("opponents", "opponents", shape(1), False),
        ("judge", "judge", shape(2), True),
        ("reference", "score", shape(4), True),
    ]


def test_a_second_source_is_sampled_and_scored_beside_the_first():
    fresh = OnlineConfig(PROMPTS, samples=1)
    one = BatchShape(8, 40, 1, 20)
    job = policy_job(loss=LossConfig("hypo"), fresh=fresh)
    assert planned(job) == [
        ("update", "update", shape(2), False),
        ("sampling", "sample", one, False),
        ("reference", "score", shape(2), True),
        ("reference, fresh", "score", one, False),
    ]
    assert programs_of(job, KNOWN)[1][0].facts.fresh == one


def test_the_labels_of_a_job_are_the_judges():
    job = policy_job(source=OnlineConfig(PROMPTS, judge=JudgeConfig("runs/judge", labels="soft")))
    assert next(each for each in programs_of(job, KNOWN)[1] if each.kind == "judge").labels == "soft"


def test_labelling_is_the_judge_alone():
    config = LabelConfig("pairs", JUDGE, batch_size=8, mesh=MeshConfig(layout="fsdp"))
    assert planned(config) == [("judge", "judge", shape(2), True)]
    assert programs_of(config, KNOWN)[0].mesh == MeshConfig(layout="fsdp")


def test_generation_holds_every_policy():
    known = dataclasses.replace(KNOWN, given=dataclasses.replace(KNOWN.given, model="t5_small"))
    sampler = SamplerConfig(temperature=0.5)
    config = GenerateConfig("prompts", ("runs/a", "runs/b"), JUDGE, batch_size=8, sampler=sampler)
    assert planned(config, known) == [
        ("sampling 0", "sample", shape(1), True),
        ("sampling 1", "sample", shape(1), True),
        ("judge", "judge", shape(2), True),
    ]
    job, _ = programs_of(config, known)
    assert (job.online.sampler, job.online.samples) == (sampler, 1)


def test_an_evaluation_samples_diverges_classifies_and_asks_every_judge(tmp_path):
    run = write_run(tmp_path / "policy", Network(model=DECODER))
    judges = ("golden=runs/golden", "runs/proxy")
    config = EvaluateConfig(run, None, "pairs", judges, response_length=20, batch_size=8)
    assert planned(config) == [
        ("sampling", "sample", shape(1), True),
        ("KL", "divergence", shape(1), True),
        ("classification", "score", shape(2), False),
        ("judge golden", "judge", shape(2), True),
        ("judge proxy", "judge", shape(2), True),
    ]


def test_an_evaluated_preference_model_is_a_judge_itself(tmp_path):
    known = dataclasses.replace(KNOWN, given=dataclasses.replace(KNOWN.given, judge=None))
    run = write_run(tmp_path / "model", Network("pairwise", DECODER, MARKERS))
    config = EvaluateConfig(run, None, "pairs", ("rubric",), batch_size=8)
    assert planned(config, known) == [("judge run", "judge", shape(2), True)]


def calls(config, known=KNOWN, examples=None, **given):
    """The calls of every program, by its name."""
    known = dataclasses.replace(known, given=dataclasses.replace(known.given, examples=examples, **given))
    return {program.name: program.calls for program in programs_of(config, known)[1]}


def test_a_training_job_calls_its_programs_in_every_step():
    names = ("update", "sampling", "judge", "reference")
    assert calls(dataclasses.replace(online_job(), steps=70)) == dict.fromkeys(names, 70)
    assert calls(policy_job(loss=LossConfig("sft"), steps=30)) == {"update": 30}
    # Three epochs of 83 examples in batches of 8.
    epochs = policy_job(steps=None, source=dataclasses.replace(PROMPTS, epochs=3))
    assert calls(epochs, examples=83) == {"update": 31, "reference": 31}
    assert calls(epochs) == {"update": None, "reference": None}


def test_labelling_and_generation_call_a_program_for_every_batch():
    label = LabelConfig("pairs", JUDGE, batch_size=8)
    assert calls(label, examples=81) == {"judge": 11}
    assert calls(label) == {"judge": None}
    generate = GenerateConfig("prompts", ("runs/a", "runs/b"), JUDGE, batch_size=8, limit=40)
    every = ("sampling 0", "sampling 1", "judge")
    assert calls(generate, examples=81, model="t5_small") == dict.fromkeys(every, 5)
    assert calls(generate, examples=17, model="t5_small") == dict.fromkeys(every, 3)
    assert calls(generate, model="t5_small") == dict.fromkeys(every)


def test_scoring_in_advance_is_the_reference_alone():
    config = ReferenceConfig("pairs", "runs/a", batch_size=8, dtype="bfloat16")
    job, (program,) = programs_of(config, Known(given=Overrides("t5_small", prompt_length=40, response_length=20)))
    assert (program.name, program.kind, program.batch, program.holds) == ("reference", "score", shape(2), True)
    assert program.model.dtype == "bfloat16" and job.mesh == config.mesh
    assert calls(config, examples=81, model="t5_small") == {"reference": 11}
    assert calls(config, model="t5_small") == {"reference": None}


@pytest.fixture
def measured(tmp_path):
    """An evaluation of three checkpoints: 40 prompts are 5 batches, 20 for the KL are 3, and 9 pairs are 2."""
    run = write_run(tmp_path / "policy", Network(model=DECODER))
    counts = {"prompts": 40, "kl_prompts": 20, "pairs": 9, "batch_size": 8}
    return EvaluateConfig(run, (1, 2, 3), "pairs", ("golden=runs/golden",), ("a=runs/a", "b=runs/b"), **counts)


def test_an_evaluation_calls_its_programs_for_every_checkpoint(measured):
    # Policy and reference both score the pairs. The judge compares with two opponents.
    found = {"sampling": 3 * 5, "KL": 3 * 3, "classification": 3 * 2 * 2, "judge golden": 3 * 2 * 5}
    assert calls(measured) == found
    further = dataclasses.replace(measured, classified=("heldout=held", "stream=stream"))
    assert calls(further) == found | {"classification": 3 * 2 * 6}
    # Without a list of steps, the number of checkpoints is not known.
    assert calls(dataclasses.replace(measured, steps=None)) == dict.fromkeys(found)


def test_pairs_of_a_policys_own_are_second_samples_with_labels(measured):
    own = dataclasses.replace(measured, own_labels="runs/golden")
    assert calls(own) == {
        "sampling": 3 * 2 * 5,
        "KL": 3 * 3,
        "classification": 3 * 2 * (2 + 3),
        "judge golden": 3 * (2 * 5 + 3),
    }
    other = calls(dataclasses.replace(measured, own_labels="runs/other"))
    assert (other["judge golden"], other["judge of own samples"]) == (3 * 2 * 5, 3 * 3)


def test_the_best_of_n_are_chosen_among_one_set_of_samples(measured):
    best = dataclasses.replace(measured, best_of=(1, 2, 4), best_by="runs/proxy")
    assert calls(best) == {"sampling": 5, "judge, best of n": 3 * 5, "judge golden": 3 * 2 * 5}
    assert planned(best) == [
        ("sampling", "sample", shape(4), True),
        ("judge, best of n", "judge", shape(4), True),
        ("judge golden", "judge", shape(2), True),
    ]
    # The judge of the choice is in memory once.
    again = dataclasses.replace(best, best_by="runs/golden")
    assert [held for name, *_, held in planned(again) if name.startswith("judge")] == [False, True]


def test_a_preference_model_and_other_judges_read_the_pairs(measured, tmp_path):
    run = write_run(tmp_path / "model", Network("pairwise", DECODER, MARKERS))
    judge = dataclasses.replace(measured, run=run, opponents=(), pairs=9)
    assert calls(judge) == {"judge run": 3 * 2, "judge golden": 3 * 2}
    assert calls(dataclasses.replace(judge, pairs=0), examples=33) == {"judge run": 3 * 5, "judge golden": 3 * 5}


@pytest.mark.parametrize(
    "config", [PrepareConfig(), ComposeConfig(("pairs",)), LabelConfig("pairs", JudgeConfig("rubric"))]
)
def test_a_job_without_a_device_has_nothing_to_plan(config):
    assert programs_of(config, KNOWN)[1] == ()


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (policy_job(start=None), "the loss ipo needs a reference policy"),
        (
            policy_job(loss=LossConfig("grpo")),
            "the loss grpo needs samples of the policy.*prompts has no such log-probs",
        ),
        (policy_job(loss=LossConfig("hypo")), "set fresh to a second source"),
        (policy_job(fresh=OnlineConfig(PROMPTS)), "reads no second source"),
        (online_job("nash_md", refresh_every=4), "refresh_every"),
    ],
)
def test_what_training_would_refuse_is_refused(job, says):
    with pytest.raises(UserError, match=says):
        programs_of(job, KNOWN)


def test_a_policy_is_no_judge(tmp_path):
    known = dataclasses.replace(KNOWN, given=dataclasses.replace(KNOWN.given, judge=None))
    run = write_run(tmp_path / "policy", Network(model=DECODER))
    with pytest.raises(UserError, match="no preference model"):
        programs_of(LabelConfig("pairs", JudgeConfig(run)), known)


def test_overrides_reach_the_job_and_all_of_its_batches():
    known = Known(given=dataclasses.replace(KNOWN.given, batch=16, layout="tensor", microbatches=2))
    job, programs = programs_of(online_job(), known)
    assert (job.mesh.layout, job.microbatches) == ("tensor", 2)
    assert {each.batch.batch for each in programs} == {16}
    job, _ = programs_of(LabelConfig("pairs", JUDGE), known)
    assert job.mesh.layout == "tensor"


def test_a_program_with_another_batch_is_otherwise_the_same():
    one = BatchShape(4, 24, 1, 16)
    program = Program("update", "update", facts_of(DECODER, fresh=one))
    larger = program.with_batch(32)
    assert (larger.batch.batch, larger.facts.fresh.batch) == (32, 32)
    assert larger.with_batch(8) == program.with_batch(8)
    assert larger.with_batch(8).batch == program.batch
    assert program_of("score").with_batch(32).facts.fresh is None


@pytest.mark.parametrize(
    ("layout", "microbatches", "unit"), [("data", 1, 8), ("fsdp", 4, 32), ("tensor", 1, 1), ("fsdp_tensor", 3, 6)]
)
def test_a_batch_is_a_multiple_of_its_parts(layout, microbatches, unit):
    assert config_of(layout=layout, microbatches=microbatches).batch_unit == unit


def test_slices_split_the_batch_too():
    config = config_of(layout="fsdp", topology=parse_topology("v5e:2x4", 2))
    assert config.batch_unit == 16
