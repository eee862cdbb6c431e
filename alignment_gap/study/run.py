"""Runs a study: every stage that is not finished, then the report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignment_gap.configuration import flatten, to_dict
from alignment_gap.folders import claim, locked, write_json
from alignment_gap.models import sizes
from alignment_gap.progress import progress_bar
from alignment_gap.sharding import make_mesh
from alignment_gap.study import artefacts
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.config import Arm, StudyConfig, arms, golden_arm, validate
from alignment_gap.study.report import JudgeFacts, ReportContext, peaks_text, write_report
from alignment_gap.study.stage_functions import evaluation_prompts
from alignment_gap.study.stages import SeedStages, seed_stages

VERSIONS = ("alignment-gap", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "array-record", "numpy")
# Arrays of an evaluation that are no outcomes.
MEASURED = ("responses", "lengths")
# Below this agreement with human labels the report says how little the golden model knows of them.
WEAK_JUDGE = 0.65


def run_sizes(config: StudyConfig, workdir: Path, *, update: bool = False, say: Callable[[str], None] = print) -> None:
    """A scaling study: one study for each of the config's sizes, in `workdir`/SIZE.

    They share workdir/artefacts, and with it every stage that does not depend on the policy: the data, and judges that
    do not start from it, with their labels. Arguments and errors are those of `run_study`.
    """
    studies = {name: of_size(config, name) for name in config.sizes}
    for study in studies.values():
        validate(study, jax.device_count())
    for name, study in studies.items():
        say(f"size {name}")
        run_study(study, workdir / name, artefacts_folder=workdir / "artefacts", update=update, say=say)


def of_size(config: StudyConfig, name: str) -> StudyConfig:
    """The study of one size: its shape, with the vocabulary and the settings of the computation of the policy."""
    kept = ("vocabulary_size", "dtype", "remat", "scan_unroll")
    policy = sizes.get(name, **{field: getattr(config.policy, field) for field in kept})
    return dataclasses.replace(config, name=f"{config.name} {name}", policy=policy, sizes=())


def run_study(
    config: StudyConfig,
    workdir: Path,
    *,
    artefacts_folder: Path | None = None,
    update: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Runs every stage that `workdir` does not hold yet and writes report.html, results.csv and figures/ there.

    Args:
      config: the study.
      workdir: its folder; finished stages are under artefacts/ and are never made twice.
      artefacts_folder: where they are instead, for studies that share some.
      update: allows a folder that holds another config's study; what does not depend on the change is kept.
      say: prints a line.

    Returns:
      The report's path.

    Raises:
      UserError: where a setting or an input cannot be used, or the folder is another study's or in use.
    """
    validate(config, jax.device_count())
    mesh = make_mesh(config.mesh)
    root = artefacts_folder or workdir / "artefacts"
    seeds = [seed_stages(config, seed, mesh, root) for seed in range(config.seed, config.seed + config.seeds)]
    with locked(workdir):
        _claim(workdir / "study.json", flatten(to_dict(config)), update=update)
        root.mkdir(exist_ok=True)
        run_stages([stage for seed in seeds for stage in seed.in_order()], root, say)
        results = [result for seed in seeds for result in seed_results(seed, root)]
        report = write_report(workdir, results, report_context(config, seeds, root))
    say(peaks_text(results))
    say(f"report: {report}")
    return report


def _claim(path: Path, settings: dict[str, Any], *, update: bool) -> None:
    if update:
        write_json(path, settings)
        return
    claim(
        path,
        settings,
        remedy="give another --workdir, or --update to replace its report and redo only the stages that depend on what "
        "changed",
    )


def run_stages(stages: Sequence[artefacts.Stage], root: Path, say: Callable[[str], None]) -> None:
    """Runs unfinished stages in order, each with a progress bar and an ETA."""
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if stage.folder(root).exists():
            say(f"{title}: finished before")
            continue
        with progress_bar(stage.units, title) as bar:
            artefacts.make(stage, root, bar.update)


def seed_results(seed: SeedStages, root: Path) -> Iterator[CheckpointResult]:
    """Every evaluated checkpoint of a seed; the SFT policy is the origin, at step 0."""
    for arm, folder in _evaluated(seed, root):
        for path in _by_step(folder):
            with np.load(path) as arrays:
                outcomes = {name: arrays[name] for name in arrays.files if name not in MEASURED}
            yield CheckpointResult(arm.name, arm.loss, arm.beta, arm.learning_rate, seed.seed, int(path.stem), outcomes)


def report_context(config: StudyConfig, seeds: Sequence[SeedStages], root: Path) -> ReportContext:
    """What the report says beside the numbers."""
    settings = to_dict(config) | {"arms": _arms_table(config), "training of all arms": to_dict(config.arms)}
    stages = [stage for seed in seeds for stage in seed.in_order()]
    judges = [_judge_facts(seed, root) for seed in seeds]
    return ReportContext(
        study=config.name,
        config=settings,
        versions={name: importlib.metadata.version(name) for name in VERSIONS}
        | {"python": platform.python_version(), "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
        seeds=[seed.seed for seed in seeds],
        judges=judges,
        samples=_samples(seeds[0], root),
        wall_time={stage.name: _read(stage.folder(root) / "artefact.json")["seconds"] for stage in stages},
        notes=_notes(config, judges),
    )


def _arms_table(config: StudyConfig) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm.name,
            "loss": arm.loss,
            "beta": arm.beta,
            "learning_rate": arm.learning_rate,
            "steps": config.arms.checkpoint_steps[-1],
            "batch_size": config.arms.batch_size,
        }
        for arm in [golden_arm(config), *arms(config)]
    ]


def _judge_facts(seed: SeedStages, root: Path) -> JudgeFacts:
    golden, proxy = (_read(stage.folder(root) / "facts.json") for stage in (seed.golden, seed.proxy))
    return JudgeFacts(
        seed=seed.seed,
        golden_accuracy=golden["validation_accuracy"],
        golden_rubric_agreement=golden["rubric_agreement"],
        proxy_train_accuracy=proxy["train_accuracy"],
        proxy_validation_accuracy=proxy["validation_accuracy"],
    )


def _samples(seed: SeedStages, root: Path) -> list[dict[str, Any]]:
    """The last checkpoint's responses of every arm to the first evaluation prompts, as text."""
    bench = seed.bench
    prompts = evaluation_prompts(bench, seed.relabelled.folder(root))[: bench.config.evaluation.shown]
    samples = []
    for arm, folder in _evaluated(seed, root):
        path = _by_step(folder)[-1]
        with np.load(path) as arrays:
            responses = [
                row[:length].tolist() for row, length in zip(arrays["responses"], arrays["lengths"], strict=True)
            ]
        for example, response in zip(prompts, responses, strict=False):
            prompt = example.prompt.tolist()
            samples.append(
                {
                    "prompt": bench.vocabulary.decode(prompt),
                    "arm": arm.name,
                    "loss": arm.loss,
                    "step": int(path.stem),
                    "response": bench.vocabulary.decode(response),
                    "rubric": None if bench.rubric is None else float(bench.rubric([prompt], [response])[0]),
                }
            )
    return samples


def _evaluated(seed: SeedStages, root: Path) -> list[tuple[Arm, Path]]:
    """Every arm, SFT first, with the folder of its evaluation."""
    origin = Arm("sft", "sft", math.nan, seed.bench.config.sft.optimizer.learning_rate)
    stages = [(origin, seed.origin), *((arm, evaluation) for arm, _, evaluation in seed.runs)]
    return [(arm, stage.folder(root)) for arm, stage in stages]


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))


def _notes(config: StudyConfig, judges: Sequence[JudgeFacts]) -> list[str]:
    """What the numbers can bear, from the study's own sizes and from how good its judges are."""
    prompts, pairs = config.evaluation.prompts, config.evaluation.pairs
    notes = [
        f"Win rates rest on {prompts} prompts: the interval of one is up to {196 / math.sqrt(4 * prompts):.1f} points "
        f"to each side; accuracies rest on {pairs} pairs, up to {196 / math.sqrt(4 * pairs):.1f} points.",
        f"{config.seeds} seed{'s' if config.seeds > 1 else ''}: "
        + (
            "intervals cover the choice of seeds as far as so few can tell."
            if config.seeds > 1
            else "intervals cover the choice of prompts, not what another seed would give."
        ),
        "Prompts of the evaluation are training prompts, as in the paper; only the samples are new.",
    ]
    worst = min(judge.golden_accuracy for judge in judges)
    if worst < WEAK_JUDGE:
        notes.append(
            f"The golden model agrees with held-out human labels on {worst:.0%} of pairs, where guessing gives 50 %: "
            "win rates by it tell what it learned to like, and little of what people prefer."
        )
    if config.task.kind == "human_pairs":
        notes.append(
            "The policies are small and start from nothing but this data: they do not write useful answers. The study "
            "shows how the arms differ under these judges, not what a pretrained model would do."
        )
    return notes


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
