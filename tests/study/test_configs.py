"""The graphs of configs/study: their jobs, no job twice, an arm for every claim. No job runs."""

import collections
import dataclasses
import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from alignment_gap.configuration import from_dict
from alignment_gap.data.text import load_vocabulary
from alignment_gap.data.text.posts import pair
from alignment_gap.jobs.train import TRAIN
from alignment_gap.models import count_parameters, make_policy
from alignment_gap.study.arms import ARMS
from alignment_gap.study.claims import CLAIMS
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.graph import study_graph
from alignment_gap.study.run import of_size

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "study"


@functools.cache
def study_of(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_dict(StudyConfig, module.get_config(*arguments).to_dict())


@functools.cache
def graph_of(name, size="", *arguments):
    study = study_of(name, *arguments)
    return study_graph(of_size(study, size) if size else study, pathlib.Path("jobs"))


@pytest.mark.parametrize("kind", ["easy", "noisy", "biased", "short", "long"])
def test_the_kinds_of_the_built_in_task_differ_in_the_task_alone(kind):
    study, tiny = study_of("kinds", kind), study_of("tiny")
    posts = study.task.source.posts
    assert posts.settings != tiny.task.source.posts.settings
    assert (study.policy, study.golden, study.proxy, study.sft) == (tiny.policy, tiny.golden, tiny.proxy, tiny.sft)
    pairs = [pair(0, number, posts.settings) for number in range(200)]
    lengths = [len(words) for each in pairs for words in each.responses]
    agreement = np.mean([each.preferred == np.argmax(each.rubric) for each in pairs])
    low, high = {"easy": (0.97, 1.0), "noisy": (0.6, 0.75), "biased": (0.7, 0.85)}.get(kind, (0.8, 0.95))
    assert low <= agreement <= high
    assert max(lengths) == posts.settings.response_words or kind == "biased"
    assert {"short": 3 < np.mean(lengths) < 5, "long": 8 < np.mean(lengths) < 12}.get(kind, True)


@pytest.mark.parametrize("family", ["t5", "palm"])
def test_a_ladder_for_a_laptop_spans_two_decades_of_parameters(family):
    study = study_of("scaling", family)
    counts = [count_parameters(make_policy(of_size(study, size).policy)) for size in study.sizes]
    assert len(counts) == 3 and counts == sorted(counts)
    assert counts[-1] == pytest.approx(100 * counts[0], rel=0.2)
    vocabularies = {of_size(study, size).policy.vocabulary_size for size in study.sizes}
    assert vocabularies == {study.base.model.vocabulary_size} == {load_vocabulary("posts").size}


def test_hh_is_a_study_whose_paths_are_the_users_to_give():
    assert study_of("hh").task.source.location is None and study_of("hh").task.vocabulary is None


def test_the_helpful_pairs_start_from_the_harmless_ones():
    study, harmless = study_of("hh", "helpful"), study_of("hh")
    assert study.policy is None and study.sft.start == "runs/hh/jobs/seed0-sft"
    assert (study.evaluation, study.sampler) == (harmless.evaluation, harmless.sampler)
    assert set(study.arms.checkpoint_steps) < set(harmless.arms.checkpoint_steps)
    with pytest.raises(ValueError, match="the pairs are 'helpfull': choose one of harmless, helpful"):
        study_of("hh", "helpfull")


def test_the_posts_start_from_the_harmless_pairs_too_and_pool_the_unjudged_posts():
    study, helpful = study_of("tldr"), study_of("hh", "helpful")
    assert (study.policy, study.sft.start, study.arms) == (None, helpful.sft.start, helpful.arms)
    assert study.sft.also == ("runs/tldr_unjudged/train",) and study.task.limits.long_prompts == "keep_end"
    assert study.task.source.labels == "ours=1,reference=0,=drop"


def trained(graph):
    """The number of settings of each (arm, loss), among the runs of the first seed."""
    return collections.Counter((run.arm, run.loss) for run in graph.seeds[0].runs)


def methods_of(estimate):
    """Every method that an estimate names."""
    found = set()
    for field in dataclasses.fields(estimate):
        value = getattr(estimate, field.name)
        if dataclasses.is_dataclass(value):
            found |= methods_of(value)
        elif field.name == "methods":
            found |= set(value)
        elif isinstance(value, tuple):
            found.add(value)
    return found


@pytest.mark.parametrize(
    "graph", [("tiny",), ("paper",), ("scaling", "t5_3m"), ("pod", "t5_large"), ("pod", "t5_xxl")], ids=" ".join
)
def test_every_job_comes_after_its_needs_and_nothing_is_made_twice(graph):
    jobs, seen = graph_of(*graph).jobs, {}
    place = {job.name: number for number, job in enumerate(jobs)}
    assert len(place) == len({job.folder for job in jobs}) == len(jobs)
    assert all(place[need.name] < place[job.name] for job in jobs for need in job.needs)
    for job in jobs:
        alike = dataclasses.replace(job.config, seed=0) if hasattr(job.config, "seed") else job.config
        assert seen.setdefault((job.name.split("-")[0], job.kind.name, repr(alike)), job.name) == job.name


def test_the_paper_study_has_every_arm_of_the_table_and_every_method_of_the_claims():
    runs = trained(graph_of("paper"))
    assert {arm for arm, _ in runs} == {"sft", "golden", *(arm.name for arm in ARMS)}
    # Claims about scale need a study over sizes.
    assert {method for claim in CLAIMS for method in methods_of(claim.estimate)} <= runs.keys()
    assert study_of("paper").seeds >= 5
    assert set(study_of("paper").evaluation.classified) == {"heldout", "stream", "own"}


def test_the_runs_of_the_paper_study():
    runs = trained(graph_of("paper"))
    swept = {arm: count for (arm, loss), count in runs.items() if loss == "ipo" and count > 1}
    assert swept == {"shuffled": 4, "offline": 8}
    for loss in ("dpo", "slic", "exponential"):
        assert [runs[arm, loss] for arm in ("online", "shuffled", "offline")] == [1, 4, 4]
    assert [runs[arm, "best_of_n"] for arm in ("online", "shuffled", "offline")] == [1, 2, 2]
    assert runs["chi_po", "chi_po"] == 4
    assert len(graph_of("paper").jobs) == 5 * len([job for job in graph_of("paper").jobs if "seed0-" in job.name])


def test_make_study_is_small_and_part_of_the_paper_study():
    jobs, folders = graph_of("tiny").jobs, {job.folder for job in graph_of("paper").jobs}
    assert len(jobs) == 28 and sum(job.kind is TRAIN for job in jobs) == 11
    # Two kinds of jobs differ: the sweep, which has other settings, and evaluations, which measure less.
    missing = {job.name.removeprefix("seed0-") for job in jobs if job.folder not in folders}
    swept = {f"{kind}offline-ipo-beta0.03-lr0.0003" for kind in ("", "evaluation-")}
    assert missing == swept | {name for name in missing if name.startswith("evaluation-")}


@pytest.mark.parametrize("task", ["summarization", "helpful", "harmless", "chat_arena"])
def test_the_papers_own_settings_build_a_graph_for_every_size(task):
    study = study_of("pod", task)
    large, xl = (study_graph(of_size(study, size), pathlib.Path("jobs")) for size in study.sizes[:2])
    assert trained(large)["offline", "ipo"] == 18 and trained(large)["offline", "best_of_n"] == 3
    steps = {job.config.steps for job in large.jobs if job.name.startswith("seed0-offline-ipo")}
    assert steps == {4000, 20_000}
    # The smallest size is also the base, so it is trained once.
    assert "seed0-sft" not in {job.name for job in large.jobs}
    assert large.job("seed0-base").config.start == "imported/t5_large"
    assert xl.job("seed0-sft").config.start == "imported/t5_xl"
    assert xl.job("seed0-online-ipo-beta0.1-lr1e-05").config.recorded.batch_size == 16
    shared = {job.name for job in large.jobs if job.folder == xl.job(job.name).folder}
    assert {f"seed0-{name}" for name in ("base", "golden", "proxy", "relabelled-train", "opponent-golden")} < shared


def test_the_paper_has_four_tasks():
    with pytest.raises(ValueError, match="choose one of summarization"):
        study_of("pod", "poetry")
