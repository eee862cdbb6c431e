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

# Seconds that a process has to save after SIGTERM, and the exit status of ssh without a connection.
_GRACE, _CONNECTION_LOST = 300, 255

_SCRIPT = """\
#!/bin/bash
# Requests a TPU slice, runs jobs on all of its hosts, and gives it back.
set -u
gcloud_tpus() {{ gcloud compute tpus "$@" {place}; }}

describe() {{ gcloud_tpus queued-resources describe {name} '--format=value(state.state)'; }}

# Prints the slice's state. Without a slice it prints nothing.
state() {{
    local errors
    for look in $(seq 10); do
        {{ errors=$(describe 2>&1 >&3); }} 3>&1 && return
        case "$errors" in *NOT_FOUND*) return 0 ;; esac
        echo "$errors" >&2
        sleep {look_every}
    done
    echo "error: the state of the slice {name} is not known: see the errors of gcloud, then launch again" >&2
    return 1
}}

# A slice costs until it is deleted, so a signal ends the script only after gcloud has created or deleted it.
give_back() {{ (trap '' HUP INT TERM; gcloud_tpus queued-resources delete {name} --force --quiet) && trap - EXIT; }}

create() {{
    local asked=no status
    trap 'asked=yes' HUP INT TERM
    (trap '' HUP INT TERM; gcloud_tpus queued-resources create {name} {request})
    status=$?
    if [ $status -eq 0 ]; then trap give_back EXIT; fi
    end_if_asked
    if [ $asked = yes ]; then exit {try_again}; fi
    return $status
}}

end_if_asked() {{ trap 'exit {try_again}' HUP INT TERM; }}
end_if_asked

ask() {{
    local found
    while found=$(state) || exit 1; [ "$found" = SUSPENDING ]; do sleep {look_every}; done
    # A slice that was taken back or that failed stays in the list until it is deleted.
    case "$found" in SUSPENDED | FAILED) give_back || exit 1; found= ;; esac
    if [ -z "$found" ]; then
        # Another script may own a slice of this name: this one deletes only what it has created.
        trap - EXIT
        create || exit 1
        fresh=yes
    fi
    while found=$(state) || exit 1; [ "$found" != ACTIVE ]; do
        case "$found" in
            FAILED | SUSPENDED | "") echo "error: the slice {name} is not available" >&2; exit 1 ;;
        esac
        sleep {look_every}
    done
    if [ "$fresh" = yes ]; then on_hosts all {setup} || exit 1; fi
    fresh=no
}}

# In the background, because a signal interrupts `wait`, but no command in the foreground.
on_hosts() {{ gcloud_tpus tpu-vm ssh {name} --worker="$1" --command="$2" & wait $!; }}

# Each host runs this before and after a job's command. When a connection is lost, the process goes on and holds its
# folder, and gcloud runs the command again: then the earlier process is asked to save, and ends first.
before='
file=${{TMPDIR:-/tmp}}/alignment-gap.pid
if earlier=$(cat $file 2> /dev/null) && kill -TERM $earlier 2> /dev/null; then
    for second in $(seq {grace}); do kill -0 $earlier 2> /dev/null || break; sleep 1; done
    kill -KILL $earlier 2> /dev/null
fi
'
after='
job=$!
echo $job > $file
wait $job
status=$?
if grep -qx $job $file; then rm $file; fi
exit $status
'

run() {{
    for attempt in $(seq 0 {retries}); do
        ask
        echo "$1: started"
        on_hosts "$2" "$before$3 &$after"
        status=$?
        # {user_error}: another attempt would fail again. {try_again}: the job was asked to end, and has saved.
        # {connection_lost}: ssh lost the connection.
        case $status in
            0) echo "$1: done"; return ;;
            {user_error}) break ;;
            {connection_lost}) sleep {look_every} ;;
        esac
    done
    echo "error: $1 failed with exit status $status: fix it and launch again" >&2
    exit "$status"
}}

found=$(state) || exit 1
if [ -n "$found" ]; then
    echo "error: there is a queued resource {name} already, in state $found: give --queued.name=NAME, or if no other" \
        "launch uses it, delete it: gcloud compute tpus queued-resources delete {name} --force {place}" >&2
    exit 1
fi
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
        grace=_GRACE,
        user_error=USER_ERROR,
        connection_lost=_CONNECTION_LOST,
        try_again=TRY_AGAIN,
        runs="\n".join(_run(task, config, slice_.hosts) for task in waiting),
    )


def _flags(settings: dict[str, str | None]) -> str:
    return " ".join(shlex.quote(f"--{key}={value}") for key, value in settings.items())


def _run(task: Task, config: QueuedConfig, hosts: int) -> str:
    assert config.folder is not None
    together = task.processes and hosts > 1
    # A command of one process runs on one host only, where the TPU would wait for the other hosts' TPUs.
    variables = [] if task.processes else ["env", "JAX_PLATFORMS=cpu"]
    words = [*variables, "alignment-gap", *task.words, *(["--coordinator=auto"] if together else [])]
    # exec, so that the number of the process is the job's own.
    command = f"cd {shlex.quote(config.folder)} && exec {shlex.join(words)}"
    return shlex.join(["run", task.name, "all" if task.processes else "0", command])


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
    script = subprocess.Popen(["bash", str(path)])
    try:
        status = script.wait()
    except KeyboardInterrupt:
        say("interrupted: the script gives the slice back")
        script.terminate()
        script.wait()
        raise
    if status:
        raise UserError(f"the script {path} ended with exit status {status}: see its output")
