"""`alignment-gap train` in several processes: the same training as in one, saved and restored together."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignment_gap.cli import train
from alignment_gap.data import PostsTaskConfig, posts_task, write_dataset
from alignment_gap.errors import UserError
from alignment_gap.sharding import initialize
from alignment_gap.training import Checkpoints
from alignment_gap.training.job import run_job

COMMAND = "import sys; from alignment_gap.cli.main import main; sys.argv[0] = 'alignment-gap'; main()"
SETTINGS = {
    "DATASET": "pairs",
    "BATCH_SIZE": 8,
    "VOCABULARY_SIZE": 136,
    "T5Config.width": 16,
    "T5Config.encoder_layers": 1,
    "T5Config.decoder_layers": 1,
    "T5Config.heads": 2,
    "T5Config.head_size": 8,
    "T5Config.mlp_width": 16,
    "CHECKPOINT_EVERY": 2,
    "JobConfig.log_every": 1,
    "MeshConfig.data": 2,
    "MeshConfig.fsdp": 2,
    "MeshConfig.model": 2,
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_processes(count, folder, settings, workdir):
    """Exit statuses and outputs of `count` processes with 8 devices together, started in `folder`."""
    devices = f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"XLA_FLAGS": devices, "PYTHONPATH": root, "JAX_COORDINATOR_ADDRESS": ""}
    flags = [f"--gin.{name}={value}" for name, value in (SETTINGS | settings).items()]
    flags += ["--gin_file=runs/sft.gin", f"--workdir={workdir}", "--compilation_cache="]
    if count > 1:
        flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, "train", *flags, f"--process={number}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    task = posts_task(PostsTaskConfig(pairs=32, validation_pairs=1))
    write_dataset(folder / "pairs", task.pairs, vocabulary_digest=task.vocabulary.digest, provenance={})
    return folder


@pytest.fixture(scope="module")
def together(folder):
    """The folder of a run that two processes, as two slices, took to step 2, and four from there to step 4."""
    for count, steps, slices in ((2, 2, 2), (4, 4, 1)):
        settings = {"TRAIN_STEPS": steps, "MeshConfig.slices": slices}
        statuses, outputs = run_processes(count, folder, settings, "many")
        assert statuses == [0] * count, outputs
        # The first alone speaks.
        assert ["many/checkpoints" in output for output, _ in outputs] == [True] + [False] * (count - 1)
    return folder / "many"


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_and_then_four_processes_train_what_one_does(folder, together, monkeypatch):
    """This process trains the same, then restores what four have saved.

    The sums over devices are taken in another order, which Adam's division can enlarge: parameters within 2e-5 where
    a step is 1e-3.
    """
    monkeypatch.chdir(folder)
    overrides = [f"{name}={value}" for name, value in (SETTINGS | {"TRAIN_STEPS": 4}).items()]
    config = train.read_config(["runs/sft.gin"], overrides)
    alone = run_job(config, folder / "one")
    assert [line["step"] for line in metrics(together)] == [1, 2, 3, 4]
    for expected, line in zip(metrics(folder / "one"), metrics(together), strict=True):
        np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(line["gradient_norm"], expected["gradient_norm"], rtol=1e-5)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), alone)
    with Checkpoints(together / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4]
        restored = checkpoints.restore(abstract, 4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    jax.tree.map(close, jax.device_get(restored), jax.device_get(alone))


def test_what_one_process_refuses_all_refuse(folder, together):
    (folder / "other").mkdir()
    settings = json.loads((together / "job.json").read_text()) | {"seed": 5}
    (folder / "other" / "job.json").write_text(json.dumps(settings))
    statuses, outputs = run_processes(2, folder, {"TRAIN_STEPS": 1}, "other")
    assert statuses == [2, 2], outputs
    for _, error in outputs:
        assert "error: " in error and "seed was 5, now 0" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("", 2, 0), "2 processes without a coordinator"),
        (("", 1, 1), "without a coordinator"),
        (("host:1", 2, 2), "process 2 of 2: processes are numbered from 0 to 1"),
    ],
)
def test_processes_that_cannot_meet_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        initialize(*flags)
