"""Labels and samples of datasets: every example gets its own, however the batches fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap.data import Example
from alignment_gap.evaluation.datasets import Batching, label, sample_examples
from alignment_gap.sampling import Samples


def make(count):
    rng = np.random.default_rng(0)

    def tokens(longest):
        return rng.integers(2, 9, rng.integers(1, longest + 1)).astype(np.int32)

    return [Example(i, tokens(6), (tokens(4), tokens(4)), np.zeros(2, np.float32)) for i in range(count)]


@jax.jit
def longest_wins(prompts, prompt_lengths, responses, lengths):
    """Scores that any example can be checked by: lengths, and a sum that padding would change."""
    inside = jnp.arange(responses.shape[-1]) < lengths[..., None]
    return lengths * 1000.0 + jnp.where(inside, responses, 0).sum(-1) + prompts.sum(-1)[:, None]


@jax.jit
def echo(ids, prompts, lengths):
    """Two responses: the prompt's id and an end; the prompt's first token alone."""
    first = jnp.stack([jnp.stack([ids, jnp.ones_like(ids)], 1), jnp.stack([prompts[:, 0], 0 * ids], 1)], 1)
    zeros = jnp.zeros(first.shape)
    return Samples(first, jnp.broadcast_to(jnp.array([2, 1]), (len(ids), 2)), zeros, zeros)


@pytest.mark.parametrize("batch_size", [8, 32])
def test_every_example_has_the_label_of_its_own(mesh, batch_size):
    examples = make(19)
    labelled = list(label(iter(examples), longest_wins, Batching(mesh, batch_size, 6, 4)))
    assert [e.prompt_id for e in labelled] == list(range(19))
    for before, after in zip(examples, labelled, strict=True):
        wanted = [len(r) * 1000 + int(r.sum()) + int(before.prompt.sum()) for r in before.responses]
        assert after.scores.tolist() == wanted and after.scores.dtype == np.float32
        assert after.prompt is before.prompt and after.responses is before.responses


def test_samples_come_in_the_order_of_the_policies_and_are_not_yet_labelled(mesh):
    examples = make(11)
    found = list(sample_examples(examples, [echo, echo], Batching(mesh, 8, 6, 2)))
    for before, after in zip(examples, found, strict=True):
        first = before.prompt[0]
        assert [r.tolist() for r in after.responses] == [[before.prompt_id, 1], [first], [before.prompt_id, 1], [first]]
        assert after.scores.tolist() == [0.5] * 4
        assert (after.prompt_id, after.prompt.tolist()) == (before.prompt_id, before.prompt.tolist())
