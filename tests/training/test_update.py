"""The update step: equal on every mesh; losses get arrays by their names; and exact values at the reference."""

import dataclasses
import functools
import inspect
import math
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import MESHES, Unigram, make_batch, random_params, texts

from alignment_gap import losses
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.packing import Rows
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, make_policy, score
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh
from alignment_gap.training import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    create_state,
    loss_inputs,
    make_optimizer,
    make_update_step,
    policy_objective,
    preference_objective,
    state_from_params,
)
from alignment_gap.training.update import INPUTS, _mean, _weights

BATCH = make_batch(8, vocabulary_size=16)
# Enough for four microbatches on eight devices.
LARGE_BATCH = make_batch(32, vocabulary_size=16)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3))


def single_device_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def fresh_state(policy, mesh, seed=0, copies=()):
    abstract = abstract_state(policy.init, OPTIMIZER, mesh, copies)
    return create_state(policy.init, abstract, OPTIMIZER, jax.random.key(seed))


class Steps(NamedTuple):
    """The layout of a state, the state before and after two steps, and the metrics of both steps."""

    abstract: TrainState
    before: TrainState
    after: TrainState
    metrics: list

    @property
    def params(self):
        return jax.device_get(self.after.params)


def two_steps(policy, mesh, microbatches, batch=LARGE_BATCH):
    """Takes two steps on the mesh, from random parameters."""
    abstract = abstract_state(policy.init, OPTIMIZER, mesh)
    before = state = state_from_params(random_params(policy), abstract, OPTIMIZER)
    objective = policy_objective(policy, losses.get("cpo"))
    step = make_update_step(objective, OPTIMIZER, mesh, abstract, microbatches=microbatches)
    # numpy arrays are split on the host, without compiling a program for each.
    batch = jax.device_put(jax.tree.map(np.asarray, batch), batch_sharding(mesh))
    values = []
    for _ in range(2):
        state, metrics = step(state, batch)
        values.append(jax.device_get(metrics))
    return Steps(abstract, before, state, values)


@functools.cache
def steps_on(policy, name, microbatches):
    """Two steps on one of `MESHES`; several tests share them."""
    return two_steps(policy, make_mesh(MESHES[name]), microbatches)


@pytest.fixture(scope="module")
def alone(even_policy):
    return two_steps(even_policy, single_device_mesh(), 1)


# Each axis of the mesh alone, and all together; with microbatches and without. "two_by_four" is left out: "all" splits
# more, and the sampler's tests have both.
@pytest.mark.parametrize(
    ("name", "microbatches"), [("fsdp", 1), ("model", 1), ("sequence", 1), ("data", 4), ("all", 4)]
)
def test_every_mesh_takes_the_same_steps(name, microbatches, even_policy, alone):
    """Sums have another order, so the last bits of float32 differ; Adam's division can enlarge the difference."""
    other = steps_on(even_policy, name, microbatches)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), other.metrics, alone.metrics)
    # The learning rate is 1e-3, so a step in another direction would show as a difference of 1e-3.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), other.params, alone.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), random_params(even_policy), alone.params)
    assert min(jax.tree.leaves(moved)) > 5e-4


def packed(batch, multiple):
    """The batch packed into `multiple` rows, or a few more; rows have several prompts."""
    lengths = np.concatenate([batch.prompt_lengths[:, None], batch.response_lengths], axis=1)
    rows = Rows((9, 8), 8, multiple)
    found = rows.fill(lengths)
    order = np.argsort(found, kind="stable")
    return jax.tree.map(jnp.asarray, rows.pack(jax.tree.map(lambda leaf: leaf[order], batch), found[order]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "microbatches"), [("all", 4), ("sequence", 1)])
def test_packed_rows_take_the_same_steps(name, microbatches, even_policy, alone):
    """For any empty slots, and any number of prompts on a device or in a microbatch."""
    mesh = make_mesh(MESHES[name])
    batch = packed(LARGE_BATCH, mesh.batch_parts * microbatches)
    assert len(batch.prompts) < 32
    assert (batch.prompt_lengths == 0).any() and len(set(np.sum(batch.prompt_lengths > 0, axis=1).tolist())) > 1
    other = two_steps(even_policy, mesh, microbatches, batch)
    first, expected = other.metrics[0], alone.metrics[0]
    assert first.pop("padding") < expected["padding"]
    for name, value in first.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), other.params, alone.params)


def test_padding_and_prompts_are_counted(alone):
    metrics = alone.metrics[0]
    tokens = int(LARGE_BATCH.prompt_lengths.sum() + LARGE_BATCH.response_lengths.sum())
    np.testing.assert_allclose(metrics["padding"], 1 - tokens / (32 * (6 + 2 * 5)), rtol=1e-6)
    assert metrics["prompts"] == 32


def collectives(program, kind):
    """Types and shapes of the results of all collectives of a kind, such as ("f32", (4, 16))."""
    lines = re.findall(rf"= (\S+|\(.*?\)) {kind}(?:-start)?\(", program)
    results = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(lines))
    return {(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in results}


def test_fsdp_splits_the_batch_and_gathers_parameters(even_policy):
    """It communicates a layer's parameters and their gradients, scalars, and rows of the embedding.

    CPUs have no reduce-scatter. So an all-reduce sums the gradients, and each device keeps its part.
    """
    mesh = make_mesh(MESHES["fsdp"])
    abstract = abstract_state(even_policy.init, OPTIMIZER, mesh)
    step = make_update_step(policy_objective(even_policy, losses.get("cpo")), OPTIMIZER, mesh, abstract)
    # No size of the models is 40. Each of 8 devices has 5 prompts.
    batch = make_batch(40, vocabulary_size=16, prompt_length=6, response_length=7)
    program = step.lower(abstract, batch).compile().as_text()
    # No device holds an activation of the whole batch (40), also not flattened: 40 x 6 prompt tokens, 40 x 2 x 7
    # response tokens.
    assert not re.findall(r"f32\[(?:\d+,)*(?:40|240|560)(?:,\d+)*\]", program)
    stacked = {leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract.params) if "layers" in str(path)}
    of_a_layer = {tuple(size for size in shape[1:] if size > 1) for shape in stacked}
    others = {leaf.shape for leaf in jax.tree.leaves(abstract.params)} - stacked
    parameters = {tuple(sorted(shape)) for shape in of_a_layer | others}
    gathered = {
        tuple(sorted(s for s in shape if s > 1)) for t, shape in collectives(program, "all-gather") if t == "f32"
    }
    assert gathered and gathered <= parameters
    matrices = {shape for shape in parameters if len(shape) > 1 and 16 in shape}
    assert matrices <= gathered
    reduced = {tuple(sorted(s for s in shape if s > 1)) for t, shape in collectives(program, "all-reduce")}
    assert matrices <= reduced


def test_adafactors_moments_are_small_where_they_are_whole():
    """Factored moments lack an axis, and every device holds them whole.

    Other moments are split like their parameter.
    """
    config = DecoderConfig(vocabulary_size=1024, width=256, layers=2, heads=4, head_size=64, mlp_width=512)
    mesh = make_mesh(MESHES["all"])
    abstract = abstract_state(make_policy(config).init, make_optimizer(OptimizerConfig("adafactor")), mesh)
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    split, whole = 0, 0
    for leaf in jax.tree.leaves(abstract.optimizer_state):
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        split, whole = (split, whole + held) if held == leaf.size else (split + held, whole)
    assert 0 < whole < size / 50


def test_no_device_makes_more_than_its_part(even_policy):
    """Each of eight devices holds and makes an eighth of a new state; leaves without the width are whole."""
    mesh = make_mesh(MESHES["fsdp"])
    abstract = abstract_state(even_policy.init, OPTIMIZER, mesh)
    state = fresh_state(even_policy, mesh)
    device = jax.devices()[3]
    held = [s.data.size for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device]
    wide = sum(leaf.size for leaf in jax.tree.leaves(abstract) if 16 in leaf.shape)
    rest = sum(leaf.size for leaf in jax.tree.leaves(abstract)) - wide
    assert sum(held) <= wide / 8 + rest


def test_the_order_of_a_judges_pair_follows_from_its_prompt(unchecked):
    class FirstTokens:
        """Log-odds that show which response came first."""

        def log_odds(self, params, prompts, prompt_lengths, responses, response_lengths):
            return responses[:, 0, 0].astype(jnp.float32)

    batch = dataclasses.replace(LARGE_BATCH, responses=LARGE_BATCH.responses.at[:, :, 0].set(jnp.array([1, 2])))
    objective = preference_objective(FirstTokens(), jax.random.key(0))
    losses_of_all, _ = objective({}, batch, jnp.int32(3))
    some = jnp.array([5, 30, 2])
    losses_of_some, _ = objective({}, jax.tree.map(lambda array: array[some], batch), jnp.int32(3))
    np.testing.assert_array_equal(losses_of_some, losses_of_all[some])
    other_step, _ = objective({}, batch, jnp.int32(4))
    assert (np.asarray(other_step) != np.asarray(losses_of_all)).any()


def test_parameters_and_moments_are_created_sharded(even_policy):
    mesh = make_mesh(MESHES["all"])
    state = fresh_state(even_policy, mesh)
    moments = next(part for part in jax.tree.leaves(state.optimizer_state, is_leaf=is_adam) if is_adam(part))
    for tree in (state.params, moments.mu, moments.nu):
        table = tree["token_embedder"]["embedding"]
        assert table.sharding.spec == P("model", "fsdp")
        assert table.addressable_shards[0].data.shape == (8, 8)
        kernel = tree["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        assert kernel.sharding.spec == P(None, "fsdp", "model")
        assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], 8, 12)
    assert state.step.sharding.is_fully_replicated


def is_adam(part):
    return hasattr(part, "mu")


def test_shardings_outlive_a_step_and_the_old_state_is_reused(even_policy):
    steps = steps_on(even_policy, "all", 4)
    kept = jax.tree.map(
        lambda leaf, target: leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim), steps.after, steps.abstract
    )
    assert all(jax.tree.leaves(kept))
    assert int(steps.after.step) == 2
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(steps.before.params))
    # The state copied the parameters.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(random_params(even_policy)))


def test_a_fresh_state_is_the_policys_own(even_policy):
    """The numbers do not depend on whether it is created on one device or on several."""
    sharded = fresh_state(even_policy, make_mesh(MESHES["all"]), seed=3)
    single = fresh_state(even_policy, single_device_mesh(), seed=3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded.params), jax.device_get(single.params))


UNIGRAM = Unigram()
PARAMS = UNIGRAM.init(None)


def with_reference(policy, params, batch):
    return dataclasses.replace(batch, reference_log_probs=jax.jit(partial(score, policy))(params, *texts(batch)))


@pytest.fixture(scope="module")
def unigram_batch():
    return with_reference(UNIGRAM, {"logits": jnp.zeros(16)}, BATCH)


def test_every_registered_loss_trains_a_policy(unigram_batch):
    batch = dataclasses.replace(unigram_batch, fresh=unigram_batch)

    @jax.jit
    def all_losses(params):
        objectives = {name: policy_objective(UNIGRAM, losses.get(name)) for name in losses.names()}
        return {
            name: jax.value_and_grad(lambda p, o=objective: o(p, batch, jnp.int32(0))[0].mean())(params)
            for name, objective in objectives.items()
        }

    for name, (value, gradient) in all_losses(PARAMS).items():
        assert np.isfinite(value), name
        assert np.isfinite(gradient["logits"]).all() and np.abs(gradient["logits"]).max() > 0, name


@pytest.mark.slow
def test_every_loss_of_packed_rows_is_that_of_their_prompts_or_refused(unigram_batch):
    """In value and gradient. A loss that reads other prompts gives another value for half of the batch."""
    # The reference is much less likely, because KTO clips the mean at 0.
    batch = dataclasses.replace(unigram_batch, reference_log_probs=unigram_batch.reference_log_probs - 1.0)
    rows, half = packed(batch, 2), jax.tree.map(lambda leaf: leaf[:4], batch)
    settings = {"dr_grpo": {"max_length": 7}, "wpo": {"alignment": "sampled"}}
    # A batch with fresh samples beside it is never packed.
    names = [name for name in losses.names() if "fresh_logps" not in inspect.signature(losses.get(name)).parameters]
    configured = {name: losses.get(name, **settings.get(name, {})) for name in names}
    by_prompts = {False: [], True: []}
    for name, loss in configured.items():
        by_prompts[losses.OTHER_PROMPTS in losses.reads(loss)].append(name)
    with pytest.raises(UserError, match="depends on the batch's other prompts"):
        policy_objective(UNIGRAM, losses.get("bco"))(PARAMS, rows, jnp.int32(0))

    @jax.jit
    def all_losses(params):
        def mean(objective, batch):
            def loss(params):
                values, diagnostics = objective(params, batch, jnp.int32(0))
                means = {name: _mean(value, _weights(batch)) for name, value in diagnostics.items()}
                return _mean(values, _weights(batch)), means

            return jax.value_and_grad(loss, has_aux=True)(params)

        objectives = {name: policy_objective(UNIGRAM, loss) for name, loss in configured.items()}
        return (
            {name: (mean(objectives[name], rows), mean(objectives[name], batch)) for name in by_prompts[False]},
            {
                name: (objective(params, half, jnp.int32(0))[0], objective(params, batch, jnp.int32(0))[0][:4])
                for name, objective in objectives.items()
            },
        )

    compared, of_half = all_losses(PARAMS)
    for name, (ours, expected) in compared.items():
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6, err_msg=name), ours, expected)
    for name, (alone, among_others) in of_half.items():
        assert np.allclose(alone, among_others, rtol=1e-5) != (name in by_prompts[True]), name
    assert len(by_prompts[True]) >= 4


def test_a_loss_of_ones_own_is_given_what_it_names(unigram_batch):
    """Settings keep their defaults. Optional arrays are passed if they exist."""
    seen = {}

    def mine(chosen_logps, mask, ref_logps=None, old_logps=None, *, strength=2.0):
        seen.update(mask=mask, ref_logps=ref_logps)
        assert old_logps is None
        return -strength * chosen_logps

    @jax.jit
    def evaluate(params):
        value, diagnostics = policy_objective(UNIGRAM, mine)(params, unigram_batch, jnp.int32(0))
        return value, diagnostics, dict(seen), loss_inputs(unigram_batch, score(UNIGRAM, params, *texts(BATCH)))

    value, diagnostics, given, inputs = evaluate(PARAMS)
    np.testing.assert_allclose(value, -2 * inputs["chosen_logps"], rtol=1e-6)
    np.testing.assert_array_equal(given["mask"], np.arange(5) < np.asarray(BATCH.response_lengths)[..., None])
    np.testing.assert_allclose(given["ref_logps"], -math.log(16) * np.asarray(BATCH.response_lengths), rtol=1e-5)
    assert value.shape == (8,) and all(part.shape == (8,) for part in diagnostics.values())


def test_log_collisions_are_offered_where_a_loss_reads_them(unigram_batch):
    """A unigram has one log sum_v p(v)^2 for every token; padding has 0."""
    calls = []

    class Counted(Unigram):
        def hidden(self, *arguments):
            calls.append(1)
            return super().hidden(*arguments)

    def mine(chosen_log_collisions, rejected_log_collisions, chosen_mask, log_collisions):
        assert log_collisions.shape == (8, 2, 5)
        return jnp.sum(chosen_log_collisions - 0.0 * rejected_log_collisions, axis=-1)

    with pytest.raises(UserError, match="needs chosen_log_collisions, log_collisions, rejected_log_collisions"):
        policy_objective(UNIGRAM, mine)(PARAMS, unigram_batch, jnp.int32(0))
    mine.reads = {losses.LOG_COLLISIONS}
    objective = policy_objective(Counted(), mine)

    def total(params):
        value, _ = objective(params, unigram_batch, jnp.int32(0))
        return value.sum(), value

    gradient, value = jax.grad(total, has_aux=True)(PARAMS)
    p = np.asarray(jax.nn.softmax(PARAMS["logits"]), np.float64)
    best = np.argmax(BATCH.scores, axis=-1)
    lengths = np.take_along_axis(np.asarray(BATCH.response_lengths), best[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(value, lengths * np.log(np.sum(p**2)), rtol=1e-5)
    np.testing.assert_array_equal(gradient["logits"], 0.0)
    assert len(calls) == 1


def test_sampled_alignment_of_wpo_trains_as_its_weights_say(unigram_batch):
    """Each token's log-prob is reduced by log sum_v p(v)^2. For a unigram this is the same number for every token."""
    collision = np.log(np.sum(np.asarray(jax.nn.softmax(PARAMS["logits"]), np.float64) ** 2))
    objectives = [policy_objective(UNIGRAM, losses.get("wpo", alignment=each)) for each in ("plain", "sampled")]
    plain, sampled = (each(PARAMS, unigram_batch, jnp.int32(0))[0] for each in objectives)
    np.testing.assert_allclose(sampled, plain * np.exp(-2 * collision), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logps, rewards: logps, "the loss needs rewards, which this batch does not have: it has chosen_len"),
        (losses.get("hypo"), "needs fresh_logps, ref_chosen_logps, ref_fresh_logps, ref_rejected_logps"),
        (losses.get("dpo"), "needs ref_chosen_logps, ref_rejected_logps, which this batch does not have"),
    ],
)
def test_a_loss_that_asks_for_what_no_batch_has_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        policy_objective(UNIGRAM, loss)(PARAMS, BATCH, jnp.int32(0))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda chosen_logp=None: chosen_logp, r"takes chosen_logp, .*: did you mean chosen_logps\?"),
        (lambda logps, beta=0.1: logps, r"takes beta, .* \(put settings after a star"),
        (lambda logps: logps.mean(), r"returns float32\[\]: let it return a float for each prompt, \[8\] here"),
        (lambda logps: logps.astype(jnp.int32), r"returns int32\[8, 2\]"),
        (lambda token_logps: token_logps, r"returns float32\[8, 2, \d\]"),
        (lambda logps: None, "returns None"),
    ],
)
def test_a_loss_of_other_arrays_or_values_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        policy_objective(UNIGRAM, loss)(PARAMS, BATCH, jnp.int32(0))


def test_the_names_of_all_arrays_are_those_that_losses_take():
    taken = set()
    for name in losses.names():
        taken |= {each.name for each in inspect.signature(losses.get(name)).parameters.values() if each.kind == 1}
    assert taken <= INPUTS
    assert loss_inputs(BATCH, jnp.zeros(BATCH.responses.shape)).keys() <= INPUTS


def test_one_response_a_prompt_is_no_pair_of_itself():
    first = {name: getattr(BATCH, name)[:, :1] for name in ("responses", "response_lengths", "scores")}
    batch = dataclasses.replace(BATCH, **first)
    singles = with_reference(UNIGRAM, PARAMS, batch)
    for name in ("dpo", "ipo", "bco", "simpo"):
        with pytest.raises(UserError, match="a batch of one response a prompt does not have: choose one of single"):
            policy_objective(UNIGRAM, losses.get(name))(PARAMS, singles, jnp.int32(0))
    value, diagnostics = policy_objective(UNIGRAM, losses.get("kto"))(PARAMS, singles, jnp.int32(0))
    # At the reference z = r = 0, so both sides are sigma(0).
    np.testing.assert_allclose(value, np.full((8, 1), 0.5), rtol=1e-5)
    assert diagnostics.keys() == {"length", "log_prob"}


def test_at_the_reference_the_losses_are_known(even_policy):
    params = random_params(even_policy)
    batch = with_reference(even_policy, params, BATCH)

    @jax.jit
    def values(params):
        objectives = [policy_objective(even_policy, losses.get(name, beta=0.3)) for name in ("dpo", "ipo")]
        return [objective(params, batch, jnp.int32(0)) for objective in objectives]

    (dpo, diagnostics), (ipo, _) = values(params)
    np.testing.assert_allclose(dpo, math.log(2), rtol=1e-5)
    # (0 - 1 / (2 beta))^2
    np.testing.assert_allclose(ipo, 1 / (4 * 0.3**2), rtol=1e-5)
    np.testing.assert_allclose(diagnostics["margin"], 0.0, atol=1e-5)
    np.testing.assert_allclose(diagnostics["chosen_log_ratio"], 0.0, atol=1e-5)


def test_diagnostics_by_hand():
    """Responses have one token, 15 or 0. The unigram's logits are 1 and -1 there; the reference is uniform."""
    batch = dataclasses.replace(
        BATCH,
        responses=jnp.tile(jnp.array([[15, 3], [0, 3]]), (8, 1, 1)),
        response_lengths=jnp.ones((8, 2), jnp.int32),
        scores=jnp.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4),
    )
    batch = with_reference(UNIGRAM, {"logits": jnp.zeros(16)}, batch)
    _, diagnostics = jax.jit(policy_objective(UNIGRAM, losses.get("sft")))(PARAMS, batch, jnp.int32(0))
    normalizer = math.log(sum(math.exp(-1 + 2 * i / 15) for i in range(16)))
    high, low = 1 - normalizer, -1 - normalizer
    np.testing.assert_allclose(
        diagnostics["chosen_log_ratio"], [high + math.log(16)] * 4 + [low + math.log(16)] * 4, rtol=1e-5
    )
    np.testing.assert_allclose(diagnostics["margin"], [2.0] * 4 + [-2.0] * 4, rtol=1e-5)
    np.testing.assert_array_equal(diagnostics["accuracy"], [1.0] * 4 + [0.0] * 4)
    tied = dataclasses.replace(batch, scores=jnp.full((8, 2), 0.5))
    _, of_ties = jax.jit(policy_objective(UNIGRAM, losses.get("sft")))(PARAMS, tied, jnp.int32(0))
    np.testing.assert_array_equal(of_ties["accuracy"], 0.5)
    np.testing.assert_allclose(diagnostics["log_prob"], (high + low) / 2, rtol=1e-5)
    np.testing.assert_array_equal(diagnostics["length"], 1.0)


def test_equal_policies_classify_at_chance():
    batch = with_reference(UNIGRAM, PARAMS, BATCH)
    _, diagnostics = jax.jit(policy_objective(UNIGRAM, losses.get("sft")))(PARAMS, batch, jnp.int32(0))
    np.testing.assert_array_equal(diagnostics["accuracy"], 0.5)


def test_loss_inputs_by_hand():
    """K = 4.

    Row 0: response 2 is the best, 1 the worst. Row 1 has ties: the first best, the last worst. Row 2: all tie.
    """
    scores = jnp.array([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.8, 0.2], [0.4, 0.4, 0.4, 0.4]])
    token_log_probs = -jnp.arange(1.0, 25.0).reshape(3, 4, 2)
    reference = jnp.full((3, 4, 2), -0.5)
    lengths = jnp.array([[2, 2, 2, 2], [1, 2, 1, 1], [2, 2, 2, 2]])
    token_log_probs = jnp.where(jnp.arange(2) < lengths[..., None], token_log_probs, 0.0)
    batch = PreferenceBatch(
        jnp.arange(3), jnp.ones((3, 1), int), jnp.ones(3, int), jnp.ones((3, 4, 2), int), lengths, scores, reference
    )
    inputs = jax.jit(loss_inputs)(batch, token_log_probs)
    # Row 0: -(5 + 6) and -(3 + 4). Row 1: -(11 + 12) and -15, one token. Row 2: -(17 + 18) and -(23 + 24).
    np.testing.assert_array_equal(inputs["chosen_logps"], [-11, -23, -35])
    np.testing.assert_array_equal(inputs["rejected_logps"], [-7, -15, -47])
    np.testing.assert_array_equal(inputs["chosen_lengths"], [2, 2, 2])
    np.testing.assert_array_equal(inputs["rejected_lengths"], [2, 1, 2])
    np.testing.assert_array_equal(inputs["preference"], [1, 1, 0.5])
    np.testing.assert_array_equal(inputs["logps"][1], [-9, -23, -13, -15])
    # Padding of the reference is ignored.
    np.testing.assert_array_equal(inputs["ref_rejected_logps"], [-1, -0.5, -1])
    np.testing.assert_array_equal(inputs["rejected_token_logps"][1], [-15, 0])
    np.testing.assert_array_equal(inputs["ref_rejected_token_logps"][1], [-0.5, 0])
    np.testing.assert_array_equal(inputs["rejected_mask"][1], [True, False])
    np.testing.assert_array_equal(inputs["scores"], scores)


def test_no_reference_offers_no_reference():
    inputs = jax.eval_shape(loss_inputs, BATCH, jnp.zeros((8, 2, 5)))
    assert not [name for name in inputs if name.startswith("ref_")]


def test_a_preference_model_is_trained_on_pairs_only(unchecked):
    three = dataclasses.replace(
        BATCH, responses=np.zeros((8, 3, 4), np.int32), response_lengths=np.ones((8, 3), np.int32)
    )
    with pytest.raises(UserError, match="trained on pairs, the batch has 3 responses"):
        preference_objective(None, jax.random.key(0))({}, three, 0)
