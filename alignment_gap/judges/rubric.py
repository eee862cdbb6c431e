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
    """The labels that the rubric gives by itself: rewards."""
    return REWARDS


def check(name: str) -> None:
    """Passes always; `open_judge` checks whether the dataset has a rubric."""


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh) -> Judge:
    """Opens the rubric of the task that a dataset comes from; raises UserError if the task has none."""
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
