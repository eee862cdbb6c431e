"""Engines that run a graph of jobs on what people have."""

from alignment_gap.launch.jobset import JobSetConfig, submit_jobset
from alignment_gap.launch.local import LocalConfig, run_local
from alignment_gap.launch.queued import QueuedConfig, run_queued
from alignment_gap.launch.slurm import SlurmConfig, submit_slurm
from alignment_gap.launch.status import status_text
from alignment_gap.launch.tasks import Task, waiting_tasks

__all__ = [
    "JobSetConfig",
    "LocalConfig",
    "QueuedConfig",
    "SlurmConfig",
    "Task",
    "run_local",
    "run_queued",
    "status_text",
    "submit_jobset",
    "submit_slurm",
    "waiting_tasks",
]
