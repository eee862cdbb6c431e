"""Evaluates the checkpoints of a run prompt by prompt: win rates by any judge, KL, accuracy, log-ratios, length.

FOLDER/
  STEP.npz       the outcomes and responses of one checkpoint
  results.csv    a row for each checkpoint: means with 95 % intervals
  figure.png     win rates and rewards over KL
A policy gives one response to each prompt. A preference model is compared with the labels of pairs. Best-of-n has the
number n in place of a step.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from alignment_gap import checks
from alignment_gap.checkpoints import agreed_model, complete_steps, find_checkpoint, known_network
from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.checkpoints.layout import read_digest
from alignment_gap.data.batches import PreferenceBatch, check_token_ids
from alignment_gap.data.batches.order import SEED_LIMIT
from alignment_gap.data.records import Dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.records.dataset import CARD
from alignment_gap.errors import UserError
from alignment_gap.evaluation.batching import Batching
from alignment_gap.evaluation.figure import kl_picture
from alignment_gap.evaluation.measures import (
    Outcomes,
    Responses,
    agreed,
    classified,
    classified_own,
    diverged,
    judge_scores,
    judged,
)
from alignment_gap.evaluation.results import csv_text, means
from alignment_gap.folders import JOB, AnyPath, at, read_json, write_bytes
from alignment_gap.jobs.compose import distinct_prompts
from alignment_gap.jobs.config import POLICY
from alignment_gap.jobs.folder import MESH, Kind, Opened, finished_with
from alignment_gap.jobs.generate import drawing, ends_facts, open_policy, policy_ends, policy_network
from alignment_gap.jobs.label import open_checked
from alignment_gap.judges import Judge, JudgeConfig, by_itself, open_judge
from alignment_gap.models import Policy
from alignment_gap.progress import OpenBar
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import LogicalMesh, MeshConfig, first_says, make_mesh, on_every_process, on_first_process
from alignment_gap.tables import text_table

RESULTS, FIGURE = "results.csv", "figure.png"
# Arrays in a checkpoint's file that are not outcomes.
RESPONSES = ("responses", "lengths")
# Added to a step for the random key of its policy's second samples.
_SECOND = 2**30
# Measures the checkpoint of a step.
Measure = Callable[[int], Outcomes]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and what to compare it with.

    Attributes:
      run: folder of the run of a policy or of a preference model.
      steps: steps of the checkpoints to measure; None for all.
      dataset: dataset whose prompts are answered, and whose pairs are classified.
      judges: NAME=JUDGE, separated by commas; JUDGE has the form of `JudgeConfig.judge`.
      opponents: NAME=FOLDER, separated by commas; FOLDER is a policy's run, or a dataset of responses to the prompts.
      classified: NAME=FOLDER, separated by commas; additional datasets whose last pairs a policy classifies.
      own_labels: a judge that labels two samples of the policy for each prompt; the policy then classifies these pairs.
        None to leave this out.
      best_of: numbers n. Measures the best of n responses of the last checkpoint, instead of every checkpoint. The KL
        is the upper bound log n - (n - 1) / n (arXiv 2401.01879), and nothing is classified. Empty to leave this out.
      best_by: the judge that chooses the best of n responses.
      reference: folder of the policy that KL and log-ratios are measured to; None for the run's own reference.
      prompts: number of prompts that are answered, the first of the dataset.
      kl_prompts: number of these prompts whose responses measure KL.
      pairs: number of pairs that are classified, the last of the dataset.
      sampler: how responses are drawn.
      response_length: maximum tokens of a response; None for the longest in the dataset.
      seed: seed of the responses.
      vocabulary: path of the dataset's vocabulary, if it has moved.
      batch_size: prompts at a time, over all devices.
      mesh: the device mesh.
    """

    run: str | None = None
    steps: tuple[int, ...] | None = None
    dataset: str | None = None
    judges: tuple[str, ...] = ()
    opponents: tuple[str, ...] = ()
    classified: tuple[str, ...] = ()
    own_labels: str | None = None
    best_of: tuple[int, ...] = ()
    best_by: str | None = None
    reference: str | None = None
    prompts: int = 512
    kl_prompts: int = 256
    pairs: int = 256
    sampler: SamplerConfig = SamplerConfig()
    response_length: int | None = None
    seed: int = 0
    vocabulary: str | None = None
    batch_size: int = 128
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings conflict."""
        checks.at_least(self, 1, "prompts", "kl_prompts", "response_length", "batch_size")
        checks.at_least(self, 0, "pairs")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        if self.kl_prompts > self.prompts:
            raise UserError(f"kl_prompts is {self.kl_prompts}, over prompts={self.prompts}: lower it")
        if any(number < 1 for number in self.best_of) or len(set(self.best_of)) < len(self.best_of):
            raise UserError(f"best_of is {self.best_of}: give numbers of at least 1, each only once")
        if bool(self.best_of) != (self.best_by is not None):
            raise UserError(f"best_of is {self.best_of} and best_by is {self.best_by}: set both, or neither")
        if self.best_of and (self.classified or self.own_labels is not None):
            raise UserError("best_of is set, and then nothing is classified: leave classified and own_labels out")
        if self.opponents and not self.judges:
            raise UserError(
                f"opponents is {self.opponents}, and no judge compares with them: set judges, or leave opponents out"
            )
        for name in ("judges", "opponents", "classified"):
            names = [named(text)[0] for text in getattr(self, name)]
            if len(set(names)) < len(names):
                raise UserError(f"{name} has the names {', '.join(names)}, and one comes twice: write NAME=VALUE")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the result's rows: steps, or those of `best_of`; empty if all steps are measured."""
        return self.best_of or self.steps or ()


def named(text: str) -> tuple[str, str]:
    """The name and the value of NAME=VALUE; without a name, it is the last part of the value."""
    name, equals, value = text.partition("=")
    return (name, value) if equals else (PurePath(text).name.split(":")[-1], text)


def open_evaluation(config: EvaluateConfig) -> Opened:
    """Opens the run, the datasets, the opponents and the judges; raises UserError if one cannot be used."""
    if config.run is None:
        raise UserError("run is not set: give the folder of a training job")
    dataset, mesh = open_checked(config.dataset, "dataset"), make_mesh(config.mesh)
    steps = on_every_process(lambda: _steps(str(config.run), config.steps))
    network = on_every_process(lambda: known_network(find_checkpoint(at(str(config.run)), steps[0])))
    responses = dataset.card.responses_per_prompt
    if responses != 2 and (config.pairs or network.kind != POLICY):
        raise UserError(
            f"{config.dataset} has {responses} responses per prompt, but only pairs can be classified: give a dataset "
            "of pairs or, for a policy, set pairs to 0"
        )
    if network.kind != POLICY and (asked := [n for n in ("best_of", "opponents") if getattr(config, n)]):
        raise UserError(
            f"{asked[0]} is set, but {config.run} is a preference model, which writes no responses: leave it out, or "
            "give the run of a policy"
        )
    judges = {name: open_judge(by_itself(judge), dataset, mesh) for name, judge in map(named, config.judges)}
    longest = (dataset.card.max_prompt_length, dataset.card.max_response_length)
    batching = Batching(mesh, config.batch_size, (longest,))
    open_measure = _measure_best_of_n if config.best_of else _measure_policy
    if network.kind != POLICY:
        open_measure = _measure_judge
    inputs, measure = open_measure(config, dataset, judges, batching, steps[-1])
    facts: dict[str, Any] = {"dataset.digest": dataset.card.digest, "steps": steps, **inputs}
    facts |= {f"judge {name}.{key}": value for name, judge in judges.items() for key, value in judge.facts.items()}
    return Opened(facts, functools.partial(_run, config, config.best_of or steps, measure))


def _run(config: EvaluateConfig, steps: Sequence[int], measure: Measure, folder: AnyPath, open_bar: OpenBar) -> None:
    missing = first_says(lambda: np.array([not _is_whole(folder / f"{step}.npz") for step in steps]))
    with open_bar(len(steps), folder.name, " checkpoints") as bar:
        for step, is_missing in zip(steps, missing, strict=True):
            if is_missing:
                arrays = measure(step)
                on_first_process(functools.partial(_save_arrays, folder / f"{step}.npz", arrays))
            bar.update(1)
    on_first_process(lambda: _write_results(config, steps, folder))


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """The prompts of an evaluation, the judges of their responses, and the opponents.

    Attributes:
      config: settings of the evaluation.
      dataset: dataset of the prompts.
      judges: the judges, by name.
      batching: how batches are made.
      prompts: the prompts that are answered.
      drawn: settings for `make_generate`.
      ends: the ids that end an answer, for each policy's folder.
      recorded: the responses of opponents that are datasets, by name.
    """

    config: EvaluateConfig
    dataset: Dataset
    judges: Mapping[str, Judge]
    batching: Batching
    prompts: PreferenceBatch
    drawn: Mapping[str, Any]
    ends: Mapping[str, tuple[int, ...]]
    recorded: Mapping[str, Responses]

    def draw(self, folder: str, policy: Policy, params: Any, number: int, samples: int) -> Responses:
        """Responses [N, K, R] to the prompts, and their lengths; `number` gives every policy its own random key."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        settings = {"samples": samples, "eos_id": self.ends[folder], **self.drawn}
        draw = drawing(policy, params, self.batching.mesh, key, **settings)
        rows = (self.prompts.prompt_ids, self.prompts.prompts, self.prompts.prompt_lengths)
        drawn = draw(self.batching, rows)
        return drawn.responses, drawn.lengths

    def answer(self, folder: str, policy: Policy, params: Any, number: int) -> Responses:
        """One response to each prompt."""
        responses, lengths = self.draw(folder, policy, params, number, 1)
        return responses[:, 0], lengths[:, 0]

    @functools.cached_property
    def opponents(self) -> dict[str, Responses]:
        """The opponents' responses. They are sampled when first needed; a finished evaluation needs none."""
        return {
            name: self.recorded[name]
            if name in self.recorded
            else self.answer(folder, *open_policy(folder, self.dataset, self.batching.mesh), number)
            for number, (name, folder) in enumerate(map(named, self.config.opponents))
        }

    def outcomes(self, responses: Responses) -> Outcomes:
        """The judgements and lengths of a policy's responses, and the responses themselves."""
        judgements = judged(self.judges, self.batching, self.prompts, responses, self.opponents)
        lengths = {"length": responses[1].astype(np.float64)}
        return judgements | lengths | dict(zip(RESPONSES, responses, strict=True))


def _ask(
    config: EvaluateConfig, dataset: Dataset, judges: Mapping[str, Judge], batching: Batching, last: int
) -> tuple[dict[str, Any], _Asked]:
    """Facts about the last checkpoint and the opponents, such as digests; and the prompts with judges and opponents."""
    mesh, recorded = batching.mesh, dict[str, Responses]()
    prompts = batching.collate([dataset[int(i)] for i in distinct_prompts(dataset, config.prompts)])
    drawn = {
        "max_length": config.response_length or dataset.card.max_response_length,
        "config": config.sampler,
    }
    for judge in judges.values():
        judge.check(prompts.prompts)
    run, eos_id = str(config.run), find_vocabulary(dataset, config.vocabulary).eos_id
    ends = {run: policy_ends(run, eos_id, last)}
    facts: dict[str, Any] = {"run.digest": params_digest(open_policy(run, dataset, mesh, last)[1])}
    facts |= ends_facts("run", ends[run])
    for name, folder in map(named, config.opponents):
        if (at(folder) / CARD).exists():
            answers = open_checked(folder, "opponents")
            recorded[name], digest = _recorded(answers, prompts), answers.card.digest
        else:
            digest = params_digest(open_policy(folder, dataset, mesh)[1])
            ends[folder] = policy_ends(folder, eos_id)
            facts |= ends_facts(f"opponent {name}", ends[folder])
        facts[f"opponent {name}.digest"] = digest
    return facts, _Asked(config, dataset, judges, batching, prompts, drawn, ends, recorded)


def _measure_policy(
    config: EvaluateConfig, dataset: Dataset, judges: Mapping[str, Judge], batching: Batching, last: int
) -> tuple[dict[str, Any], Measure]:
    """Facts about the last checkpoint and the other inputs; and the function that measures the policy of a step."""
    mesh = batching.mesh
    pairs = batching.collate(dataset[-config.pairs :]) if config.pairs else None
    further, own_labels = _further_pairs(config, batching), None
    if config.own_labels is not None:
        own_labels = _further_judge(config.own_labels, config, judges, dataset, mesh)
    place, reference_step = on_every_process(lambda: _reference(config))
    network = policy_network(str(config.run), last)
    # The run's own network computes the log-probs of both.
    other = policy_network(place, reference_step)
    agreed_model(network.model, other, place, remedy=f"give a reference of the network of {config.run}")
    _, reference = open_policy(place, dataset, mesh, reference_step)
    for each in (*([] if pairs is None else [pairs]), *(batch for batch, _ in further.values())):
        check_token_ids("a pair", str(config.run), network.model.vocabulary_size, each.prompts, each.responses)
    facts, asked = _ask(config, dataset, judges, batching, last)
    facts["reference.digest"] = params_digest(reference)
    facts |= {f"classified {name}.digest": digest for name, (_, digest) in further.items()}
    facts |= {f"own_labels.{key}": value for key, value in (own_labels.facts if own_labels else {}).items()}

    def measure(step: int) -> Outcomes:
        policy, params = open_policy(str(config.run), dataset, mesh, step)
        responses = asked.answer(str(config.run), policy, params, len(config.opponents) + step)
        few: Responses = (responses[0][: config.kl_prompts], responses[1][: config.kl_prompts])
        outcomes = asked.outcomes(responses) | diverged(policy, params, reference, batching, asked.prompts, few)
        if pairs is not None:
            outcomes |= classified(policy, params, reference, batching, pairs)
        for name, (each, _) in further.items():
            outcomes[f"accuracy.{name}"] = classified(policy, params, reference, batching, each)["accuracy"]
        if own_labels is not None:
            tokens, lengths = asked.answer(str(config.run), policy, params, _SECOND + step)
            second = tokens[: config.kl_prompts], lengths[: config.kl_prompts]
            outcomes |= classified_own(policy, params, reference, own_labels, batching, asked.prompts, (few, second))
        return outcomes

    return facts, measure


def _measure_best_of_n(
    config: EvaluateConfig, dataset: Dataset, judges: Mapping[str, Judge], batching: Batching, last: int
) -> tuple[dict[str, Any], Measure]:
    """Facts about the last checkpoint and the other inputs; and the function that measures the best of n."""
    facts, asked = _ask(config, dataset, judges, batching, last)
    chooser = _further_judge(str(config.best_by), config, judges, dataset, batching.mesh)
    facts |= {f"best_by.{key}": value for key, value in chooser.facts.items()}

    @functools.cache
    def samples() -> Responses:
        """Responses of the last checkpoint, as many as the largest n; each n uses the first n of them."""
        policy, params = open_policy(str(config.run), dataset, batching.mesh, last)
        return asked.draw(str(config.run), policy, params, len(config.opponents) + last, max(config.best_of))

    def measure(number: int) -> Outcomes:
        tokens, lengths = (each[:, :number] for each in samples())
        best = np.zeros(len(tokens), np.int64)
        if number > 1:
            texts = (asked.prompts.prompts, asked.prompts.prompt_lengths, tokens, lengths)
            scores = judge_scores(chooser, batching, texts)
            if count := int(np.isnan(scores).any(axis=1).sum()):
                raise UserError(
                    f"best_by is {config.best_by}, but it chose none of the {number} responses to {count} of the "
                    "prompts: raise its retries, or set best_by to another judge"
                )
            best = np.argmax(scores, axis=1)
        rows = np.arange(len(tokens))
        kl = np.full(config.kl_prompts, math.log(number) - (number - 1) / number)
        return asked.outcomes((tokens[rows, best], lengths[rows, best])) | {"kl": kl}

    return facts, measure


def _further_judge(
    judge: str, config: EvaluateConfig, judges: Mapping[str, Judge], dataset: Dataset, mesh: LogicalMesh
) -> Judge:
    """A judge that the evaluation asks for more than win rates; if it is among `judges`, it is not opened again."""
    opened = {place: judges[name] for name, place in map(named, config.judges)}
    return opened.get(judge) or open_judge(by_itself(judge), dataset, mesh)


def _further_pairs(config: EvaluateConfig, batching: Batching) -> dict[str, tuple[PreferenceBatch, str]]:
    """The last pairs of each additional dataset, and its digest; raises UserError if one does not hold pairs."""
    found = {}
    for name, folder in map(named, config.classified):
        dataset = open_checked(folder, "classified")
        if dataset.card.responses_per_prompt != 2 or not config.pairs:
            raise UserError(f"classified has {folder}: give datasets of pairs, and set pairs to 1 or more")
        found[name] = (batching.collate(dataset[-config.pairs :]), dataset.card.digest)
    return found


def _measure_judge(
    config: EvaluateConfig, dataset: Dataset, judges: Mapping[str, Judge], batching: Batching, last: int
) -> tuple[dict[str, Any], Measure]:
    """The digest of the last checkpoint; and the function that measures the preference model of a step."""
    pairs = batching.collate(dataset[-config.pairs :] if config.pairs else dataset[:])

    def measure(step: int) -> Outcomes:
        own = open_judge(JudgeConfig(config.run, step), dataset, batching.mesh)
        return agreed(own, judges, batching, pairs, dataset.card.scores)

    last_judge = open_judge(JudgeConfig(config.run, last), dataset, batching.mesh)
    for each in (last_judge, *judges.values()):
        each.check(pairs.prompts, pairs.responses)
    return {"run.digest": last_judge.facts["judge.digest"]}, measure


def _steps(run: str, asked: Sequence[int] | None) -> list[int]:
    """The steps of the checkpoints to measure; raises UserError if there is no such checkpoint."""
    if asked is not None:
        return [int(find_checkpoint(at(run), step).name) for step in asked]
    return complete_steps(find_checkpoint(at(run)).parent)


def _reference(config: EvaluateConfig) -> tuple[str, int | None]:
    """Folder and step of the reference: the given one, or the one that the run was trained with.

    Raises:
      UserError: the run has no reference, or the checkpoint in its place is not the one that it was trained with.
    """
    if config.reference is not None:
        return config.reference, None
    path = at(str(config.run)) / JOB
    settings = read_json(path, remedy="set reference") if path.exists() else {}
    for name in ("reference", "start"):
        if settings.get(name) is not None:
            place, step = settings[name], settings.get(f"{name}_step")
            checkpoint = find_checkpoint(at(place), step)
            found, wanted = read_digest(checkpoint), settings.get(f"{name}.digest")
            if None not in (found, wanted) and found != wanted:
                raise UserError(
                    f"{config.run} was trained with another checkpoint of {place} than {checkpoint.name}, its last one "
                    f"now: set reference to {place}/checkpoints/STEP"
                )
            return place, step
    raise UserError(f"{config.run} was trained without a reference: set reference to the run that KL is measured to")


def _recorded(dataset: Dataset, prompts: PreferenceBatch) -> Responses:
    """The dataset's first response to each of the prompts; raises UserError if a prompt has no response."""
    first = {example.prompt.tobytes(): example.responses[0] for example in reversed(dataset[:])}
    asked = [row[:length] for row, length in zip(prompts.prompts, prompts.prompt_lengths, strict=True)]
    unanswered = [number for number, prompt in enumerate(asked) if prompt.tobytes() not in first]
    if unanswered:
        raise UserError(
            f"{dataset.folder} answers {len(asked) - len(unanswered)} of the {len(asked)} prompts: generate responses "
            "to the same prompts, or lower prompts"
        )
    answers = [first[prompt.tobytes()] for prompt in asked]
    tokens = np.zeros((len(answers), max(map(len, answers))), np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = answer
    return tokens, np.array([*map(len, answers)], np.int32)


def load_outcomes(path: AnyPath) -> dict[str, np.ndarray]:
    """The outcomes of a checkpoint without its responses; raises UserError if the file is missing or damaged."""
    if not _is_whole(path):
        raise UserError(f"{path} is missing or damaged: run its job again to measure this checkpoint again")
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return {name: arrays[name] for name in arrays.files if name not in RESPONSES}


def _write_results(config: EvaluateConfig, steps: Sequence[int], folder: AnyPath) -> None:
    outcomes = {step: load_outcomes(folder / f"{step}.npz") for step in steps}
    metrics = list(dict.fromkeys(name for each in outcomes.values() for name in each))
    rows = [{"run": config.run, "step": step} | means(each, metrics) for step, each in outcomes.items()]
    columns = ["run", "step", *(f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high"))]
    write_bytes(folder / RESULTS, csv_text(rows, columns).encode())
    if picture := kl_picture(rows, metrics):
        write_bytes(folder / FIGURE, picture)


def results_text(folder: AnyPath) -> str:
    """The means and intervals of a finished evaluation, for the terminal."""
    rows = [*csv.DictReader(io.StringIO((folder / RESULTS).read_text()))]
    metrics = [name for name in rows[0] if f"{name}_low" in rows[0]]
    cells = [[metric, *(_cell(row, metric) for row in rows)] for metric in metrics]
    headers = ["mean (95 % interval)", *(f"step {row['step']}" for row in rows)]
    return "\n".join(
        [text_table(headers, cells), *_fewer_prompts(folder, rows[0]["step"]), f"results: {folder / RESULTS}"]
    )


def _fewer_prompts(folder: AnyPath, step: str) -> list[str]:
    """A line if the dataset has fewer prompts than were asked for."""
    settings = read_json(folder / JOB, remedy="run the evaluation again, in another folder")
    answered = len(load_outcomes(folder / f"{step}.npz").get("length", ()))
    if not 0 < answered < settings["prompts"]:
        return []
    return [
        f"{settings['dataset']} has {answered:,} prompts, fewer than prompts={settings['prompts']}: all are answered"
    ]


def _cell(row: Mapping[str, str], metric: str) -> str:
    if not row[metric]:
        return ""
    value, low, high = (f"{float(row[name]):.3f}" for name in (metric, f"{metric}_low", f"{metric}_high"))
    return f"{value} ({low} to {high})"


def _has_all_files(folder: AnyPath) -> bool:
    """Whether a finished evaluation has its results, and every file of outcomes undamaged."""
    settings = finished_with(folder) or {}
    numbers = settings.get("best_of") or settings.get("steps") or ()
    return (folder / RESULTS).exists() and all(_is_whole(folder / f"{number}.npz") for number in numbers)


def _is_whole(path: AnyPath) -> bool:
    """Whether every array in a file matches its checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return False


def _save_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


EVALUATE = Kind(
    name="evaluate",
    command="evaluate",
    config=EvaluateConfig,
    open=open_evaluation,
    summary=results_text,
    short={"sampler.": ""},
    may_change=lambda folder: ("batch_size", "vocabulary", *MESH),
    is_whole=_has_all_files,
)
