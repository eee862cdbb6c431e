"""Prepared datasets as seqio Tasks: the same pairs as in our own batches, in the same order, and never cut."""

import types
import warnings

import numpy as np
import pytest
from built_in import posts_examples, write_posts

from alignment_gap.data.batches import offline_source
from alignment_gap.data.records import Example, open_dataset, write_dataset
from alignment_gap.data.records.log_probs import ReferenceWriter
from alignment_gap.data.text import load_vocabulary
from alignment_gap.data.text.vocabulary_training import train_vocabulary
from alignment_gap.errors import UserError


@pytest.fixture(scope="module")
def seqio():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import seqio

        return seqio


@pytest.fixture(scope="module")
def modules(seqio):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from alignment_gap.data.tasks import seqio_prepared, seqio_tasks
    return types.SimpleNamespace(prepared=seqio_prepared, tasks=seqio_tasks)


@pytest.fixture
def pairs(tmp_path):
    write_posts(tmp_path / "pairs", 12)
    return tmp_path / "pairs"


def store_reference(dataset, checkpoint="one"):
    """Stores log-probs that identify their example, response and token."""
    writer = ReferenceWriter(dataset, {"dataset": dataset.card.digest, "checkpoint": checkpoint}, len(dataset))
    shape = (len(dataset), 2, dataset.card.max_response_length)
    writer.write(np.arange(len(dataset)), -np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.close()


def batches_of(seqio, modules, folder, converter, **settings):
    dataset = seqio.get_dataset(
        modules.prepared.prepared_task(str(folder), **settings),
        task_feature_lengths=modules.prepared.prepared_lengths(str(folder)),
        feature_converter=converter,
        batch_size=4,
        trim_output_features=False,
    )
    return [modules.tasks.preference_batch(features) for features in dataset.as_numpy_iterator()]


def chosen_first(batch):
    """Our batch with the chosen response first, as a Task has it."""
    order = np.argsort(-np.asarray(batch.scores), axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    return [batch.prompts, batch.prompt_lengths, *(np.asarray(each)[rows, order] for each in batch_arrays(batch))]


def batch_arrays(batch):
    arrays = [batch.responses, batch.response_lengths, batch.scores]
    return arrays + [batch.reference_log_probs] * (batch.reference_log_probs is not None)


def test_the_batches_are_those_of_the_recorded_order(seqio, modules, pairs):
    dataset = open_dataset(pairs)
    assert {int(np.argmax(example.scores)) for example in dataset} == {0, 1}
    longest = {name: getattr(dataset.card, f"max_{name}") for name in ("prompt_length", "response_length")}
    source = offline_source(dataset, batch_size=4, seed=0, order="recorded", **longest)
    found = batches_of(seqio, modules, pairs, modules.tasks.PreferenceFeatureConverter())
    assert len(found) == 3
    for step, batch in enumerate(found):
        theirs = [batch.prompts, batch.prompt_lengths, *batch_arrays(batch)]
        for ours, each in zip(chosen_first(source(step)), theirs, strict=True):
            np.testing.assert_array_equal(ours, each)


def test_stored_log_probs_stay_with_their_tokens(seqio, modules, pairs):
    dataset = open_dataset(pairs)
    store_reference(dataset)
    (first, *_) = batches_of(seqio, modules, pairs, modules.tasks.ReferenceFeatureConverter())
    longest = dataset.card.max_response_length
    for row, example in enumerate(dataset[:4]):
        for place, response in enumerate(np.argsort(-example.scores, kind="stable")):
            length = len(example.responses[response])
            expected = -np.arange(length) - (2 * row + response) * longest
            log_probs = first.reference_log_probs[row, place]
            assert log_probs[:length].tolist() == expected.tolist() and not log_probs[length:].any()


def test_log_probs_of_the_examples_are_taken_where_none_are_stored(seqio, modules, tmp_path):
    examples = [
        Example(i, x.prompt, x.responses, x.scores, tuple(np.full(len(y), -i, np.float32) for y in x.responses))
        for i, x in enumerate(posts_examples(4))
    ]
    digest = load_vocabulary("posts").digest
    write_dataset(tmp_path / "own", examples, vocabulary_digest=digest, provenance={"vocabulary": "posts"})
    (batch,) = batches_of(seqio, modules, tmp_path / "own", modules.tasks.ReferenceFeatureConverter())
    assert [row.min() for row in np.asarray(batch.reference_log_probs)] == [0, -1, -2, -3]


def test_what_lacks_or_has_several_references_is_one_line(seqio, modules, pairs):
    with pytest.raises(UserError, match=r"no chosen_reference_log_probs.*alignment-gap data reference"):
        batches_of(seqio, modules, pairs, modules.tasks.ReferenceFeatureConverter())
    dataset = open_dataset(pairs)
    for name in ("one", "two"):
        store_reference(dataset, name)
    names = sorted(path.name for path in (pairs / "reference").iterdir())
    with pytest.raises(UserError, match=f"several references: choose one of {names[0]}, {names[1]}"):
        modules.prepared.prepared_task(str(pairs))
    with pytest.raises(UserError, match=f"no log-probs of the reference 'three': it has {names[0]}"):
        modules.prepared.prepared_task(str(pairs), reference="three")
    tasks = [modules.prepared.prepared_task(str(pairs), reference=name) for name in names]
    assert len({task.name for task in tasks}) == 2


def test_lengths_below_the_longest_text_are_refused(seqio, modules, pairs):
    longest = open_dataset(pairs).card.max_response_length
    lengths = modules.prepared.prepared_lengths(str(pairs)) | {"chosen": longest - 1}
    with pytest.raises(UserError, match=rf"texts of {longest} tokens, TASK_FEATURE_LENGTHS\['chosen'\] is"):
        modules.prepared.prepared_task(str(pairs)).get_dataset(lengths, "train", shuffle=False)


def test_what_is_no_pair_or_has_no_scores_is_refused(seqio, modules, tmp_path):
    words = {"vocabulary_digest": load_vocabulary("posts").digest, "provenance": {"vocabulary": "posts"}}
    (example,) = posts_examples(1)
    single = Example(0, example.prompt, example.responses[:1], example.scores[:1])
    write_dataset(tmp_path / "single", [single], **words)
    with pytest.raises(UserError, match="has 1 responses a prompt: T5X trains on pairs"):
        modules.prepared.prepared_task(str(tmp_path / "single"))
    nothing = Example(7, example.prompt, example.responses, np.full(2, np.nan, np.float32))
    write_dataset(tmp_path / "nothing", [nothing], **words)
    with pytest.raises(Exception, match="the prompt 7 has no scores"):
        batches_of(seqio, modules, tmp_path / "nothing", modules.tasks.PreferenceFeatureConverter())


def test_shuffling_permutes_the_whole_dataset(modules, pairs):
    task = modules.prepared.prepared_task(str(pairs))

    def prompts(**settings):
        return [row["prompt"].tolist() for row in task.source.get_dataset("train", **settings).as_numpy_iterator()]

    recorded, one, again, other = (
        prompts(shuffle=False),
        *(prompts(shuffle=True, seed=seed) for seed in (1, 1, 2)),
    )
    assert one == again != other and recorded not in (one, other)
    assert sorted(one) == sorted(other) == sorted(recorded)


def test_the_vocabulary_is_the_datasets(seqio, modules, pairs, tmp_path):
    posts = load_vocabulary("posts")
    found = modules.prepared.prepared_vocabulary(str(pairs))
    assert isinstance(found, seqio.PassThroughVocabulary)
    assert (found.vocab_size, found.eos_id) == (posts.size, posts.eos_id)
    texts = [f"word{i} and word{i + 1}" for i in range(200)]
    train_vocabulary(texts, tmp_path / "pieces.model", 278)
    for place, kind in (("bytes", seqio.ByteVocabulary), (tmp_path / "pieces.model", seqio.SentencePieceVocabulary)):
        ours = load_vocabulary(str(place))
        folder = tmp_path / kind.__name__
        provenance = {"vocabulary": str(place)}
        write_dataset(folder, posts_examples(1), vocabulary_digest=ours.digest, provenance=provenance)
        theirs = modules.prepared.prepared_vocabulary(str(folder))
        assert isinstance(theirs, kind) and theirs.vocab_size == ours.size and theirs.eos_id == ours.eos_id
        assert theirs.encode("word3 and") == ours.encode("word3 and")


def test_a_task_is_registered_once(seqio, modules, pairs):
    name = modules.prepared.registered_task(str(pairs))
    assert modules.prepared.registered_task(str(pairs)) == name and name in seqio.TaskRegistry.names()
