"""The built-in task's rubric as a judge: the true quality of a response."""

from __future__ import annotations

import numpy as np

from alignment_gap.data.records import Dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.errors import UserError
from alignment_gap.judges.contract import REWARDS, Judge, JudgeConfig
from alignment_gap.judges.host import host_judge
from alignment_gap.sharding import LogicalMesh

RUBRIC = "rubric"


def accepts(name: str) -> bool:
    """Whether this module opens the judge of this name."""
    return name == RUBRIC


def own_labels(name: str) -> str:
    """What the judge of this name gives by itself."""
    return REWARDS


def check(name: str) -> None:
    """There is always a rubric; whether a dataset has one is told when it is opened."""


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh) -> Judge:
    """The rubric of the task that a dataset comes from; raises UserError where it has none."""
    rubric = rubric_of(dataset)
    if rubric is None:
        raise UserError(
            f"{dataset.folder} does not come from the built-in task, which alone has a rubric: give a judge"
        )

    def rewards(prompts: list[list[int]], responses: list[list[list[int]]]) -> np.ndarray:
        samples = len(responses[0])
        flat = [response for each in responses for response in each]
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        return rubric(repeated, flat).reshape(len(prompts), samples)

    return host_judge(rewards, config, mesh, {"judge": RUBRIC})
