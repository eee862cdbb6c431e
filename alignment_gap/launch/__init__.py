"""Engines that run a graph of jobs: on this machine, Slurm, TPU slices or Kubernetes.

An engine is a config and two functions of `(tasks, config, logs)`. One returns as text what would run; the other runs
or submits it.
"""

from alignment_gap.launch.jobset import JobSetConfig, jobset_text, submit_jobset
from alignment_gap.launch.local import LocalConfig, local_text, run_local
from alignment_gap.launch.queued import QueuedConfig, queued_text, run_queued
from alignment_gap.launch.slurm import SlurmConfig, slurm_text, submit_slurm
from alignment_gap.launch.status import status_text
from alignment_gap.launch.tasks import Task, waiting_tasks

__all__ = [
    "JobSetConfig",
    "LocalConfig",
    "QueuedConfig",
    "SlurmConfig",
    "Task",
    "jobset_text",
    "local_text",
    "queued_text",
    "run_local",
    "run_queued",
    "slurm_text",
    "status_text",
    "submit_jobset",
    "submit_slurm",
    "waiting_tasks",
]
