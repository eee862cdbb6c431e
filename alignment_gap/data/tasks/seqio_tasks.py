"""seqio Tasks and Mixtures of the paper's four tasks. Importing this module registers them, and imports TensorFlow.

    alignment_pairs_summarization, _helpfulness, _harmlessness, _chat_arena      preference Tasks
    alignment_pairs                                                             their Mixture, by number of examples
    ..._sft                                                                     the same for supervised training

A preference Task has the features `prompt`, `chosen` and `rejected`, their texts as `..._pretokenized`, and
`preference`; `PreferenceFeatureConverter` turns them into padded arrays. `seqio_prepared` has the Task of a dataset
that this library prepared. A `_sft` Task has seqio's usual `inputs` (the prompt) and `targets` (the chosen response).
All read the TFDS dataset `alignment_pairs` of `tfds_pairs`, from `seqio.set_tfds_data_dir_override` or `TFDS_DATA_DIR`.
Pairs that exceed a length are left out, never cut.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
import tensorflow as tf

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.tasks import tfds_pairs
from alignment_gap.errors import UserError

T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
_TEXTS = ("prompt", "chosen", "rejected")
# Features of a Task with reference log-probs, and the tokens that they are of.
REFERENCE_FEATURES = {f"{side}_reference_log_probs": side for side in ("chosen", "rejected")}


def register(vocabulary: seqio.Vocabulary, suffix: str = "") -> None:
    """Registers Tasks and Mixtures that encode with `vocabulary`; their names end in `suffix`.

    Importing the module does this with T5's vocabulary and no suffix. The first use of a Task reads the vocabulary's
    file.
    """
    preference = {name: seqio.Feature(vocabulary) for name in _TEXTS}
    # A Mixture keeps nothing but output features.
    preference["preference"] = number_feature(rank=0)
    sft = {name: seqio.Feature(vocabulary) for name in ("inputs", "targets")}
    to_sft = functools.partial(seqio.preprocessors.rekey, key_map={"inputs": "prompt", "targets": "chosen"})
    for kind, features, first in (("", preference, []), ("_sft", sft, [to_sft])):
        names = [f"{tfds_pairs.NAME}_{task}{kind}{suffix}" for task in tfds_pairs.TASKS]
        for task, name in zip(tfds_pairs.TASKS, names, strict=True):
            seqio.TaskRegistry.add(
                name,
                source=seqio.TfdsDataSource(
                    f"{tfds_pairs.NAME}/{task}:{tfds_pairs.VERSION}", splits=("train", "validation")
                ),
                preprocessors=[
                    *first,
                    seqio.preprocessors.tokenize,
                    seqio.CacheDatasetPlaceholder(),
                    seqio.preprocessors.append_eos,
                    leave_out_long,
                ],
                output_features=features,
                metric_fns=[],
            )
        seqio.MixtureRegistry.add(
            f"{tfds_pairs.NAME}{kind}{suffix}", names, default_rate=seqio.mixing_rate_num_examples
        )


def number_feature(rank: int, vocabulary: seqio.Vocabulary | None = None) -> seqio.Feature:
    """A feature of float32, which seqio passes through.

    T5X compares the vocabularies of all features of a Task whose tokens are passed through too: give it theirs.
    """
    return seqio.Feature(vocabulary or seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32, rank=rank)


def leave_out_long(
    dataset: tf.data.Dataset, output_features: Mapping[str, Any], sequence_length: Mapping[str, int] | None
) -> tf.data.Dataset:
    """Leaves out examples with a feature that exceeds its length, instead of cutting the feature."""
    if not sequence_length:
        return dataset
    limits = {name: sequence_length[name] for name in output_features if sequence_length.get(name) is not None}
    return dataset.filter(lambda example: tf.reduce_all([tf.size(example[name]) <= limits[name] for name in limits]))


class PreferenceFeatureConverter(seqio.FeatureConverter):
    """Converts pairs to padded arrays with their lengths.

    Converts `prompt`, `chosen` and `rejected` (int32 of any length) and `preference` to

        prompt_tokens int32[P], chosen_tokens and rejected_tokens int32[R], padded on the right with 0,
        prompt_length, chosen_length, rejected_length int32[], including the end id,
        scores float32[2] of the chosen and the rejected response: the probability of each to be the better one.

    A Task may have `scores` instead of `preference`; they can be rewards. The converter does not pack.
    `preference_batch` turns a batch of these features into a `PreferenceBatch`.
    """

    TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(tf.int32) for name in _TEXTS}  # noqa: RUF012
    MODEL_FEATURES = {  # noqa: RUF012
        **{f"{name}_tokens": seqio.FeatureConverter.FeatureSpec(tf.int32) for name in _TEXTS},
        **{f"{name}_length": seqio.FeatureConverter.FeatureSpec(tf.int32, rank=0) for name in _TEXTS},
        "scores": seqio.FeatureConverter.FeatureSpec(tf.float32),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, tf.DType] = {}

    # Further features with a number for each token, and the tokens that they are of.
    _OF_TOKENS: Mapping[str, str] = {}

    def __init__(self, pack: bool = False, **settings: Any):
        """Raises ValueError if `pack` is True."""
        if pack:
            raise ValueError("pack is True, but this converter does not pack pairs: pass pack=False")
        super().__init__(pack=False, **settings)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        if missing := sorted(self._OF_TOKENS.keys() - ds.element_spec.keys()):
            raise UserError(
                f"the Task has no {', '.join(missing)}: store them beside the dataset by alignment-gap data reference, "
                "or choose a loss without a reference, such as simpo"
            )

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            tokens = {f"{name}_tokens": example[name] for name in _TEXTS}
            lengths = {f"{name}_length": tf.size(example[name]) for name in _TEXTS}
            for name, of in self._OF_TOKENS.items():
                # One that was cut has lost its end.
                message = f"{name} has another length than {of}: set trim_output_features=False"
                tf.debugging.assert_equal(tf.size(example[name]), tf.size(example[of]), message)
            return tokens | lengths | {"scores": _scores(example)} | {name: example[name] for name in self._OF_TOKENS}

        return self._pack_or_pad(
            ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE), self._padded_lengths(task_feature_lengths)
        )

    def _padded_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = {f"{name}_tokens": task_feature_lengths[name] for name in _TEXTS}
        return lengths | {name: task_feature_lengths[of] for name, of in self._OF_TOKENS.items()}

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Lengths of the padded arrays; 1 for features that are a number."""
        lengths = self._padded_lengths(task_feature_lengths) | {"scores": 2}
        return {name: lengths.get(name, 1) for name in self.MODEL_FEATURES}


class ReferenceFeatureConverter(PreferenceFeatureConverter):
    """Converts pairs with their log-probs under the reference.

    Like `PreferenceFeatureConverter`. It also converts `chosen_reference_log_probs` and `rejected_reference_log_probs`,
    float32 in nats for each token, to arrays of the same names, float32[R] padded with 0.
    """

    MODEL_FEATURES = {  # noqa: RUF012
        **PreferenceFeatureConverter.MODEL_FEATURES,
        **dict.fromkeys(REFERENCE_FEATURES, seqio.FeatureConverter.FeatureSpec(tf.float32)),
    }
    _OF_TOKENS = REFERENCE_FEATURES


def _scores(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
    if "scores" in example:
        return tf.ensure_shape(example["scores"], [2])
    return tf.stack([example["preference"], 1 - example["preference"]])


def preference_batch(features: Mapping[str, Any], first_prompt_id: int = 0) -> PreferenceBatch:
    """Turns a batch of `PreferenceFeatureConverter`'s features into a PreferenceBatch; all responses have one length R.

    Prompt ids count from `first_prompt_id`, because seqio gives examples no stable number.
    """
    arrays = {name: jnp.asarray(value) for name, value in features.items()}

    def both(name: str) -> jax.Array:
        return jnp.stack([arrays[f"{side}_{name}"] for side in ("chosen", "rejected")], axis=1)

    return PreferenceBatch(
        prompt_ids=first_prompt_id + jnp.arange(len(arrays["prompt_length"]), dtype=jnp.int32),
        prompts=arrays["prompt_tokens"],
        prompt_lengths=arrays["prompt_length"],
        responses=both("tokens"),
        response_lengths=both("length"),
        scores=arrays["scores"],
        reference_log_probs=both("reference_log_probs") if "chosen_reference_log_probs" in arrays else None,
    )


register(seqio.SentencePieceVocabulary(T5_VOCABULARY))
