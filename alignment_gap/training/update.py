"""The one update step: it updates the state with a batch of any source and with any loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from alignment_gap import losses
from alignment_gap.checks import nearest
from alignment_gap.data.batches.batch import PreferenceBatch, length_mask
from alignment_gap.errors import UserError
from alignment_gap.models import Adapters, Policy, PreferenceModel, score, score_with_collisions
from alignment_gap.models.packing import unpack
from alignment_gap.models.preference import pair_loss
from alignment_gap.sharding import LogicalMesh, batch_sharding, constrain, replicated, within
from alignment_gap.training.guard import GuardConfig, guard
from alignment_gap.training.state import TrainState, shardings_like

Metrics = dict[str, Array]
# (state, batch, *frozen) -> (state, metrics).
UpdateStep = Callable[..., tuple[TrainState, Metrics]]


# The log-prob in nats of responses in the empty slots of packed rows. Their losses are ignored, but must be finite.
_EMPTY = -1.0
_OF_RESPONSES = ("logps", "lengths", "token_logps", "mask", "log_collisions")
INPUTS = frozenset(
    (
        *_OF_RESPONSES,
        *(f"{side}_{name}" for side in ("chosen", "rejected") for name in _OF_RESPONSES),
        *(f"ref_{side}{name}" for side in ("", "chosen_", "rejected_") for name in ("logps", "token_logps")),
        *("scores", "preference", "old_logps", "old_token_logps"),
        *(f"{reference}{other}_logps" for reference in ("", "ref_") for other in ("fresh", "kl")),
    )
)
"""The names of all arrays that a loss may take: see `loss_inputs`; some batches lack some of them."""


@runtime_checkable
class Objective(Protocol):
    """The function to minimise: it gives a loss and diagnostics for each prompt."""

    def __call__(
        self, params: Any, batch: PreferenceBatch, step: Int[Array, ""], *frozen: Any
    ) -> tuple[Float[Array, "N *K"], dict[str, Float[Array, "N"]]]:
        """The losses [N] in nats and named diagnostics [N], for B prompts or for the B * S slots of packed rows.

        A loss on single responses gives [N, K]. Values at empty slots are ignored. `frozen` is used but not trained:
        the base of adapters, or nothing.
        """


def make_update_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: LogicalMesh,
    abstract: TrainState,
    *,
    microbatches: int = 1,
    skip: GuardConfig = GuardConfig(),
    frozen: Sequence[Any] = (),
) -> UpdateStep:
    """One jitted, sharded `(state, batch, *frozen) -> (state, metrics)`; the state's buffers are reused.

    Args:
      objective: such as `policy_objective(policy, loss)`.
      optimizer: an optax transformation.
      mesh: the device mesh.
      abstract: the state's shapes and shardings, from `abstract_state`.
      microbatches: number of parts of the batch; their gradients are computed one after another and averaged. This
        number times `mesh.batch_parts` must divide the batch size. The step equals the step on the whole batch, except
        for losses that depend on other prompts (such as kto and bco): they see only a part.
      skip: which updates to skip; a skipped update keeps parameters and optimizer state, but counts as a step.
      frozen: shapes and shardings of the objective's `frozen` arguments.

    Returns:
      The step. Its metrics are in float32:

      - "loss" and the objective's diagnostics: means over the batch's prompts
      - "gradient_norm"
      - "prompts" and "tokens": their numbers
      - "padding": the fraction of token slots that hold padding
      - "skipped": the number of skipped updates so far
      - "skipped_in_a_row": the number of skipped updates since the last update that was made
    """

    shardings = shardings_like(abstract)

    def update_step(state: TrainState, batch: PreferenceBatch, *frozen: Any) -> tuple[TrainState, Metrics]:
        def mean_loss(params: Any, part: PreferenceBatch, weights: Array) -> tuple[Array, Metrics]:
            loss, diagnostics = objective(params, part, state.step, *frozen)
            means = {name: _mean(value, weights) for name, value in ({"loss": loss} | diagnostics).items()}
            return means["loss"], means

        def gradients_of(part: tuple[PreferenceBatch, Array]) -> tuple[Any, Metrics]:
            gradients, metrics = jax.grad(mean_loss, has_aux=True)(state.params, *part)
            return jax.lax.with_sharding_constraint(gradients, shardings.params), metrics

        gradients, metrics = _mean_over(gradients_of, (batch, _weights(batch)), microbatches)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.global_norm(gradients)
        is_good, skipped = guard(skip, state.skipped, state.step, metrics["loss"], norm)
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old),
            (params, optimizer_state),
            (state.params, state.optimizer_state),
        )
        metrics |= {"gradient_norm": norm, "skipped": skipped.total, "skipped_in_a_row": skipped.in_a_row}
        return TrainState(state.step + 1, params, optimizer_state, state.copies, skipped), metrics | _sizes(batch)

    return jax.jit(
        within(mesh, update_step),
        in_shardings=(shardings, batch_sharding(mesh), *map(shardings_like, frozen)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_validation_step(
    objective: Objective, mesh: LogicalMesh, abstract: TrainState, frozen: Sequence[Any] = ()
) -> Callable[..., Metrics]:
    """A jitted `(params, batch, *frozen) -> metrics`: the update step's means, without an update."""

    def validate(params: Any, batch: PreferenceBatch, *frozen: Any) -> Metrics:
        # A fixed step, so that a preference model reads its pairs in the same order each time.
        loss, found = objective(params, batch, jnp.int32(0), *frozen)
        weights = _weights(batch)
        return {name: _mean(value, weights) for name, value in ({"loss": loss} | found).items()}

    shardings = (shardings_like(abstract.params), batch_sharding(mesh), *map(shardings_like, frozen))
    return jax.jit(within(mesh, validate), in_shardings=shardings, out_shardings=replicated(mesh))


def _weights(batch: PreferenceBatch) -> Float[Array, "B *S"]:
    """The weight of each prompt's loss in a mean over prompts and empty slots; 1 if there are no empty slots."""
    there = (batch.prompt_lengths > 0).astype(jnp.float32)
    return there / jnp.mean(there)


def _mean(values: Float[Array, "N *K"], weights: Float[Array, "B *S"]) -> Float[Array, ""]:
    return jnp.mean(values * weights.reshape(-1, *[1] * (values.ndim - 1)))


def _sizes(batch: PreferenceBatch) -> Metrics:
    tokens = jnp.sum(batch.prompt_lengths) + jnp.sum(batch.response_lengths)
    padding = 1 - tokens / (batch.prompts.size + batch.responses.size)
    return {"prompts": jnp.sum(batch.prompt_lengths > 0), "tokens": tokens, "padding": padding}


def _mean_over(
    gradients_of: Callable[[Any], tuple[Any, Metrics]], batch: Any, microbatches: int
) -> tuple[Any, Metrics]:
    """The mean of gradients and metrics over equal parts of the batch.

    A part takes every n-th row: a batch that is sharded over devices is then sharded in each part too.
    """
    if microbatches == 1:
        return gradients_of(batch)

    def split(array: Array) -> Array:
        parts = jnp.swapaxes(array.reshape(-1, microbatches, *array.shape[1:]), 0, 1)
        return constrain(parts, None, "batch", *[None] * (parts.ndim - 2))

    # Jitted, so that the loop reuses the trace for the shapes.
    gradients_of = jax.jit(gradients_of)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients_of(part)), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda array: array[0], parts))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), parts)
    return jax.tree.map(lambda value: value / microbatches, total)


def policy_objective(policy: Policy, loss: Callable[..., Array], *, rewards: bool = False) -> Objective:
    """An objective that trains a policy with any loss whose parameters are names from `loss_inputs`.

    Args:
      policy: the network.
      loss: from `losses.get`, or a callable of your own.
      rewards: whether the scores of a batch are rewards to compare, not probabilities.

    Raises:
      UserError: the loss needs an array that the batch does not have.
    """
    reads = losses.reads(loss)

    def objective(params: Any, batch: PreferenceBatch, step: Array, *_: Any) -> tuple[Array, dict[str, Array]]:
        if batch.is_packed and losses.OTHER_PROMPTS in reads:
            raise UserError(
                "the loss of a prompt depends on the batch's other prompts, and packed rows have empty slots: leave "
                "packing out, and set buckets instead"
            )
        texts = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        if losses.LOG_COLLISIONS in reads:
            inputs = loss_inputs(batch, *score_with_collisions(policy, params, *texts), rewards=rewards)
        else:
            inputs = loss_inputs(batch, score(policy, params, *texts), rewards=rewards)
        return apply_loss(loss, inputs | _beside(policy, params, batch))

    return objective


def preference_objective(model: PreferenceModel, run_key: Key[Array, ""], *, rewards: bool = False) -> Objective:
    """An objective that trains a preference model on pairs by cross-entropy.

    Each pair is read in a random order, drawn from (run, step, prompt). Scores are the probabilities that a response is
    preferred or, with `rewards`, rewards to compare.
    """

    def objective(params: Any, batch: PreferenceBatch, step: Array, *_: Any) -> tuple[Array, dict[str, Array]]:
        if batch.is_packed:
            raise UserError("a preference model reads one prompt a row: leave packing out")
        if batch.responses.shape[1] != 2:
            raise UserError(
                f"a preference model is trained on pairs, the batch has {batch.responses.shape[1]} responses"
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(run_key, step), batch.prompt_ids)
        swap = jax.vmap(jax.random.bernoulli)(keys)
        order = jnp.where(swap[:, None], jnp.array([1, 0]), jnp.array([0, 1]))
        responses = jnp.take_along_axis(batch.responses, order[..., None], axis=1)
        lengths = jnp.take_along_axis(batch.response_lengths, order, axis=1)
        log_odds = model.log_odds(params, batch.prompts, batch.prompt_lengths, responses, lengths)
        scores = jnp.take_along_axis(batch.scores, order, axis=1)
        preference = (jnp.sign(scores[:, 0] - scores[:, 1]) + 1) / 2 if rewards else scores[:, 0]
        correct = (jnp.sign(log_odds) * jnp.sign(preference - 0.5) + 1) / 2
        return pair_loss(log_odds, preference), {"accuracy": correct}

    return objective


def adapter_objective(objective: Objective, adapters: Adapters, run_key: Key[Array, ""] | None = None) -> Objective:
    """The objective with adapters as its parameters; the base's parameters are a further argument, without gradient.

    With a key, the adapters use dropout. The mask depends on run, step and the batch's first prompt, so every
    microbatch has its own mask.
    """

    def of_adapters(params: Any, batch: PreferenceBatch, step: Array, *base: Any) -> tuple[Array, dict[str, Array]]:
        key = run_key
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, step), batch.prompt_ids.reshape(-1)[0])
        return objective(adapters.on(base[0], params, key), batch, step)

    return of_adapters


def loss_inputs(
    batch: PreferenceBatch,
    token_log_probs: Float[Array, "B K R"],
    log_collisions: Float[Array, "B K R"] | None = None,
    *,
    rewards: bool = False,
) -> dict[str, Array]:
    """Every array that a loss may name, from a batch and the policy's log-probs of its responses.

    For packed rows, B in the result counts all slots. An empty slot has equal scores and responses of one token.

    The chosen response has the highest score, the rejected response the lowest. `preference` is the probability that
    the chosen response is better. For a pair of probabilities it is the chosen response's score. Rewards, and scores of
    more than two responses, are compared: it is 1, or 0.5 if both are equal.

    Args:
      batch: a batch of any source.
      token_log_probs: log-probs of its responses under the policy, in nats.
      log_collisions: log sum_v pi(v)^2 at every token, in nats, or None.
      rewards: whether the scores of pairs are rewards, not probabilities.

    Returns:
      The arrays by name:

      - token_logps, mask [B, K, R]; logps, scores, lengths [B, K]
      - with two responses or more: preference [B]; chosen_logps, chosen_lengths [B]; chosen_token_logps, chosen_mask
        [B, R]; and the same for the rejected response
      - if given: log_collisions [B, K, R]; chosen_log_collisions, rejected_log_collisions [B, R]
      - if the batch has reference log-probs: ref_logps, ref_token_logps, ref_chosen_logps and so on
      - if the batch has the sampler's log-probs: old_token_logps [B, K, R], old_logps [B, K]
    """
    lengths, reference, samples = batch.response_lengths, batch.reference_log_probs, batch.scores.shape[-1]
    scores = batch.scores.reshape(-1, samples)
    if batch.is_packed:
        reference = None if reference is None else unpack(reference, lengths, _EMPTY)[0]
        log_collisions = None if log_collisions is None else unpack(log_collisions, lengths, _EMPTY)[0]
        token_log_probs, lengths = unpack(token_log_probs, lengths, _EMPTY)
    mask = length_mask(lengths, batch.responses.shape[-1])
    inputs = {
        "token_logps": token_log_probs,
        "mask": mask,
        "logps": token_log_probs.sum(-1),
        "scores": scores,
        "lengths": lengths,
    }
    if batch.sampler_log_probs is not None:
        sampler = batch.sampler_log_probs
        if batch.is_packed:
            sampler = unpack(sampler, batch.response_lengths, _EMPTY)[0]
        inputs["old_token_logps"] = jnp.where(mask, sampler, 0.0)
        inputs["old_logps"] = inputs["old_token_logps"].sum(-1)
    if reference is not None:
        inputs["ref_token_logps"] = jnp.where(mask, reference, 0.0)
        inputs["ref_logps"] = inputs["ref_token_logps"].sum(-1)
    if log_collisions is not None:
        inputs["log_collisions"] = log_collisions
    if samples == 1:
        return inputs
    chosen = jnp.argmax(scores, axis=-1)
    rejected = samples - 1 - jnp.argmin(scores[:, ::-1], axis=-1)

    def pick(values: Array, index: Array) -> Array:
        index = index.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.take_along_axis(values, index, axis=1)[:, 0]

    compared = jnp.where(pick(scores, chosen) > pick(scores, rejected), 1.0, 0.5)
    inputs["preference"] = compared if rewards or samples > 2 else pick(scores, chosen)
    of_policy = [name for name in _OF_RESPONSES if name in inputs]
    for side, index in (("chosen", chosen), ("rejected", rejected)):
        inputs |= {f"{side}_{name}": pick(inputs[name], index) for name in of_policy}
        if reference is not None:
            inputs |= {f"ref_{side}_{name}": pick(inputs[f"ref_{name}"], index) for name in ("logps", "token_logps")}
    return inputs


def apply_loss(loss: Callable[..., Array], inputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The losses of the prompts and their `diagnostics`, from arrays by name.

    Args:
      loss: from `losses.get`, or a callable of your own.
      inputs: arrays as `loss_inputs` gives them, and others that the loss names.

    Returns:
      The losses [N], or [N, K] of a loss on single responses, nan where a prompt has no scores; and the diagnostics
      [N].

    Raises:
      UserError: the loss needs an array that is not there, takes one that no batch has, or returns other values.
    """
    arrays = losses.arrays(loss)
    if missing := sorted(name for name, is_required in arrays.items() if is_required and name not in inputs):
        batches, remedy = "this batch", ""
        if inputs["scores"].shape[-1] == 1:
            batches, remedy = "a batch of one response a prompt", "choose one of single responses, such as kto; "
        raise UserError(
            f"the loss needs {', '.join(missing)}, which {batches} does not have: {remedy}it has "
            f"{', '.join(sorted(inputs))}",
            page="jobs.md#which-source-serves-which-loss",
        )
    if unknown := sorted(arrays.keys() - INPUTS - inputs.keys()):
        raise UserError(
            f"the loss takes {unknown[0]}, which is not an array of a batch: {nearest(unknown[0], sorted(INPUTS))} "
            "(put settings after a star, as in (logps, *, scale=1.0))"
        )
    found = loss(**{name: inputs[name] for name in arrays if name in inputs})
    _check_values(found, inputs["scores"].shape)
    # A prompt that its judge gave no scores has no loss, whether the loss reads scores or not.
    scored = ~jnp.isnan(inputs["scores"]).any(axis=-1)
    return jnp.where(scored.reshape(-1, *[1] * (found.ndim - 1)), found, jnp.nan), diagnostics(inputs)


def _beside(policy: Policy, params: Any, batch: PreferenceBatch) -> dict[str, Array]:
    """The log-probs [B, K] of the batch's `fresh` samples, and of its `mismatched` responses to other prompts."""
    inputs = {}
    for name, other, weights in (
        ("fresh", batch.fresh, params),
        ("kl", batch.mismatched, jax.lax.stop_gradient(params)),  # Losses only use it as a threshold.
    ):
        if other is not None:
            texts = (other.prompts, other.prompt_lengths, other.responses, other.response_lengths)
            inputs[f"{name}_logps"] = score(policy, weights, *texts).sum(-1)
            if other.reference_log_probs is not None:
                inputs[f"ref_{name}_logps"] = other.reference_log_probs.sum(-1)
    return inputs


def diagnostics(inputs: dict[str, Array]) -> dict[str, Array]:
    """Health metrics of a run for each prompt: log-ratios to the reference in nats, accuracy, length."""
    values = {"length": inputs["lengths"].mean(-1), "log_prob": inputs["logps"].mean(-1)}
    if "ref_chosen_logps" in inputs:
        names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        # The chosen response is the one that the label prefers; a label may also leave the pair undecided.
        decided = jnp.where(inputs["preference"] == 0.5, 0.5, 1.0)
        pair = losses.pairwise_diagnostics(**{name: inputs[name] for name in names}, preference=decided)
        # Without the implicit rewards, which need a beta; not every loss has one.
        values |= {name: pair[name] for name in ("chosen_log_ratio", "rejected_log_ratio", "margin", "accuracy")}
    return values


def _check_values(found: Any, shape: tuple[int, ...]) -> None:
    """Raises UserError unless a loss returned a float for each prompt, or for each response."""
    is_float = isinstance(found, jax.Array) and jnp.issubdtype(found.dtype, jnp.floating)
    if is_float and found.shape in (shape[:1], shape):
        return
    given = f"{found.dtype}{[*found.shape]}" if isinstance(found, jax.Array) else repr(found)
    raise UserError(
        f"the loss returns {given}: let it return a float for each prompt, {[*shape[:1]]} here, or for each response, "
        f"{[*shape]}; the update takes the mean"
    )
