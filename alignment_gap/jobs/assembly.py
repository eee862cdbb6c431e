"""Assembles network, objective, source, judge, reference, optimizer and mesh into a training run.

An `Assembly` has all parts that need neither data nor parameters. Jobs run them, and plans compile them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignment_gap.checkpoints import (
    Network,
    agreed_model,
    check_policy,
    find_checkpoint,
    pad_token,
    read_network,
    tokenizer_of,
)
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.data.text import Vocabulary, extra_id
from alignment_gap.errors import UserError
from alignment_gap.folders import at
from alignment_gap.jobs.config import MOST_STEPS, POLICY, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.served import (
    REFERENCE_LOG_PROBS,
    SAMPLER_LOG_PROBS,
    check_served,
    needs_reference,
    reads_mismatched,
    tracing,
)
from alignment_gap.judges import REWARDS
from alignment_gap.models import Adapters, Policy, abstract_parameters
from alignment_gap.models.preference import Markers
from alignment_gap.models.reward_head import RewardHead, without_output
from alignment_gap.sampling import Samples, make_generate
from alignment_gap.sharding import LogicalMesh, batch_sharding, check_batch_size
from alignment_gap.training import (
    GuardConfig,
    Objective,
    OptimizerConfig,
    TrainState,
    UpdateStep,
    abstract_base,
    abstract_state,
    adapter_objective,
    make_moving,
    make_optimizer,
    make_refresh,
    make_score,
    make_update_step,
    make_validation_step,
    policy_objective,
    preference_objective,
)
from alignment_gap.training.flops import count_flops

# Names of the copies in a `TrainState`: the parameters of a lagging sampler, and those of a moving reference.
SAMPLER, REFERENCE = "sampler", "reference"
# Uses of randomness other than fresh parameters; each number is folded into the run's key.
ORDER_OF_PAIRS, SAMPLES, OPPONENTS, DROPOUT = 1, 2, 3, 4
# How many compiled update steps are kept. A study has many runs with the same settings in one process.
_KEPT = 4


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch.

    Attributes:
      batch: number of prompts.
      prompt: tokens of a prompt, including padding.
      samples: responses per prompt.
      response: tokens of a response, including padding.
    """

    batch: int
    prompt: int
    samples: int
    response: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a job's inputs that its parts depend on.

    Attributes:
      network: the network that is trained.
      batch: shape of the source's batches; the largest one if there are several.
      fresh: shape of the second source's batches, if there is a second source.
      fields: optional arrays of the source's recorded examples; empty for an online source.
      rewards: whether scores are rewards, which only compare responses; otherwise they are probabilities.
      end_ids: the token ids that end a response; the first is the vocabulary's.
    """

    network: Network
    batch: BatchShape
    fresh: BatchShape | None = None
    fields: tuple[str, ...] = ()
    rewards: bool = False
    end_ids: tuple[int, ...] = (1,)

    def with_plain_attention(self) -> Facts:
        """The same with XLA's attention; a traced program shows its matrix products, but not those of fused kernels."""
        return self.with_model(attention="xla")

    def with_model(self, **settings: Any) -> Facts:
        """The same with other settings of the model."""
        model = dataclasses.replace(self.network.model, **settings)
        return dataclasses.replace(self, network=dataclasses.replace(self.network, model=model))


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A training run without its data and parameters.

    Attributes:
      config: settings of the job.
      facts: facts about its inputs.
      mesh: the device mesh.
    """

    config: JobConfig
    facts: Facts
    mesh: LogicalMesh

    def __post_init__(self) -> None:
        """Raises UserError if a batch cannot be split over the mesh, or the sources do not serve the loss."""
        parts, microbatches = self.mesh.batch_parts, self.config.microbatches
        for shape in filter(None, (self.facts.batch, self.facts.fresh)):
            check_batch_size("batch_size", shape.batch, parts, microbatches)
        if self.is_policy:
            check_served(self.config, self.loss, self.facts.fields)

    @property
    def is_policy(self) -> bool:
        """Whether the job trains a policy rather than a preference model."""
        return self.facts.network.kind == POLICY

    @functools.cached_property
    def needs_reference(self) -> bool:
        """Whether a reference policy has to score batches."""
        return self.is_policy and needs_reference(self.config, self.loss, self.facts.fields)

    @functools.cached_property
    def policy(self) -> Policy:
        """The network; for a preference model, the policy network inside it."""
        return self.facts.network.policy()

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, if only they are trained; None if all parameters are trained."""
        return self.facts.network.adapters

    def whole(self, params: Any, *frozen: Any) -> Any:
        """The policy's parameters: `params` themselves or, if these are adapters, the base with the adapters on it."""
        return self.adapters.on(frozen[0], params) if self.adapters else params

    @functools.cached_property
    def loss(self) -> Callable[..., Any]:
        """The loss of a policy, with its settings bound."""
        return self.config.loss.function()

    @property
    def objective(self) -> Objective:
        """The function that training minimises."""
        return self._traced.objective

    @property
    def optimizer(self) -> Any:
        """The optax transformation."""
        return self._traced.optimizer

    @property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        return self._traced.abstract

    @property
    def frozen(self) -> tuple[Any, ...]:
        """Shapes and shardings of parameters that are not trained: the base of adapters, or an empty tuple."""
        return self._traced.frozen

    @property
    def update_step(self) -> UpdateStep:
        """The one jitted `(state, batch, *frozen) -> (state, metrics)`; runs with the same settings share it."""
        return self._traced.update_step

    def validation_step(self, *, rewards: bool) -> Callable[..., Any]:
        """The jitted `(params, batch, *frozen) -> metrics`, without the adapters' dropout.

        `rewards` says whether the held-out scores are rewards: they may be of another kind than the source's.
        """
        return make_validation_step(self._trace(rewards).evaluated, self.mesh, self.abstract, self.frozen)

    @functools.cached_property
    def _traced(self) -> _Traced:
        return self._trace(self.facts.rewards)

    def _trace(self, rewards: bool) -> _Traced:
        """The traced parts for scores of this kind."""
        config, network = self.config, self.facts.network
        # A sampler that stays at the start needs no copy of it.
        every = self._refresh_every
        lags = every > 1 or (every == 0 and config.start is None)
        moves = config.reference_every is not None
        # A plan does not know the steps of a job that counts epochs. The compiled program has the same form anyway.
        steps = (config.steps or MOST_STEPS) if config.optimizer.ends else None
        is_random = not self.is_policy or config.adapter.dropout > 0
        return _traced_once(
            dataclasses.replace(
                network,
                vocabulary=None,
                vocabulary_digest=None,
                base=None,
                base_digest=None,
                end_prompts=None,
                template=None,
            ),
            config.loss if self.is_policy else None,
            config.seed if is_random else None,
            rewards,
            config.optimizer,
            steps,
            self.mesh,
            (SAMPLER,) * lags + (REFERENCE,) * moves,
            config.microbatches,
            config.guard,
        )

    @property
    def score(self) -> Callable[..., Any]:
        """The jitted function for the log-probs of responses; also used with the reference's parameters."""
        return make_score(self.policy, self.mesh)

    @property
    def refresh(self) -> Callable[[int, TrainState], TrainState]:
        """Updates the copies in the state before a step: those of a lagging sampler and of a moving reference."""
        config, every, changes = self.config, self._refresh_every, list[Callable[[int, TrainState], TrainState]]()
        if every > 1:
            changes.append(make_refresh(SAMPLER, every, self.abstract))
        if config.reference_every is not None:
            changes.append(make_moving(REFERENCE, config.reference_every, config.reference_alpha, self.abstract))
        return lambda step, state: functools.reduce(lambda changed, change: change(step, changed), changes, state)

    @property
    def _refresh_every(self) -> int:
        return self.config.online.refresh_every if self.config.online else 1

    def generate(self, online: OnlineConfig, response: int, *, opponents: bool = False) -> Callable[..., Samples]:
        """The jitted sampler of an online source, or of the opponents of its samples."""
        of_mixture = opponents or online.against == "each_other"
        return make_generate(
            self.policy,
            self.mesh,
            samples=1 if opponents else online.samples,
            max_length=response,
            eos_id=self.facts.end_ids,
            config=online.sampler,
            mixture=online.mixture if of_mixture else None,
        )

    def key(self, use: int) -> jax.Array:
        """The random key for one use; fresh parameters use the seed's own key."""
        return _key(self.config.seed, use)

    def abstract_batch(self) -> PreferenceBatch:
        """Shapes, dtypes and shardings of the update step's largest batch, with one prompt per row."""
        sampled = isinstance(self.config.source, OnlineConfig) or SAMPLER_LOG_PROBS in self.facts.fields
        batch = self._abstract_batch(self.facts.batch, sampled=sampled)
        if self.facts.fresh is not None:
            batch = dataclasses.replace(batch, fresh=self._abstract_batch(self.facts.fresh, sampled=True))
        if self.is_policy and reads_mismatched(self.loss):
            batch = dataclasses.replace(batch, mismatched=self._abstract_batch(self.facts.batch, sampled=False))
        return batch

    def update_flops(self, batch: PreferenceBatch) -> tuple[int, int]:
        """FLOPs of the update step for a batch of these shapes, and the model FLOPs among them; both over all devices.

        The model FLOPs are three forward passes, or two with adapters because their base has no gradient. They are
        never more than all FLOPs of the step, and leave out recomputation by remat. `count_flops` counts both.
        """
        plain = dataclasses.replace(self, facts=self.facts.with_plain_attention())
        update: Any = plain.update_step
        done = count_flops(update.trace(plain.abstract, batch, *plain.frozen).jaxpr)
        forward = jax.jit(plain.objective).trace(plain.abstract.params, batch, plain.abstract.step, *plain.frozen)
        return done, min((2 if self.adapters else 3) * count_flops(forward.jaxpr), done)

    def check_loss(self, batch: PreferenceBatch, *, rewards: bool | None = None) -> list[str]:
        """Traces the objective with the shapes of a batch; returns the names of its metrics.

        Args:
          batch: a batch, or its shapes.
          rewards: whether its scores are rewards; None if they are of the source's kind.

        Raises:
          UserError: the loss does not run on the batch.
        """
        objective = self._trace(self.facts.rewards if rewards is None else rewards).objective
        with tracing(self.config.loss):
            _, found = jax.eval_shape(objective, self.abstract.params, batch, self.abstract.step, *self.frozen)
        return ["loss", *found]

    def texts(self, shape: BatchShape) -> PreferenceBatch:
        """Abstract prompts and responses, sharded over the mesh, without log-probs."""
        return self._abstract_batch(shape, sampled=False, scored=False)

    def _abstract_batch(self, shape: BatchShape, *, sampled: bool, scored: bool = True) -> PreferenceBatch:
        def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=batch_sharding(self.mesh))

        scored = scored and (self.needs_reference or REFERENCE_LOG_PROBS in self.facts.fields)
        rows, prompt, samples, response = dataclasses.astuple(shape)
        log_probs = array(rows, samples, response, dtype=jnp.float32)
        return PreferenceBatch(
            prompt_ids=array(rows),
            prompts=array(rows, prompt),
            prompt_lengths=array(rows),
            responses=array(rows, samples, response),
            response_lengths=array(rows, samples),
            scores=array(rows, samples, dtype=jnp.float32),
            reference_log_probs=log_probs if scored else None,
            sampler_log_probs=log_probs if sampled else None,
        )


class _Traced(NamedTuple):
    objective: Objective
    evaluated: Objective
    optimizer: Any
    abstract: TrainState
    frozen: tuple[Any, ...]
    update_step: UpdateStep


@functools.lru_cache(maxsize=_KEPT)
def _traced_once(
    network: Network,
    loss: LossConfig | None,
    seed: int | None,
    rewards: bool,
    optimizer: OptimizerConfig,
    steps: int | None,
    mesh: LogicalMesh,
    copies: tuple[str, ...],
    microbatches: int,
    skip: GuardConfig,
) -> _Traced:
    """The traced and compiled parts, of a policy with its loss or of a preference model.

    The seed decides the order of a preference model's pairs and the adapters' dropout; it is None if neither is used.
    """
    objective: Objective = (
        policy_objective(network.policy(), loss.function(), rewards=rewards)
        if loss is not None
        else preference_objective(network.preference_model(), _key(seed or 0, ORDER_OF_PAIRS), rewards=rewards)
    )
    evaluated: Objective = objective
    frozen: tuple[Any, ...] = ()
    if network.adapters is not None:
        frozen = (abstract_base(network.policy(), mesh, network.adapters.config.base_dtype),)
        evaluated = adapter_objective(objective, network.adapters)
        objective = adapter_objective(objective, network.adapters, None if seed is None else _key(seed, DROPOUT))
    transformation = make_optimizer(optimizer, steps=steps, parameters=abstract_parameters(network.init))
    abstract = abstract_state(network.init, transformation, mesh, copies)
    step = make_update_step(
        objective, transformation, mesh, abstract, microbatches=microbatches, skip=skip, frozen=frozen
    )
    return _Traced(objective, evaluated, transformation, abstract, frozen, step)


def _key(seed: int, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), use)


def stored_network(path: str, step: int | None) -> Network | None:
    """The network in a checkpoint of a run; None if the checkpoint does not describe it."""
    return read_network(find_checkpoint(at(path), step))


def trained_network(
    config: JobConfig,
    digest: str | None,
    place: str | None,
    vocabulary: Vocabulary | None,
    stored: Callable[[str, int | None], Network | None] = stored_network,
) -> Network:
    """The network that a job trains: the model of its settings or, if they have none, the model of its start.

    Args:
      config: settings of the job.
      digest: digest of the dataset's vocabulary.
      place: path of the vocabulary.
      vocabulary: the vocabulary; a preference model uses its sentinels as markers, and a policy does not need it.
      stored: reads the network of a run's folder.

    Raises:
      UserError: there is no model, or it differs from the model of the start.
    """
    model, head = config.model, None
    if config.start is not None:
        network = stored(config.start, config.start_step)
        if network is not None:
            model, head = agreed_model(config.model, network, config.start), network.head
            if config.kind != "bradley_terry":
                check_policy(network, config.start)
        elif model is None:
            raise UserError(f"{config.start} does not say which model it holds: set MODEL to that model")
    if model is None:
        raise UserError(
            "there is no model: set MODEL, such as by --gin_file=gin/models/t5_tiny.gin, or START to a run's folder"
        )
    markers: tuple[int, ...] = ()
    if config.kind != POLICY and head is None:
        assert vocabulary is not None
        markers = markers_of(config.kind, vocabulary, place)
        if not markers:
            model, head = without_output(model), RewardHead(_pad_id(config, vocabulary))
    adapter = None if config.adapter.rank is None else config.adapter
    return Network(config.kind, model, markers, place, digest, adapter, head=head)


def _pad_id(config: JobConfig, vocabulary: Vocabulary) -> int | None:
    """The padding that a fresh head skips: as transformers would, on the same base. None for the last token.

    Without a config.json it is the vocabulary's, unless the end of a response has this id too.
    """
    own = None if vocabulary.pad_id == vocabulary.eos_id else vocabulary.pad_id
    if config.start is None:
        return own
    return pad_token(tokenizer_of(find_checkpoint(at(config.start), config.start_step)), own)


def markers_of(kind: str, vocabulary: Vocabulary, place: str | None) -> tuple[int, ...]:
    """The sentinels that a preference model marks texts with; none if it needs a head of its own.

    Args:
      kind: kind of the preference model.
      vocabulary: the vocabulary.
      place: path of the vocabulary, for the error.

    Raises:
      UserError: a model of this kind has no head, and the vocabulary has too few sentinels.
    """
    needed = len(Markers._fields)
    if vocabulary.extra_ids >= needed:
        return tuple(extra_id(vocabulary, i) for i in range(needed))
    if kind != "bradley_terry":
        raise UserError(
            f"the kind is {kind!r}, which marks texts with {needed} sentinels, T5's <extra_id_i>, but the vocabulary "
            f"{place} has {vocabulary.extra_ids}: set the kind to 'bradley_terry', which then has a head of its own"
        )
    return ()


def gives_rewards(online: OnlineConfig) -> bool:
    """Whether the scores of an online source rank responses, but are not probabilities that one beats the other.

    Rewards do, win rates among more than two samples, and chances to beat a sample of the mixture.
    """
    compared = online.kept > 1 if online.against == "mixture" else online.samples > 2
    return online.judge.labels == REWARDS or compared
