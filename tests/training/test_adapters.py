"""Adapters in the update step: full rank equals full fine-tuning; what changes and what does not; layouts; memory."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr
from tiny_models import EVEN_CONFIGS, MESHES, make_batch, random_params, texts

from alignment_gap import losses
from alignment_gap.data.batches.packing import Rows
from alignment_gap.models import AdapterConfig, Adapters, DecoderConfig, compute_params, make_policy, merged, score
from alignment_gap.sampling import SamplerConfig, make_generate
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh, replicated, unbox
from alignment_gap.training import (
    OptimizerConfig,
    TrainState,
    abstract_base,
    abstract_params,
    abstract_state,
    adapter_objective,
    make_optimizer,
    make_score,
    make_update_step,
    policy_objective,
    state_from_params,
)

BATCH = make_batch(8, vocabulary_size=16)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2))
DECODER = make_policy(EVEN_CONFIGS["decoder"])
ALONE = make_mesh(MeshConfig(), jax.devices()[:1])


class Trained(NamedTuple):
    """The base, the state before and after the steps, and their metrics."""

    base: Any
    before: Any
    after: TrainState
    metrics: list


def some_adapters(adapters, seed=1):
    """Adapters whose b has the size that it has after some steps."""
    shapes = jax.eval_shape(lambda: unbox(adapters.init(jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.2, leaf.shape)), shapes)


def laid_out(tree, abstract):
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def take_steps(adapters, mesh, *, start=None, optimizer=OPTIMIZER, microbatches=1, steps=2):
    """Takes steps on CPO, from the given adapters."""
    policy = adapters.policy
    abstract, frozen = abstract_state(adapters.init, optimizer, mesh), abstract_base(policy, mesh)
    objective = adapter_objective(policy_objective(policy, losses.get("cpo")), adapters, jax.random.key(3))
    step = make_update_step(objective, optimizer, mesh, abstract, microbatches=microbatches, frozen=(frozen,))
    base = laid_out(random_params(policy), frozen)
    before = some_adapters(adapters) if start is None else start
    state = state_from_params(laid_out(before, abstract.params), abstract, optimizer)
    batch = jax.device_put(jax.tree.map(np.asarray, BATCH), batch_sharding(mesh))
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch, base)
        found.append(jax.device_get(metrics))
    return Trained(base, before, state, found)


def stepping(name):
    """Adam for parameters with the name in their path; the others stay."""

    def masked(updates, _):
        return jax.tree.map_with_path(lambda path, leaf: leaf if name in keystr(path) else 0 * leaf, updates)

    return optax.chain(optax.adam(1e-2), optax.stateless(masked))


@pytest.mark.slow
def test_of_full_rank_with_a_the_identity_it_is_full_fine_tuning(even_policy):
    """If a = I stays fixed and alpha = rank, the delta is b, and its gradient x^T g is that of the kernel.

    So an optimizer takes the same steps on b as on the kernel, up to the rounding of x W + x b. If a were trained too,
    this would be another parametrisation: only the first step would agree, because b = 0 gives a no gradient.
    """
    adapters = Adapters(even_policy, AdapterConfig(16, alpha=16.0, targets=("decoder.mlp.wi_0",)))
    parts = unbox(adapters.init(jax.random.key(0)))
    layers = parts["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]["a"].shape[0]
    parts["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]["a"] = jnp.tile(jnp.eye(16), (layers, 1, 1))
    kernel = "['decoder']['layers']['mlp']['wi_0']['kernel']"
    only_b, only_kernel = stepping(f"{kernel}['b']"), stepping(kernel)
    trained = take_steps(adapters, ALONE, start=parts, optimizer=only_b, steps=3)
    ours = merged(adapters.on(trained.base, trained.after.params))["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]

    abstract = abstract_state(even_policy.init, only_kernel, ALONE)
    step = make_update_step(policy_objective(even_policy, losses.get("cpo")), only_kernel, ALONE, abstract)
    state = state_from_params(random_params(even_policy), abstract, only_kernel)
    before = random_params(even_policy)["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    for line in trained.metrics:
        state, metrics = step(state, jax.device_put(BATCH, batch_sharding(ALONE)))
        np.testing.assert_allclose(line["loss"], metrics["loss"], rtol=1e-5)
    theirs = state.params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    # Each of the three steps has size 1e-2, so a step in another direction would show.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    assert float(jnp.abs(theirs - before).max()) > 2e-2


@pytest.fixture(scope="module")
def alone():
    return take_steps(Adapters(DECODER, AdapterConfig(2, dropout=0.2)), ALONE)


@pytest.mark.slow
def test_adapters_alone_change(alone):
    jax.tree.map(np.testing.assert_array_equal, alone.base, random_params(DECODER))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(alone.after.params), alone.before)
    assert min(jax.tree.leaves(moved)) > 5e-3
    assert jax.tree.structure(alone.after.params) == jax.tree.structure(alone.before)
    sizes = {leaf.size for leaf in jax.tree.leaves(alone.after.optimizer_state)}
    assert sizes == {leaf.size for leaf in jax.tree.leaves(alone.before)} | {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_every_layout_takes_the_same_steps(name, alone):
    """Dropout does not depend on the layout. Sums are taken in another order."""
    other = take_steps(Adapters(DECODER, AdapterConfig(2, dropout=0.2)), make_mesh(MESHES[name]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), other.metrics, alone.metrics)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, jax.device_get(other.after.params), jax.device_get(alone.after.params))


@pytest.mark.slow
def test_microbatches_are_the_whole_batch():
    adapters = Adapters(DECODER, AdapterConfig(2))
    whole, parts = (take_steps(adapters, ALONE, microbatches=parts) for parts in (1, 2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), parts.metrics, whole.metrics)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, jax.device_get(parts.after.params), jax.device_get(whole.after.params))


def test_packed_rows_are_scored_as_alone():
    adapters = Adapters(DECODER, AdapterConfig(2))
    whole = adapters.on(random_params(DECODER), some_adapters(adapters))
    lengths = np.concatenate([BATCH.prompt_lengths[:, None], BATCH.response_lengths], axis=1)
    rows = Rows((12, 10), 8, 1)
    found = rows.fill(lengths)
    order = np.argsort(found, kind="stable")
    packed = rows.pack(jax.tree.map(lambda leaf: np.asarray(leaf)[order], BATCH), found[order])
    scored = jax.jit(functools.partial(score, DECODER))
    assert len(packed.prompts) < len(BATCH.prompts)
    sums = [float(scored(whole, *map(jnp.asarray, texts(each))).sum()) for each in (packed, BATCH)]
    np.testing.assert_allclose(*sums, rtol=1e-5)


def test_the_sampler_agrees_with_the_scorer():
    """The sampler adds the adapters to their kernels, the scorer applies them separately."""
    adapters, mesh = Adapters(DECODER, AdapterConfig(2)), make_mesh(MESHES["all"])
    base = laid_out(random_params(DECODER), abstract_params(DECODER.init, mesh))
    whole = adapters.on(base, laid_out(some_adapters(adapters), abstract_params(adapters.init, mesh)))
    generate = make_generate(DECODER, mesh, samples=2, max_length=5, eos_id=1, config=SamplerConfig())
    asked = jax.device_put((BATCH.prompt_ids, BATCH.prompts, BATCH.prompt_lengths), batch_sharding(mesh))
    key, step = jax.device_put((jax.random.key(7), jnp.int32(0)), replicated(mesh))
    drawn = generate(whole, key, step, *asked)
    scored = make_score(DECODER, mesh)(whole, *asked[1:], drawn.responses, drawn.lengths)
    np.testing.assert_allclose(drawn.log_probs, scored, rtol=1e-4, atol=1e-4)
    plain = make_score(DECODER, mesh)(base, *asked[1:], drawn.responses, drawn.lengths)
    assert np.abs(np.asarray(plain) - np.asarray(scored)).max() > 0.1


@pytest.mark.slow
def test_a_base_in_bfloat16_changes_no_bit_of_a_bfloat16_computation():
    """Every use casts the base anyway. So log-probs and the adapters' gradients equal those with a float32 base."""
    policy = make_policy(dataclasses.replace(EVEN_CONFIGS["decoder"], dtype="bfloat16"))
    adapters, wide = Adapters(policy, AdapterConfig(2)), random_params(policy)
    narrow = compute_params(policy, wide)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, abstract_base(policy, ALONE))
    assert jax.tree.map(lambda leaf: leaf.dtype, narrow) == dtypes
    assert {str(dtype) for dtype in jax.tree.leaves(dtypes)} == {"bfloat16", "float32"}

    def loss(params, base):
        return score(policy, adapters.on(base, params), *texts(BATCH)).sum()

    found = [jax.jit(jax.value_and_grad(loss))(some_adapters(adapters), base) for base in (wide, narrow)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert float(optax.global_norm(found[0][1])) > 1.0


def analysis(step, *arguments):
    return step.lower(*arguments).compile().memory_analysis()


@pytest.mark.slow
def test_no_gradient_no_optimizer_state_and_no_copy_of_the_base():
    """The compiler reports the memory. The base has 2.1 MB; the batch and the adapters have a few KB."""
    config = DecoderConfig(vocabulary_size=16, width=128, layers=4, heads=2, kv_heads=2, head_size=64, mlp_width=256)
    policy = make_policy(config)
    adapters, objective = Adapters(policy, AdapterConfig(1)), policy_objective(policy, losses.get("cpo"))
    batch = make_batch(2, prompt_length=3, response_length=3, vocabulary_size=16)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    base = abstract_base(policy, ALONE)
    size, small = (4 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (base, adapters_of(adapters)))
    assert size > 2e6 and small < size / 40
    full = abstract_state(policy.init, OPTIMIZER, ALONE)
    all_of_it = analysis(make_update_step(objective, OPTIMIZER, ALONE, full), full, batch)
    state = abstract_state(adapters.init, OPTIMIZER, ALONE)
    step = make_update_step(adapter_objective(objective, adapters), OPTIMIZER, ALONE, state, frozen=(base,))
    found = analysis(step, state, batch, base)
    # Parameters and two moments. The base is an argument; outputs take the place of inputs.
    assert 3 * size <= all_of_it.argument_size_in_bytes
    assert size + 3 * small <= found.argument_size_in_bytes < size + 3 * small + 4096
    assert found.alias_size_in_bytes < 3 * small + 4096
    assert found.output_size_in_bytes < 3 * small + 4096
    # The temporaries of full training contain the gradient of all parameters; those of adapter training do not.
    assert all_of_it.temp_size_in_bytes - found.temp_size_in_bytes > 0.9 * size


def adapters_of(adapters):
    return jax.eval_shape(lambda: unbox(adapters.init(jax.random.key(0))))


def test_flops_have_no_gradient_of_the_base():
    """Per parameter of a projection, a forward pass costs 2 units and its gradient 4; for a frozen parameter 2."""
    from alignment_gap.training.flops import count_flops

    objective = policy_objective(DECODER, losses.get("cpo"))
    adapters = Adapters(DECODER, AdapterConfig(1))
    base = abstract_params(DECODER.init, ALONE)

    def flops(loss, params, *rest):
        return count_flops(jax.jit(jax.grad(loss)).trace(params, *rest).jaxpr)

    forward = count_flops(jax.jit(lambda p: objective(p, BATCH, jnp.int32(0))[0].sum()).trace(base).jaxpr)
    full = flops(lambda p: objective(p, BATCH, jnp.int32(0))[0].sum(), base)
    low = flops(
        lambda p, b: adapter_objective(objective, adapters)(p, BATCH, jnp.int32(0), b)[0].sum(),
        adapters_of(adapters),
        base,
    )
    assert full == pytest.approx(3 * forward, rel=0.05)
    assert 2 * forward < low < 2.6 * forward
