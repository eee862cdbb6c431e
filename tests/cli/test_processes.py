"""`alignment-gap train` and `data reference` in several processes do together what one process does."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import texts

from alignment_gap.cli import train
from alignment_gap.data.batches import collate
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.tasks.task import PostsTaskConfig, posts_task
from alignment_gap.errors import UserError
from alignment_gap.models import score
from alignment_gap.sharding import initialize
from alignment_gap.training import Checkpoints, reference
from alignment_gap.training.checkpoints import load_policy
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


def train_words(settings, workdir, files=("runs/sft.gin",)):
    words = [f"--gin.{name}={value}" for name, value in (SETTINGS | settings).items()]
    return ["train", *words, *(f"--gin_file={file}" for file in files), f"--workdir={workdir}"]


def run_processes(folder, *commands):
    """Exit statuses and outputs of one process for each command, with 8 devices together, started in `folder`."""
    count = len(commands)
    devices = f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"XLA_FLAGS": devices, "PYTHONPATH": root, "JAX_COORDINATOR_ADDRESS": ""}
    flags = ["--compilation_cache=", f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words, *flags, f"--process={number}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, words in enumerate(commands)
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
        statuses, outputs = run_processes(folder, *count * [train_words(settings, "many")])
        assert statuses == [0] * count, outputs
        # The first alone speaks.
        assert ["many/checkpoints" in output for output, _ in outputs] == [True] + [False] * (count - 1)
    return folder / "many"


def job(settings, files=("runs/sft.gin",)):
    """What `train_words` says, for this process."""
    return train.read_config(files, [f"{name}={value}" for name, value in (SETTINGS | settings).items()])


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_and_then_four_processes_train_what_one_does(folder, together, monkeypatch):
    """This process trains the same, then restores what four have saved.

    The sums over devices are taken in another order, which Adam's division can enlarge: parameters within 2e-5 where
    a step is 1e-3.
    """
    monkeypatch.chdir(folder)
    alone = run_job(job({"TRAIN_STEPS": 4}), folder / "one")
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
    statuses, outputs = run_processes(folder, *2 * [train_words({"TRAIN_STEPS": 1}, "other")])
    assert statuses == [2, 2], outputs
    for _, error in outputs:
        assert "error: " in error and "seed was 5, now 0" in error


REFERENCE = ["data", "reference", "--checkpoint=start", "--layout=fsdp", "--batch_size=16"]
IPO = {"START": "start", "REFERENCE_LOG_PROBS": "stored", "TRAIN_STEPS": 3, "LEARNING_RATE": 0.01, "WARMUP_STEPS": 0}
IPO_FILES = ("runs/sft.gin", "losses/ipo.gin")


@pytest.fixture(scope="module")
def scored(folder):
    """The folder with a policy, `start`, and its log-probs of `pairs`, which two processes have stored."""
    with contextlib.chdir(folder):
        run_job(job({"TRAIN_STEPS": 2}), folder / "start")
    statuses, outputs = run_processes(folder, *2 * [[*REFERENCE, "--dataset=pairs"]])
    assert statuses == [0, 0], outputs
    # The first alone speaks.
    assert ["pairs: log-probs of 32 examples under start" in output for output, _ in outputs] == [True, False]
    assert ["scoring" in error for _, error in outputs] == [True, False]
    return folder


def test_two_processes_store_the_log_probs_of_every_example(scored, mesh):
    dataset = open_dataset(scored / "pairs")
    policy, params = load_policy(scored / "start", mesh)
    batch = collate(dataset[:], dataset.card.max_prompt_length, dataset.card.max_response_length)
    expected = jax.jit(functools.partial(score, policy))(params, *texts(batch))
    (values,) = scored.glob("pairs/reference/*/log_probs.npy")
    inside = np.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]
    np.testing.assert_allclose(np.load(values), np.asarray(expected)[inside], atol=1e-5)


def test_one_process_and_two_train_alike_with_what_two_have_stored(scored, monkeypatch):
    """And compute no log-probs of the reference on their own."""
    monkeypatch.chdir(scored)
    (values,) = scored.glob("pairs/reference/*/log_probs.npy")
    stored_at = values.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(reference, "make_score", None)
        run_job(job(IPO, IPO_FILES), scored / "ipo_one")
    statuses, outputs = run_processes(scored, *2 * [train_words(IPO, "ipo_two", IPO_FILES)])
    assert statuses == [0, 0], outputs
    assert list(scored.glob("pairs/reference/*/log_probs.npy")) == [values]
    assert values.stat().st_mtime_ns == stored_at
    run_job(job(IPO | {"REFERENCE_LOG_PROBS": "each_step"}, IPO_FILES), scored / "ipo_each_step")
    expected = metrics(scored / "ipo_each_step")
    assert len(expected) == 3 and expected[0]["loss"] != expected[-1]["loss"]
    for name in ("ipo_one", "ipo_two"):
        for wanted, line in zip(expected, metrics(scored / name), strict=True):
            np.testing.assert_allclose(line["loss"], wanted["loss"], rtol=1e-5)
            np.testing.assert_allclose(line["gradient_norm"], wanted["gradient_norm"], rtol=1e-5)


def test_what_one_process_alone_cannot_read_ends_all(scored):
    commands = [[*REFERENCE, f"--dataset={name}"] for name in ("pairs", "nowhere")]
    statuses, outputs = run_processes(scored, *commands)
    assert statuses == [2, 2], outputs
    errors = [error.strip().splitlines()[-1] for _, error in outputs]
    assert errors[1].startswith("error: nowhere is no finished dataset")
    assert errors[0].startswith("error: process 1: nowhere is no finished dataset")


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


def test_two_processes_train_alike_on_packed_rows(scored, monkeypatch):
    """Rows are filled over the whole batch, so that each reads prompts that are another's without packing."""
    monkeypatch.chdir(scored)
    settings = IPO | {"BATCH_SIZE": 16, "REFERENCE_LOG_PROBS": "each_step", "MeshConfig.model": 1, "MeshConfig.data": 4}
    run_job(job(settings, IPO_FILES), scored / "plain")
    packed = settings | {"PACKING": 2}
    statuses, outputs = run_processes(scored, *2 * [train_words(packed, "packed", IPO_FILES)])
    assert statuses == [0, 0], outputs
    assert ["of the tokens in batches is padding" in output for output, _ in outputs] == [True, False]
    for expected, line in zip(metrics(scored / "plain"), metrics(scored / "packed"), strict=True):
        assert line["prompts"] == expected["prompts"] == 16
        for name in ("loss", "gradient_norm", "log_prob", "margin"):
            np.testing.assert_allclose(line[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
