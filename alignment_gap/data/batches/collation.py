"""Collates records into the arrays of a batch, without an object for each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import msgpack
import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket
from alignment_gap.data.records.card import ends_prompts
from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.example import TOKEN_FIELDS, Example, check_form, decode
from alignment_gap.data.records.lengths import lengths_of
from alignment_gap.data.records.log_probs import ReferenceLogProbs
from alignment_gap.errors import UserError

_INTS, _FLOATS = np.dtype("<i4"), np.dtype("<f4")


class Examples:
    """The examples of one or several datasets, read many at a time; numbers count on from one dataset to the next."""

    def __init__(self, datasets: Sequence[Any], references: Sequence[ReferenceLogProbs] = ()):
        """`datasets` are sequences of `Example`; `references` are the stored log-probs of each dataset, or empty.

        Raises:
          UserError: `datasets` is empty, a dataset is empty, or the datasets cannot share a batch.
        """
        self.datasets, self.references = tuple(datasets), tuple(references)
        self.sizes = tuple(len(dataset) for dataset in datasets)
        self._starts = np.cumsum((0, *self.sizes))
        self._on_disk = all(isinstance(dataset, Dataset) for dataset in self.datasets)
        if not self.sizes or not all(self.sizes):
            raise UserError("the dataset is empty: check what was dropped from it")
        _check_alike([dataset for dataset in self.datasets if isinstance(dataset, Dataset)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> list[Any]:
        """The examples with these numbers: records as on disk, or `Example`s if the dataset is in memory."""
        found: list[Any] = [None] * len(numbers)
        for dataset, places, rows in self._by_dataset(numbers):
            data = self.datasets[dataset]
            read = data.records(rows.tolist()) if self._on_disk else [data[row] for row in rows.tolist()]
            for place, example in zip(places.tolist(), read, strict=True):
                found[place] = example
        return found

    def collate(self, numbers: np.ndarray, found: Sequence[Any], shape: Bucket) -> PreferenceBatch:
        """Collates the result of `read` for these numbers, padded on the right to (P, R); raises as `collate` does."""
        batch = (collate_records if self._on_disk else collate)(found, *shape)
        if not self.references:
            return batch
        log_probs = np.zeros(batch.responses.shape, np.float32)
        for dataset, places, rows in self._by_dataset(numbers):
            log_probs[places] = self.references[dataset](rows, shape[1])
        return dataclasses.replace(batch, reference_log_probs=log_probs)  # type: ignore[arg-type]

    def _by_dataset(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each dataset with some of the numbers: its index, the positions of its numbers, and their rows in it."""
        home = np.searchsorted(self._starts, numbers, side="right") - 1
        for dataset in np.unique(home).tolist():
            places = np.flatnonzero(home == dataset)
            yield dataset, places, numbers[places] - self._starts[dataset]

    def lengths(self) -> np.ndarray:
        """Lengths of the prompt and of each response of every example, in tokens: int32[N, 1 + K]."""
        return np.concatenate([lengths_of(dataset) for dataset in self.datasets])


def collate(examples: Sequence[Example], prompt_length: int, response_length: int) -> PreferenceBatch:
    """The examples as one batch of numpy arrays, padded on the right to P = prompt_length and R = response_length.

    Raises:
      UserError: `examples` is empty, one exceeds its limit, or two differ in K or in their fields.
    """
    if not examples:
        raise UserError("a batch needs an example, but none was given")
    first = examples[0]
    for index, example in enumerate(examples):
        check_form(example, first, f"example {index} of the batch")
        _check_length(len(example.prompt), prompt_length, "prompt", index, example)
        _check_length(max(map(len, example.responses)), response_length, "response", index, example)
    flat = [response for example in examples for response in example.responses]
    grid = (len(examples), len(first.responses))
    arrays: dict[str, Any] = {
        "prompt_ids": np.array([example.prompt_id for example in examples], _INTS),
        "prompts": _padded([example.prompt for example in examples], prompt_length, _INTS),
        "prompt_lengths": np.array([len(example.prompt) for example in examples], _INTS),
        "responses": _padded(flat, response_length, _INTS).reshape(*grid, response_length),
        "response_lengths": np.array([len(response) for response in flat], _INTS).reshape(grid),
        "scores": np.stack([np.asarray(example.scores, _FLOATS) for example in examples]),
    }
    for name in TOKEN_FIELDS:
        if getattr(first, name) is not None:
            rows = [row for example in examples for row in getattr(example, name)]
            arrays[name] = _padded(rows, response_length, _FLOATS).reshape(*grid, response_length)
    return PreferenceBatch(**arrays)


def examples_of(batch: PreferenceBatch) -> list[Example]:
    """The rows of a batch as examples on the host, without padding: the inverse of `collate`.

    `fresh` and `mismatched` are left out.
    """
    host = jax.device_get(dataclasses.replace(batch, fresh=None, mismatched=None))
    per_token = {name: value for name in TOKEN_FIELDS if (value := getattr(host, name)) is not None}

    def cut(rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(row[:length] for row, length in zip(rows, lengths, strict=True))

    return [
        Example(
            prompt_id=int(host.prompt_ids[i]),
            prompt=host.prompts[i, : host.prompt_lengths[i]],
            responses=cut(host.responses[i], host.response_lengths[i]),
            scores=host.scores[i],
            **{name: cut(value[i], host.response_lengths[i]) for name, value in per_token.items()},
        )
        for i in range(len(host.prompt_ids))
    ]


def collate_records(records: Sequence[bytes], prompt_length: int, response_length: int) -> PreferenceBatch:
    """As `collate`, for records as they are on disk."""
    contents = [msgpack.unpackb(record) for record in records]
    responses = [response for content in contents for response in content["responses"]]
    if not _fit(contents, responses, prompt_length, response_length):
        return collate([decode(record) for record in records], prompt_length, response_length)
    grid = (len(contents), -1)
    prompts, prompt_lengths = _pad([content["prompt"] for content in contents], prompt_length, _INTS)
    padded, response_lengths = _pad(responses, response_length, _INTS)
    arrays: dict[str, Any] = {
        "prompt_ids": np.array([content["prompt_id"] for content in contents], _INTS),
        "prompts": prompts,
        "prompt_lengths": prompt_lengths,
        "responses": padded.reshape(*grid, response_length),
        "response_lengths": response_lengths.reshape(grid),
        "scores": np.frombuffer(b"".join(content["scores"] for content in contents), _FLOATS).reshape(grid),
    }
    for name in TOKEN_FIELDS:
        if name in contents[0]:
            rows = [row for content in contents for row in content[name]]
            arrays[name] = _pad(rows, response_length, _FLOATS)[0].reshape(*grid, response_length)
    return PreferenceBatch(**arrays)


def _fit(
    contents: Sequence[Mapping[str, Any]], responses: Sequence[bytes], prompt_length: int, response_length: int
) -> bool:
    """Whether all records have one form and are within the limits."""
    return (
        len({(len(content["responses"]), *(name in content for name in TOKEN_FIELDS)) for content in contents}) == 1
        and max(len(content["prompt"]) for content in contents) <= prompt_length * _INTS.itemsize
        and max(map(len, responses)) <= response_length * _INTS.itemsize
    )


def _pad(rows: Sequence[bytes], length: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 4-byte numbers as one array [len(rows), length], padded with zeros on the right; and their lengths."""
    lengths = np.fromiter(map(len, rows), _INTS, len(rows)) // dtype.itemsize
    padded = np.zeros((len(rows), length), dtype)
    padded[np.arange(length) < lengths[:, None]] = np.frombuffer(b"".join(rows), dtype)
    return padded, lengths


def _check_alike(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets[1:]:
        first, card = datasets[0], dataset.card
        for name, value, other in (
            ("a vocabulary of digest", card.vocabulary_digest[:12], first.card.vocabulary_digest[:12]),
            ("responses a prompt:", card.responses_per_prompt, first.card.responses_per_prompt),
            ("the fields", ", ".join(card.fields), ", ".join(first.card.fields)),
            ("scores that are", card.scores, first.card.scores),
            ("end_prompts", ends_prompts(dataset), ends_prompts(first)),
        ):
            if value != other:
                raise UserError(
                    f"{dataset.folder} has {name} {value}, but {first.folder} has {other}: use datasets that agree"
                )


def _check_length(length: int, limit: int, what: str, index: int, example: Example) -> None:
    if length > limit:
        raise UserError(
            f"example {index} of the batch (prompt id {example.prompt_id}) has a {what} of {length} tokens, over "
            f"{what}_length={limit}: raise {what}_length or prepare the data with this limit"
        )


def _padded(rows: Sequence[np.ndarray], length: int, dtype: np.dtype) -> np.ndarray:
    padded = np.zeros((len(rows), length), dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
