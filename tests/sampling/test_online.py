"""The online source: its use of prompts, state and judge; and its batch is a function of the step alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_examples import make_random_examples
from resumption import assert_equal_batches, assert_equal_output_after_restore
from tiny_models import make_batch, random_params

from alignment_gap.data.batches import offline_source
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.sampling import (
    SamplerConfig,
    Samples,
    against_each_other,
    against_opponent,
    make_generate,
    online_source,
)
from alignment_gap.sharding import put_batch, replicated
from alignment_gap.training import TrainState

PROMPTS = {step: make_batch(8, seed=step) for step in range(3)}


def state_of(step, value=0):
    return TrainState(jnp.int32(step), jnp.int32(value), ())


def sampler(samples, moved=0):
    """Samples whose tokens name step, parameter and prompt. Odd samples are shorter."""

    def draw(state, batch):
        none = jnp.zeros_like(batch.prompt_ids)
        rows = jnp.stack([state.step + none, state.params + none, batch.prompt_ids % 50, moved + none], axis=1)
        responses = jnp.tile(rows[:, None], (1, samples, 1)).at[:, :, 3].add(jnp.arange(samples))
        lengths = jnp.broadcast_to(4 - jnp.arange(samples) % 2, (len(none), samples))
        log_probs = jnp.broadcast_to(-1.0 - jnp.arange(samples, dtype=jnp.float32)[None, :, None], responses.shape)
        return Samples(responses, lengths, log_probs, log_probs / 2)

    return draw


def by_table(table):
    """A judge that looks up the score of the last token; all prompts have the same scores."""
    return lambda prompts, prompt_lengths, responses, lengths: jnp.asarray(table, jnp.float32)[responses[..., 3]]


def test_a_batch_is_prompts_samples_and_scores(mesh):
    source = online_source(PROMPTS.__getitem__, sampler(2), against_each_other(by_table([0.0, 1.0])), "all", mesh)
    for step, prompts in PROMPTS.items():
        batch = source(step, state_of(step, 5))
        for name in ("prompt_ids", "prompts", "prompt_lengths"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(prompts, name))
        number = int(prompts.prompt_ids[2]) % 50
        np.testing.assert_array_equal(batch.responses[2], [[step, 5, number, 0], [step, 5, number, 1]])
        np.testing.assert_array_equal(batch.response_lengths, [[4, 3]] * 8)
        np.testing.assert_array_equal(batch.scores, [[0, 1]] * 8)
        # From the distribution that the samples come from, not from the policy.
        np.testing.assert_array_equal(batch.sampler_log_probs[0, :, 0], [-0.5, -1.0])
        assert batch.reference_log_probs is batch.fresh is batch.mismatched is None


def test_samples_that_nobody_scores_are_even(mesh):
    batch = online_source(PROMPTS.__getitem__, sampler(3), None, "all", mesh)(0, state_of(0))
    np.testing.assert_array_equal(batch.scores, np.full((8, 3), 0.5))
    assert batch.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("keep", "table", "kept"),
    [
        ("all", [0.1, 0.9, 0.4, 0.2], [0, 1, 2, 3]),
        ("best_and_worst", [0.1, 0.9, 0.4, 0.2], [1, 0]),
        ("best_and_worst", [-3.0, -5.0, -4.0, -3.5], [0, 1]),
        # Of equal scores the first sample is the best and the last one the worst, so they are never the same sample.
        ("best_and_worst", [0.5, 0.5, 0.5, 0.5], [0, 3]),
        ("best_and_worst", [0.2, 0.7, 0.7, 0.2], [1, 3]),
        ("best", [0.1, 0.9, 0.4, 0.2], [1]),
        ("best", [0.3, 0.3, 0.1, 0.3], [0]),
    ],
)
def test_what_is_kept_of_four_samples(keep, table, kept, mesh):
    """A kept sample keeps its length, its score and its log-probs."""
    source = online_source(PROMPTS.__getitem__, sampler(4), against_each_other(by_table(table)), keep, mesh)
    batch = source(1, state_of(1))
    np.testing.assert_array_equal(batch.responses[..., 3], [kept] * 8)
    np.testing.assert_array_equal(batch.response_lengths, [[4 - k % 2 for k in kept]] * 8)
    np.testing.assert_allclose(batch.scores, [[table[k] for k in kept]] * 8)
    np.testing.assert_array_equal(batch.sampler_log_probs[:, :, 0], [[-0.5 - k / 2 for k in kept]] * 8)


def test_each_prompt_keeps_its_own_best(mesh):
    scores = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(4.0), (8, 1)), axis=1), jnp.float32)
    source = online_source(PROMPTS.__getitem__, sampler(4), lambda state, batch, drawn: scores, "best_and_worst", mesh)
    batch = source(0, state_of(0))
    order = np.argsort(scores, axis=1)
    np.testing.assert_array_equal(batch.responses[..., 3], np.stack([order[:, 3], order[:, 0]], axis=1))
    np.testing.assert_array_equal(batch.scores, [[3, 0]] * 8)
    assert len(set(order[:, 3].tolist())) > 1


def test_every_sample_meets_one_sample_of_the_opponent(mesh):
    """The opponent's tokens are 7 larger. The score of a sample is that of its side, and depends on both sides."""
    asked = []

    def scores(prompts, prompt_lengths, responses, lengths):
        asked.append((responses[0, :, 3].tolist(), lengths[0].tolist()))
        first = 1 / (1 + responses[:, 0, 3] + responses[:, 1, 3]).astype(jnp.float32)
        return jnp.stack([first, 1 - first], axis=1)

    score = against_opponent(scores, sampler(2, moved=7), mesh)
    batch = online_source(PROMPTS.__getitem__, sampler(3), score, "all", mesh)(0, state_of(0))
    # The judge is never asked about the opponent's second sample.
    assert asked == [([0, 7], [4, 4]), ([1, 7], [3, 4]), ([2, 7], [4, 4])]
    np.testing.assert_allclose(batch.scores, [[1 / 8, 1 / 9, 1 / 10]] * 8, rtol=1e-6)
    # The batch does not contain the opponent's samples.
    np.testing.assert_array_equal(batch.responses[..., 3], [[0, 1, 2]] * 8)


def test_opponents_see_the_state_and_the_prompts_of_the_step(mesh):
    seen = []

    def opponent(state, batch):
        seen.append((int(state.step), int(state.params), batch.prompt_ids.tolist()))
        return sampler(1)(state, batch)

    source = online_source(
        PROMPTS.__getitem__, sampler(2), against_opponent(by_table([0, 1]), opponent, mesh), "all", mesh
    )
    source(2, state_of(2, 11))
    assert seen == [(2, 11, PROMPTS[2].prompt_ids.tolist())]


def later(table, events):
    """A judge that is asked first and answers later; it logs both. The table has the scores."""

    def begin(prompts, prompt_lengths, responses, lengths):
        step = int(responses[0, 0, 0])
        events.append(("asked", step))

        def wait():
            events.append(("answered", step))
            return jnp.asarray(table, jnp.float32)

        return wait

    return begin


def test_the_next_step_is_asked_about_before_this_one_is_answered(mesh):
    """In windows of three steps. Samples come from the parameters that the state has at that time."""
    events, prompts = [], dict.fromkeys(range(5), PROMPTS[0])
    score = against_each_other(later([[1, 0]] * 8, events))
    source = online_source(prompts.__getitem__, sampler(2), score, "all", mesh, lambda step: step in (0, 1, 3))
    batches = [source(step, state_of(step, 5)) for step in range(5)]
    assert [event for event in events if event[1] < 3] == [
        ("asked", 0),
        ("asked", 1),
        ("answered", 0),
        ("asked", 2),
        ("answered", 1),
        ("answered", 2),
    ]
    assert events[6:] == [("asked", 3), ("asked", 4), ("answered", 3), ("answered", 4)]
    assert [batch.responses[0, 0, :2].tolist() for batch in batches] == [[step, 5] for step in range(5)]


@pytest.mark.parametrize("start", [0, 1, 4])
def test_several_steps_in_one_draw_give_the_batches_of_one_step_a_draw(start, mesh):
    """In draws of three steps, from any step on. There are prompts for five steps, so the last draw has too few."""
    prompts = {step: make_batch(8, seed=step) for step in range(5)}
    calls, draw = [], sampler(2)

    def counted(state, batch):
        calls.append(batch.prompts.shape)
        return draw(state, batch)

    score = against_each_other(by_table([0.0, 1.0]))
    single = online_source(prompts.__getitem__, draw, score, "all", mesh)
    together = online_source(prompts.__getitem__, counted, score, "all", mesh, steps_per_draw=3, last=5)
    for step in range(start, 5):
        state = state_of(step, 7)
        assert_equal_batches(together(step, state), single(step, state))
    assert calls == [(24, *prompts[0].prompts.shape[1:])] * len({step // 3 for step in range(start, 5)})


NONE = [float("nan")] * 2


@pytest.mark.parametrize(
    ("unanswered", "taken"),
    [
        ((), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((1,), [0, 2, 2, 3, 4, 5, 6, 7]),
        ((0, 1, 7), [2, 3, 2, 3, 4, 5, 6, 4]),
        ((0, 1, 2, 3, 4, 5, 7), [6] * 8),
    ],
)
def test_a_prompt_without_scores_gives_its_place_to_one_that_has_some(unanswered, taken, mesh):
    table = [NONE if row in unanswered else [row, -row] for row in range(8)]
    source = online_source(PROMPTS.__getitem__, sampler(2), against_each_other(later(table, [])), "all", mesh)
    batch, prompts = source(0, state_of(0)), PROMPTS[0]
    np.testing.assert_array_equal(batch.scores, [[row, -row] for row in taken])
    for name in ("prompt_ids", "prompts", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(batch, name), np.asarray(getattr(prompts, name))[taken])
    np.testing.assert_array_equal(batch.responses[:, 0, 2], np.asarray(prompts.prompt_ids)[taken] % 50)


def test_where_no_prompt_has_scores_there_are_none(mesh):
    source = online_source(PROMPTS.__getitem__, sampler(2), against_each_other(later([NONE] * 8, [])), "all", mesh)
    assert np.isnan(source(0, state_of(0)).scores).all()


def test_an_opponent_s_samples_are_asked_about_before_they_are_answered(mesh):
    events = []
    score = against_opponent(later([[0.25, 0.75]] * 8, events), sampler(2, moved=7), mesh)
    batch = online_source(PROMPTS.__getitem__, sampler(3), score, "all", mesh)(0, state_of(0))
    assert [kind for kind, _ in events] == ["asked"] * 3 + ["answered"] * 3
    np.testing.assert_array_equal(batch.scores, [[0.25] * 3] * 8)


@pytest.fixture(scope="module")
def sources(even_policy, mesh, tmp_path_factory):
    """Makes a source with three samples for each prompt; it keeps the best and the worst.

    Prompts are shuffled, for more than two epochs. The parameters differ at every step.
    """
    folder = tmp_path_factory.mktemp("prompts")
    examples = [dataclasses.replace(e, prompt=e.prompt % 16) for e in make_random_examples(10)]
    write_dataset(folder, examples, vocabulary_digest="", provenance={})
    generate = make_generate(even_policy, mesh, samples=3, max_length=4, eos_id=1, config=SamplerConfig())
    params = random_params(even_policy)
    key = jax.device_put(jax.random.key(7), replicated(mesh))

    def state(step):
        changed = jax.tree.map(lambda leaf: leaf * (1 + 0.1 * step), params)
        return jax.device_put(TrainState(jnp.int32(step), changed, ()), replicated(mesh))

    def draw(state, batch):
        texts = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        return generate(state.params, key, state.step, *texts)

    def scores(prompts, prompt_lengths, responses, lengths):
        return (responses % 3).sum(-1).astype(jnp.float32)

    def make():
        prompts = offline_source(open_dataset(folder), batch_size=8, seed=3, prompt_length=9, response_length=5)
        ahead = lambda step: put_batch(prompts(step), mesh, 8)  # noqa: E731
        source = online_source(ahead, draw, against_each_other(scores), "best_and_worst", mesh)
        return lambda step: source(step, state(step))

    return make


def test_resumes_at_every_step(sources):
    through = assert_equal_output_after_restore(sources, 4)
    # A prompt that repeats has other samples, so batches of different steps cannot be equal by chance.
    for pair in itertools.pairwise(through):
        of, again = (dict(zip(b.prompt_ids.tolist(), b.responses, strict=True)) for b in pair)
        common = of.keys() & again.keys()
        assert common and any((of[i] != again[i]).any() for i in common)


def test_a_step_is_the_same_whenever_and_however_often_it_is_asked_for(sources):
    source = sources()
    in_order = [jax.device_get(source(step)) for step in range(3)]
    for step in (2, 0, 2, 1):
        assert_equal_batches(jax.device_get(source(step)), in_order[step])
