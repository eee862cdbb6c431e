"""Labels and samples of datasets: every example gets its own, however the batches fall."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from alignment_gap.data.records import Example
from alignment_gap.evaluation import datasets
from alignment_gap.evaluation.datasets import Batching, label, sample_examples
from alignment_gap.models import PreferenceModel
from alignment_gap.models.preference import Markers
from alignment_gap.sampling import SamplerConfig, Samples, make_generate, preference_labeller
from alignment_gap.sharding import replicated


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


SHAPES = [((6, 4),), ((2, 2), (4, 3), (6, 4))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("batch_size", [8, 32])
def test_every_example_has_the_label_of_its_own(mesh, batch_size, shapes, monkeypatch):
    """Also where a window ends within the examples."""
    monkeypatch.setattr(datasets, "_WINDOW", 2)
    examples = make(19)
    labelled = list(label(iter(examples), longest_wins, Batching(mesh, batch_size, shapes)))
    assert [e.prompt_id for e in labelled] == list(range(19))
    for before, after in zip(examples, labelled, strict=True):
        wanted = [len(r) * 1000 + int(r.sum()) + int(before.prompt.sum()) for r in before.responses]
        assert after.scores.tolist() == wanted and after.scores.dtype == np.float32
        assert after.prompt is before.prompt and after.responses is before.responses


def test_a_batch_has_the_smallest_shape_that_holds_it(mesh):
    """Of 40 examples: each shape has all that fit into it and are no whole batch of a smaller one, but for the last."""
    examples, seen = make(40), []

    def labeller(prompts, prompt_lengths, responses, lengths):
        seen.append((prompts.shape[1], responses.shape[2]))
        assert prompt_lengths.max() <= prompts.shape[1] and lengths.max() <= responses.shape[2]
        return longest_wins(prompts, prompt_lengths, responses, lengths)

    list(label(examples, labeller, Batching(mesh, 8, SHAPES[1])))
    small = sum(len(e.prompt) <= 2 and max(map(len, e.responses)) <= 2 for e in examples)
    middle = sum(len(e.prompt) <= 4 and max(map(len, e.responses)) <= 3 for e in examples)
    assert small >= 1 and middle >= 8
    assert seen == small // 8 * [(2, 2)] + (middle // 8 - small // 8) * [(4, 3)] + (5 - middle // 8) * [(6, 4)]


def test_samples_come_in_the_order_of_the_policies_and_are_not_yet_labelled(mesh):
    examples = make(11)
    found = list(sample_examples(examples, [echo, echo], Batching(mesh, 8, ((6, 2),))))
    for before, after in zip(examples, found, strict=True):
        first = before.prompt[0]
        assert [r.tolist() for r in after.responses] == [[before.prompt_id, 1], [first], [before.prompt_id, 1], [first]]
        assert after.scores.tolist() == [0.5] * 4
        assert (after.prompt_id, after.prompt.tolist()) == (before.prompt_id, before.prompt.tolist())


def test_networks_sample_and_label_alike_in_buckets(even_policy, mesh):
    """The same tokens for the same seed, and the same hard labels, of human responses and of samples."""
    params, examples = random_params(even_policy), make(29)
    labeller = preference_labeller(PreferenceModel(even_policy, Markers(8, 9, 10, 11, 12)), params, mesh)
    generate = make_generate(even_policy, mesh, samples=2, max_length=4, eos_id=1, config=SamplerConfig())
    run = functools.partial(generate, params, *jax.device_put((jax.random.key(3), jnp.int32(0)), replicated(mesh)))

    def made(of_pairs, of_prompts):
        pairs, prompts = Batching(mesh, 8, of_pairs), Batching(mesh, 8, of_prompts)
        sampled = list(label(sample_examples(examples, [run], prompts), labeller, prompts))
        return [*sampled, *label(examples, labeller, pairs)]

    whole, buckets = made(((6, 4),), ((6, 4),)), made(((4, 3), (6, 4)), ((3, 4), (6, 4)))
    for wanted, found in zip(whole, buckets, strict=True):
        assert found.prompt_id == wanted.prompt_id
        assert [r.tolist() for r in found.responses] == [r.tolist() for r in wanted.responses]
        assert found.scores.tolist() == wanted.scores.tolist()
    assert {tuple(e.scores.tolist()) for e in whole} >= {(0.0, 1.0), (1.0, 0.0)}
    assert len({r.tobytes() for e in whole[:29] for r in e.responses}) > 29
