"""Features of all policies: logits by hand, the dtypes of parameters, collisions, first inputs, and sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import log_softmax, logits_of
from tiny_models import CONFIGS, SETTINGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import (
    DecoderConfig,
    Output,
    Policy,
    T5Config,
    compute_params,
    make_policy,
    response_hidden,
    score_with_collisions,
)
from alignment_gap.models.packing import Packing

BATCH = make_batch(3, responses=2)


def test_logits_by_hand():
    embedding, hidden = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), jnp.array([[3.0, -1.0]])
    np.testing.assert_allclose(Output(embedding).logits(hidden), [[3.0, -2.0, 2.0]])
    np.testing.assert_allclose(Output(embedding, 0.5).logits(hidden), [[1.5, -1.0, 1.0]])
    # The cap applies to the scaled logits: 2 tanh(z / 2).
    capped = Output(embedding, 0.5, 2.0).logits(hidden)
    np.testing.assert_allclose(capped, 2 * np.tanh([[0.75, -0.5, 0.5]]), rtol=1e-6)
    # Products of bfloat16 accumulate in float32: 1 + 2^-9 is not a bfloat16.
    half = Output(jnp.array([[1.0, 2.0**-9]])).logits(jnp.ones((1, 2), jnp.bfloat16))
    assert half.dtype == jnp.float32 and float(half[0, 0]) == 1 + 2.0**-9


def test_both_architectures_are_policies_that_equal_configs_make_equal(policy):
    assert isinstance(policy, Policy)
    again = type(policy)(dataclasses.replace(policy.config))
    assert again is not policy and make_policy(again.config) is make_policy(policy.config)
    assert again == policy and hash(again) == hash(policy)
    assert make_policy(dataclasses.replace(policy.config, mlp_width=9)) != policy


@pytest.mark.parametrize("name", ["t5", "gemma3", "gpt_neox"])
def test_parameters_of_the_computation_are_cast_but_for_norms_and_position_biases(name):
    depth = {"encoder_layers": 1, "decoder_layers": 1} if name == "t5" else {"layers": 1}
    plain = make_policy(dataclasses.replace({**CONFIGS, **SETTINGS}[name], **depth))
    policy = make_policy(dataclasses.replace(plain.config, dtype="bfloat16"))
    params = random_params(plain)
    cast = compute_params(policy, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        whole = "norm" in path[-2].key or "relpos" in path[-2].key
        assert leaf.dtype == (jnp.float32 if whole else jnp.bfloat16), path
    # The results do not change, because every use casts the parameters anyway.
    hidden = jax.jit(partial(response_hidden, policy))
    arrays = BATCH.prompts, BATCH.prompt_lengths, BATCH.responses
    np.testing.assert_array_equal(hidden(cast, *arrays), hidden(params, *arrays))
    jax.tree.map(np.testing.assert_array_equal, compute_params(plain, params), params)


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_collisions_by_enumeration_of_all_tokens(name):
    """log sum_v p(v)^2 of every token, 0 at padding; Gemma 2 caps its logits."""
    policy = make_policy({**CONFIGS, **SETTINGS}[name])
    params, total = random_params(policy, 2), jax.jit(partial(score_with_collisions, policy))
    scores, collisions = total(params, *texts(BATCH))
    for b, k in np.ndindex(3, 2):
        prompt, length = BATCH.prompts[b, : int(BATCH.prompt_lengths[b])], int(BATCH.response_lengths[b, k])
        log_probs = log_softmax(logits_of(policy.config, params, prompt, BATCH.responses[b, k, :length]))
        expected = np.log((np.exp(log_probs) ** 2).sum(-1))
        np.testing.assert_allclose(collisions[b, k, :length], expected, rtol=1e-4, atol=1e-4)
        taken = np.take_along_axis(log_probs, np.asarray(BATCH.responses[b, k, :length])[:, None], -1)[:, 0]
        np.testing.assert_allclose(scores[b, k, :length], taken, rtol=1e-4, atol=1e-4)
        assert not np.asarray(collisions[b, k, length:]).any()


def test_collisions_have_no_gradient(policy, params):
    gradient = jax.jit(jax.grad(lambda p: score_with_collisions(policy, p, *texts(BATCH))[1].sum()))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@dataclasses.dataclass(frozen=True)
class Echo:
    """A policy whose hidden states are its inputs; so a test can see them."""

    config: DecoderConfig | T5Config

    def start_tokens(self, prompts, prompt_lengths):
        return make_policy(self.config).start_tokens(prompts, prompt_lengths)

    def hidden(self, params, prompts, prompt_lengths, inputs, packing=None):
        return inputs[..., None].astype(jnp.float32)


@pytest.mark.parametrize(("name", "starts"), [("t5", [0, 0, 0]), ("decoder", [7, 5, 9])])
def test_a_response_is_shifted_behind_its_first_input(unchecked, name, starts):
    """T5 begins with id 0, a decoder with the prompt's last token, even if a row holds two prompts."""
    echo = Echo(CONFIGS[name])
    prompts, lengths = jnp.array([[6, 7, 1], [5, 2, 2], [8, 8, 9]]), jnp.array([2, 1, 3])
    responses = jnp.array([[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]])
    assert echo.start_tokens(prompts, lengths).tolist() == starts
    found = response_hidden(echo, None, prompts, lengths, responses)[:, 0, :, 0]
    assert found.tolist() == [[start, *row[0][:2]] for start, row in zip(starts, responses.tolist(), strict=True)]
    # The first two prompts share a row; each has one response of two tokens.
    packed, sizes = jnp.array([[6, 7, 5, 0]]), jnp.array([[2, 1]])
    assert echo.start_tokens(packed, sizes).tolist() == [starts[:2]]
    packing = Packing.of(sizes, jnp.array([[[2], [2]]]), 4, 4)
    found = response_hidden(echo, None, packed, sizes, jnp.array([[[1, 2, 4, 5]]]), packing)[0, 0, :, 0]
    assert found.tolist() == [starts[0], 1, starts[1], 4]


NUMBERS = [
    (config, field.name, field.default is None)
    for config in (T5Config, DecoderConfig)
    for field in dataclasses.fields(config)
    if field.type in ("int", "float", "int | None", "float | None")
]


@pytest.mark.parametrize(("config", "name", "optional"), NUMBERS)
def test_every_number_of_a_config_is_positive_or_not_set(config, name, optional):
    for value in (0, -1):
        remedy = "it must be positive, or None$" if optional else "it must be positive$"
        with pytest.raises(UserError, match=rf"^{config.__name__}\.{name} is {value}: {remedy}"):
            make_policy(config(**{name: value}))


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("block", "parallel, parallel_two_norms, serial"),
        ("activation", "silu, gelu, exact_gelu"),
        ("norm", "scale, one_plus_scale, layer"),
        ("embedding_scale", "one, sqrt_width"),
        ("logits_scale", "inverse_sqrt_width, one"),
        ("rope_scaling", "none, linear, llama3"),
        ("attention", "auto, xla, cudnn, splash"),
        ("remat", "none, full, dots"),
        ("dtype", "float32, bfloat16"),
    ],
)
def test_every_choice_of_a_decoder_is_named(name, choices):
    with pytest.raises(UserError, match=rf"^DecoderConfig\.{name} is 'other': choose one of {choices}$"):
        make_policy(DecoderConfig(**{name: "other"}))
