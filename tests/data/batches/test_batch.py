"""The batch type: masks follow from lengths, and a tree map over a batch gives a batch."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies
from hypothesis.extra import numpy as arrays_of
from resumption import assert_equal_batches

from alignment_gap.data.batches import collate, examples_of, length_mask
from alignment_gap.data.batches.packing import Rows
from alignment_gap.data.records import Example


def test_masks_by_hand():
    mask = length_mask(jnp.array([[0, 2], [3, 5]]), 4)
    np.testing.assert_array_equal(mask, [[[0, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]])
    assert mask.dtype == bool and length_mask(jnp.int32(1), 2).tolist() == [True, False]


def test_an_end_that_has_the_id_of_padding_is_a_token():
    """In this vocabulary the end id is also the padding id: 0."""
    example = Example(1, np.array([5], np.int32), (np.array([3, 0], np.int32), np.array([0], np.int32)), np.ones(2))
    batch = collate([example], 2, 4)
    np.testing.assert_array_equal(length_mask(jnp.asarray(batch.response_lengths), 4)[0].sum(-1), [2, 1])
    assert [response.tolist() for response in examples_of(batch)[0].responses] == [[3, 0], [0]]


def test_whether_rows_are_packed_is_told_by_their_lengths(make_examples):
    plain = collate(make_examples(3), 9, 5)
    packed = Rows((18, 10), 2, 1).pack(plain, np.array([0, 0, 1]))
    assert (plain.is_packed, packed.is_packed) == (False, True)
    assert packed.prompt_lengths.shape == (2, 2) and packed.response_lengths.shape == (2, 2, 2)


def test_a_batch_is_a_tree_whose_absent_parts_have_no_leaves(make_examples):
    bare, full = (
        collate(make_examples(4, **dict.fromkeys(fields, True)), 9, 5) for fields in ((), ("with_reference",))
    )
    assert len(jax.tree.leaves(bare)) == 6 and len(jax.tree.leaves(full)) == 7
    both = dataclasses.replace(full, fresh=bare, mismatched=bare)
    assert len(jax.tree.leaves(both)) == 7 + 2 * 6
    leaves, tree = jax.tree.flatten(both)
    assert_equal_batches(jax.tree.unflatten(tree, leaves), both)
    assert {type(leaf) for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, full))} == {type(jnp.zeros(()))}


TOKENS = arrays_of.arrays(np.int32, strategies.integers(1, 4), elements=strategies.integers(0, 2**31 - 1))


@strategies.composite
def contents(draw):
    """The fields of examples with K responses of any tokens, including 0, and scores."""
    responses = draw(strategies.integers(1, 3))
    return [
        (
            draw(strategies.integers(0, 2**31 - 1)),
            draw(TOKENS),
            tuple(draw(TOKENS) for _ in range(responses)),
            draw(arrays_of.arrays(np.float32, responses, elements=strategies.floats(-2, 2, width=32))),
        )
        for _ in range(draw(strategies.integers(1, 4)))
    ]


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(fields=contents(), more=strategies.integers(0, 2))
def test_any_examples_come_back_from_their_batch(plain, fields, more):
    examples = [Example(*each) for each in fields]
    assert [plain(e) for e in examples_of(collate(examples, 4 + more, 4 + more))] == [plain(e) for e in examples]
