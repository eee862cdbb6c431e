"""Runs commands in several processes on this machine, like a small pod: eight devices in total."""

import json
import os
import pathlib
import re
import subprocess
import sys

from alignment_gap.launch.local import free_port

# Runs commands one after the other. The first command joins the processes; they stay joined.
COMMANDS = """
import json, sys
from alignment_gap.cli.main import main
shared = sys.argv[2:]
for words in json.loads(sys.argv[1]):
    sys.argv = ["alignment-gap", *words, *shared]
    shared = []
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""

# Gin settings of a network that trains in a moment on the built-in task.
TINY_T5 = {
    "VOCABULARY_SIZE": 136,
    "T5Config.width": 16,
    "T5Config.encoder_layers": 1,
    "T5Config.decoder_layers": 1,
    "T5Config.heads": 2,
    "T5Config.head_size": 8,
    "T5Config.mlp_width": 16,
}

# Several threads of Gloo print that they have connected; their lines can mix with each other.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d")


def said_by(output):
    """The lines of standard output that do not come from Gloo."""
    return [line for line in output.splitlines() if GLOO.sub("", line).strip()]


def run_processes(folder, *commands, caches=False):
    """Runs one process for each list of commands, in `folder`; returns exit statuses and outputs.

    With `caches` each process has its own cache folder, as on a machine of its own.
    """
    count = len(commands)
    flags = (
        f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    shared = ["--compilation_cache=", f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, json.dumps(words), *shared, f"--process={number}"],
            cwd=folder,
            env=environment | ({"ALIGNMENT_GAP_CACHE": f"{folder}/cache{number}"} if caches else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, words in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs
