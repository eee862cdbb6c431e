"""A training job, online or offline, for a policy or a preference model; a stopped job resumes in its folder.

FOLDER/
  job.json, done.json        see `jobs.folder`
  checkpoints/STEP/          complete or absent
  metrics.jsonl              a line every `log_every` steps; `training.monitor` may write more files
  record/                    the samples of an online source, as a dataset
  reference.json             under `reference_log_probs="auto"`: where the reference's log-probs come from
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from alignment_gap import losses
from alignment_gap.checkpoints import (
    CHECKPOINTS,
    TOKENIZER,
    Network,
    agreed_model,
    check_policy,
    check_vocabulary,
    complete_steps,
    find_checkpoint,
    open_checkpoint,
    read_digest,
    read_network,
    run_like,
    tokenizer_of,
)
from alignment_gap.checkpoints.adapters import plain_tensors
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.data.batches.offline import Padding
from alignment_gap.data.records import Dataset
from alignment_gap.data.records.card import ends_prompts, find_vocabulary, template_place, vocabulary_place
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, copy_files, whole_path
from alignment_gap.jobs.assembly import (
    REFERENCE,
    Assembly,
    BatchShape,
    Facts,
    gives_rewards,
    trained_network,
)
from alignment_gap.jobs.config import (
    POLICY,
    DatasetConfig,
    JobConfig,
    MonitorConfig,
    OnlineConfig,
    SourceConfig,
    recorded,
)
from alignment_gap.jobs.folder import MESH, Kind, Opened
from alignment_gap.jobs.generate import ends_facts, policy_ends
from alignment_gap.jobs.monitor import open_monitor, open_validation
from alignment_gap.jobs.reading import Reading, has_rewards, open_reading
from alignment_gap.jobs.record import close_record, open_recorder
from alignment_gap.jobs.reference import stored_references
from alignment_gap.jobs.served import check_cards, check_recorded_reference
from alignment_gap.jobs.sources import Inputs, Parameters, frozen_of, open_source
from alignment_gap.jobs.words import gin_words
from alignment_gap.judges import Judge, open_judge
from alignment_gap.models import abstract_parameters
from alignment_gap.models.policy import HEAD
from alignment_gap.models.reward_head import init_head, replace_output, without_head, without_output
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import (
    first_says,
    make_mesh,
    on_every_process,
    on_first_process,
    put_replicated,
    unbox,
    undivided,
)
from alignment_gap.training import (
    Bases,
    Checkpoints,
    KeepConfig,
    TrainState,
    base_key,
    create_state,
    load_base,
    load_params,
    load_plain,
    shardings_like,
    state_from_params,
    train,
    with_copy,
)

# The number of buckets whose padding a job shows at its start, beside that of one shape.
_BUCKETS = 4
_SOURCES = ("source", "source.prompts", "fresh", "fresh.prompts")
# Settings that may change when a run resumes; they do not affect the steps already taken.
_MAY_CHANGE = (
    *("steps", "microbatches", "checkpoint_every", "checkpoint_steps", "log_every", "guard.stop_after"),
    *(_KEEP := tuple(f"keep.{field.name}" for field in dataclasses.fields(KeepConfig))),
    *(_MONITOR := tuple(f"monitor.{field.name}" for field in dataclasses.fields(MonitorConfig))),
    *(f"{source}.{name}" for source in _SOURCES for name in ("epochs", "packing", "prefetch", "vocabulary")),
    *MESH,
)


def open_training(config: JobConfig) -> Opened:
    """Opens a job's inputs, assembles its parts and checks that they fit together.

    Raises:
      UserError: a setting or an input cannot be used. It is raised before anything is written or compiled; only a token
        id outside the model's vocabulary is found later, when its batch is read.
    """
    reading = _open_reading(config.source, "source.prompts" if isinstance(config.source, OnlineConfig) else "source")
    fresh = _open_reading(config.fresh, "fresh") if config.fresh is not None else None
    _check_fresh(reading, fresh)
    config = dataclasses.replace(config, steps=reading.steps(config.steps))
    assembly = Assembly(config, _facts(config, reading, fresh), make_mesh(config.mesh))
    readings = (reading,) if fresh is None else (reading, fresh)
    if assembly.is_policy:
        check_cards(config, assembly.loss, *([each.card for each in found.datasets] for found in readings))
    assembly.check_loss(_example_batch(assembly, reading))
    start, network = _start(assembly), assembly.facts.network
    # Judge and reference share the base, if they are adapters of the same base.
    bases: Bases = {base_key(network): start.read} if start and network.base_digest else {}
    judge, online = None, config.online
    if online is not None and online.judge.judge is not None:
        asked = (fresh or reading).datasets[0]
        judge = open_judge(online.judge, asked, assembly.mesh, bases)
        _check_judge(judge, network, asked, config.recorded.vocabulary)
    reference = start
    if config.reference is not None:
        folder, other = _checked(config.reference, config.reference_step, assembly)
        # A moving reference is averaged with the policy, so it needs plain kernels.
        load = functools.partial(load_params, bases=bases) if config.reference_every is None else load_plain
        reference = Parameters(lambda: load(folder, other, assembly.mesh), read_digest(folder))
    for source, found in zip((config.source, config.fresh), readings, strict=False):
        if assembly.is_policy and isinstance(source, DatasetConfig):
            digest, cards = reference.digest if reference else None, [each.card for each in found.datasets]
            check_recorded_reference(config, assembly.loss, source, cards, digest)
    inputs = Inputs(reading, fresh, judge, start, reference, validation=open_validation(assembly, reading))
    facts: dict[str, Any] = {"source.digest": reading.digest} | ({"fresh.digest": fresh.digest} if fresh else {})
    for name, params, path in (("start", start, config.start), ("reference", reference, config.reference)):
        facts |= {f"{name}.digest": params.digest} if params is not None and path is not None else {}
    facts |= dict(judge.facts if judge else {})
    if online is not None:
        facts |= ends_facts("start", assembly.facts.end_ids)
    if config.optimizer.ends:  # The number of steps then changes the learning rate of earlier steps.
        facts["optimizer.steps"] = config.steps
    if config.microbatches > 1 and _reads_microbatches(config):
        facts["loss.microbatches"] = config.microbatches
    return Opened(facts, functools.partial(_run, assembly, inputs), functools.partial(_read_first, inputs))


def _reads_microbatches(config: JobConfig) -> bool:
    """Whether the gradient depends on the number of microbatches."""
    return losses.OTHER_PROMPTS in losses.reads(config.loss.function()) or bool(config.adapter.dropout)


def _open_reading(source: SourceConfig, setting: str) -> Reading:
    return open_reading(recorded(source), setting, prompts_only=isinstance(source, OnlineConfig))


def _check_fresh(reading: Reading, fresh: Reading | None) -> None:
    """Raises UserError if the two sources have different vocabularies."""
    digests = [each.datasets[0].card.vocabulary_digest for each in (reading, fresh) if each is not None]
    if len(set(digests)) > 1:
        raise UserError(
            f"fresh was prepared with the vocabulary {digests[1][:12]}, but source with {digests[0][:12]}: prepare "
            "both with the same one"
        )


def _facts(config: JobConfig, reading: Reading, fresh: Reading | None) -> Facts:
    """Facts about the inputs of a job."""
    dataset = reading.datasets[0]
    place = config.recorded.vocabulary or vocabulary_place(dataset)
    # A preference model's markers and the end id of samples come from the vocabulary.
    needs_vocabulary = config.kind != POLICY or config.online is not None
    vocabulary = find_vocabulary(dataset, config.recorded.vocabulary) if needs_vocabulary else None
    digest = dataset.card.vocabulary_digest
    network = on_every_process(lambda: _with_base(config, trained_network(config, digest, place, vocabulary)))
    network = dataclasses.replace(network, end_prompts=ends_prompts(dataset), template=template_place(dataset))
    online = config.source if isinstance(config.source, OnlineConfig) else None
    return Facts(
        network,
        _batch_shape(config.source, reading),
        _batch_shape(config.fresh, fresh) if config.fresh is not None and fresh is not None else None,
        fields=() if online else tuple(dataset.card.fields),
        rewards=gives_rewards(online) if online else has_rewards(reading),
        end_ids=_ends(config, vocabulary.eos_id) if vocabulary else Facts.end_ids,
    )


def _check_judge(judge: Judge, network: Network, dataset: Dataset, vocabulary: str | None) -> None:
    """Raises UserError if a judge lacks a row for a token that the policy may draw; the devices would take another."""
    rows, size = judge.vocabulary_size, network.model.vocabulary_size
    if rows is None or rows >= size:
        return
    # An embedding may have more rows than its vocabulary has tokens. Their number differs within a family, as Qwen's.
    tokens = min(size, find_vocabulary(dataset, vocabulary).size)
    if rows < tokens:
        raise UserError(
            f"the judge {judge.facts['judge']} has vocabulary_size={rows}, but the policy may draw {tokens} token ids: "
            "give a judge with at least as many"
        )


def _ends(config: JobConfig, eos_id: int) -> tuple[int, ...]:
    """The ids that end a sample: the vocabulary's, then those that the tokenizer files of the start name."""
    return (eos_id,) if config.start is None else policy_ends(config.start, eos_id, config.start_step)


def _with_base(config: JobConfig, network: Network) -> Network:
    """The network; if it has adapters, with the path and the digest of their base."""
    if network.adapter is None:
        return network
    folder = find_checkpoint(at(str(config.start)), config.start_step)
    return dataclasses.replace(network, base=whole_path(folder), base_digest=read_digest(folder))


def _batch_shape(source: SourceConfig, reading: Reading) -> BatchShape:
    (prompt, response), size = reading.shapes[-1], reading.config.batch_size
    if isinstance(source, OnlineConfig):
        return BatchShape(size, prompt, source.kept, source.response_length or response)
    return BatchShape(size, prompt, reading.datasets[0].card.responses_per_prompt, response)


def _example_batch(assembly: Assembly, reading: Reading) -> PreferenceBatch:
    """A batch to trace the loss on: abstract arrays, or the first batch if rows are packed."""
    config = assembly.config
    # Called for every job, because it raises if the order does not suit the examples.
    batches = reading.batches(assembly.mesh, config.seed, config.microbatches)
    if config.recorded.packing is None:
        return assembly.abstract_batch()
    batch = batches(0)
    if assembly.needs_reference:
        batch = dataclasses.replace(batch, reference_log_probs=jnp.zeros(batch.responses.shape))
    return batch


def _start(assembly: Assembly) -> Parameters | None:
    """The parameters that training starts from, with plain kernels; or the base of the adapters."""
    config = assembly.config
    if config.start is None:
        return None
    folder, network = _checked(config.start, config.start_step, assembly)
    wanted, mesh, said = assembly.facts.network, assembly.mesh, read_digest(folder)
    if wanted.adapter is not None:
        load = functools.partial(load_base, folder, network, mesh, wanted.adapter.base_dtype)
        return Parameters(load if wanted.head is None else lambda: without_head(load()), said)
    if network.head == wanted.head:
        return Parameters(lambda: load_plain(folder, network, mesh), said)
    return Parameters(lambda: _with_fresh_head(load_plain(folder, network, mesh), assembly), said)


def _with_fresh_head(params: Any, assembly: Assembly) -> Any:
    """A policy's parameters with a fresh reward head."""
    head, shardings = assembly.facts.network.head, shardings_like(assembly.abstract.params[HEAD])
    assert head is not None
    make = jax.jit(lambda key: unbox(init_head(assembly.policy, head, key)), out_shardings=shardings)
    return replace_output(params, make(jax.random.key(assembly.config.seed)))


def _checked(path: str, step: int | None, assembly: Assembly) -> tuple[AnyPath, Network]:
    """Another run's checkpoint and its network; raises UserError if its model or vocabulary is not the job's.

    The checkpoint of a policy can start a reward model, whose head replaces the output embedding.
    """
    folder, wanted = find_checkpoint(at(path), step), assembly.facts.network
    network = read_network(folder)
    if network is None:
        return folder, dataclasses.replace(wanted, adapter=None)
    if wanted.head is None:
        check_policy(network, path)
    inner = network.model if wanted.head == network.head else without_output(network.model)
    agreed_model(wanted.model, dataclasses.replace(network, model=inner), path)
    check_vocabulary(network, wanted.vocabulary_digest, path, str(assembly.config.recorded.folder))
    return folder, dataclasses.replace(network, model=run_like(network.model, wanted.model))


def _read_first(inputs: Inputs, folder: AnyPath) -> None:
    """Reads the parameters that a job without a checkpoint starts from, to find damage before anything is written."""
    if first_says(lambda: bool(complete_steps(folder / CHECKPOINTS))):
        return
    for params in (inputs.start, inputs.reference):
        if params is not None:
            params.read()


def _run(assembly: Assembly, inputs: Inputs, folder: AnyPath, open_bar: OpenBar) -> None:
    """Trains up to the job's last step in `folder`; resumes from its last complete checkpoint, if there is one."""
    config, steps = assembly.config, assembly.config.steps or 0
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / CHECKPOINTS, assembly.facts.network, config.keep))
        last_step = max(checkpoints.steps(), default=0)
        if last_step > steps:
            raise UserError(
                f"{checkpoints.folder} is at step {last_step}, beyond steps={steps}: raise steps, or give another "
                "folder"
            )
        on_first_process(lambda: _carry_tokenizer(config, folder))
        if not inputs.stored and assembly.needs_reference:
            inputs = inputs._replace(stored=stored_references(assembly, inputs, folder, open_bar))
        bar = stack.enter_context(open_bar(steps, folder.name, " steps"))
        bar.write(_summary(assembly, inputs.reading))
        for reading in filter(None, (inputs.reading, inputs.fresh)):
            if line := _repeats(reading):
                bar.write(line)
        parameters = abstract_parameters(assembly.facts.network.policy().init)
        if line := undivided(parameters, assembly.mesh.shape, assembly.mesh.rules):
            bar.write(line)
        state = checkpoints.restore_last(assembly.abstract, bar.write) or _first_state(assembly, inputs)
        if REFERENCE in state.copies and assembly.adapters is None:
            # The state holds a copy of the moving reference, so the loaded parameters can be freed.
            for params in filter(None, (inputs.start, inputs.reference)):
                params.forget()
        monitor = open_monitor(assembly, inputs, folder)
        frozen = frozen_of(assembly, inputs)
        train(
            state,
            lambda state, batch: assembly.update_step(state, batch, *frozen),
            stack.enter_context(open_source(assembly, inputs, steps, monitor.times)),
            checkpoint_steps=_checkpoint_steps(config, steps),
            checkpoints=checkpoints,
            monitor=monitor,
            log_every=config.log_every,
            skip=config.guard,
            refresh=assembly.refresh,
            recorder=open_recorder(assembly, folder, int(jax.device_get(state.step))),
            bar=bar,
        )
    if config.online is not None and config.online.record:
        on_first_process(lambda: close_record(assembly, inputs, folder))


def _first_state(assembly: Assembly, inputs: Inputs) -> TrainState:
    config, abstract, optimizer = assembly.config, assembly.abstract, assembly.optimizer
    if inputs.start is not None and assembly.adapters is None:
        state = state_from_params(inputs.start.read(), abstract, optimizer)
    else:
        state = create_state(assembly.facts.network.init, abstract, optimizer, jax.random.key(config.seed))
        if (head := _head_of_start(assembly)) is not None:
            state = state_from_params(state.params | {HEAD: head}, abstract, optimizer)
    if config.reference_every is not None and config.reference is not None and inputs.reference is not None:
        state = with_copy(state, REFERENCE, inputs.reference.read(), abstract)
    return state


def _head_of_start(assembly: Assembly) -> Any:
    """The head of the reward model that adapters are added to; None if it has none."""
    config = assembly.config
    if config.start is None or assembly.facts.network.head is None:
        return None
    stored = open_checkpoint(find_checkpoint(at(config.start), config.start_step))
    if stored.network is None or stored.network.head is None:
        return None
    tensors = plain_tensors(stored)

    def read(path: Any, _: Any) -> Any:
        return tensors[f"{HEAD}.{jax.tree_util.keystr(path, simple=True, separator='.')}"].read(None)

    return put_replicated(jax.tree.map_with_path(read, assembly.abstract.params[HEAD]), assembly.mesh)


def _checkpoint_steps(config: JobConfig, steps: int) -> list[int]:
    every = range(config.checkpoint_every, steps, config.checkpoint_every)
    return sorted({*every, *(step for step in config.checkpoint_steps if step < steps), steps})


def _summary(assembly: Assembly, reading: Reading) -> str:
    """The work ahead, and the share of padding; of buckets too if they would save a tenth of the token slots."""
    config = assembly.config
    line = f"{config.steps:,} steps of {reading.config.batch_size} of {len(reading.examples):,} examples"
    is_online = isinstance(config.source, OnlineConfig)

    def padding_of(reading: Reading) -> Padding:
        return reading.batches(assembly.mesh, config.seed, config.microbatches).padding(prompts_only=is_online)

    padding = padding_of(reading)
    line += f"; {padding.share:.1%} of the {'prompts' if is_online else 'batches'}' token slots hold padding"
    if _may_have_buckets(config.source, reading.config):
        bucketed = padding_of(reading.bucketed(_BUCKETS, prompts_only=is_online))
        if bucketed.slots <= 0.9 * padding.slots:
            line += f", with buckets={_BUCKETS} {bucketed.share:.1%}"
    return line


def _repeats(reading: Reading) -> str | None:
    """A line if a batch is larger than its datasets, so that examples come in it more than once."""
    size, count = reading.config.batch_size, len(reading.examples)
    if size <= count:
        return None
    return (
        f"batch_size is {size:,}, but {reading.config.folder} has {count:,} examples: each comes {size / count:.1f} "
        "times in a batch on average; lower batch_size for batches of different examples"
    )


def _may_have_buckets(source: SourceConfig, config: DatasetConfig) -> bool:
    is_plain = config.buckets == 1 and config.packing is None and config.order == "shuffle"
    return is_plain and not (isinstance(source, OnlineConfig) and source.steps_per_draw > 1)


def _carry_tokenizer(config: JobConfig, folder: AnyPath) -> None:
    """Copies the tokenizer files of the start, so that an export of the trained parameters can include them."""
    tokenizer = tokenizer_of(find_checkpoint(at(config.start), config.start_step)) if config.start else None
    if tokenizer:
        copy_files(tokenizer, folder / TOKENIZER)


TRAIN = Kind(
    name="train",
    command="train",
    config=JobConfig,
    open=open_training,
    summary=lambda folder: f"checkpoints: {folder / CHECKPOINTS}",
    output="workdir",
    words=gin_words,
    may_change=lambda folder: _MAY_CHANGE,
    without_effect=(
        "checkpoint_every",
        "log_every",
        *_KEEP,
        *_MONITOR,
        *(f"{source}.prefetch" for source in _SOURCES),
    ),
)
