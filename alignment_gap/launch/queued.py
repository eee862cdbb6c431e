"""Runs jobs one after another on a TPU slice, requested as a queued resource; this needs no Kubernetes.

The script below requests the slice, waits for it, runs each command on all of its hosts, and gives the slice back.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.interruption import TRY_AGAIN
from alignment_gap.launch.slices import slice_of
from alignment_gap.launch.tasks import USER_ERROR, Task, waiting_tasks

_SCRIPT = """\
#!/bin/bash
# Requests a TPU slice, runs jobs on all of its hosts, and gives it back.
set -u
gcloud_tpus() {{ gcloud compute tpus "$@" {place}; }}

state() {{ gcloud_tpus queued-resources describe {name} '--format=value(state.state)' 2> /dev/null || true; }}

give_back() {{ gcloud_tpus queued-resources delete {name} --force --quiet; }}

ask() {{
    # A slice that was taken back or that failed stays in the list until it is deleted.
    case "$(state)" in SUSPENDED | FAILED) give_back || exit 1 ;; esac
    if [ -z "$(state)" ]; then
        gcloud_tpus queued-resources create {name} {request} || exit 1
        fresh=yes
    fi
    while [ "$(state)" != ACTIVE ]; do
        case "$(state)" in
            FAILED | "") echo "error: the slice {name} is not available" >&2; exit 1 ;;
        esac
        sleep {look_every}
    done
    if [ "$fresh" = yes ]; then on_hosts all {setup} || exit 1; fi
    fresh=no
}}

on_hosts() {{ gcloud_tpus tpu-vm ssh {name} --worker="$1" --command="$2"; }}

run() {{
    for attempt in $(seq 0 {retries}); do
        ask
        echo "$1: started"
        on_hosts "$2" "$3"
        status=$?
        # {user_error}: another attempt would fail again. {try_again}: the job was asked to end, and has saved.
        case $status in
            0) echo "$1: done"; return ;;
            {user_error}) break ;;
        esac
    done
    echo "error: $1 failed with exit status $status: fix it and launch again" >&2
    exit "$status"
}}

fresh=yes
trap give_back EXIT
{runs}
"""


@dataclasses.dataclass(frozen=True)
class QueuedConfig:
    """The slice to request.

    Attributes:
      name: name of the queued resource and of its node.
      topology: topology of the slice, such as v5e:4x4.
      zone: zone of the slice; None for gcloud's default.
      project: project that pays; None for gcloud's default.
      spot: whether to use a spot slice, which may be taken back at any time; the script then requests it again.
      setup: shell command for each host of a new slice; it installs this package and mounts the shared storage.
      folder: folder in which commands run; it must be the same shared storage on all hosts.
      retries: how often a job is tried again after its slice was taken back or its processes crashed.
      look_every: seconds between two looks at a waiting request.
    """

    name: str = "alignment-gap"
    topology: str = "v5e:4x4"
    zone: str | None = None
    project: str | None = None
    spot: bool = False
    setup: str = "true"
    folder: str | None = None
    retries: int = 10
    look_every: int = 30

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or TPU VMs do not offer the slice."""
        checks.at_least(self, 0, "retries")
        checks.at_least(self, 1, "look_every")
        if slice_of(self.topology).runtime is None:
            raise UserError(f"topology {self.topology!r} is not offered as a queued resource: use the engine jobset")


def queued_text(tasks: Sequence[Task], config: QueuedConfig, logs: Path) -> str:
    """The script that would run."""
    waiting = waiting_tasks(tasks)
    if not waiting:
        return "all jobs are done"
    if config.folder is None:
        raise UserError("queued.folder is not set: add --queued.folder=FOLDER, which all hosts of the slice share")
    slice_ = slice_of(config.topology)
    request = {
        "node-id": config.name,
        "accelerator-type": slice_.accelerator_type,
        "runtime-version": slice_.runtime,
    }
    place = {"zone": config.zone, "project": config.project}
    return _SCRIPT.format(
        name=shlex.quote(config.name),
        place=_flags({key: value for key, value in place.items() if value}),
        request=_flags(request) + (" --spot" if config.spot else ""),
        setup=shlex.quote(config.setup),
        retries=config.retries,
        look_every=config.look_every,
        user_error=USER_ERROR,
        try_again=TRY_AGAIN,
        runs="\n".join(_run(task, config, slice_.hosts) for task in waiting),
    )


def _flags(settings: dict[str, str | None]) -> str:
    return " ".join(shlex.quote(f"--{key}={value}") for key, value in settings.items())


def _run(task: Task, config: QueuedConfig, hosts: int) -> str:
    assert config.folder is not None
    together = task.processes and hosts > 1
    command = shlex.join(["alignment-gap", *task.words, *(["--coordinator=auto"] if together else [])])
    if not task.processes:
        # It runs on one host only, where the TPU would wait for the other hosts' TPUs.
        command = f"JAX_PLATFORMS=cpu {command}"
    words = ["run", task.name, "all" if task.processes else "0", f"cd {shlex.quote(config.folder)} && {command}"]
    return shlex.join(words)


def run_queued(tasks: Sequence[Task], config: QueuedConfig, logs: Path, say: Callable[[str], None] = print) -> None:
    """Runs the script, and keeps it in the folder of logs.

    Raises:
      UserError: a setting is missing, gcloud is not installed, or the script fails.
    """
    text = queued_text(tasks, config, logs)
    if not waiting_tasks(tasks):
        say(text)
        return
    if shutil.which("gcloud") is None:
        raise UserError("this machine has no gcloud: install it and log in, or give --dry_run")
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "queued.sh"
    path.write_text(text)
    if status := subprocess.run(["bash", str(path)]).returncode:
        raise UserError(f"the script {path} ended with exit status {status}: see its output")
