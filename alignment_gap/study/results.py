"""Reads the measurements of a study's finished jobs: results to analyse, and facts for the report."""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.evaluation.intervals import Interval, mean_interval
from alignment_gap.folders import read_json
from alignment_gap.jobs.baselines import NGRAMS, SHORTER, load_accuracies
from alignment_gap.jobs.compose import distinct_prompts
from alignment_gap.jobs.config import POLICY
from alignment_gap.jobs.evaluate import load_outcomes
from alignment_gap.jobs.folder import DONE, Job
from alignment_gap.jobs.train import TRAIN
from alignment_gap.study.analysis import METRICS, ORIGIN, PROXY, CheckpointResult, loss_name
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.curves import JUDGES, TrainingRun, read_lines
from alignment_gap.study.diagrams import diagram_figures
from alignment_gap.study.graph import GOLDEN_HELD_OUT, SeedJobs, StudyGraph
from alignment_gap.study.report import JudgeFacts, ReportContext
from alignment_gap.study.versions import versions

# If the golden model agrees less with human labels, the report warns about it.
WEAK_JUDGE = 0.65


def study_results(graph: StudyGraph) -> list[CheckpointResult]:
    """Every evaluated checkpoint of a study; the SFT policy is the origin, at step 0."""
    return [result for seed in graph.seeds for result in _seed_results(seed)]


def _seed_results(seed: SeedJobs) -> Iterator[CheckpointResult]:
    for run in seed.runs:
        for step in run.evaluation.config.numbers:
            measured = load_outcomes(run.evaluation.folder / f"{step}.npz")
            outcomes = {name: measured[each.outcome] for name, each in METRICS.items() if each.outcome in measured}
            taken = 0 if run.arm == ORIGIN else step
            setting = (run.beta, run.learning_rate, seed.seed, taken, outcomes)
            yield CheckpointResult(run.arm, run.loss, *setting, steps_factor=run.steps_factor)
    if seed.proxy:
        (step,) = next(iter(seed.proxy.values())).config.steps
        # The policies classify the last of the pairs that the proxy was measured on.
        pairs = seed.runs[0].evaluation.config.pairs
        outcomes = {
            f"{name}_accuracy": load_outcomes(job.folder / f"{step}.npz")["accuracy"][-pairs:]
            for name, job in seed.proxy.items()
        }
        yield CheckpointResult(*PROXY, math.nan, math.nan, seed.seed, step, outcomes)


def report_context(config: StudyConfig, graph: StudyGraph) -> ReportContext:
    """The content of the report besides the measurements."""
    judges = [_judge_facts(seed.seed, *each) for seed in graph.seeds for each in seed.judges.items()]
    judges += [facts for seed in graph.seeds if seed.baselines for facts in _baselines(seed.seed, seed.baselines)]
    return ReportContext(
        config=config,
        versions=versions() | {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
        judges=judges,
        samples=_samples(config, graph.seeds[0]),
        wall_time={job.name: wall_time(job) for job in graph.jobs},
        notes=notes_on(config, judges),
        diagrams=diagram_figures(graph, config.arms.losses[0]),
        training=[run for seed in graph.seeds for run in _training_runs(graph, seed)],
    )


def _training_runs(graph: StudyGraph, seed: SeedJobs) -> Iterator[TrainingRun]:
    """The training jobs of a seed; SFT and the arms have the report's names, preference models those of their jobs."""
    trained = (run for run in seed.runs if not run.evaluation.config.best_of)
    policies, prefix = {run.evaluation.config.run: run for run in trained}, f"seed{seed.seed}-"
    for job in graph.jobs:
        if job.kind is not TRAIN or not job.name.startswith(prefix):
            continue
        run, name = policies.get(str(job.folder)), job.name.removeprefix(prefix)
        yield TrainingRun(
            name=run.arm if run else JUDGES.get(name, name),
            lines=read_lines(job.folder),
            seconds=wall_time(job).total_seconds(),
            loss=job.config.loss.name if job.config.kind == POLICY else "",
            beta=run.beta if run else math.nan,
            learning_rate=job.config.optimizer.learning_rate,
            steps_factor=run.steps_factor if run else 1,
            seed=seed.seed,
        )


def wall_time(job: Job) -> datetime.timedelta:
    """The duration of a finished job, in whole seconds."""
    done = read_json(job.folder / DONE, remedy="remove the folder to run the job again")
    return datetime.timedelta(seconds=round(done["seconds"]))


def _judge_facts(seed: int, measured: str, job: Job) -> JudgeFacts:
    """How often a judge agrees with the labels of the pairs and with the additional judges."""
    (step,) = job.config.steps
    outcomes = load_outcomes(job.folder / f"{step}.npz")
    names = {"accuracy": "the labels"} | {name: name.removeprefix("agreement.") for name in outcomes if "." in name}
    intervals = {
        whom: mean_interval(values[~np.isnan(values)]) for name, whom in names.items() for values in (outcomes[name],)
    }
    return _facts(seed, measured, intervals)


def _baselines(seed: int, job: Job) -> list[JudgeFacts]:
    """How often each baseline predicts the human labels."""
    names = {SHORTER: "the shorter response, held-out human labels", NGRAMS: "n-grams, held-out human labels"}
    return [_facts(seed, names[name], {"the labels": each}) for name, each in load_accuracies(job.folder).items()]


def _facts(seed: int, measured: str, intervals: Mapping[str, Interval]) -> JudgeFacts:
    shares = {whom: each.value for whom, each in intervals.items()}
    return JudgeFacts(seed, measured, shares, {whom: (each.low, each.high) for whom, each in intervals.items()})


def _samples(config: StudyConfig, seed: SeedJobs) -> dict[str, list[dict[str, Any]]]:
    """The responses of every arm's last checkpoint to the first evaluation prompts, as text."""
    dataset = open_dataset(seed.golden_pairs)
    decode, rubric = find_vocabulary(dataset).decode, rubric_of(dataset)
    prompts = [dataset[int(i)].prompt.tolist() for i in distinct_prompts(dataset, config.evaluation.shown)]
    samples: dict[str, list[dict[str, Any]]] = {decode(prompt, past_ends=True): [] for prompt in prompts}
    for run in seed.runs:
        step = run.evaluation.config.numbers[-1]
        with np.load(io.BytesIO((run.evaluation.folder / f"{step}.npz").read_bytes())) as arrays:
            rows = zip(arrays["responses"], arrays["lengths"], strict=True)
            responses = [row[:length].tolist() for row, length in rows]
        for prompt, response in zip(prompts, responses, strict=False):
            sample = {
                "arm": run.arm,
                "loss": loss_name(run.loss),
                "step": 0 if run.arm == ORIGIN else step,
                "response": decode(response),
                "rubric": None if rubric is None else float(rubric([prompt], [response])[0]),
            }
            samples[decode(prompt, past_ends=True)].append(sample)
    return samples


def notes_on(config: StudyConfig, judges: Sequence[JudgeFacts]) -> list[str]:
    """Sentences on how far the numbers can be trusted, given the sizes of the study and the accuracy of its judges."""
    prompts, pairs = config.evaluation.prompts, config.evaluation.pairs
    notes = [
        f"Win rates rest on at most {prompts} prompts, accuracies on at most {pairs} pairs. With so many, the interval "
        f"of a win rate is up to {196 / math.sqrt(4 * prompts):.1f} points to each side, that of an accuracy up to "
        f"{196 / math.sqrt(4 * pairs):.1f}; with fewer they are wider.",
        "Prompts of the evaluation are training prompts, as in the paper; only the samples are new.",
    ]
    worst = min(facts.shares["the labels"] for facts in judges if facts.measured == GOLDEN_HELD_OUT)
    if worst < WEAK_JUDGE:
        notes.append(
            f"The golden model agrees with held-out human labels on {worst:.0%} of pairs; guessing gives 50 %. So win "
            "rates by it show what it learned to like, and say little about what people prefer."
        )
    if config.sampler.restricts:
        notes.append(
            "Samples are drawn with a temperature, top_k or top_p, and win rates are those of such samples. KL is that "
            "of the policies themselves along these samples: arms of equal KL may differ in the KL of what they sample."
        )
    if "rubric" not in judges[0].shares and config.sft.start is None:
        notes.append(
            "The policies are small and are trained on this data alone: they do not write useful answers. The study "
            "shows how the arms differ under these judges, not what a pretrained model would do."
        )
    return notes
