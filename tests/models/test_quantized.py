"""Kernels in int8: their values, the product with one, and a policy on such a base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import AdapterConfig, Adapters, make_policy, score
from alignment_gap.models.adapters import abstract_base, in_int8, input_axes, projections
from alignment_gap.models.quantized import INT8, quantize, quantized_product, rounded
from alignment_gap.sampling import SamplerConfig, sample
from alignment_gap.sampling.sampler import sample_keys
from alignment_gap.sharding import unbox

BATCH = make_batch(3)
POLICIES = [make_policy(CONFIGS[name]) for name in ("t5", "decoder")]


@pytest.mark.parametrize(("shape", "inputs"), [((2, 5, 3, 4), 1), ((2, 3, 4, 5), 2), ((1, 6, 7), 1)])
def test_each_value_is_within_half_a_step_of_its_output(shape, inputs):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[:, ..., 0] = 0.0  # One output has only zeros.
    held = quantize(jnp.asarray(kernel), inputs)
    assert held.values.dtype == jnp.int8 and held.scale.shape == (shape[0], *shape[1 + inputs :])
    largest = np.abs(kernel).max(axis=tuple(range(1, 1 + inputs)), keepdims=True)
    found = np.asarray(held.dequantized())
    assert (np.abs(found - kernel) <= largest / 254 + 1e-7).all()
    assert int(jnp.abs(held.values).max()) == 127
    np.testing.assert_array_equal(found[..., 0], 0.0)
    # Rounding what is already rounded changes nothing.
    np.testing.assert_allclose(rounded(found, inputs), found, rtol=1e-6)


@pytest.mark.parametrize("inputs", [1, 2])
def test_the_product_and_its_gradient_are_those_of_the_dequantized_kernel(inputs):
    rng = np.random.default_rng(1)
    shape = (3, 4, 5) if inputs == 2 else (4, 5, 3)
    kernel, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, (2, 6, *shape[:inputs])))
    held = quantize(kernel[None], inputs)
    plain, (values, scale) = held.dequantized()[0], (held.values[0], held.scale[0])
    dimensions = ((tuple(range(2, 2 + inputs)), tuple(range(inputs))), ((), ()))

    def ours(x):
        return quantized_product(x, values, scale, dimensions)

    def expected(x):
        return jax.lax.dot_general(x, plain, dimensions)

    np.testing.assert_allclose(ours(x), expected(x), rtol=1e-5, atol=1e-5)
    gradient = jnp.asarray(rng.normal(size=ours(x).shape), jnp.float32)
    (found,), (wanted,) = (jax.vjp(function, x)[1](gradient) for function in (ours, expected))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert quantized_product(x.astype(jnp.bfloat16), values, scale, dimensions).dtype == jnp.bfloat16


def held_in_int8(policy, base):
    """The base with every projection in int8."""
    adapters = Adapters(policy, AdapterConfig(2, base_dtype=INT8))
    whole = jax.tree.map(lambda leaf: leaf, base)
    for name, inputs in input_axes(policy).items():
        *path, last = name.split(".")
        node = functools.reduce(lambda node, part: node[part], path, whole)
        node[last] = quantize(node[last], inputs)
    return adapters, whole


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_on_such_a_base_is_the_policy_with_rounded_kernels(policy):
    base = random_params(policy)
    adapters, held = held_in_int8(policy, base)
    abstract = unbox(abstract_base(policy, INT8))
    assert jax.tree.structure(abstract) == jax.tree.structure(held)
    like, there = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (abstract, held))
    assert like == there
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: unbox(adapters.init(jax.random.key(0))))
    parts = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    plain = adapters.rounded(base)

    def total(parts, base):
        return score(policy, adapters.on(base, parts), *texts(BATCH)).sum()

    compiled = jax.jit(jax.value_and_grad(total))
    (ours, our_gradient), (theirs, their_gradient) = compiled(parts, held), compiled(parts, plain)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), our_gradient, their_gradient)
    # The result differs from that of the original kernels.
    assert abs(float(ours - compiled(parts, base)[0])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_samples_come_from_the_scored_policy(policy):
    """The sampler keeps adapters and int8 kernels apart. So there is no float copy of the base."""
    adapters, held = held_in_int8(policy, random_params(policy))
    params = adapters.on(held, unbox(adapters.init(jax.random.key(0))))
    keys = sample_keys(jax.random.key(3), jnp.int32(0), BATCH.prompt_ids, 2)
    draw = functools.partial(sample, policy, max_length=5, eos_id=1, config=SamplerConfig())
    drawn = jax.jit(draw)(params, BATCH.prompts, BATCH.prompt_lengths, keys)
    scored = score(policy, params, BATCH.prompts, BATCH.prompt_lengths, drawn.responses, drawn.lengths)
    np.testing.assert_allclose(drawn.log_probs, scored, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_sampler_with_weights_in_int8_steps_with_rounded_kernels_from_the_caches_of_the_whole_ones(policy):
    """The log-probs of the samples are those of such steps, made one after another."""
    params = random_params(policy)
    rounded = Adapters(policy, AdapterConfig(2)).rounded(params)
    keys = sample_keys(jax.random.key(3), jnp.int32(0), BATCH.prompt_ids, 2)
    config = SamplerConfig(weights_dtype="int8")
    draw = jax.jit(functools.partial(sample, policy, max_length=5, eos_id=1, config=config))
    drawn = draw(params, BATCH.prompts, BATCH.prompt_lengths, keys)

    cache = policy.prefill(params, BATCH.prompts, BATCH.prompt_lengths, 2, 5)
    start = policy.start_tokens(BATCH.prompts, BATCH.prompt_lengths)[:, None]
    inputs = jnp.concatenate([jnp.broadcast_to(start, (len(start), 2))[..., None], drawn.responses[..., :-1]], axis=-1)
    step = jax.jit(functools.partial(policy.decode_step, places=5))
    for position in range(5):
        hidden, cache = step(rounded, cache, jnp.int32(position), inputs[..., position])
        logits = jax.nn.log_softmax(policy.output(rounded).logits(hidden))
        expected = jnp.take_along_axis(logits, drawn.responses[..., position, None], axis=-1)[..., 0]
        there = np.asarray(position < drawn.lengths)
        for found in (drawn.log_probs, drawn.sampler_log_probs):
            np.testing.assert_allclose(found[..., position][there], expected[there], atol=1e-4)
    assert there.any()
    whole = score(policy, params, BATCH.prompts, BATCH.prompt_lengths, drawn.responses, drawn.lengths)
    assert float(jnp.abs(drawn.log_probs - whole).max()) > 1e-3


def test_a_sampler_on_a_base_in_int8_has_nothing_left_to_round():
    policy = POLICIES[0]
    adapters, held = held_in_int8(policy, random_params(policy))
    params = adapters.on(held, unbox(adapters.init(jax.random.key(0))))
    assert in_int8(policy, params) is params


def test_every_projection_is_in_int8_and_nothing_else():
    for policy in POLICIES:
        leaves = jax.tree_util.tree_leaves_with_path(unbox(abstract_base(policy, INT8)))
        names = {
            jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in leaves if leaf.dtype == "int8"
        }
        assert names == {f"{name}.values" for name in input_axes(policy)} and len(names) == len(projections(policy))


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match=r"base_dtype is 'int4': choose int8, or None for that of the computation"):
        AdapterConfig(2, base_dtype="int4")


def test_a_base_without_adapters_is_refused():
    with pytest.raises(UserError, match=r"base_dtype is 'int8', but there are no adapters: set rank, or leave it out"):
        AdapterConfig(base_dtype="int8")
