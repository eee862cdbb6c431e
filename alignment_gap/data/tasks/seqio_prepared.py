"""Prepared datasets as seqio Tasks, for training in T5X. It imports TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from alignment_gap.data.batches.order import permutation
from alignment_gap.data.records import Dataset, Example, open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.records.log_probs import ReferenceLogProbs, find_reference
from alignment_gap.data.tasks.seqio_tasks import REFERENCE_FEATURES, number_feature
from alignment_gap.data.text.vocabulary import ByteVocabulary, SentencePieceVocabulary
from alignment_gap.errors import UserError

_Arrays = dict[str, np.ndarray]


def prepared_task(folder: str, vocabulary: seqio.Vocabulary | None = None, reference: str | None = None) -> seqio.Task:
    """A dataset of pairs as a Task of one split, "train".

    Without shuffling, it has the pairs in the order of the dataset. `alignment_gap.training.loss_inputs` and this Task
    agree on which response is the chosen one. The Task has the features

        prompt, chosen, rejected int32, with their end ids; scores float32[2] of the chosen and the rejected response;
        chosen_reference_log_probs, rejected_reference_log_probs float32 in nats, where the dataset has them.

    Args:
      folder: a prepared dataset.
      vocabulary: the dataset's; None for `prepared_vocabulary(folder)`.
      reference: which of the stored reference log-probs: a folder's name in `reference/`. None for the only ones or, if
        none are stored, for those of the examples.

    Raises:
      UserError: the dataset cannot be read or holds no pairs, or as `find_reference`. When the Task is read: a pair is
        over the lengths that are asked for, or its judge gave it no scores.
    """
    dataset = open_dataset(folder)
    if dataset.card.responses_per_prompt != 2:
        raise UserError(
            f"{folder} has {dataset.card.responses_per_prompt} responses a prompt: T5X trains on pairs, give a dataset "
            "of them"
        )
    vocabulary = vocabulary or prepared_vocabulary(folder)
    stored = find_reference(dataset, reference)
    tokens = seqio.Feature(vocabulary, add_eos=False)
    numbers = number_feature(1, vocabulary if isinstance(vocabulary, seqio.PassThroughVocabulary) else None)
    features = {"prompt": tokens, "chosen": tokens, "rejected": tokens, "scores": numbers}
    if stored or dataset[0].reference_log_probs is not None:
        features |= dict.fromkeys(REFERENCE_FEATURES, numbers)
    signature = {
        name: tf.TensorSpec([2] if name == "scores" else [None], feature.dtype) for name, feature in features.items()
    }

    def read(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        order = permutation(len(dataset), seed or 0, 0) if shuffle_files else np.arange(len(dataset))
        return tf.data.Dataset.from_generator(lambda: _rows(dataset, stored, order), output_signature=signature)

    return seqio.Task(
        "_".join(("prepared", dataset.card.digest[:16], *([reference] if reference else []))),
        source=seqio.FunctionDataSource(read, splits=("train",), num_input_examples={"train": len(dataset)}),
        preprocessors=[_refuse_long(dataset)],
        output_features=features,
        metric_fns=[],
    )


def registered_task(folder: str, vocabulary: seqio.Vocabulary | None = None, reference: str | None = None) -> str:
    """The name under which the Task of `prepared_task`, with the same arguments, is registered.

    T5X finds Tasks by name.
    """
    task = prepared_task(folder, vocabulary, reference)
    if task.name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add_provider(task.name, task)
    return task.name


def prepared_lengths(folder: str) -> dict[str, int]:
    """The lengths of a prepared dataset's longest texts, as T5X's `TASK_FEATURE_LENGTHS`."""
    card = open_dataset(folder).card
    return {
        "prompt": card.max_prompt_length,
        "chosen": card.max_response_length,
        "rejected": card.max_response_length,
    }


def prepared_vocabulary(folder: str, vocabulary: str | None = None) -> seqio.Vocabulary:
    """The vocabulary of a prepared dataset.

    Args:
      folder: a prepared dataset.
      vocabulary: where its vocabulary is; None for where it was when the dataset was prepared.

    Returns:
      seqio's vocabulary of bytes or of a SentencePiece model. For others one that passes token ids through.

    Raises:
      UserError: the vocabulary is not found, or the dataset was encoded with another one.
    """
    found = find_vocabulary(open_dataset(folder), vocabulary)
    if isinstance(found, ByteVocabulary):
        return seqio.ByteVocabulary(found.extra_ids)
    if isinstance(found, SentencePieceVocabulary):
        return seqio.SentencePieceVocabulary(str(found.path), found.extra_ids)
    return seqio.PassThroughVocabulary(found.size, found.eos_id)


def _rows(dataset: Dataset, stored: ReferenceLogProbs | None, order: np.ndarray) -> Iterator[_Arrays]:
    for number in order.tolist():
        example = dataset[number]
        if np.isnan(example.scores).any():
            raise UserError(f"{dataset.folder}: the prompt {example.prompt_id} has no scores: label it or drop it")
        chosen, rejected = int(np.argmax(example.scores)), 1 - int(np.argmin(example.scores[::-1]))
        log_probs = _reference_of(example, stored, number)
        yield {
            "prompt": example.prompt,
            "chosen": example.responses[chosen],
            "rejected": example.responses[rejected],
            "scores": example.scores[[chosen, rejected]],
            **dict(zip(REFERENCE_FEATURES, (log_probs[chosen], log_probs[rejected]), strict=True) if log_probs else ()),
        }


def _reference_of(example: Example, stored: ReferenceLogProbs | None, number: int) -> tuple[np.ndarray, ...] | None:
    """The reference log-probs of the tokens of both responses, without padding."""
    if stored is None:
        return example.reference_log_probs
    lengths = [len(response) for response in example.responses]
    rows = stored(np.array([number]), max(lengths))[0]
    return tuple(row[:length] for row, length in zip(rows, lengths, strict=True))


def _refuse_long(dataset: Dataset) -> Callable[..., tf.data.Dataset]:
    """A preprocessor that refuses lengths below the dataset's longest texts, which seqio would cut."""
    longest = prepared_lengths(str(dataset.folder))

    def refuse_long(rows: tf.data.Dataset, sequence_length: Mapping[str, Any] | None) -> tf.data.Dataset:
        for name, length in longest.items():
            limit = (sequence_length or {}).get(name)
            if limit is not None and length > limit:
                raise UserError(
                    f"{dataset.folder} has texts of {length} tokens, TASK_FEATURE_LENGTHS[{name!r}] is {limit}: give "
                    f"{length}, or prepare the dataset with shorter limits"
                )
        return rows

    return refuse_long
