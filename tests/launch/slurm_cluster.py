"""A real Slurm of several nodes on this machine, for tests and trials.

Usage: python tests/launch/slurm_cluster.py --nodes 3 -- COMMAND

It starts munged, slurmctld and one slurmd for each node, all in one folder. Then it runs the command; SLURM_CONF names
the cluster's config. Debian's packages slurm-wlm and munge have the programs. Run it as root: slurmd needs root.
"""

import argparse
import contextlib
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Preempted jobs return to the queue, and have some time to save. Credentials expire soon, because a requeued job waits
# until they do.
CONFIG = """
ClusterName=here
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,requeue_delay=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 State=UP MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP MaxTime=INFINITE
"""


def missing():
    """Why no cluster can start here; empty if one can."""
    lost = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if lost:
        return f"{', '.join(lost)} not installed: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd has to be started by root"


@contextlib.contextmanager
def cluster(nodes=2, cpus=1):
    """A running Slurm; yields the environment in which its commands find it."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    started = []

    def start(*words):
        with (folder / f"{words[0]}.log").open("a") as log:
            started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))

    try:
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        folder.chmod(0o755)
        ports = free_ports(1 + nodes)
        host = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1"
        lines = [f"NodeName=node{i} {host} Port={port} CPUs={cpus} State=UNKNOWN" for i, port in enumerate(ports[1:])]
        settings = {"ports": ports, "user": getpass.getuser(), "folder": folder, "nodes": "\n".join(lines)}
        (folder / "slurm.conf").write_text(CONFIG.format(**settings))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        start("munged", "--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in files.items()))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-c")
        for i in range(nodes):
            start("slurmd", "-D", "-N", f"node{i}")
        wait_for(lambda: idle_nodes(environment) == nodes, "slurmctld", folder)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def idle_nodes(environment):
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%N %T", "-p", "low"], env=environment, capture_output=True, text=True
    )
    return sum(line.split()[1] == "idle" for line in done.stdout.splitlines())


def wait_for(is_there, name, folder, seconds=120):
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{name} did not start within {seconds} s:\n{logs}")
        time.sleep(0.2)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs="+")
    flags = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    with cluster(flags.nodes) as environment:
        sys.exit(subprocess.run(flags.command, env=environment).returncode)


if __name__ == "__main__":
    main()
