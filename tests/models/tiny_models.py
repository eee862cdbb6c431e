"""Policies and batches that are as small as possible, for tests of models, sampling, sharding and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.models.policy import Output
from alignment_gap.sharding import MeshConfig, unbox

# Sizes differ from each other where possible, so that swapped axes show.
CONFIGS = {
    "t5": T5Config(
        vocabulary_size=13,
        width=12,
        encoder_layers=2,
        decoder_layers=3,
        heads=2,
        head_size=5,
        mlp_width=7,
        relative_position_buckets=8,
        relative_position_max_distance=12,
    ),
    "decoder": DecoderConfig(vocabulary_size=13, width=12, layers=3, heads=4, kv_heads=2, head_size=6, mlp_width=7),
}
# The decoder with the settings of each family of checkpoints. Windows are shorter than a prompt with its response.
_SERIAL = dataclasses.replace(CONFIGS["decoder"], block="serial", logits_scale="one", rope_base=100.0)
_GEMMA = dataclasses.replace(_SERIAL, activation="gelu", norm="one_plus_scale", embedding_scale="sqrt_width")
SETTINGS = {
    "gemma": dataclasses.replace(_GEMMA, kv_heads=1, norm_epsilon=1e-3),
    "gemma2": dataclasses.replace(
        _GEMMA,
        post_norms=True,
        attention_soft_cap=0.5,
        logits_soft_cap=1.5,
        query_pre_attention_scalar=3.0,
        window=3,
        full_attention_every=2,
    ),
    "gemma3": dataclasses.replace(
        _GEMMA,
        post_norms=True,
        query_key_norm=True,
        window=2,
        full_attention_every=3,
        rope_scaling="linear",
        rope_scaling_factor=8.0,
        rope_local_base=10.0,
    ),
    "llama3": dataclasses.replace(
        _SERIAL,
        tied_embeddings=False,
        rope_scaling="llama3",
        rope_scaling_factor=8.0,
        rope_original_length=64,
    ),
    "qwen2": dataclasses.replace(_SERIAL, query_key_value_bias=True),
    "qwen3": dataclasses.replace(_SERIAL, query_key_norm=True, kv_heads=4),
    "gpt_neox": dataclasses.replace(
        _SERIAL,
        block="parallel_two_norms",
        kv_heads=4,
        head_size=8,
        gated_mlp=False,
        activation="exact_gelu",
        norm="layer",
        norm_epsilon=1e-2,
        query_key_value_bias=True,
        out_and_mlp_bias=True,
        tied_embeddings=False,
        rotary_size=4,
    ),
}
# Two and eight devices divide these sizes.
EVEN_CONFIGS = {
    "t5": T5Config(
        vocabulary_size=16, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=4, mlp_width=24
    ),
    "decoder": DecoderConfig(vocabulary_size=16, width=16, layers=2, heads=2, kv_heads=1, head_size=4, mlp_width=24),
}
MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "model": MeshConfig(1, 1, 8),
    "two_by_four": MeshConfig(2, 1, 4),
    "all": MeshConfig(2, 2, 2),
    # Splits prompts of six tokens in two.
    "sequence": MeshConfig(2, 2, 2, layout="sequence"),
}


@functools.cache
def initial_params(policy):
    """A jitted `key -> params`, compiled once for all seeds."""
    return jax.jit(lambda key: unbox(policy.init(key)))


@functools.cache
def random_params(policy, seed=0):
    """Random parameters. No parameter has an initial value that hides it, such as a norm's scale of one."""
    params = initial_params(policy)(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(leaf):
        # numpy does not compile anything for a new shape.
        return jnp.asarray(np.asarray(leaf) + (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(moved, params)


def make_batch(prompts, *, responses=2, prompt_length=6, response_length=5, vocabulary_size=13, seed=0):
    """Random prompts, responses and lengths, including the shortest and the longest. Padding holds garbage."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, prompt_length + 1, prompts)
    response_lengths = rng.integers(1, response_length + 1, (prompts, responses))
    prompt_lengths[:2] = 1, prompt_length
    response_lengths[:2, 0] = response_length, 1
    scores = rng.permuted(np.tile(np.linspace(0, 1, responses), (prompts, 1)), axis=1)
    return PreferenceBatch(
        jnp.asarray(100 + rng.permutation(prompts), jnp.int32),
        jnp.asarray(rng.integers(0, vocabulary_size, (prompts, prompt_length)), jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        jnp.asarray(rng.integers(0, vocabulary_size, (prompts, responses, response_length)), jnp.int32),
        jnp.asarray(response_lengths, jnp.int32),
        jnp.asarray(scores, jnp.float32),
    )


def texts(batch):
    """The arrays of a batch that models read."""
    return batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths


@dataclasses.dataclass(frozen=True)
class Unigram:
    """A minimal policy: one distribution over tokens, which ignores the context. It can only score."""

    config: None = None

    def init(self, key):
        return {"logits": jnp.linspace(-1.0, 1.0, 16)}

    def output(self, params):
        return Output(params["logits"][:, None], 1.0)

    def start_tokens(self, prompts, prompt_lengths):
        return jnp.zeros_like(prompt_lengths)

    def hidden(self, params, prompts, prompt_lengths, inputs, packing=None):
        return jnp.ones((*inputs.shape, 1))

    def prefill(self, params, prompts, prompt_lengths, samples, max_length, cache_dtype=None):
        raise NotImplementedError

    def decode_step(self, params, cache, step, tokens, places):
        raise NotImplementedError
