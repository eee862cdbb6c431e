"""The progress of each job of a graph, read from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignment_gap.folders import JOB, AnyPath, is_held, read_json
from alignment_gap.jobs.folder import FAILED, finished_with
from alignment_gap.launch.tasks import Task
from alignment_gap.training.monitor import METRICS


def status_text(tasks: Sequence[Task]) -> str:
    """A line for every job: done, running (with step, rate and remaining time), failed (with its error), or waiting."""
    width = max(len(task.name) for task in tasks)
    done = {task.name for task in tasks if task.is_done}
    return "\n".join(f"{task.name:{width}}  {_state(task, done)}" for task in tasks)


def _state(task: Task, done: set[str]) -> str:
    if task.name in done:
        return "done"
    missing = [name for name in task.needs if name not in done]
    if missing:
        return f"waiting for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    folder = task.folder
    if folder is None or not (folder / JOB).exists():
        return "ready"
    if finished_with(folder) is not None:
        return "done with other settings: its command continues it or refuses"
    progress = _progress(folder)
    if is_held(folder):
        return f"running{progress}"
    if (folder / FAILED).exists():
        return f"failed: {read_json(folder / FAILED, remedy='remove it')['line']}"
    return f"stopped{progress}"


def _progress(folder: AnyPath) -> str:
    """Step, rate and remaining time of a training job, from its last line of metrics."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    steps = read_json(folder / JOB, remedy="remove the folder").get("steps")
    if not lines or not steps:
        return ""
    try:
        last = json.loads(lines[-1])
    except ValueError:  # The line is being written.
        return ""
    if "pairs_per_second" not in last:
        return f", step {last['step']} of {steps}"
    rate = last["pairs_per_second"] / last["prompts"]
    left = (steps - last["step"]) / rate
    return f", step {last['step']} of {steps}, {rate:.3g} steps/s, {left:.0f} s to go"
