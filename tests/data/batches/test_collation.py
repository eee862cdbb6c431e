"""Records and examples become the arrays of a batch, and come back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resumption import assert_equal_batches

from alignment_gap.data.batches import Examples, collate, examples_of
from alignment_gap.data.batches.collation import collate_records
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.records.example import encode
from alignment_gap.data.records.log_probs import ReferenceLogProbs
from alignment_gap.errors import UserError


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("responses", [1, 2, 3])
def test_records_become_the_batch_that_their_examples_become(
    tmp_path, make_examples, responses, with_reference, with_sampler
):
    examples = make_examples(20, responses=responses, with_reference=with_reference, with_sampler=with_sampler)
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    on_disk = Examples([open_dataset(tmp_path)])
    numbers = np.array([7, 0, 19, 7])
    batch = on_disk.collate(numbers, on_disk.read(numbers), (9, 6))
    assert_equal_batches(batch, collate([examples[i] for i in (7, 0, 19, 7)], 9, 6))


def test_what_collate_refuses_is_refused_in_its_words(tmp_path, make_examples):
    long = dataclasses.replace(make_examples(1)[0], prompt_id=77, prompt=np.arange(12, dtype=np.int32))
    write_dataset(tmp_path, [*make_examples(3), long], vocabulary_digest="", provenance={})
    on_disk = Examples([open_dataset(tmp_path)])
    with pytest.raises(UserError, match=r"example 1 of the batch \(prompt id 77\) has a prompt of 12 tokens"):
        on_disk.collate(np.array([1, 3]), on_disk.read(np.array([1, 3])), (9, 6))
    with pytest.raises(UserError, match="a batch needs an example"):
        collate_records([], 9, 6)


@pytest.mark.parametrize("settings", [{"with_sampler": True}, {"responses": 3}])
def test_records_of_two_forms_are_refused_in_the_words_of_collate(make_examples, settings):
    records = [encode(example) for example in [*make_examples(1), *make_examples(1, **settings)]]
    with pytest.raises(UserError, match=r"example 1 of the batch \(prompt id 1000\) (differs from|has 3 responses)"):
        collate_records(records, 9, 6)


def test_stored_reference_log_probs_join_those_of_the_sampler(tmp_path, make_examples):
    examples = make_examples(6, with_sampler=True)
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    dataset, numbers = open_dataset(tmp_path), np.array([4, 1])

    class Stored(ReferenceLogProbs):
        """Stores for every token the number of its example."""

        def __init__(self):
            pass

        def __call__(self, numbers, response_length):
            return np.broadcast_to(np.float32(numbers)[:, None, None], (2, 2, response_length))

    both = Examples([dataset], [Stored()])
    batch = both.collate(numbers, both.read(numbers), (9, 6))
    assert batch.reference_log_probs[:, 1, 0].tolist() == [4, 1]
    expected = collate([examples[4], examples[1]], 9, 6)
    assert_equal_batches(dataclasses.replace(batch, reference_log_probs=None), expected)


def test_a_damaged_record_is_named(tmp_path, make_examples, unchecked):
    """Type checks are off: they look into a sequence, and would find the damage first."""
    write_dataset(tmp_path, make_examples(200), vocabulary_digest="", provenance={})
    path = tmp_path / "pairs.array_record"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    examples = Examples([open_dataset(tmp_path)])
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        examples.read(np.arange(200))
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        examples.lengths()


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_collate_pads_on_the_right(make_examples, with_reference, with_sampler):
    examples = make_examples(4, responses=3, with_reference=with_reference, with_sampler=with_sampler)
    batch = collate(examples, 11, 6)
    assert batch.prompts.shape == (4, 11) and batch.responses.shape == (4, 3, 6) and batch.scores.shape == (4, 3)
    for field in ("prompt_ids", "prompts", "prompt_lengths", "responses", "response_lengths"):
        assert getattr(batch, field).dtype == np.int32
    assert batch.scores.dtype == np.float32
    for b, example in enumerate(examples):
        assert batch.prompts[b].tolist() == example.prompt.tolist() + [0] * (11 - len(example.prompt))
        assert batch.prompt_lengths[b] == len(example.prompt) and batch.prompt_ids[b] == 1000 + b
        for k, response in enumerate(example.responses):
            assert batch.responses[b, k].tolist() == response.tolist() + [0] * (6 - len(response))
            assert batch.response_lengths[b, k] == len(response)
            for name in ("reference_log_probs",) * with_reference + ("sampler_log_probs",) * with_sampler:
                values = getattr(example, name)[k].tolist()
                assert getattr(batch, name)[b, k].tolist() == values + [0.0] * (6 - len(response))
    assert (batch.reference_log_probs is not None) == with_reference
    assert (batch.sampler_log_probs is not None) == with_sampler
    assert batch.fresh is None and batch.mismatched is None


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_examples_of_is_the_inverse_of_collate_also_on_the_device(make_examples, plain, with_reference, with_sampler):
    examples = make_examples(4, with_reference=with_reference, with_sampler=with_sampler)
    batch = collate(examples, 11, 6)
    # The batches beside the pairs have any shape; they are not among the examples.
    beside = dataclasses.replace(batch, fresh=collate(make_examples(3), 12, 7), mismatched=batch)
    for either in (batch, jax.tree.map(jnp.asarray, batch), beside, jax.tree.map(jnp.asarray, beside)):
        assert [plain(e) for e in examples_of(either)] == [plain(e) for e in examples]


def test_an_example_over_a_limit_is_named_with_the_limit(make_examples):
    examples = make_examples(20)
    longest = max(range(20), key=lambda i: len(examples[i].prompt))
    with pytest.raises(UserError, match=rf"example {longest} .*prompt of 9 tokens, over prompt_length=8: raise"):
        collate(examples, 8, 5)
    with pytest.raises(UserError, match=r"response of 5 tokens, over response_length=4: raise"):
        collate(examples, 9, 4)
    with pytest.raises(UserError, match="needs an example"):
        collate([], 8, 5)
