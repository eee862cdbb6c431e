"""One training job: a policy or a preference model trained offline on a dataset, in a folder that resumes itself.

workdir/
  job.json                   the settings
  checkpoints/STEP/          complete or absent
  metrics.jsonl              a line per `log_every` steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from alignment_gap import losses
from alignment_gap.checkpoints import (
    CHECKPOINTS,
    TOKENIZER,
    Network,
    agreed_model,
    check_vocabulary,
    find_checkpoint,
    preference_network,
    read_network,
    tokenizer_of,
)
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket
from alignment_gap.data.batches.collation import Examples
from alignment_gap.data.batches.offline import OfflineSource
from alignment_gap.data.batches.prefetch import Prefetched
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.log_probs import ReferenceLogProbs, open_reference
from alignment_gap.errors import UserError
from alignment_gap.folders import claim, locked
from alignment_gap.models import DecoderConfig, ModelConfig, Policy, T5Config
from alignment_gap.models.preference import KINDS
from alignment_gap.sharding import (
    LogicalMesh,
    MeshConfig,
    check_batch_size,
    is_first_process,
    make_mesh,
    on_every_process,
    on_first_process,
)
from alignment_gap.training.checkpoints import Checkpoints
from alignment_gap.training.loop import Source, make_score, train, with_reference
from alignment_gap.training.offline import (
    DatasetConfig,
    batch_shapes,
    datasets_digest,
    job_batches,
    job_steps,
    on_devices,
    open_datasets,
)
from alignment_gap.training.optimizers import OptimizerConfig, make_optimizer
from alignment_gap.training.reference import reference_identity, store_reference
from alignment_gap.training.state import TrainState, abstract_state, create_state, state_from_params
from alignment_gap.training.update import Objective, make_update_step, policy_objective, preference_objective

POLICY = "policy"
METRICS, CARD = "metrics.jsonl", "job.json"
REFERENCE_LOG_PROBS = ("auto", "stored", "each_step")
# What a resumed run may change: none of it alters the steps that were taken.
_MESH = tuple(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig))
_OF_DATA = tuple(f"dataset.{name}" for name in ("epochs", "packing", "prefetch"))
_MAY_CHANGE = ("steps", "checkpoint_every", "log_every", "microbatches", *_OF_DATA, *_MESH)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """A loss by name.

    Attributes:
      name: one of `losses.names()`.
      settings: its keyword-only parameters, such as {"beta": 0.1}.
    """

    name: str = "ipo"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One training job.

    Attributes:
      model: the policy; None for the one of `start`.
      kind: "policy"; or a preference model, "pairwise" or "bradley_terry", which asks the policy.
      loss: what a policy is trained with; a preference model learns the labels.
      dataset: what it is trained on.
      optimizer: its settings.
      mesh: the device mesh.
      steps: gradient steps; 0 for those of `dataset.epochs`.
      checkpoint_every: steps between two checkpoints; the last step has one too.
      log_every: steps between two lines of metrics.
      microbatches: parts in which a step's batch is computed, one after the other, to save memory.
      seed: of fresh parameters and of the shuffle.
      start: folder of the run whose parameters training starts from; empty for fresh ones.
      start_step: which of its checkpoints; 0 means the last.
      reference: folder of the run that is the reference policy; empty for the one of `start`, where the loss takes a
        reference and the dataset has no reference log-probs.
      reference_step: which of its checkpoints; 0 means the last.
      reference_log_probs: the reference's log-probs are "stored" beside the dataset, and computed first where they are
        not; or computed in "each_step"; or "auto", those that are stored where there are, or else in each step. What is
        stored counts only for the same dataset, checkpoint, lengths and precision.
    """

    model: T5Config | DecoderConfig | None = None
    kind: str = "policy"
    loss: LossConfig = LossConfig()
    dataset: DatasetConfig = DatasetConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 1000
    checkpoint_every: int = 200
    log_every: int = 20
    microbatches: int = 1
    seed: int = 0
    start: str = ""
    start_step: int = 0
    reference: str = ""
    reference_step: int = 0
    reference_log_probs: str = "auto"


def run_job(
    config: JobConfig,
    workdir: Path,
    progress: Callable[[int], None] = lambda steps: None,
    tell: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Trains up to `config.steps` in `workdir`, from its last complete checkpoint where there is one.

    Args:
      config: the job.
      workdir: its folder.
      progress: is told how many steps are newly done, those of an earlier run first.
      tell: is given a line on what is trained on, before the first step.

    Returns:
      The state after the last step.

    Raises:
      UserError: where a setting or an input cannot be used, or the folder is another job's; before anything is written
        or compiled, but for a token id outside of the model's vocabulary, which is found when its batch is read.
    """
    _check_settings(config)
    _check_width(config)
    model = _model(config)
    config = dataclasses.replace(config, model=model)
    examples = on_every_process(lambda: open_datasets(config.dataset))
    dataset = examples.datasets[0]  # All of them agree in vocabulary, responses a prompt and fields.
    network = _network(config, model, dataset)
    mesh, policy = make_mesh(config.mesh), network.policy()
    check_batch_size("dataset.batch_size", config.dataset.batch_size, mesh.batch_parts, config.microbatches)
    shapes = batch_shapes(config.dataset, examples)
    reading: dict[str, Any] = {"seed": config.seed, "microbatches": config.microbatches}
    batches = job_batches(config.dataset, examples, shapes, mesh, **reading)
    config = dataclasses.replace(config, steps=job_steps(config.dataset, examples, config.steps))
    objective = _objective(config, network)
    optimizer = make_optimizer(config.optimizer)
    abstract = abstract_state(policy.init, optimizer, mesh)
    needs_reference = _needs_reference(config, dataset)
    _check_loss(config, objective, abstract, batches(0), with_reference=needs_reference)
    start = _params(config.start, config.start_step, model, dataset, abstract) if config.start else None
    reference = start if needs_reference else None
    if needs_reference and config.reference:
        reference = _params(config.reference, config.reference_step, model, dataset, abstract)
    stored = _stored_reference(config, examples, policy, reference, mesh, shapes) if needs_reference else []
    if stored:
        reference = None
        batches = job_batches(config.dataset, examples, shapes, mesh, **reading, references=stored)
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(_own(workdir, config, examples)))
        checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS, network))
        _check_not_beyond(config, checkpoints)
        if is_first_process():
            tell(_reading(config, batches))
        if start is None:
            state = create_state(policy.init, optimizer, mesh, jax.random.key(config.seed))
        else:
            state = state_from_params(start, abstract, optimizer)
        return train(
            state,
            make_update_step(objective, optimizer, mesh, abstract, microbatches=config.microbatches),
            stack.enter_context(_source(config, batches, policy, mesh, reference)),
            checkpoint_steps=(*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps),
            checkpoints=checkpoints,
            metrics_path=workdir / METRICS,
            log_every=config.log_every,
            progress=progress,
        )


def _reading(config: JobConfig, batches: OfflineSource) -> str:
    pairs, size = len(batches.examples), config.dataset.batch_size
    share = batches.padding().share
    return f"{config.steps:,} steps of {size} of {pairs:,} examples; {share:.1%} of the tokens in batches is padding"


@contextlib.contextmanager
def _source(
    config: JobConfig, batches: OfflineSource, policy: Policy, mesh: LogicalMesh, reference: Any
) -> Iterator[Source]:
    """The batches on the devices, read ahead; scored by the reference's parameters, where given, in each step."""
    placed = on_devices(batches, config.dataset, mesh, policy.config.vocabulary_size)
    with Prefetched(placed, config.dataset.prefetch, last=config.steps) as ahead:

        def source(step: int, state: TrainState) -> PreferenceBatch:
            return ahead(step)

        yield source if reference is None else with_reference(source, make_score(policy, mesh), reference)


@contextlib.contextmanager
def _own(workdir: Path, config: JobConfig, examples: Examples) -> Iterator[None]:
    """Holds the job's folder, which has its settings; raises UserError where it is another job's or in use."""
    settings = flatten(to_dict(config)) | {"dataset.digest": datasets_digest(examples)}
    with locked(workdir):
        claim(workdir / CARD, settings, remedy="give another folder, or these settings", may_change=_MAY_CHANGE)
        _carry_tokenizer(config, workdir)
        yield


def _stored_reference(
    config: JobConfig, examples: Examples, policy: Policy, params: Any, mesh: LogicalMesh, shapes: Sequence[Bucket]
) -> list[ReferenceLogProbs]:
    """The stored reference log-probs of every dataset, or none where the job computes them in each step."""
    if config.reference_log_probs == "each_step":
        return []
    if config.reference_log_probs == "stored":
        settings: dict[str, Any] = {"batch_size": config.dataset.batch_size, "buckets": shapes}
        return [store_reference(data, policy, params, mesh, **settings) for data in examples.datasets]
    found = [open_reference(data, reference_identity(data, policy, params, shapes)) for data in examples.datasets]
    return [stored for stored in found if stored] if all(found) else []


def _model(config: JobConfig) -> ModelConfig:
    """The model to train: that of the settings or, where they have none, that of the start."""
    if config.start:
        folder = find_checkpoint(Path(config.start), config.start_step or None)
        network = read_network(folder)
        if network is not None:
            return agreed_model(config.model, network, config.start)
        if config.model is None:
            raise UserError(f"{folder} does not say what model it holds: set MODEL to the one that it was trained as")
    if config.model is None:
        raise UserError(
            "there is no model: set MODEL, such as by --gin_file=gin/models/t5_tiny.gin, or START to a run's folder"
        )
    return config.model


def _network(config: JobConfig, model: ModelConfig, dataset: Dataset) -> Network:
    if config.kind == POLICY:
        return Network(model=model, vocabulary_digest=dataset.card.vocabulary_digest)
    return preference_network(config.kind, model, find_vocabulary(dataset, config.dataset.vocabulary))


def _objective(config: JobConfig, network: Network) -> Objective:
    if network.kind == POLICY:
        return policy_objective(network.policy(), _loss(config.loss))
    # The key of the order of pairs; the seed's own is that of fresh parameters.
    return preference_objective(network.preference_model(), jax.random.fold_in(jax.random.key(config.seed), 1))


def _carry_tokenizer(config: JobConfig, workdir: Path) -> None:
    """Copies the files that came with the start's parameters, so that they can leave with the trained ones."""
    tokenizer = tokenizer_of(find_checkpoint(Path(config.start), config.start_step or None)) if config.start else None
    if tokenizer:
        shutil.copytree(tokenizer, workdir / TOKENIZER, dirs_exist_ok=True)


def _params(path: str, step: int, model: ModelConfig, dataset: Dataset, abstract: TrainState) -> Any:
    """The parameters of another run's checkpoint, of its last one for step 0."""
    folder = find_checkpoint(Path(path), step or None)
    network = read_network(folder)
    if network is not None:
        agreed_model(model, network, path)
        check_vocabulary(network, dataset.card.vocabulary_digest, path, str(dataset.folder))
    with Checkpoints(folder.parent) as checkpoints:
        return checkpoints.restore_params(abstract.params, int(folder.name))


def _loss(config: LossConfig) -> Callable[..., Any]:
    try:
        return losses.get(config.name, **config.settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_width(config: JobConfig) -> None:
    """Raises UserError where the width of a batch's rows decides the loss, and is not always the same."""
    divisor = inspect.signature(_loss(config.loss)).parameters.get("max_length")
    if divisor and divisor.default is None and (config.dataset.packing or config.dataset.buckets > 1):
        raise UserError(
            f"the loss {config.loss.name} divides by the width of a batch's rows, which packing and buckets change: "
            "set its max_length in LossConfig.settings"
        )


def _needs_reference(config: JobConfig, dataset: Dataset) -> bool:
    """Whether reference log-probs have to be computed."""
    if config.kind != POLICY:
        return False
    if "reference_log_probs" in dataset.card.fields:
        if config.reference:
            raise UserError(
                f"{config.dataset.folder} has reference log-probs of its own: leave reference={config.reference!r} "
                "empty"
            )
        return False
    there = bool(config.reference or config.start)
    inputs = [p for p in inspect.signature(_loss(config.loss)).parameters.values() if p.name.startswith("ref_")]
    if not there and any(p.default is inspect.Parameter.empty for p in inputs):
        raise UserError(
            f"the loss {config.loss.name} needs a reference policy: set start or reference to the folder of a run, "
            "such as one of supervised fine-tuning"
        )
    return bool(config.reference) or (there and bool(inputs))


def _check_loss(
    config: JobConfig, objective: Objective, abstract: TrainState, batch: PreferenceBatch, *, with_reference: bool
) -> None:
    """Traces the loss on the shapes of the first batch, so that what it asks for and does not get is told at once."""
    if with_reference:
        batch = dataclasses.replace(batch, reference_log_probs=jnp.zeros(batch.responses.shape))
    try:
        jax.eval_shape(objective, abstract.params, batch, abstract.step)
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the loss {config.loss.name} with {dict(config.loss.settings)} does not run: {reason}"
        ) from error


def _check_settings(config: JobConfig) -> None:
    for name in ("steps", "checkpoint_every", "log_every", "microbatches"):
        if getattr(config, name) < (name != "steps"):
            raise UserError(f"{name} is {getattr(config, name)}: it must be at least 1")
    for name in ("start_step", "reference_step"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} is {getattr(config, name)}: give the step of a checkpoint, or 0 for the last")
    if config.kind not in (POLICY, *KINDS):
        raise UserError(f"kind is {config.kind!r}: choose one of {', '.join((POLICY, *KINDS))}")
    if config.kind != POLICY and config.reference:
        raise UserError(f"reference is {config.reference!r}: a preference model has none, leave it empty")
    if config.dataset.packing and config.dataset.buckets != 1:
        raise UserError(
            f"dataset.packing={config.dataset.packing} does not go with buckets={config.dataset.buckets}: choose one"
        )
    if config.dataset.prefetch < 0:
        raise UserError(f"dataset.prefetch={config.dataset.prefetch} is out of range: set 0 or more batches")
    if config.reference_log_probs not in REFERENCE_LOG_PROBS:
        raise UserError(
            f"reference_log_probs is {config.reference_log_probs!r}: choose one of {', '.join(REFERENCE_LOG_PROBS)}"
        )
    if not config.dataset.folder:
        raise UserError("dataset.folder is empty: give the folder of a prepared dataset")


def _check_not_beyond(config: JobConfig, checkpoints: Checkpoints) -> None:
    if checkpoints.steps() and checkpoints.steps()[-1] > config.steps:
        raise UserError(
            f"{checkpoints.folder} is at step {checkpoints.steps()[-1]}, beyond steps={config.steps}: raise steps, or "
            "give another folder"
        )
