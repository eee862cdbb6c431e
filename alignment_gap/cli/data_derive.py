"""The sub-commands of `alignment-gap data` that work on datasets: shuffle, mix, relabel, generate, reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from alignment_gap.cli.data import definers, parse, require
from alignment_gap.cli.parsing import (
    define_compilation_cache,
    define_processes,
    join_processes,
    refuse_processes,
    use_compilation_cache,
)
from alignment_gap.errors import UserError

if TYPE_CHECKING:
    from alignment_gap.data.records.dataset import Card, Dataset, Example
    from alignment_gap.evaluation.datasets import Draw
    from alignment_gap.sampling import Labeller
    from alignment_gap.sharding import LogicalMesh


def shuffle(arguments: list[str]) -> None:
    """Shuffle a dataset, all of it or within successive windows."""

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        text("input", "", "The dataset.")
        text("output", "", "Folder of the shuffled one.")
        number("window", 0, "Examples that are shuffled together, batches times batch size; 0 for all.")
        number("seed", 0, "Of the order.")

    values = parse(arguments, define, shuffle.__doc__)
    if values is None:
        return

    from alignment_gap.data.tasks.derive import shuffle as run

    if values.window < 0:
        raise UserError(f"--window={values.window} is out of range: give so many examples, or 0 for all")
    (dataset,) = _open(values, "input")
    output = Path(require(values, "output"))
    _say(output, run(dataset, output, seed=_seed(values), window=values.window))


def mix(arguments: list[str]) -> None:
    """Mix datasets of one vocabulary by weight."""

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        flags.DEFINE_list("inputs", [], "The datasets, with commas between.", flag_values=values)
        flags.DEFINE_list("weights", [], "A weight for each; every example comes once where empty.", flag_values=values)
        text("output", "", "Folder of the mixture.")
        number("seed", 0, "Of the order.")

    values = parse(arguments, define, mix.__doc__)
    if values is None:
        return

    from alignment_gap.data.tasks.derive import mix as run

    try:
        weights = [float(weight) for weight in values.weights]
    except ValueError:
        raise UserError(f"--weights={','.join(values.weights)}: give numbers with commas between") from None
    output = Path(require(values, "output"))
    _say(output, run(_open(values, "inputs"), output, weights=weights, seed=_seed(values)))


def relabel(arguments: list[str]) -> None:
    """Give a dataset the labels of a preference model."""

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        text("input", "", "The dataset.")
        text("preference_model", "", "Folder of a preference model: a run, a study's stage, or a checkpoint.")
        text("output", "", "Folder of the relabelled dataset.")
        number("buckets", 4, "Shapes that batches are padded to at most, chosen from the lengths.")
        _define_device_flags(values)

    values = parse(arguments, define, relabel.__doc__)
    if values is None:
        return
    refuse_processes("data relabel")
    (dataset,) = _open(values, "input")
    output, model = Path(require(values, "output")), require(values, "preference_model")
    use_compilation_cache(values)

    from alignment_gap.data.batches.buckets import choose_buckets
    from alignment_gap.data.records.lengths import lengths_of
    from alignment_gap.data.tasks.derive import write_derived
    from alignment_gap.evaluation.datasets import Batching, label

    mesh = _mesh(values)
    longest = (dataset.card.max_prompt_length, dataset.card.max_response_length)
    batching = Batching(mesh, values.batch_size, choose_buckets(lengths_of(dataset), values.buckets, longest))
    labeller, facts = _labeller(model, dataset, mesh)
    facts["buckets"] = values.buckets  # They alter the rounding.

    def make(start: int, stop: int) -> Iterator[Example]:
        return label(itertools.islice(dataset, start, stop), labeller, batching)

    _say(output, write_derived(output, len(dataset), make, made_by="relabel", inputs={"pairs": dataset}, facts=facts))


def generate(arguments: list[str]) -> None:
    """Sample responses to a dataset's prompts from one policy, or from two against each other, and label them."""

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        text("prompts", "", "The dataset whose prompts are answered, each once.")
        flags.DEFINE_list("policies", [], "Folder of a policy, or of two with a comma between.", flag_values=values)
        text("preference_model", "", "Folder of what labels the samples; where empty all are equally good.")
        text("output", "", "Folder of the new dataset.")
        number("samples", 0, "Responses a prompt and policy; 0 for 2 of one policy, 1 of each of two.")
        number("response_length", 0, "Most tokens of a response; 0 for the longest of the dataset.")
        flags.DEFINE_float("temperature", 1.0, "Divides the logits.", flag_values=values)
        number("top_k", 0, "Only the k likeliest tokens; 0 for all.")
        flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens that reach this probability.", flag_values=values)
        number("seed", 0, "Of the samples.")
        text("vocabulary", "", "What the dataset was encoded with, where it is no longer at its place.")
        number("buckets", 4, "Lengths that prompts are padded to at most, chosen from theirs.")
        _define_device_flags(values)

    values = parse(arguments, define, generate.__doc__)
    if values is None:
        return
    refuse_processes("data generate")
    (dataset,) = _open(values, "prompts")
    if len(values.policies) not in (1, 2):
        raise UserError(f"--policies has {len(values.policies)} folders: give one policy, or two with a comma between")
    output = Path(require(values, "output"))
    use_compilation_cache(values)

    import numpy as np

    from alignment_gap.data.batches.buckets import choose_buckets
    from alignment_gap.data.records.lengths import lengths_of
    from alignment_gap.data.tasks.derive import distinct_prompts, write_derived
    from alignment_gap.evaluation.datasets import Batching, label, sample_examples

    mesh = _mesh(values)
    response_length = values.response_length or dataset.card.max_response_length
    numbers = distinct_prompts(dataset)
    # Of the samples nothing is known but how long they may be.
    lengths = np.column_stack([lengths_of(dataset)[numbers, 0], np.full(len(numbers), response_length)])
    shapes = choose_buckets(lengths, values.buckets, (dataset.card.max_prompt_length, response_length))
    batching = Batching(mesh, values.batch_size, shapes)
    draws, facts = _draws(values, dataset, response_length, mesh)
    labeller = None
    if values.preference_model:
        labeller, about = _labeller(values.preference_model, dataset, mesh)
        facts |= about

    def make(start: int, stop: int) -> Iterator[Example]:
        sampled = sample_examples((dataset[int(i)] for i in numbers[start:stop]), draws, batching)
        return label(sampled, labeller, batching) if labeller else sampled

    card = write_derived(output, len(numbers), make, made_by="generate", inputs={"prompts": dataset}, facts=facts)
    _say(output, card)


def reference(arguments: list[str]) -> None:
    """Compute the log-probs of a job's datasets under its reference policy ahead of it, and store them beside each.

    A job with REFERENCE_LOG_PROBS stored or auto uses them where it has the same datasets, reference, lengths, buckets,
    dtype and attention.
    """

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        flags.DEFINE_list("dataset", [], "The job's dataset, or all of its datasets.", flag_values=values)
        text("checkpoint", "", "Folder of the reference policy: a run, or a checkpoint.")
        number("buckets", 1, "Shapes that batches are padded to at most, as in the job.")
        number("prompt_length", 0, "Tokens that prompts are padded to, as in the job; 0 for the longest.")
        number("response_length", 0, "Tokens that responses are padded to, as in the job; 0 for the longest.")
        text("dtype", "", "float32 or bfloat16, as in the job's model; the checkpoint's own where empty.")
        text("attention", "", "xla, cudnn or splash, as in the job's model; the checkpoint's own where empty.")
        _define_device_flags(values)
        define_processes(values)

    values = parse(arguments, define, reference.__doc__)
    if values is None:
        return
    require(values, "dataset")
    checkpoint = require(values, "checkpoint")
    use_compilation_cache(values)
    join_processes(values)

    from alignment_gap.models import make_policy
    from alignment_gap.progress import progress_bar
    from alignment_gap.sharding import is_first_process, on_every_process
    from alignment_gap.training.checkpoints import load_policy
    from alignment_gap.training.offline import DatasetConfig, batch_shapes, open_datasets
    from alignment_gap.training.reference import store_reference

    lengths: dict[str, Any] = {name: values[name].value for name in ("buckets", "prompt_length", "response_length")}
    config = DatasetConfig(",".join(values.dataset), **lengths)
    examples = on_every_process(lambda: open_datasets(config))
    shapes = batch_shapes(config, examples)
    mesh = _mesh(values)
    policy, params = _load(load_policy, checkpoint, examples.datasets[0], mesh)
    changes = {name: values[name].value for name in ("dtype", "attention") if values[name].value}
    policy = make_policy(dataclasses.replace(policy.config, **changes))
    with progress_bar(len(examples), "scoring", " examples", silent=not is_first_process()) as bar:
        for dataset in examples.datasets:
            settings: dict[str, Any] = {"batch_size": values.batch_size, "buckets": shapes, "progress": bar.update}
            store_reference(dataset, policy, params, mesh, **settings)
    if is_first_process():
        for dataset in examples.datasets:
            print(f"{dataset.folder}: log-probs of {len(dataset):,} examples under {checkpoint}")


def _draws(
    values: flags.FlagValues, dataset: Dataset, response_length: int, mesh: LogicalMesh
) -> tuple[list[Draw], dict[str, Any]]:
    """What samples each policy, and the facts that decide the samples."""
    import jax
    import jax.numpy as jnp

    from alignment_gap.data.records.card import find_vocabulary
    from alignment_gap.sampling import SamplerConfig, make_generate
    from alignment_gap.sharding import replicated
    from alignment_gap.training.checkpoints import load_policy

    samples = values.samples or (2 if len(values.policies) == 1 else 1)
    if samples * len(values.policies) < 2 and values.preference_model:
        raise UserError(f"--samples={samples} of one policy cannot be compared: sample 2 or more, or give two policies")
    if samples < 1 or response_length < 1:
        raise UserError(f"--samples={samples} --response_length={response_length} are out of range: give 1 or more")
    config = SamplerConfig(values.temperature, values.top_k, values.top_p)
    eos_id = find_vocabulary(dataset, values.vocabulary).eos_id
    facts: dict[str, Any] = {
        "samples": samples,
        "response_length": response_length,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "seed": _seed(values),
        "buckets": values.buckets,  # They alter the rounding.
    }
    draws: list[Draw] = []
    for number, folder in enumerate(values.policies):
        policy, params = _load(load_policy, folder, dataset, mesh)
        draw = make_generate(policy, mesh, samples=samples, max_length=response_length, eos_id=eos_id, config=config)
        key = jax.random.fold_in(jax.random.key(values.seed), number)
        draws.append(functools.partial(draw, params, *jax.device_put((key, jnp.int32(0)), replicated(mesh))))
        facts |= _named(f"policy {number}", folder, params)
    return draws, facts


def _labeller(folder: str, dataset: Dataset, mesh: LogicalMesh) -> tuple[Labeller, dict[str, Any]]:
    from alignment_gap.sampling import preference_labeller
    from alignment_gap.training.checkpoints import load_preference_model

    model, params = _load(load_preference_model, folder, dataset, mesh)
    return preference_labeller(model, params, mesh), _named("preference_model", folder, params)


def _load(load: Callable[..., Any], folder: str, dataset: Dataset, mesh: LogicalMesh) -> Any:
    from alignment_gap.checkpoints import check_vocabulary, find_checkpoint, known_network
    from alignment_gap.sharding import on_every_process

    def check() -> None:
        network = known_network(find_checkpoint(Path(folder), None))
        check_vocabulary(network, dataset.card.vocabulary_digest, folder, str(dataset.folder))

    on_every_process(check)
    return load(Path(folder), mesh)


def _named(role: str, folder: str, params: Any) -> dict[str, str]:
    from alignment_gap.training.reference import params_digest

    return {role: folder, f"{role}.digest": params_digest(params)}


def _open(values: flags.FlagValues, name: str) -> list[Dataset]:
    """The datasets of a flag, read through once so that what is damaged is told before any work."""
    from alignment_gap.data.records.dataset import open_dataset, verify_dataset

    require(values, name)
    folders: Any = values[name].value
    datasets = [open_dataset(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
    for dataset in datasets:
        verify_dataset(dataset)
    return datasets


def _seed(values: flags.FlagValues) -> int:
    if not 0 <= values.seed < 2**32:
        raise UserError(f"--seed={values.seed} is out of range: set it from 0 to {2**32 - 1}")
    return int(values.seed)


def _define_device_flags(values: flags.FlagValues) -> None:
    text, number = definers(values)
    number("batch_size", 64, "Prompts at a time, over all devices.")
    text("layout", "data", "How a model is laid over the devices: data, fsdp, tensor, ...")
    define_compilation_cache(values)


def _mesh(values: flags.FlagValues) -> LogicalMesh:
    from alignment_gap.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(layout=values.layout))
    if values.batch_size < 1 or values.batch_size % mesh.batch_parts:
        raise UserError(
            f"--batch_size={values.batch_size}: it must be a multiple of the {mesh.batch_parts} parts that the layout "
            "splits a batch into"
        )
    return mesh


def _say(output: Path, card: Card) -> None:
    print(f"{output}: {card.count:,} examples, digest {card.digest[:12]}")
