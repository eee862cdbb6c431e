"""Predicts the labels of held-out pairs without a language model: accuracies that a preference model has to beat."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse, special

from alignment_gap import checks
from alignment_gap.data.records import Example
from alignment_gap.errors import UserError
from alignment_gap.evaluation.intervals import Interval, mean_interval
from alignment_gap.evaluation.results import csv_text
from alignment_gap.folders import AnyPath, write_bytes
from alignment_gap.jobs.folder import Kind, Opened
from alignment_gap.jobs.label import open_checked
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import on_first_process
from alignment_gap.tables import text_table

RESULTS = "results.csv"
_COLUMNS = ("baseline", "pairs", "accuracy", "accuracy_low", "accuracy_high")
SHORTER, NGRAMS = "shorter", "ngrams"
# The L2 penalty is the one of these with the best accuracy on the last tenth of the training pairs.
_PENALTIES = (1e-4, 1e-3, 1e-2)
_HELD_OUT = 10
# An n-gram in fewer training responses than this does not help on other pairs.
_FEWEST = 3


@dataclasses.dataclass(frozen=True)
class BaselinesConfig:
    """Pairs to learn from, and pairs to predict.

    Attributes:
      train: dataset of the pairs that the regression learns from.
      dataset: dataset of held-out pairs.
      pairs: how many of the last pairs of `dataset` are predicted, as in `alignment-gap evaluate`; 0 for all.
    """

    train: str | None = None
    dataset: str | None = None
    pairs: int = 1000

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 0, "pairs")


def open_baselines(config: BaselinesConfig) -> Opened:
    """Opens both datasets; raises UserError if one cannot be used or holds no pairs."""
    train, held_out = open_checked(config.train, "train"), open_checked(config.dataset, "dataset")
    for setting, dataset in (("train", train), ("dataset", held_out)):
        if dataset.card.responses_per_prompt != 2:
            raise UserError(
                f"{setting} has {dataset.card.responses_per_prompt} responses per prompt: give a dataset of pairs"
            )

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        def write() -> None:
            told = tell(train[:], held_out[-config.pairs :] if config.pairs else held_out[:])
            rows = [
                dict(zip(_COLUMNS, (name, len(each), *dataclasses.astuple(mean_interval(each))), strict=True))
                for name, each in told.items()
            ]
            write_bytes(folder / RESULTS, csv_text(rows, _COLUMNS).encode())

        with open_bar(1, folder.name, " baselines") as bar:
            on_first_process(write)
            bar.update(1)

    return Opened({"train.digest": train.card.digest, "dataset.digest": held_out.card.digest}, run)


def tell(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, np.ndarray]:
    """Whether each baseline predicts the preferred response of every held-out pair: 1, 0, or 1/2 for a tie.

    - "shorter": predicts the shorter response.
    - "ngrams": a logistic regression. Its features are the unigrams and bigrams of tokens that only one of the two
      responses has. Its L2 penalty is chosen on the last tenth of the training pairs.

    Returns:
      float64[N] for each baseline; pairs without a preferred response are left out.
    """
    train, held_out = _decided(train), _decided(held_out)
    if len(train) < _HELD_OUT or not held_out:
        raise UserError(
            f"train has {len(train)} pairs with a preferred response and dataset has {len(held_out)}: give at least "
            f"{_HELD_OUT} and 1"
        )
    lengths = np.array([[len(response) for response in _ordered(example)] for example in held_out])
    columns = _ngrams_of_several(train)
    known, asked = _differences(train, columns), _differences(held_out, columns)
    part = len(train) // _HELD_OUT
    right = {each: _wins(known[-part:] @ _fitted(known[:-part], each)).mean() for each in _PENALTIES}
    weights = _fitted(known, max(right, key=lambda penalty: right[penalty]))
    return {SHORTER: _wins(lengths[:, 1] - lengths[:, 0]), NGRAMS: _wins(asked @ weights)}


def load_accuracies(folder: AnyPath) -> dict[str, Interval]:
    """The accuracy of each baseline in a finished job, with its 95 % interval."""
    rows = csv.DictReader(io.StringIO((folder / RESULTS).read_text()))
    return {row["baseline"]: Interval(*(float(row[name]) for name in _COLUMNS[2:])) for row in rows}


def _decided(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.scores[0] != example.scores[1]]


def _ordered(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The preferred response of a pair, then the other."""
    first, second = example.responses
    return (first, second) if example.scores[0] > example.scores[1] else (second, first)


def _wins(margins: np.ndarray) -> np.ndarray:
    return (np.sign(margins) + 1) / 2


def _ngrams(response: np.ndarray) -> set[tuple[int, ...]]:
    tokens = response.tolist()
    return {*((token,) for token in tokens), *itertools.pairwise(tokens)}


def _ngrams_of_several(train: Sequence[Example]) -> dict[tuple[int, ...], int]:
    """The column of every n-gram that enough training responses have."""
    counts: dict[tuple[int, ...], int] = {}
    for example in train:
        for response in example.responses:
            for ngram in _ngrams(response):
                counts[ngram] = counts.get(ngram, 0) + 1
    return {ngram: column for column, ngram in enumerate(n for n, count in counts.items() if count >= _FEWEST)}


def _differences(examples: Sequence[Example], columns: dict[tuple[int, ...], int]) -> sparse.csr_matrix:
    """A row per pair: 1 for an n-gram that only the preferred response has, -1 for one that only the other has."""
    values, places, ends = [], [], [0]
    for example in examples:
        chosen, rejected = map(_ngrams, _ordered(example))
        for ngrams, value in ((chosen - rejected, 1.0), (rejected - chosen, -1.0)):
            found = [columns[ngram] for ngram in ngrams if ngram in columns]
            places += found
            values += [value] * len(found)
        ends.append(len(places))
    return sparse.csr_matrix((values, places, ends), shape=(len(examples), max(1, len(columns))))


def _fitted(differences: sparse.csr_matrix, penalty: float) -> np.ndarray:
    """Weights w that minimise mean log(1 + exp(-x w)) + penalty / 2 |w|^2 over the rows x."""
    count = differences.shape[0]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences @ weights
        value = np.logaddexp(0, -margins).mean() + penalty / 2 * weights @ weights
        return value, -(differences.T @ special.expit(-margins)) / count + penalty * weights

    return optimize.minimize(loss, np.zeros(differences.shape[1]), jac=True, method="L-BFGS-B").x


def results_text(folder: AnyPath) -> str:
    """The accuracies of a finished job, for the terminal."""
    rows = list(csv.DictReader(io.StringIO((folder / RESULTS).read_text())))
    cells = [[row["baseline"], row["pairs"], *(f"{float(row[name]):.3f}" for name in _COLUMNS[2:])] for row in rows]
    return f"{text_table(['baseline', 'pairs', 'accuracy', 'low', 'high'], cells)}\nresults: {folder / RESULTS}"


BASELINES = Kind(
    name="baselines",
    command="data baselines",
    config=BaselinesConfig,
    open=open_baselines,
    summary=results_text,
)
