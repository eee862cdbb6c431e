"""A model card: the README.md of an exported folder, with the method, the data, and what an evaluation measured.

A card names folders by their last part alone, so that it publishes nothing of the machine.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from alignment_gap import __version__
from alignment_gap.checkpoints import find_checkpoint, known_network
from alignment_gap.checkpoints.huggingface.folder import installed
from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.folders import JOB, AnyPath, at, read_json
from alignment_gap.jobs.config import POLICY
from alignment_gap.jobs.evaluate import RESULTS
from alignment_gap.jobs.folder import finished_with

# What a card says of a training job: a label for each setting, shown where it is set.
_METHOD = {
    "source.samples": "samples for each prompt",
    "source.keep": "kept of them",
    "source.refresh_every": "steps between two refreshes of the sampler",
    "source.mixture": "share of the reference in the mixture",
    "source.sampler.temperature": "temperature",
    "steps": "steps",
    "batch_size": "prompts in a step",
    "optimizer.name": "optimizer",
    "optimizer.learning_rate": "learning rate",
    "optimizer.schedule": "schedule",
    "adapter.rank": "rank of the adapters",
    "adapter.alpha": "alpha of the adapters",
    "seed": "seed",
}
# A row of the measured table: the metric, its mean, and the ends of its 95 % interval.
Row = tuple[str, float, float, float]


def model_card(path: AnyPath, name: str, library: str, step: int | None = None, evaluation: str | None = None) -> str:
    """The text of a model card for a run's checkpoint, with the metadata that the Hugging Face Hub reads.

    Args:
      path: the run's folder, its checkpoints/, or the folder of a step.
      name: what the model is called.
      library: which library loads the export, "transformers" or "peft".
      step: which checkpoint; None for the last.
      evaluation: folder of a finished evaluation of this checkpoint; None for none.

    Raises:
      UserError: there is no such checkpoint, or the evaluation is not finished or measured another one.
    """
    hub, folder = installed("huggingface_hub"), find_checkpoint(path, step)
    job = folder.parent.parent / JOB
    settings = read_json(job, remedy="give the folder that the job wrote") if job.exists() else {}
    measured = _measured(evaluation, folder) if evaluation else []
    metadata = hub.ModelCardData(
        library_name=library,
        model_name=name,
        tags=["alignment_gap", *([_objective(settings), _kind(settings)] if settings else [])],
        eval_results=[
            hub.EvalResult(
                task_type="text-generation",
                dataset_type="preference",
                dataset_name=_evaluated_on(str(evaluation)),
                metric_type=metric,
                metric_value=mean,
            )
            for metric, mean, _, _ in measured
        ]
        or None,
    )
    origin = f"trained by {_kind(settings)} {_objective(settings)}" if settings else "imported, not trained here"
    network = "policy" if known_network(folder).kind == POLICY else "preference model"
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"Step {folder.name} of a {network} that was {origin}, with alignment_gap {__version__}.",
    ]
    if settings:
        lines += ["## Method", _table(("setting", "value"), _method(settings))]
        lines += ["## Data", _table(("dataset", "examples", "made from", "digest"), map(_data, _datasets(settings)))]
    if measured:
        rows = ((metric, f"{mean:.3f}", f"{low:.3f} to {high:.3f}") for metric, mean, low, high in measured)
        lines += [
            "## Evaluation",
            f"Means over the prompts or pairs of {_evaluated_on(str(evaluation))}. `win_rate.JUDGE.OPPONENT` is the "
            "share of prompts on which the judge prefers this policy's response. `kl` is the KL to the reference, and "
            "it and log-ratios are in nats; lengths are in tokens.",
            _table(("metric", "mean", "95 % interval"), rows),
        ]
    else:
        lines += ["## Evaluation", "No evaluation was given."]
    return "\n\n".join(lines) + "\n"


def _objective(settings: Mapping[str, Any]) -> str:
    """The loss of a policy; a preference model has none, and its kind says what it learns."""
    return str(settings["loss.name"] if settings["kind"] == POLICY else settings["kind"])


def _kind(settings: Mapping[str, Any]) -> str:
    return "online" if "source.prompts.folder" in settings else "offline"


def _method(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bound = {key.removeprefix("loss.settings."): value for key, value in settings.items() if "loss.settings." in key}
    if settings["kind"] == POLICY:
        yield "loss", _objective(settings) + (f" ({_joined(bound)})" if bound else "")
    else:
        yield "kind", _objective(settings)
    for role, key in (("judge", "source.judge.judge"), ("start", "start"), ("reference", "reference")):
        if settings.get(key) is not None:
            digest = settings.get(f"{role}.digest")
            yield role, _last(str(settings[key])) + (f", digest {str(digest)[:12]}" if digest else "")
    sizes = {"batch_size": settings.get("source.prompts.batch_size", settings.get("source.batch_size"))}
    without_adapters = {"adapter.alpha": None} if settings.get("adapter.rank") is None else {}
    shown = {**settings, **sizes, **without_adapters}
    yield from ((label, str(shown[key])) for key, label in _METHOD.items() if shown.get(key) is not None)


def _datasets(settings: Mapping[str, Any]) -> list[str]:
    """The datasets of a training job, of its second source too."""
    keys = (f"{source}.{part}folder" for source in ("source", "fresh") for part in ("", "prompts."))
    return [place for key in keys if settings.get(key) for place in str(settings[key]).split(",")]


def _data(place: str) -> tuple[str, str, str, str]:
    """A row about a dataset; of one that has gone, its name alone."""
    try:
        card = open_dataset(place).card
    except UserError:
        return _last(place), "", "", ""
    return _last(place), f"{card.count:,}", ", ".join(dict.fromkeys(_sources(card.provenance))), card.digest[:12]


def _sources(provenance: Mapping[str, Any]) -> Iterator[str]:
    """What a dataset was first made from, through all that it was derived from."""
    source = provenance.get("source")
    if isinstance(source, Mapping) and source.get("location"):
        location = str(source["location"])
        yield location if location.startswith("hub:") else _last(location)
    for part in provenance.get("inputs", ()):
        yield from _sources(part["provenance"])


def _measured(evaluation: str, folder: AnyPath) -> list[Row]:
    """What an evaluation says of the checkpoint in `folder`; raises UserError if it says nothing of it."""
    place = at(evaluation)
    settings = finished_with(place)
    if settings is None or settings["kind"] != "evaluate":
        raise UserError(f"{evaluation} is not a finished evaluation: give the --output of alignment-gap evaluate")
    run, asked = find_checkpoint(at(settings["run"])).parent.parent, folder.parent.parent
    rows = {row["step"]: row for row in csv.DictReader(io.StringIO((place / RESULTS).read_text()))}
    if settings["best_of"] or _resolved(run) != _resolved(asked) or folder.name not in rows:
        measured = "best-of-n" if settings["best_of"] else f"the steps {', '.join(rows)}"
        raise UserError(
            f"{evaluation} measured {measured} of {settings['run']}, and step {folder.name} of {asked} is exported: "
            "give an evaluation of this checkpoint"
        )
    row = rows[folder.name]
    names = [name for name in row if f"{name}_low" in row and row[name]]
    return [(name, float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"])) for name in names]


def _evaluated_on(evaluation: str) -> str:
    return _last((finished_with(at(evaluation)) or {})["dataset"])


def _resolved(path: AnyPath) -> str:
    return str(path.resolve() if hasattr(path, "resolve") else path)


def _last(place: str) -> str:
    """The last part of a folder's name; of a language model behind a URL, the model."""
    return place.rpartition("#")[2] if "#" in place else PurePath(place).name


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
