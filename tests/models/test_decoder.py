"""Decoder settings that no family combines equal the numpy model; and the parameters that settings add."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import score_rows
from tiny_models import CONFIGS, make_batch, random_params, texts

from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, make_policy, score

BATCH = make_batch(3)
PALM = dataclasses.replace(CONFIGS["decoder"], layers=2)
# Settings that no family combines, such as those of serial blocks in parallel ones.
MIXED = {
    "parallel, windows and both norms": {
        "post_norms": True,
        "query_key_norm": True,
        "window": 2,
        "full_attention_every": 2,
        "rope_local_base": 10.0,
        "activation": "gelu",
        "norm": "one_plus_scale",
    },
    "parallel, biases and caps": {
        "query_key_value_bias": True,
        "attention_soft_cap": 0.5,
        "logits_soft_cap": 1.5,
        "tied_embeddings": False,
        "embedding_scale": "sqrt_width",
        "norm_epsilon": 0.1,
        "rope_scaling": "llama3",
        "rope_scaling_factor": 4.0,
        "rope_original_length": 16,
    },
    "serial, one key head and an odd scale": {
        "block": "serial",
        "kv_heads": 1,
        "query_key_value_bias": True,
        "query_key_norm": True,
        "query_pre_attention_scalar": 2.5,
        "window": 3,
        # Every layer has a window.
        "full_attention_every": 3,
        "logits_scale": "one",
    },
    "two norms of the input, layer norms everywhere and a gated MLP with biases": {
        "block": "parallel_two_norms",
        "norm": "layer",
        "post_norms": True,
        "query_key_norm": True,
        "out_and_mlp_bias": True,
        "rotary_size": 2,
        "rope_scaling": "linear",
        "rope_scaling_factor": 3.0,
    },
    "serial, no gate and no bias": {
        "block": "serial",
        "gated_mlp": False,
        "activation": "exact_gelu",
        "rotary_size": 4,
        "window": 2,
        "full_attention_every": 2,
        "rope_local_base": 10.0,
    },
}


@pytest.mark.parametrize("name", MIXED)
def test_settings_that_no_family_combines_equal_the_numpy_model(name):
    policy = make_policy(dataclasses.replace(PALM, **MIXED[name]))
    params = random_params(policy, 3)
    expected = score_rows(policy.config, params, *map(np.asarray, texts(BATCH)))
    np.testing.assert_allclose(jax.jit(partial(score, policy))(params, *texts(BATCH)), expected, rtol=1e-4, atol=1e-4)


LAYER = "decoder.layers"
# The parameters that a setting adds to PALM's decoder, by hand: 2 layers, 4 heads of size 6, 2 key heads, width 12.
ADDED = {
    "post_norms": {f"{LAYER}.post_{name}_layer_norm.scale": (2, 12) for name in ("attention", "mlp")},
    "query_key_norm": {f"{LAYER}.{name}_norm.scale": (2, 6) for name in ("query", "key")},
    "out_and_mlp_bias": {f"{LAYER}.{name}.bias": (2, 12) for name in ("out", "mlp.wo")}
    | {f"{LAYER}.mlp.{name}.bias": (2, 7) for name in ("wi_0", "wi_1")},
    "query_key_value_bias": {f"{LAYER}.query.bias": (2, 4, 6)}
    | {f"{LAYER}.{name}.bias": (2, 2, 6) for name in ("key", "value")},
}


@pytest.mark.parametrize("setting", ADDED)
def test_parameters_that_a_setting_adds(setting):
    plain = model_shapes(PALM)
    assert model_shapes(dataclasses.replace(PALM, **{setting: True})) == plain | ADDED[setting]


def test_parameters_of_serial_blocks_and_untied_embeddings():
    plain = model_shapes(PALM)
    serial = model_shapes(dataclasses.replace(PALM, block="serial", tied_embeddings=False))
    norms = {f"{LAYER}.pre_attention_layer_norm.scale": (2, 12), f"{LAYER}.pre_mlp_layer_norm.scale": (2, 12)}
    del plain[f"{LAYER}.pre_layer_norm.scale"]
    assert serial == plain | norms | {"output_embedder.embedding": (13, 12)}


def test_parameters_of_layer_norms_and_an_mlp_without_a_gate():
    plain = model_shapes(PALM)
    found = model_shapes(dataclasses.replace(PALM, norm="layer", gated_mlp=False))
    biases = {f"{LAYER}.pre_layer_norm.bias": (2, 12), "decoder.decoder_norm.bias": (12,)}
    del plain[f"{LAYER}.mlp.wi_0.kernel"], plain[f"{LAYER}.mlp.wi_1.kernel"]
    assert found == plain | biases | {f"{LAYER}.mlp.wi.kernel": (2, 12, 7)}


@pytest.mark.parametrize("size", [3, 8])
def test_a_part_that_no_head_turns_is_refused(size):
    message = f"DecoderConfig.rotary_size is {size}: it must be even, and at most head_size=6"
    with pytest.raises(UserError, match=message):
        make_policy(dataclasses.replace(PALM, rotary_size=size))


def test_settings_without_parameters_leave_them_as_they_are():
    settings = {"window": 3, "full_attention_every": 2, "attention_soft_cap": 2.0, "logits_soft_cap": 2.0}
    settings |= {"activation": "gelu", "norm": "one_plus_scale", "embedding_scale": "sqrt_width", "logits_scale": "one"}
    settings |= {"query_pre_attention_scalar": 3.0, "rope_base": 7.0, "rope_local_base": 5.0}
    settings |= {"rotary_size": 4}
    assert model_shapes(dataclasses.replace(PALM, **settings)) == model_shapes(PALM)


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({}, None),
        ({"window": 4, "full_attention_every": 2}, [False, True, False, True, False]),
        ({"window": 4, "full_attention_every": 5}, [False, False, False, False, True]),
        ({"window": 4, "full_attention_every": 6}, [False] * 5),
    ],
)
def test_which_layers_have_no_window(settings, full):
    found = make_policy(DecoderConfig(layers=5, **settings))._full_layers()
    assert found is None if full is None else found.tolist() == full


def test_the_input_embedding_is_scaled_in_the_dtype_of_the_computation():
    """Like Gemma's code, this rounds the square root of the width: sqrt(12) is 3.469 in bfloat16, not 3.464."""
    config = dataclasses.replace(PALM, embedding_scale="sqrt_width", dtype="bfloat16")
    policy = make_policy(config)
    params = random_params(policy)
    found = policy._embed(params, jnp.arange(13)[None])
    table = params["token_embedder"]["embedding"].astype(jnp.bfloat16)
    assert float(jnp.bfloat16(12**0.5)) == 3.46875
    np.testing.assert_array_equal(found[0], table * jnp.bfloat16(3.46875))


def test_a_windowed_layer_sees_so_many_tokens_and_no_more():
    """One layer has a window of 3. At the response's third token it still sees the last token of the prompt."""
    config = dataclasses.replace(PALM, layers=1, window=3, full_attention_every=2)
    policy = make_policy(config)
    params, length = random_params(policy), jnp.full((1, 1), 4)
    prompt, response = jnp.arange(6)[None], jnp.array([[[1, 2, 3, 4]]])
    scores = jax.jit(partial(score, policy))
    base = scores(params, prompt, jnp.array([6]), response, length)[0, 0]
    seen = np.zeros((6, 4), bool)
    for place in range(6):
        other = scores(params, prompt.at[0, place].add(7), jnp.array([6]), response, length)[0, 0]
        seen[place] = np.abs(other - base) > 1e-6
    # Position 5 + t predicts the response's token t; it sees itself and two before. The prompt's last token is at 5.
    expected = [[5 + t - 2 <= place <= 5 + t for t in range(4)] for place in range(6)]
    np.testing.assert_array_equal(seen, expected)
