"""Labels a dataset by a judge: the same prompts and responses, with the judge's scores.

FOLDER/
  card.json, *.array_record   the dataset; see `data.records.dataset`
  judge.json                  for a judge over HTTP: counts of questions, answers and tokens, for each part
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from alignment_gap import checks
from alignment_gap.data.batches import PreferenceBatch, choose_buckets
from alignment_gap.data.records import Dataset, Example, lengths_of, open_dataset, verify_dataset
from alignment_gap.errors import UserError
from alignment_gap.evaluation.batching import Batching
from alignment_gap.evaluation.measures import judge_scores
from alignment_gap.folders import AnyPath, read_json, write_json
from alignment_gap.jobs.folder import MESH, Kind, Opened
from alignment_gap.jobs.parts import dataset_summary, write_parts
from alignment_gap.judges import Judge, JudgeConfig, open_judge
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import MeshConfig, make_mesh, on_every_process, on_first_process

ACCOUNT = "judge.json"


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """A dataset to label, and its judge.

    Attributes:
      dataset: folder of the dataset to label.
      judge: the judge that scores the responses.
      buckets: maximum number of padded shapes, chosen from the lengths.
      batch_size: prompts at a time, over all devices.
      mesh: the device mesh.
    """

    dataset: str | None = None
    judge: JudgeConfig = JudgeConfig()
    buckets: int = 4
    batch_size: int = 64
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "buckets", "batch_size")


def open_labelling(config: LabelConfig) -> Opened:
    """Opens the dataset and the judge; raises UserError if one of them cannot be used."""
    dataset = open_checked(config.dataset, "dataset")
    mesh = make_mesh(config.mesh)
    longest = (dataset.card.max_prompt_length, dataset.card.max_response_length)
    batching = Batching(mesh, config.batch_size, choose_buckets(lengths_of(dataset), config.buckets, longest))
    judge = open_judge(config.judge, dataset, mesh)
    # The number of buckets changes the rounding.
    facts = {"labels": config.judge.labels, "buckets": config.buckets, **judge.facts}

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        def make(start: int, stop: int) -> Iterator[Example]:
            labelled = label(itertools.islice(dataset, start, stop), judge, batching)
            return accounted(labelled, judge, folder, start)

        inputs = {"pairs": dataset}
        write_parts(
            folder,
            len(dataset),
            make,
            made_by="label",
            inputs=inputs,
            facts=facts,
            open_bar=open_bar,
            scores=judge.kind if dataset.card.responses_per_prompt == 2 else "rewards",
        )

    return Opened({"dataset.digest": dataset.card.digest, **judge.facts}, run)


def open_checked(folder: str | None, setting: str) -> Dataset:
    """The dataset that a setting names; every process reads it completely, and raises UserError if it is damaged."""
    if folder is None:
        raise UserError(f"{setting} is not set: give the folder of a prepared dataset")

    def read() -> Dataset:
        dataset = open_dataset(folder)
        verify_dataset(dataset)
        return dataset

    return on_every_process(read)


def label(examples: Iterable[Example], judge: Judge, batching: Batching) -> Iterator[Example]:
    """The examples with a judge's scores; examples without an answer from the judge are left out."""

    def scores(batch: PreferenceBatch) -> list[np.ndarray]:
        arrays = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        return list(np.asarray(judge_scores(judge, batching, arrays), np.float32))

    for example, row in batching.each(examples, scores):
        if not np.isnan(row).any():
            yield dataclasses.replace(example, scores=row)


def accounted(examples: Iterable[Example], judge: Judge, folder: AnyPath, start: int) -> Iterator[Example]:
    """Yields the examples of the part that begins at `start`; then writes the judge's counts for it to judge.json."""
    yield from examples
    if counts := judge.counts():
        path = folder / ACCOUNT
        on_first_process(lambda: write_json(path, _account(folder) | {f"{start:09d}": counts}))


def _account(folder: AnyPath) -> dict[str, dict[str, float]]:
    path = folder / ACCOUNT
    return read_json(path, remedy="remove it") if path.exists() else {}


def labels_summary(folder: AnyPath) -> str:
    """Describes a finished dataset, with the judge's total counts."""
    parts = _account(folder).values()
    if not parts:
        return dataset_summary(folder)
    total = {name: sum(part[name] for part in parts) for name in next(iter(parts)) if name.startswith("judge_")}
    told = ", ".join(f"{value:,.10g} {name.removeprefix('judge_').replace('_', ' ')}" for name, value in total.items())
    return f"{dataset_summary(folder)}\njudge: {told}"


LABEL = Kind(
    name="label",
    command="data label",
    config=LabelConfig,
    open=open_labelling,
    summary=labels_summary,
    short={"judge.judge": "judge"},
    may_change=lambda folder: ("batch_size", *MESH),
    repairs=True,
)
