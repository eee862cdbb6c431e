"""Both policies have one interface; tests compare them with the numpy models and with themselves."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import logits_of, score_rows
from tiny_models import CONFIGS, SETTINGS, initial_params, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config, count_parameters, make_policy, score
from alignment_gap.models.policy import response_hidden
from alignment_gap.sharding import STANDARD

BATCH = make_batch(4, responses=3)


@pytest.fixture(scope="module")
def scorer(policy):
    return jax.jit(partial(score, policy))


@pytest.fixture(scope="module")
def scores(scorer, params):
    return np.asarray(scorer(params, *texts(BATCH)))


@functools.cache
def _logits(policy):
    @jax.jit
    def logits(params):
        hidden = response_hidden(policy, params, BATCH.prompts, BATCH.prompt_lengths, BATCH.responses)
        return policy.output(params).logits(hidden)

    return logits


def test_every_parameter_names_its_axes(policy):
    boxed = jax.eval_shape(policy.init, jax.random.key(0))
    known = dict(STANDARD)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= set(known)
        assert leaf.value.dtype == jnp.float32


def test_number_of_t5_parameters():
    # Attention: 4 projections of 12 x (2 x 5) = 480. MLP: 3 x 12 x 7 = 252. Norms have 12.
    encoder = 2 * (480 + 252 + 2 * 12) + 12 + 2 * 8
    decoder = 3 * (2 * 480 + 252 + 3 * 12) + 12 + 2 * 8
    assert count_parameters(make_policy(CONFIGS["t5"])) == 2 * 13 * 12 + encoder + decoder
    tied = dataclasses.replace(CONFIGS["t5"], tied_embeddings=True)
    assert count_parameters(make_policy(tied)) == 13 * 12 + encoder + decoder


def test_number_of_decoder_parameters():
    # Query and out 12 x 24 each, key and value 12 x 12 each, MLP 3 x 12 x 7, one norm.
    layer = 2 * 288 + 2 * 144 + 252 + 12
    assert count_parameters(make_policy(CONFIGS["decoder"])) == 13 * 12 + 3 * layer + 12


def test_initial_logits_are_of_order_one(policy):
    params = initial_params(policy)(jax.random.key(3))
    assert 0.3 < float(jnp.std(_logits(policy)(params))) < 3


def test_scores_equal_the_numpy_model(policy, params, scores):
    expected = score_rows(policy.config, params, *map(np.asarray, texts(BATCH)))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert scores.dtype == np.float32


def test_logits_equal_the_numpy_model(policy, params):
    logits = _logits(policy)(params)
    for row in range(4):
        prompt = np.asarray(BATCH.prompts)[row, : int(BATCH.prompt_lengths[row])]
        expected = logits_of(policy.config, params, prompt, BATCH.responses[row, 1])
        np.testing.assert_allclose(logits[row, 1], expected, rtol=1e-4, atol=1e-4)


def test_tied_t5_equals_the_numpy_model():
    policy = make_policy(dataclasses.replace(CONFIGS["t5"], tied_embeddings=True))
    params = random_params(policy, 1)
    expected = score_rows(policy.config, params, *map(np.asarray, texts(BATCH)))
    np.testing.assert_allclose(jax.jit(partial(score, policy))(params, *texts(BATCH)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_decoder_equal_the_numpy_model(name):
    policy = make_policy(SETTINGS[name])
    params = random_params(policy, 2)
    expected = score_rows(policy.config, params, *map(np.asarray, texts(BATCH)))
    np.testing.assert_allclose(jax.jit(partial(score, policy))(params, *texts(BATCH)), expected, rtol=1e-4, atol=1e-4)
    initial = initial_params(policy)(jax.random.key(3))
    assert 0.3 < float(jnp.std(_logits(policy)(initial))) < 3


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_neox"])
def test_decoding_with_windows_or_on_a_part_of_each_head_equals_scoring(name):
    policy = make_policy(SETTINGS[name])
    params, (prompts, lengths, responses, _) = random_params(policy, 2), texts(BATCH)

    @jax.jit
    def stepwise(params):
        cache, tokens = policy.prefill(params, prompts, lengths, 3, 5), policy.start_tokens(prompts, lengths)
        tokens, found = jnp.broadcast_to(tokens[:, None], (4, 3)), []
        for step in range(5):
            hidden, cache = policy.decode_step(params, cache, jnp.int32(step), tokens, 5)
            tokens = responses[..., step]
            found.append(hidden)
        return jnp.stack(found, 2)

    whole = jax.jit(partial(response_hidden, policy))(params, prompts, lengths, responses)
    np.testing.assert_allclose(stepwise(params), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_decoding_reads_only_the_places_that_it_is_given(name):
    """The places after them hold nan, so that a product with one of them would be nan."""
    policy = make_policy(CONFIGS[name] if name in CONFIGS else SETTINGS[name])
    params, (prompts, lengths, responses, _) = random_params(policy, 2), texts(BATCH)

    @jax.jit
    def stepwise(params):
        cache, tokens = policy.prefill(params, prompts, lengths, 3, 5), policy.start_tokens(prompts, lengths)
        cache["responses"] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache["responses"])
        tokens, found = jnp.broadcast_to(tokens[:, None], (4, 3)), []
        for step in range(4):
            # The place after this step is read too, but gets no weight.
            filled = jax.tree.map(lambda x, step=step: x.at[..., step + 1, :].set(7.0), cache["responses"])
            cache = {**cache, "responses": filled}
            hidden, cache = policy.decode_step(params, cache, jnp.int32(step), tokens, step + 2)
            tokens = responses[..., step]
            found.append(hidden)
        return jnp.stack(found, 2)

    whole = jax.jit(partial(response_hidden, policy))(params, prompts, lengths, responses)[:, :, :4]
    np.testing.assert_allclose(stepwise(params), whole, rtol=1e-4, atol=1e-4)


def test_responses_of_one_prompt_do_not_see_each_other(scorer, params, scores):
    for k in range(3):
        alone = scorer(params, *texts(BATCH)[:2], BATCH.responses[:, k : k + 1], BATCH.response_lengths[:, k : k + 1])
        np.testing.assert_allclose(alone[:, 0], scores[:, k], rtol=1e-5, atol=1e-5)


def test_padding_is_not_seen(scorer, params, scores):
    prompt_garbage = jnp.pad(BATCH.prompts, ((0, 0), (0, 3)), constant_values=7)
    prompt_end = jnp.arange(9) < BATCH.prompt_lengths[:, None]
    response_garbage = jnp.pad(BATCH.responses, ((0, 0), (0, 0), (0, 2)), constant_values=5)
    response_end = jnp.arange(7) < BATCH.response_lengths[..., None]
    padded = scorer(
        params,
        jnp.where(prompt_end, prompt_garbage, 11),
        BATCH.prompt_lengths,
        jnp.where(response_end, response_garbage, 12),
        BATCH.response_lengths,
    )
    np.testing.assert_allclose(padded[..., :5], scores, rtol=1e-5, atol=1e-5)
    assert not np.asarray(padded[..., 5:]).any()
    assert not np.asarray(padded)[~np.asarray(response_end)].any()


def test_a_token_changes_no_log_prob_before_it_and_every_one_behind(scorer, params):
    full = jnp.full_like(BATCH.response_lengths, 5)
    before = scorer(params, *texts(BATCH)[:3], full)
    changed = BATCH.responses.at[..., 2].set((BATCH.responses[..., 2] + 1) % 13)
    after = scorer(params, *texts(BATCH)[:2], changed, full)
    np.testing.assert_array_equal(before[..., :2], after[..., :2])
    assert (np.abs(before - after)[..., 2:] > 1e-6).all()


def test_every_prompt_token_matters(scorer, params):
    changed = BATCH.prompts.at[1].set((BATCH.prompts[1] + 1) % 13)
    base = scorer(params, *texts(BATCH))
    for position in range(6):
        prompts = BATCH.prompts.at[1, position].set(changed[1, position])
        other = scorer(params, prompts, *texts(BATCH)[1:])
        assert abs(float(base[1, 1, 0] - other[1, 1, 0])) > 1e-6
        np.testing.assert_array_equal(base[0], other[0])


def test_probabilities_of_all_responses_sum_to_one(scorer, params):
    every = jnp.broadcast_to(jnp.arange(13)[None, :, None], (4, 13, 1))
    log_probs = scorer(params, BATCH.prompts, BATCH.prompt_lengths, every, jnp.ones((4, 13), jnp.int32))
    np.testing.assert_allclose(jnp.exp(log_probs).sum((1, 2)), 1.0, rtol=1e-5)


@pytest.fixture(scope="module")
def gradient(policy, params):
    return _gradient(policy.config, params)


def _gradient(config, params):
    return jax.jit(jax.grad(lambda p: score(make_policy(config), p, *texts(BATCH)).sum()))(params)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots", "scan_unroll": 3}])
def test_what_is_recomputed_or_unrolled_does_not_change_gradients(policy, params, gradient, change):
    other = _gradient(dataclasses.replace(policy.config, **change), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, other)


def test_every_parameter_has_a_gradient(gradient):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        # Each layer of a stack separately.
        stacked = "layers" in jax.tree_util.keystr(path)
        for part in leaf if stacked else [leaf]:
            assert np.abs(part).max() > 1e-6, path


def test_bfloat16_is_close(policy, params, scores):
    half = make_policy(dataclasses.replace(policy.config, dtype="bfloat16"))
    arrays = BATCH.prompts, BATCH.prompt_lengths, BATCH.responses
    assert jax.eval_shape(partial(response_hidden, half), params, *arrays).dtype == jnp.bfloat16
    low = jax.jit(partial(score, half))(params, *texts(BATCH))
    assert low.dtype == jnp.float32
    # Three layers with eight bits of mantissa.
    np.testing.assert_allclose(low, scores, atol=0.3)
    assert np.abs(low - scores).mean() < 0.05


def _products(jaxpr):
    """The matrix products of a traced function, including those in loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _products(getattr(inner, "jaxpr", inner))


def test_bfloat16_computes_over_float32_parameters(policy, params):
    """The inputs of every matrix product are bfloat16; parameters and gradients are float32."""
    half = make_policy(dataclasses.replace(policy.config, dtype="bfloat16"))
    boxed = jax.eval_shape(half.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed)} == {jnp.dtype("float32")}
    step = jax.grad(lambda p: score(half, p, *texts(BATCH)).sum())
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(step, params))} == {jnp.dtype("float32")}
    products = list(_products(jax.make_jaxpr(partial(score, half))(params, *texts(BATCH)).jaxpr))
    assert len(products) > 8
    assert all(x.aval.dtype == jnp.bfloat16 for product in products for x in product.invars)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (T5Config(), {"width": 0}, r"T5Config\.width is 0: it must be positive"),
        (T5Config(), {"remat": "some"}, "remat is 'some': choose one of none, full, dots"),
        (T5Config(), {"dtype": "float16"}, "dtype is 'float16': choose one of float32, bfloat16"),
        (T5Config(), {"relative_position_buckets": 2}, "relative_position_buckets is 2: it must be at least 4"),
        (
            T5Config(),
            {"relative_position_max_distance": 16},
            "relative_position_max_distance is 16: it must be above 16",
        ),
        (DecoderConfig(), {"layers": -1}, r"DecoderConfig\.layers is -1: it must be positive"),
        (DecoderConfig(), {"kv_heads": 3}, "kv_heads is 3: it must divide heads=4"),
        (DecoderConfig(), {"window": -1}, r"DecoderConfig\.window is -1: it must be positive, or None"),
        (DecoderConfig(), {"window": 4}, "window is 4 with full_attention_every=1: set both"),
        (DecoderConfig(), {"block": "series"}, "block is 'series': choose one of parallel, parallel_two_norms, serial"),
        (DecoderConfig(), {"head_size": 7}, "head_size is 7: rotary positions need it even"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        make_policy(dataclasses.replace(config, **change))
