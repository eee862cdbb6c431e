"""The stages of the study: SFT -> golden -> relabel -> proxy -> arms -> opponents -> evaluation, for every seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment_gap.configuration import to_dict
from alignment_gap.sharding import LogicalMesh
from alignment_gap.study import stage_functions as functions
from alignment_gap.study.artefacts import Progress, Stage
from alignment_gap.study.bench import Bench
from alignment_gap.study.config import Arm, StudyConfig, arms, golden_arm


@dataclasses.dataclass(frozen=True)
class SeedStages:
    """The stages of one seed.

    Attributes:
      seed: of this repetition.
      bench: what they work with.
      data, sft, golden, relabelled, proxy, opponents: the stages that all arms share.
      runs: every arm with its training and its evaluation.
      origin: the evaluation of the SFT policy.
    """

    seed: int
    bench: Bench
    data: Stage
    sft: Stage
    golden: Stage
    relabelled: Stage
    proxy: Stage
    opponents: Stage
    runs: tuple[tuple[Arm, Stage, Stage], ...]
    origin: Stage

    def in_order(self) -> list[Stage]:
        """Every stage after those that it needs."""
        shared = [self.data, self.sft, self.golden, self.relabelled, self.proxy]
        trainings = [training for _, training, _ in self.runs]
        return [*shared, *trainings, self.opponents, self.origin, *(evaluation for *_, evaluation in self.runs)]


def seed_stages(config: StudyConfig, seed: int, mesh: LogicalMesh, root: Path) -> SeedStages:
    """All stages of one seed; nothing is run."""
    bench = Bench(dataclasses.replace(config, task=dataclasses.replace(config.task, seed=seed)), seed, mesh)
    make = functools.partial(_stage, bench, root)
    config = bench.config
    # A judge that starts from the SFT policy has its network by that stage; another is shared by policies of all sizes.
    training = {"mesh": config.mesh, "microbatches": config.microbatches}
    shared = {**training, "policy": config.policy}

    data = make("data", functions.write_data, {"task": config.task})
    sft = make("sft", functions.train_sft, {**shared, "sft": config.sft}, data, units=config.sft.steps)
    golden_inputs = (data, sft) if config.golden.initialisation == "sft" else (data,)
    golden = make(
        "golden",
        functions.train_golden,
        {**training, "judge": config.golden},
        *golden_inputs,
        units=config.golden.steps,
    )
    relabelled = make("relabelled", functions.relabel, {"kind": config.golden.kind}, data, golden)
    proxy_inputs = (relabelled, sft) if config.proxy.initialisation == "sft" else (relabelled,)
    proxy = make(
        "proxy", functions.train_proxy, {**training, "judge": config.proxy}, *proxy_inputs, units=config.proxy.steps
    )

    trainings: dict[Arm, Stage] = {}
    steps = config.arms.checkpoint_steps[-1]
    for arm in [golden_arm(config), *arms(config)]:
        run_settings: dict[str, Any] = {
            **shared,
            "arm": arm,
            "checkpoint_steps": config.arms.checkpoint_steps,
            "batch_size": config.arms.batch_size,
            "optimizer": dataclasses.replace(config.arms.optimizer, learning_rate=arm.learning_rate),
        }
        if arm.name in ("golden", "online"):
            inputs: tuple[Stage, ...] = (sft, relabelled, golden if arm.name == "golden" else proxy)
            run: Callable[..., None] = functions.train_online
            run_settings = {**run_settings, "sampler": config.sampler}
        else:
            online = dataclasses.replace(arm, name="online")
            inputs, run = (sft, trainings[online] if arm.name == "shuffled" else relabelled), functions.train_offline
        trainings[arm] = make(arm.title, functools.partial(run, arm=arm), run_settings, *inputs, units=steps)

    measured = {"sampler": config.sampler, "evaluation": config.evaluation}
    golden_policy = trainings[golden_arm(config)]
    opponents = make("opponents", functions.draw_opponents, measured, sft, relabelled, golden_policy, units=2)
    judges = (opponents, relabelled, golden, proxy, sft)

    def evaluation(name: str, trained: Stage, steps: Sequence[int | None]) -> Stage:
        run = functools.partial(functions.evaluate, steps=steps)
        return make(f"evaluation-{name}", run, {**measured, "steps": list(steps)}, trained, *judges, units=len(steps))

    runs = tuple(
        (arm, training, evaluation(arm.title, training, config.arms.checkpoint_steps))
        for arm, training in trainings.items()
    )
    return SeedStages(
        seed, bench, data, sft, golden, relabelled, proxy, opponents, runs, evaluation("sft", sft, (None,))
    )


def _stage(
    bench: Bench,
    root: Path,
    name: str,
    run: Callable[..., None],
    settings: dict[str, Any],
    *inputs: Stage,
    units: int = 1,
) -> Stage:
    """A stage whose function is called as run(bench, folder, progress, *folders of the inputs)."""

    def plain(value: Any) -> Any:
        return to_dict(value) if dataclasses.is_dataclass(value) else value

    def fill(folder: Path, progress: Progress) -> None:
        run(bench, folder, progress, *(stage.folder(root) for stage in inputs))

    content = {"seed": bench.seed, "stage": name} | {key: plain(value) for key, value in settings.items()}
    return Stage(f"seed{bench.seed}-{name}", content, inputs, fill, units)
