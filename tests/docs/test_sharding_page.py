"""The commands and the Python of docs/sharding.md run; its table has the layouts of the code."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from built_in import write_posts

from alignment_gap.data.records import open_dataset
from alignment_gap.sharding import LAYOUTS

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
COMMAND = f"alignment-gap() {{ {sys.executable} -c 'from alignment_gap.cli.main import main; main()' \"$@\"; }}\n"


@pytest.mark.slow
def test_two_processes_train_and_label(tmp_path):
    write_posts(tmp_path / "runs" / "built_in" / "train", 16)
    (tmp_path / "gin").symlink_to(ROOT / "gin")
    (script,) = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        script = script.replace("8476", str(probe.getsockname()[1]))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        ["bash", "-ec", COMMAND + script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=480
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("checkpoints: runs/two/checkpoints") == 1
    assert (tmp_path / "runs" / "two" / "checkpoints" / "2").is_dir()
    assert json.loads((tmp_path / "runs" / "two" / "job.json").read_text())["mesh.layout"] == "fsdp"
    assert ran.stdout.count("runs/labelled: 16 examples") == 1
    pairs, labelled = (
        open_dataset(tmp_path / "runs" / "built_in" / "train"),
        open_dataset(tmp_path / "runs" / "labelled"),
    )
    assert [example.prompt.tolist() for example in labelled] == [example.prompt.tolist() for example in pairs]


def test_the_python_lays_out_a_batch():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    np.testing.assert_array_equal(scope["y"], 2.0)
    assert scope["y"].addressable_shards[0].data.shape == (2, 16, 64)
    assert len(scope["y"].addressable_shards) == jax.device_count()


def test_the_table_names_every_layout():
    words = {-1: {"all", "the rest"}}
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \|", TEXT, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(LAYOUTS)
    for name, written in rows:
        for size, word in zip(LAYOUTS[name].sizes, written.split(", "), strict=True):
            assert word in words.get(size, {str(size)})
