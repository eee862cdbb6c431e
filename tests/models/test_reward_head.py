"""Reward heads: the token that they read (compared with the numpy model), and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import logits_of
from tiny_models import CONFIGS, SETTINGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import PreferenceModel, RewardHead, compute_params, make_policy
from alignment_gap.models.preference import Markers
from alignment_gap.models.reward_head import make_init, without_output
from alignment_gap.sharding import unbox

BATCH = make_batch(4, responses=3)
POLICIES = {
    "t5": make_policy(without_output(CONFIGS["t5"])),
    "llama3": make_policy(without_output(SETTINGS["llama3"])),
    "gemma2": make_policy(without_output(SETTINGS["gemma2"])),
    "gpt_neox": make_policy(without_output(SETTINGS["gpt_neox"])),
}


def parameters(policy, head=RewardHead()):  # noqa: B008
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: unbox(make_init(policy, head)(key)), jax.random.key(0))["score"]
    head = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    return {**random_params(policy), "score": head}


def hidden_of(policy, params, prompt, response):
    """The hidden state that predicts the response's last token, from the numpy model with an identity as the output."""
    config = dataclasses.replace(policy.config, tied_embeddings=False)
    params = {**params, "output_embedder": {"embedding": jnp.eye(13, 12)}}
    return logits_of(config, params, np.asarray(prompt), np.asarray(response))[-1][:12]


def reward_of(policy, params, text, after=0):
    """The reward of a text by hand.

    A decoder's head reads its last token; T5's head reads the state that predicts it.
    """
    head = jax.tree.map(np.asarray, params["score"])
    if "dense" not in head:
        return hidden_of(policy, params, text[:1], [*text[1:], after]) @ head["kernel"][:, 0]
    middle = np.tanh(hidden_of(policy, params, text, text) @ head["dense"]["kernel"] + head["dense"]["bias"])
    return middle @ head["output"]["kernel"][:, 0] + head["output"]["bias"][0]


def every_text(batch):
    for row, (prompt, length) in enumerate(zip(batch.prompts, batch.prompt_lengths, strict=True)):
        for column, (response, size) in enumerate(zip(batch.responses[row], batch.response_lengths[row], strict=True)):
            yield (row, column), prompt[:length].tolist(), response[:size].tolist()


def rewards(policy, params, head=RewardHead()):  # noqa: B008
    model = PreferenceModel(policy, None, "bradley_terry", head)
    return jax.jit(lambda p: model.scores(p, *texts(BATCH), labels="rewards"))(params)


@pytest.mark.parametrize("name", POLICIES)
def test_the_reward_is_that_of_the_last_token(name):
    policy = POLICIES[name]
    params = parameters(policy)
    found = rewards(policy, params)
    assert found.shape == (4, 3) and found.dtype == jnp.float32
    for place, prompt, response in every_text(BATCH):
        np.testing.assert_allclose(found[place], reward_of(policy, params, prompt + response), rtol=0, atol=2e-4)
    assert float(jnp.std(found)) > 0.1


def test_a_bias_is_added_to_the_reward():
    policy, head = POLICIES["gpt_neox"], RewardHead(bias=True)
    params = parameters(policy, head)
    without = {**params, "score": {"kernel": params["score"]["kernel"]}}
    np.testing.assert_allclose(
        rewards(policy, params, head) - rewards(policy, without), params["score"]["bias"][0], rtol=0, atol=1e-5
    )
    assert abs(float(params["score"]["bias"][0])) > 0.1


def test_tokens_of_the_pad_id_at_the_end_are_skipped():
    """The head reads at least the prompt's last token. A pad id before another token counts as a token."""
    policy = POLICIES["llama3"]
    params, skipped = parameters(policy), 0
    for pad in sorted({response[-1] for _, _, response in every_text(BATCH)})[:3]:
        found = rewards(policy, params, RewardHead(pad_id=pad))
        for place, prompt, response in every_text(BATCH):
            read = list(response)
            while read and read[-1] == pad:
                read.pop()
            skipped += len(read) < len(response)
            np.testing.assert_allclose(found[place], reward_of(policy, params, prompt + read), rtol=0, atol=2e-4)
    assert skipped >= 3


@pytest.mark.parametrize("name", ["t5", "llama3"])
def test_markers_stand_around_the_response(name):
    policy = POLICIES[name]
    params = parameters(policy)
    found = rewards(policy, params, RewardHead(before=11, after=12))
    for place, prompt, response in every_text(BATCH):
        text = [*prompt, 11, *response, 12]
        np.testing.assert_allclose(found[place], reward_of(policy, params, text), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_rewards_are_compared_as_of_any_bradley_terry_model():
    policy = POLICIES["llama3"]
    params = parameters(policy)
    model = PreferenceModel(policy, None, "bradley_terry", RewardHead())
    found, pair = rewards(policy, params), (*texts(BATCH)[:2], BATCH.responses[:, :2], BATCH.response_lengths[:, :2])
    np.testing.assert_allclose(model.log_odds(params, *pair), found[:, 0] - found[:, 1], rtol=0, atol=1e-5)
    hard = model.preferences(params, *pair)
    np.testing.assert_array_equal(hard, (np.sign(found[:, 0] - found[:, 1]) + 1) / 2)


def test_the_head_stays_in_float32():
    policy = make_policy(dataclasses.replace(POLICIES["t5"].config, dtype="bfloat16"))
    params = compute_params(policy, parameters(POLICIES["t5"]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["score"])} == {"float32"}
    assert params["token_embedder"]["embedding"].dtype == jnp.bfloat16


def test_a_pairwise_model_has_no_head():
    with pytest.raises(UserError, match="kind is 'pairwise': a reward head needs bradley_terry"):
        PreferenceModel(POLICIES["t5"], Markers(1, 2, 3, 4, 5), "pairwise", RewardHead())
