"""The one place where network, objective, source, judge, reference, optimizer and mesh become a training run.

An `Assembly` has all parts that need neither data nor parameters: what runs, and what a plan compiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignment_gap.checkpoints import Network, agreed_model, check_policy, find_checkpoint, read_network
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
)
from alignment_gap.judges import REWARDS
from alignment_gap.models import Adapters, Policy, abstract_parameters
from alignment_gap.models.preference import Markers
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

# Copies in a `TrainState`: the parameters that a sampler which lags behind draws from, and a reference that moves.
SAMPLER, REFERENCE = "sampler", "reference"
# Folded into the run's key: what is random beside fresh parameters.
ORDER_OF_PAIRS, SAMPLES, OPPONENTS, DROPOUT = 1, 2, 3, 4
# Update steps that stay compiled for the next run of this process with the same settings, as a study has many.
_KEPT = 4


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch.

    Attributes:
      batch: prompts.
      prompt: tokens of each, padding included.
      samples: responses to a prompt.
      response: tokens of each, padding included.
    """

    batch: int
    prompt: int
    samples: int
    response: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a job's inputs say, that its parts depend on.

    Attributes:
      network: what is trained.
      batch: shape of the source's batches, of the largest where there are several.
      fresh: shape of the second source's batches, if there is one.
      fields: what the recorded examples of the source hold; nothing where it samples.
      rewards: whether scores are rewards, to be compared, and not probabilities.
      eos_id: ends a response.
    """

    network: Network
    batch: BatchShape
    fresh: BatchShape | None = None
    fields: tuple[str, ...] = ()
    rewards: bool = False
    eos_id: int = 1

    def with_plain_attention(self) -> Facts:
        """The same with XLA's attention, whose products are in a traced program; those of a fused kernel are not."""
        model = dataclasses.replace(self.network.model, attention="xla")
        return dataclasses.replace(self, network=dataclasses.replace(self.network, model=model))


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A training run without its data and parameters.

    Attributes:
      config: the job.
      facts: what its inputs say.
      mesh: the device mesh.
    """

    config: JobConfig
    facts: Facts
    mesh: LogicalMesh

    def __post_init__(self) -> None:
        """Raises UserError where a batch cannot be split over the mesh, or the sources do not serve the loss."""
        parts, microbatches = self.mesh.batch_parts, self.config.microbatches
        for shape in filter(None, (self.facts.batch, self.facts.fresh)):
            check_batch_size("batch_size", shape.batch, parts, microbatches)
        if self.is_policy:
            check_served(self.config, self.loss, self.facts.fields)

    @property
    def is_policy(self) -> bool:
        """Whether a policy is trained, and no preference model."""
        return self.facts.network.kind == POLICY

    @functools.cached_property
    def needs_reference(self) -> bool:
        """Whether a reference policy has to score batches."""
        return self.is_policy and needs_reference(self.config, self.loss, self.facts.fields)

    @functools.cached_property
    def policy(self) -> Policy:
        """The network; of a preference model the one that it asks."""
        return self.facts.network.policy()

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that are trained in place of the network's parameters; None where those are trained."""
        return self.facts.network.adapters

    def whole(self, params: Any, *frozen: Any) -> Any:
        """The parameters that the policy takes: those of a state or, where these are adapters, the base's with them."""
        return self.adapters.on(frozen[0], params) if self.adapters else params

    @functools.cached_property
    def loss(self) -> Callable[..., Any]:
        """Of a policy, with its settings bound."""
        return self.config.loss.function()

    @property
    def objective(self) -> Objective:
        """What is minimised."""
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
        """Shapes and shardings of what is read and not trained: of the base of adapters, or nothing."""
        return self._traced.frozen

    @property
    def update_step(self) -> UpdateStep:
        """The one jitted `(state, batch, *frozen) -> (state, metrics)`; runs with the same settings share it."""
        return self._traced.update_step

    @property
    def validation_step(self) -> Callable[..., Any]:
        """The jitted `(params, batch, *frozen) -> metrics`, without the adapters' dropout."""
        return make_validation_step(self._traced.evaluated, self.mesh, self.abstract, self.frozen)

    @functools.cached_property
    def _traced(self) -> _Traced:
        config, network = self.config, self.facts.network
        # A sampler that stays at the start needs no copy of it.
        every = self._refresh_every
        lags = every > 1 or (every == 0 and config.start is None)
        moves = config.reference_every is not None
        # A plan of a job by epochs does not know its steps; what is compiled has the same form for any number.
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
            self.facts.rewards,
            config.optimizer,
            steps,
            self.mesh,
            (SAMPLER,) * lags + (REFERENCE,) * moves,
            config.microbatches,
            config.guard,
        )

    @property
    def score(self) -> Callable[..., Any]:
        """The jitted log-probs of responses, under the reference too."""
        return make_score(self.policy, self.mesh)

    @property
    def refresh(self) -> Callable[[int, TrainState], TrainState]:
        """What changes the copies of the state before a step: of a sampler that lags behind, of a moving reference."""
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
        """The jitted sampler of an online source, or of its opponents."""
        of_mixture = opponents or online.against == "each_other"
        return make_generate(
            self.policy,
            self.mesh,
            samples=1 if opponents else online.samples,
            max_length=response,
            eos_id=self.facts.eos_id,
            config=online.sampler,
            mixture=online.mixture if of_mixture else None,
        )

    def key(self, use: int) -> jax.Array:
        """The random key of one use; the seed's own is that of fresh parameters."""
        return _key(self.config.seed, use)

    def abstract_batch(self) -> PreferenceBatch:
        """Shapes, dtypes and shardings of the largest batch that the update step takes, one prompt a row."""
        sampled = isinstance(self.config.source, OnlineConfig) or SAMPLER_LOG_PROBS in self.facts.fields
        batch = self._abstract_batch(self.facts.batch, sampled=sampled)
        if self.facts.fresh is not None:
            batch = dataclasses.replace(batch, fresh=self._abstract_batch(self.facts.fresh, sampled=True))
        if self.is_policy and reads_mismatched(self.loss):
            batch = dataclasses.replace(batch, mismatched=self._abstract_batch(self.facts.batch, sampled=False))
        return batch

    def update_flops(self, batch: PreferenceBatch) -> tuple[int, int]:
        """FLOPs of the update step on a batch of these shapes, over all devices, and those that the model needs.

        The model needs three forward passes, two with adapters, whose base has no gradient; or all FLOPs where these
        are fewer. What remat computes again is not among them. Both are counted as `count_flops` says.
        """
        plain = dataclasses.replace(self, facts=self.facts.with_plain_attention())
        update: Any = plain.update_step
        done = count_flops(update.trace(plain.abstract, batch, *plain.frozen).jaxpr)
        forward = jax.jit(plain.objective).trace(plain.abstract.params, batch, plain.abstract.step, *plain.frozen)
        return done, min((2 if self.adapters else 3) * count_flops(forward.jaxpr), done)

    def check_loss(self, batch: PreferenceBatch) -> list[str]:
        """Traces the objective on the shapes of a batch, and gives the names of its metrics.

        Raises:
          UserError: the loss does not run on the batch.
        """
        loss = self.config.loss
        try:
            _, found = jax.eval_shape(self.objective, self.abstract.params, batch, self.abstract.step, *self.frozen)
        except UserError:
            raise
        except (AssertionError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the loss {loss.name} with {dict(loss.settings)} does not run: {reason}") from error
        return ["loss", *found]

    def texts(self, shape: BatchShape) -> PreferenceBatch:
        """Abstract prompts and responses, laid out over the mesh, without log-probs."""
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
    """What is traced and compiled, of a policy with its loss or of a preference model.

    The seed is that of a preference model's orders and of the adapters' dropout; None where there is neither.
    """
    objective: Objective = (
        policy_objective(network.policy(), loss.function(), rewards=rewards)
        if loss is not None
        else preference_objective(network.preference_model(), _key(seed or 0, ORDER_OF_PAIRS), rewards=rewards)
    )
    evaluated: Objective = objective
    frozen: tuple[Any, ...] = ()
    if network.adapters is not None:
        frozen = (abstract_base(network.policy(), mesh, network.whole_init, network.adapters.config.base_dtype),)
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
    """What the checkpoint of a run's folder holds; None where it does not say."""
    return read_network(find_checkpoint(at(path), step))


def trained_network(
    config: JobConfig,
    digest: str | None,
    place: str | None,
    vocabulary: Vocabulary | None,
    stored: Callable[[str, int | None], Network | None] = stored_network,
) -> Network:
    """The network that a job trains: the model of its settings or, where they have none, that of its start.

    Args:
      config: the job.
      digest: of the dataset's vocabulary.
      place: where the vocabulary is.
      vocabulary: the vocabulary, from whose sentinels a preference model takes its markers; a policy needs none.
      stored: reads the network of a run's folder.

    Raises:
      UserError: there is no model, or it is another one than the start's.
    """
    model, head = config.model, None
    if config.start is not None:
        network = stored(config.start, config.start_step)
        if network is not None:
            model, head = agreed_model(config.model, network, config.start), network.head
            if config.kind != "bradley_terry":
                check_policy(network, config.start)
        elif model is None:
            raise UserError(f"{config.start} does not say what model it holds: set MODEL to the one it was trained as")
    if model is None:
        raise UserError(
            "there is no model: set MODEL, such as by --gin_file=gin/models/t5_tiny.gin, or START to a run's folder"
        )
    markers: tuple[int, ...] = ()
    if config.kind != POLICY and head is None:
        assert vocabulary is not None
        markers = tuple(extra_id(vocabulary, i) for i in range(len(Markers._fields)))
    adapter = None if config.adapter.rank is None else config.adapter
    return Network(config.kind, model, markers, place, digest, adapter, head=head)


def samples_kept(online: OnlineConfig) -> int:
    """Responses a prompt in the batches of an online source."""
    return {"all": online.samples, "best_and_worst": 2, "best": 1}[online.keep]


def gives_rewards(online: OnlineConfig) -> bool:
    """Whether an online source's scores are to be compared: rewards, and shares of wins among more than two samples."""
    return online.judge.labels == REWARDS or (online.samples > 2 and online.against == "each_other")
