"""The plan of a whole graph of jobs, such as a study's: what each job takes at best, and which jobs cost most.

Many jobs run the same programs with other numbers, such as a learning rate. `kept.kept` compiles each of them once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.folder import Job
from alignment_gap.plan.known import Known, Overrides
from alignment_gap.plan.plan import Compile, Plan, check_batches, make_plan
from alignment_gap.plan.steps import PlanConfig, programs_of
from alignment_gap.sharding.chips import parse_topology


class JobPlan(NamedTuple):
    """A job of a graph and its plan; None if it computes on no device."""

    job: Job
    plan: Plan | None

    @property
    def seconds(self) -> float:
        """The time of the job at best; 0 if it computes on no device."""
        return (self.plan.job_seconds or 0.0) if self.plan else 0.0

    @property
    def device_seconds(self) -> float:
        """The time of the job, times the number of its devices."""
        return self.seconds * self.plan.config.topology.devices if self.plan else 0.0


def plan_graph(jobs: Sequence[Job], topology: str, given: Overrides, compile_: Compile) -> list[JobPlan]:
    """Plans every job of a graph on the same devices.

    Args:
      jobs: the jobs, each after the jobs that it needs.
      topology: the devices, such as "v5e:16x16".
      given: the user's settings.
      compile_: compiles a program, such as `kept` returns.

    Raises:
      UserError: a job cannot be planned, or no job names a folder of `networks`; raised before anything is compiled.
    """
    given.check_folders(job.config for job in jobs)
    known = Known(jobs, given)
    configs = [_config(job, known, topology) for job in jobs]
    plans = [make_plan(config, compile_) if config else None for config in configs]
    return [*map(JobPlan, jobs, plans)]


def _config(job: Job, known: Known, topology: str) -> PlanConfig | None:
    """The programs of a job, and where they run; None if it computes on no device."""
    try:
        training, programs = programs_of(job.config, known)
        if not programs:
            return None
        config = PlanConfig(training, programs, parse_topology(topology, training.mesh.slices), search=False)
        check_batches(config)
        if any(program.calls is None for program in programs):
            raise UserError("the number of its examples is not known: give --examples")
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from error
    return config


def side_by_side(planned: Sequence[JobPlan], slices: int) -> float:
    """Seconds of the whole graph on so many slices: a free one takes the first job whose needs have ended."""
    waiting, running, ended, now = [*range(len(planned))], list[tuple[float, int]](), set[AnyPath](), 0.0
    while waiting or running:
        for place in [*waiting]:
            if len(running) < slices and all(need.folder in ended for need in planned[place].job.needs):
                waiting.remove(place)
                heapq.heappush(running, (now + planned[place].seconds, place))
        now, place = heapq.heappop(running)
        ended.add(planned[place].job.folder)
    return now


def longest_chain(planned: Sequence[JobPlan]) -> float:
    """Seconds of the whole graph, if each job has devices of its own and starts when the jobs that it needs end."""
    return side_by_side(planned, len(planned))
