"""Runs a graph of jobs on Kubernetes: a JobSet for each job, and an Argo workflow that creates them in order."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.launch.slices import Slice, slice_of
from alignment_gap.launch.tasks import USER_ERROR, Task, waiting_tasks

# A pod's name has at most 63 characters: this name, "-" and five characters that complete it, "-slice-0-0-" and five
# characters of its own.
_LONGEST_NAME = 34


@dataclasses.dataclass(frozen=True)
class JobSetConfig:
    """Settings of the jobs in a Kubernetes cluster.

    Attributes:
      image: container image with this package; see the Containerfile of this project.
      topology: topology of a slice, such as v5e:4x4.
      slices: number of slices for each job, joined by the data-centre network.
      volume: PersistentVolumeClaim with all folders; every pod must be able to write to it.
      mount: path of the volume in the pods; commands run there, so relative folders are in the volume.
      namespace: Kubernetes namespace; None for kubectl's default.
      queue: a LocalQueue of Kueue; None for no queue.
      service_account: service account of the pods; None for the namespace's default.
      spot: whether to use spot slices, which may be taken back at any time.
      cpus: CPUs of the pod of a command that needs no TPU.
      memory: memory of this pod, in Kubernetes' notation.
      grace: seconds that a job has to save after SIGTERM.
      restarts: how often a job is restarted after a pod was evicted, was killed or crashed.
      cluster: name of the cluster in the xpk commands of a dry run.
    """

    image: str | None = None
    topology: str = "v5e:4x4"
    slices: int = 1
    volume: str | None = None
    mount: str = "/runs"
    namespace: str | None = None
    queue: str | None = None
    service_account: str | None = None
    spot: bool = False
    cpus: int = 8
    memory: str = "32Gi"
    grace: int = 120
    restarts: int = 10
    cluster: str = "CLUSTER"

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "slices", "cpus", "grace")
        checks.at_least(self, 0, "restarts")
        if not PurePosixPath(self.mount).is_absolute():
            raise UserError(f"mount is {self.mount}: give a path from the root, such as /runs")
        if re.fullmatch(r"\d+(\.\d+)?([KMGTPE]i|[kMGTPE])?", self.memory) is None:
            raise UserError(f"memory is {self.memory!r}: write a number with Ki, Mi, Gi or Ti, such as 32Gi")
        slice_of(self.topology)


def object_name(name: str) -> str:
    """A name that Kubernetes accepts; if the name must change, a hash keeps it distinct from other names."""
    allowed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not allowed[:1].isalpha():
        allowed = f"job-{allowed}"
    if allowed == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{allowed[: _LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def manifest(task: Task, config: JobSetConfig) -> dict[str, Any]:
    """The JobSet of a task: one pod for each host of each slice, or one pod without a TPU."""
    slice_ = slice_of(config.topology)
    hosts, slices = (slice_.hosts, config.slices) if task.processes else (1, 1)
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        # If a pod fails, its job ends and all pods start again, because processes can only continue together.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "job", "operator": "In", "values": [USER_ERROR]},
                }
            ]
        },
        "template": {"metadata": {"labels": _labels()}, "spec": _pod(task, config, slice_)},
    }
    # Kubernetes completes the name, because another launch or study may have a job of the same name.
    metadata: dict[str, Any] = {"generateName": f"{object_name(task.name)}-", "labels": _labels()}
    if config.namespace:
        metadata["namespace"] = config.namespace
    if config.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = config.queue
    if task.processes:
        # Each job of the set gets its own slice.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": config.restarts,
                # An error that the user must fix fails the set; any other error restarts it.
                "rules": [{"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def _labels() -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "alignment-gap"}


def _command(task: Task, config: JobSetConfig, slice_: Slice) -> list[str]:
    together = task.processes and slice_.hosts * config.slices > 1
    return ["alignment-gap", *task.words, *(["--coordinator=auto"] if together else [])]


def _pod(task: Task, config: JobSetConfig, slice_: Slice) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "job",
        "image": config.image,
        "command": _command(task, config, slice_),
        "workingDir": config.mount,
        "volumeMounts": [{"name": "runs", "mountPath": config.mount}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": config.volume}}],
    }
    if config.service_account:
        pod["serviceAccountName"] = config.service_account
    if not task.processes:
        asked = {"cpu": str(config.cpus), "memory": config.memory}
        container["resources"] = {"requests": asked, "limits": asked}
        container["env"] = [{"name": "JAX_PLATFORMS", "value": "cpu"}]
        return pod
    container["resources"] = {"limits": {"google.com/tpu": str(slice_.chips)}}
    # Port 8471 is for libtpu, 8482 for jax's coordinator, 8080 for megascale.
    container["ports"] = [{"containerPort": port} for port in (8471, 8482, 8080)]
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": slice_.accelerator,
        "cloud.google.com/gke-tpu-topology": slice_.shape,
    }
    if config.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return pod


def workflow(tasks: Sequence[Task], config: JobSetConfig, name: str) -> dict[str, Any]:
    """An Argo workflow that creates the JobSet of each task after the tasks that it needs have completed."""
    steps, templates = [], []
    for task in tasks:
        step = {"name": object_name(task.name), "template": object_name(task.name)}
        if task.needs:
            step["depends"] = " && ".join(map(object_name, task.needs))
        steps.append(step)
        templates.append(
            {
                "name": object_name(task.name),
                "resource": {
                    "action": "create",
                    "setOwnerReference": True,
                    "manifest": yaml.safe_dump(manifest(task, config), sort_keys=False),
                    "successCondition": "status.terminalState == Completed",
                    "failureCondition": "status.terminalState == Failed",
                },
            }
        )
    metadata = {"generateName": f"{object_name(name)}-", "labels": _labels()}
    if config.namespace:
        metadata["namespace"] = config.namespace
    spec: dict[str, Any] = {
        "entrypoint": "graph",
        # A failed job stops only the jobs that need it.
        "templates": [{"name": "graph", "dag": {"failFast": False, "tasks": steps}}, *templates],
    }
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    return {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": metadata, "spec": spec}


def _objects(tasks: Sequence[Task], config: JobSetConfig, logs: Path) -> list[dict[str, Any]]:
    """The objects to create for the tasks that are not done: one JobSet, or a workflow named after their folder."""
    missing = [setting for setting in ("image", "volume") if getattr(config, setting) is None]
    if missing:
        raise UserError(f"jobset.{missing[0]} is not set: add --jobset.{missing[0]}={missing[0].upper()}")
    waiting = waiting_tasks(tasks)
    if len(waiting) == 1:
        return [manifest(waiting[0], config)]
    return [workflow(waiting, config, logs.absolute().parent.name)] if waiting else []


def xpk_line(task: Task, config: JobSetConfig) -> str:
    """The xpk command for the same image, slice and command; an xpk storage must hold the folders."""
    slice_ = slice_of(config.topology)
    # xpk does not set a working directory.
    command = f"cd {shlex.quote(config.mount)} && {shlex.join(_command(task, config, slice_))}"
    options = {
        "cluster": config.cluster,
        "workload": object_name(task.name),
        "tpu-type": slice_.accelerator_type,
        "num-slices": config.slices,
        "docker-image": config.image,
        "storage": config.volume,
        "max-restarts": config.restarts,
        "command": command,
    }
    return shlex.join(["xpk", "workload", "create", *(f"--{key}={value}" for key, value in options.items())])


def jobset_text(tasks: Sequence[Task], config: JobSetConfig, logs: Path) -> str:
    """The manifests that would be created, and, for users of xpk, the xpk command of each job on a slice."""
    made = _objects(tasks, config, logs)
    lines = [f"# {xpk_line(task, config)}" for task in waiting_tasks(tasks) if task.processes]
    return yaml.safe_dump_all(made, sort_keys=False) + "\n".join(lines) if made else "all jobs are done"


def submit_jobset(tasks: Sequence[Task], config: JobSetConfig, logs: Path, say: Callable[[str], None] = print) -> None:
    """Creates the objects for all tasks that are not done, with kubectl; Kubernetes keeps the logs.

    Raises:
      UserError: a setting is missing, kubectl is not installed, or the cluster refuses.
    """
    made = _objects(tasks, config, logs)
    if not made:
        say("all jobs are done")
        return
    if shutil.which("kubectl") is None:
        raise UserError("this machine has no kubectl: install it and give it access to the cluster, or give --dry_run")
    done = subprocess.run(
        ["kubectl", "create", "--filename=-"], input=yaml.safe_dump_all(made), capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"kubectl refused: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    say(done.stdout.strip())
