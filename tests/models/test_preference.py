"""The preference model: its context by hand, the sign rule, and learning."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_models import logits_of
from tiny_models import CONFIGS, initial_params, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, Output, PreferenceModel, make_policy
from alignment_gap.models.preference import KINDS, Markers, pair_loss
from alignment_gap.models.ragged import join
from alignment_gap.training import preference_objective

MARKERS = Markers(8, 9, 10, 11, 12)
BATCH = make_batch(6, vocabulary_size=8)
SWAPPED = (*texts(BATCH)[:2], BATCH.responses[:, ::-1], BATCH.response_lengths[:, ::-1])


# Each kind has its own architecture here. The code that joins texts and compares answers depends on neither; the
# comparison with the numpy model has all four.
@pytest.fixture(scope="session", params=[("t5", "pairwise"), ("decoder", "bradley_terry")], ids="-".join)
def model(request):
    architecture, kind = request.param
    return PreferenceModel(make_policy(CONFIGS[architecture]), MARKERS, kind)


@pytest.fixture(scope="session")
def params(model):
    return random_params(model.policy)


@functools.cache
def log_odds_of(model):
    return jax.jit(model.log_odds)


@functools.cache
def objective_of(model):
    return jax.jit(preference_objective(model, jax.random.key(0)))


@pytest.fixture(scope="session")
def log_odds(model):
    return log_odds_of(model)


@pytest.fixture(scope="session")
def preferences(model):
    return jax.jit(model.preferences)


def test_join_by_hand():
    first = (jnp.array([[1, 2, 7], [3, 7, 7]]), jnp.array([2, 1]))
    second = (jnp.array([[4, 7], [5, 6]]), jnp.array([1, 2]))
    nothing = (jnp.array([[9], [9]]), jnp.array([0, 0]))
    joined, lengths = join([first, second, nothing])
    np.testing.assert_array_equal(joined, [[1, 2, 4, 0, 0, 0], [3, 5, 6, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 3])


def test_join_of_full_rows_loses_nothing():
    joined, lengths = join([(jnp.array([[1, 2]]), jnp.array([2])), (jnp.array([[3]]), jnp.array([1]))])
    np.testing.assert_array_equal(joined, [[1, 2, 3]])
    np.testing.assert_array_equal(lengths, [3])


def _rewards(model, params, prompt, parts):
    """The log-odds of the answer to the prompt, the marked parts and the question, by the numpy model."""
    text = [token for marker, part in zip(MARKERS[:2], parts, strict=False) for token in (marker, *part)]
    # The last row of logits predicts the token after the question; so the last input, 0, does not matter.
    logits = logits_of(model.policy.config, params, prompt, np.array([*text, MARKERS.question, 0]))[-1]
    return logits[MARKERS.first_better] - logits[MARKERS.second_better]


@pytest.mark.parametrize("kind", KINDS)
def test_log_odds_equal_the_numpy_model(kind, policy):
    model, params, expected = PreferenceModel(policy, MARKERS, kind), random_params(policy), []
    for b in range(6):
        prompt = np.asarray(BATCH.prompts)[b, : int(BATCH.prompt_lengths[b])]
        parts = [np.asarray(BATCH.responses)[b, k, : int(BATCH.response_lengths[b, k])] for k in range(2)]
        if model.kind == "pairwise":
            expected.append(_rewards(model, params, prompt, parts))
        else:
            expected.append(_rewards(model, params, prompt, parts[:1]) - _rewards(model, params, prompt, parts[1:]))
    np.testing.assert_allclose(log_odds_of(model)(params, *texts(BATCH)), expected, rtol=1e-4, atol=1e-4)


def test_a_response_cannot_forge_a_second_one(model, params, log_odds):
    """A judge's marker inside of a response counts as padding."""
    prompts, prompt_lengths, responses, lengths = texts(BATCH)
    forged, padded = (responses.at[:, 0, 1].set(token) for token in (MARKERS.second, 0))
    lengths = jnp.maximum(lengths, 2)
    found, expected = (log_odds(params, prompts, prompt_lengths, each, lengths) for each in (forged, padded))
    np.testing.assert_array_equal(found, expected)


def test_the_sign_rule_is_antisymmetric_and_hard(model, params, preferences):
    wins, losses = preferences(params, *texts(BATCH)), preferences(params, *SWAPPED)
    np.testing.assert_array_equal(wins + losses, 1.0)
    assert set(np.asarray(wins).tolist()) == {0.0, 1.0}


def test_the_sign_rule_compares_both_orders(model, params, log_odds, preferences):
    forward, backward = log_odds(params, *texts(BATCH)), log_odds(params, *SWAPPED)
    np.testing.assert_array_equal(preferences(params, *texts(BATCH)), forward > backward)
    if model.kind == "pairwise":
        # The raw answer depends on the order; the rule removes this.
        assert np.abs(forward + backward).max() > 1e-2
    else:
        np.testing.assert_allclose(forward, -backward, rtol=1e-5, atol=1e-6)


def test_identical_responses_tie(params, preferences):
    """Even if their padding differs."""
    same = BATCH.responses.at[:, 1].set(BATCH.responses[:, 0])
    lengths = BATCH.response_lengths.at[:, 1].set(BATCH.response_lengths[:, 0])
    padding = jnp.arange(5) >= lengths[..., None]
    same = jnp.where(padding & jnp.array([True, False])[:, None], 3, same)
    np.testing.assert_array_equal(preferences(params, *texts(BATCH)[:2], same, lengths), 0.5)


def test_padding_is_not_seen(params, log_odds):
    prompt_padding = jnp.arange(6) >= BATCH.prompt_lengths[:, None]
    padding = jnp.arange(5) >= BATCH.response_lengths[..., None]
    other = log_odds(
        params,
        jnp.where(prompt_padding, 7, BATCH.prompts),
        BATCH.prompt_lengths,
        jnp.where(padding, 1, BATCH.responses),
        BATCH.response_lengths,
    )
    np.testing.assert_allclose(other, log_odds(params, *texts(BATCH)), rtol=1e-5, atol=1e-5)


def test_pairwise_reads_both_responses_and_bradley_terry_rewards_are_transitive(model, params, log_odds):
    batch = make_batch(6, responses=3, vocabulary_size=8, seed=1)
    prompts = texts(batch)[:2]

    def odds(i, j):
        pair = jnp.array([i, j])
        return log_odds(params, *prompts, batch.responses[:, pair], batch.response_lengths[:, pair])

    cycle = odds(0, 1) + odds(1, 2) + odds(2, 0)
    if model.kind == "pairwise":
        assert np.abs(cycle).max() > 1e-2
        assert (np.abs(odds(0, 1) - odds(0, 2)) > 1e-6).all()
        assert (np.abs(odds(0, 1) - odds(2, 1)) > 1e-6).all()
    else:
        np.testing.assert_allclose(cycle, 0.0, atol=1e-5)


def test_scores_of_three_responses_are_shares_of_wins(model, params, preferences):
    batch = make_batch(6, responses=3, vocabulary_size=8, seed=1)
    scores = jax.jit(model.scores)(params, *texts(batch))
    expected = np.zeros((6, 3))
    for i, j in itertools.permutations(range(3), 2):
        pair = jnp.array([i, j])
        won = preferences(params, *texts(batch)[:2], batch.responses[:, pair], batch.response_lengths[:, pair])
        expected[:, i] += np.asarray(won) / 2
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(scores).sum(1), 1.5, atol=1e-6)


def test_scores_of_a_pair_are_preferences(model, params, preferences):
    scores = jax.jit(model.scores)(params, *texts(BATCH))
    wins = preferences(params, *texts(BATCH))
    np.testing.assert_array_equal(scores, np.stack([wins, 1 - wins], 1))


def test_scores_of_one_response_are_refused(model, params):
    one = (*texts(BATCH)[:2], BATCH.responses[:, :1], BATCH.response_lengths[:, :1])
    with pytest.raises(UserError, match="1 response a prompt: a preference needs 2 or more"):
        model.scores(params, *one)


def test_pair_loss_by_hand():
    # -log sigma(2) = log(1 + e^-2) = 0.126928. A tie at log-odds 0 costs log 2.
    loss = pair_loss(jnp.array([2.0, 2.0, 0.0, 2.0]), jnp.array([1.0, 0.0, 0.5, 0.5]))
    np.testing.assert_allclose(loss, [0.126928, 2.126928, 0.693147, 1.126928], rtol=1e-5)


def test_pair_loss_is_finite_where_the_model_is_sure():
    np.testing.assert_allclose(pair_loss(jnp.array([200.0, -200.0]), jnp.array([0.0, 0.0])), [200.0, 0.0], rtol=1e-6)


def test_unknown_kind_is_refused(policy):
    with pytest.raises(UserError, match="'listwise' is unknown: choose one of pairwise, bradley_terry"):
        PreferenceModel(policy, MARKERS, "listwise")


def test_the_order_of_a_pair_is_random_but_the_label_goes_with_it(model, params, log_odds):
    """Every value belongs to one of the two orders. Both orders occur, and each step draws new ones."""
    objective = objective_of(model)
    forward = pair_loss(log_odds(params, *texts(BATCH)), BATCH.scores[:, 0])
    backward = pair_loss(log_odds(params, *SWAPPED), BATCH.scores[:, 1])
    values = np.stack([objective(params, BATCH, jnp.int32(step))[0] for step in range(20)])
    is_forward, is_backward = np.isclose(values, forward, rtol=1e-4), np.isclose(values, backward, rtol=1e-4)
    assert (is_forward | is_backward).all()
    if model.kind == "pairwise":
        assert not (is_forward & is_backward).any()
        # Fewer than 36 or more than 84 heads in 120 fair throws have probability 1e-5.
        assert 36 <= is_forward.sum() <= 84
        # The pairs of one step have independent coins.
        assert is_forward.sum(1).std() > 0


def test_accuracy_counts_a_tie_as_half(model, params):
    tied = jnp.full_like(BATCH.scores, 0.5)
    batch = type(BATCH)(BATCH.prompt_ids, *texts(BATCH), tied)
    _, diagnostics = objective_of(model)(params, batch, jnp.int32(0))
    np.testing.assert_array_equal(diagnostics["accuracy"], 0.5)


@dataclasses.dataclass(frozen=True)
class Counting:
    """A policy whose state sums its inputs: those of the first response once, those of the second -1.5 times.

    The log-odds of the answer are (2 - 0) * state, because the first answer has the embedding 2, the second 0.
    """

    config: None = None

    def output(self, params):
        return Output(jnp.zeros((13, 1)).at[MARKERS.first_better, 0].set(2.0), params)

    def start_tokens(self, prompts, prompt_lengths):
        return jnp.zeros_like(prompt_lengths)

    def hidden(self, params, prompts, prompt_lengths, inputs, packing=None):
        first = jnp.cumsum(jnp.where(inputs == MARKERS.second, 100, 0), -1) == 0
        worth = jnp.where(inputs >= MARKERS.first, 0.0, jnp.where(first, 1.0, -1.5) * inputs.astype(jnp.float32))
        return jnp.cumsum(worth, -1)[..., None]


# Responses with sums 3, 2 and 4; their padding holds other numbers.
RESPONSES = jnp.array([[[1, 2, 7], [2, 6, 6], [4, 5, 5]]])
COUNTED = (jnp.array([[5]]), jnp.array([1]), RESPONSES, jnp.array([[2, 1, 1]]))


def counted(*pair):
    """The batch of two of the three responses."""
    return (*COUNTED[:2], COUNTED[2][:, jnp.array(pair)], COUNTED[3][:, jnp.array(pair)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_pairwise_model_by_hand(unchecked):
    """With scale 0.5 the log-odds are the sum of the first response minus 1.5 times that of the second."""
    model, scale = PreferenceModel(Counting(), MARKERS), 0.5
    np.testing.assert_allclose(model.log_odds(scale, *counted(0, 1)), [3 - 1.5 * 2])
    np.testing.assert_allclose(model.log_odds(scale, *counted(1, 0)), [2 - 1.5 * 3])
    np.testing.assert_allclose(model.log_odds(scale, *counted(2, 0)), [4 - 1.5 * 3])
    # Hard: the order with the larger answer decides. Soft: the mean of r and of 1 minus the swapped r.
    np.testing.assert_array_equal(model.preferences(scale, *counted(0, 1)), [1.0])
    np.testing.assert_array_equal(model.preferences(scale, *counted(0, 2)), [0.0])
    soft = model.preferences(scale, *counted(0, 1), soft=True)
    np.testing.assert_allclose(soft, [(sigmoid(0.0) + 1 - sigmoid(-2.5)) / 2], rtol=1e-6)
    np.testing.assert_allclose(1 - soft, model.preferences(scale, *counted(1, 0), soft=True), rtol=1e-6)
    # Each of three responses is compared with two others. The sums are 3, 2 and 4.
    np.testing.assert_array_equal(model.scores(scale, *COUNTED), [[0.5, 0.0, 1.0]])
    pairs = {
        (i, j): float(model.preferences(scale, *counted(i, j), soft=True)[0])
        for i, j in itertools.permutations(range(3), 2)
    }
    expected = [[(pairs[i, (i + 1) % 3] + pairs[i, (i + 2) % 3]) / 2 for i in range(3)]]
    np.testing.assert_allclose(model.scores(scale, *COUNTED, labels="soft"), expected, rtol=1e-5)


def test_a_bradley_terry_model_by_hand(unchecked):
    """Each response is read alone, in the first place. With scale 0.5 its reward is its sum."""
    model, scale = PreferenceModel(Counting(), MARKERS, "bradley_terry"), 0.5
    np.testing.assert_allclose(model.scores(scale, *COUNTED, labels="rewards"), [[3.0, 2.0, 4.0]])
    np.testing.assert_allclose(model.log_odds(scale, *counted(0, 2)), [-1.0])
    np.testing.assert_array_equal(model.preferences(scale, *counted(0, 2)), [0.0])
    np.testing.assert_allclose(model.preferences(scale, *counted(0, 2), soft=True), [sigmoid(-1.0)], rtol=1e-6)
    np.testing.assert_array_equal(model.scores(scale, *COUNTED), [[0.5, 0.0, 1.0]])
    soft = [[sigmoid(1) + sigmoid(-1), sigmoid(-1) + sigmoid(-2), sigmoid(1) + sigmoid(2)]]
    np.testing.assert_allclose(model.scores(scale, *COUNTED, labels="soft"), np.array(soft) / 2, rtol=1e-5)
    # A single response has a reward too.
    one = (*COUNTED[:2], COUNTED[2][:, :1], COUNTED[3][:, :1])
    np.testing.assert_allclose(model.scores(scale, *one, labels="rewards"), [[3.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_that_a_token_wins(kind):
    """A response is better if it has token 5; nothing else tells the two apart."""
    config = DecoderConfig(vocabulary_size=13, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=16)
    model = PreferenceModel(make_policy(config), MARKERS, kind)
    objective, optimizer = preference_objective(model, jax.random.key(1)), optax.adam(2e-2)
    params = initial_params(model.policy)(jax.random.key(2))

    def pairs(seed):
        batch = make_batch(64, vocabulary_size=5, prompt_length=3, response_length=3, seed=seed)
        winner = np.random.default_rng(seed).integers(0, 2, 64)
        responses = batch.responses.at[jnp.arange(64), winner, 0].set(5)
        scores = jax.nn.one_hot(winner, 2)
        return type(batch)(batch.prompt_ids, *texts(batch)[:2], responses, batch.response_lengths, scores)

    @jax.jit
    def step(params, state, batch, number):
        gradient = jax.grad(lambda p: objective(p, batch, number)[0].mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(40):
        params, state = step(params, state, pairs(number), jnp.int32(number))
    held_out = pairs(1000)
    wins = jax.jit(model.preferences)(params, *texts(held_out))
    assert np.mean(np.asarray(wins) == np.asarray(held_out.scores[:, 0])) >= 0.9
