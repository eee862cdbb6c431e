"""What a training job survives: a signal, damage to its last checkpoint, updates that are not finite."""

import dataclasses
import json
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from job_runs import Bar, assert_equal_runs, metrics, run_and_stop, run_job, steps

from alignment_gap.data.records import open_dataset
from alignment_gap.errors import Interrupted, UserError
from alignment_gap.interruption import signals_caught
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.folder import DONE, FAILED
from alignment_gap.judges import JudgeConfig
from alignment_gap.training import GuardConfig, OptimizerConfig


class Signalled(Bar):
    """A progress bar that raises SIGTERM once, after a number of steps."""

    def update(self, count):
        self.updates.append(count)
        if sum(self.updates) == self.stop_at and count == 1:
            signal.raise_signal(signal.SIGTERM)


def interrupted(config, folder, after):
    """Trains until SIGTERM comes after a number of steps; returns the steps with a checkpoint."""
    with signals_caught(), pytest.raises(Interrupted, match=f"saved at step {after} of {config.steps}"):
        run_job(config, folder, Signalled(after))
    assert not (folder / DONE).exists() and not (folder / FAILED).exists()
    return steps(folder)


@pytest.fixture(scope="module")
def online(sft, judge, pairs):
    """Checkpoints are due only at steps 4 and 6."""
    return JobConfig(
        source=OnlineConfig(DatasetConfig(str(pairs), batch_size=8), judge=JudgeConfig(str(judge))),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        start=str(sft),
        steps=6,
        checkpoint_every=4,
        log_every=1,
    )


@pytest.fixture(scope="module")
def run(online, tmp_path_factory):
    return run_job(online, tmp_path_factory.mktemp("survival") / "run")


def record_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "record").iterdir() if path.is_file()}


@pytest.mark.slow
def test_signals_leave_no_trace_in_a_finished_job(run, online, tmp_path):
    """SIGTERM comes in steps 2, 3 and 5. The job continues from there, and its files in the end are the same."""
    assert interrupted(online, tmp_path, 2) == [2]
    assert interrupted(online, tmp_path, 3) == [3]
    assert interrupted(online, tmp_path, 5) == [4, 5]
    assert_equal_runs(run_job(online, tmp_path), run)
    assert steps(tmp_path) == [4, 6]
    assert record_files(tmp_path) == record_files(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
def test_a_damaged_last_checkpoint_costs_its_steps_alone(run, online, tmp_path):
    """The run goes back to the last good checkpoint; the record after it is sampled again."""
    longer = dataclasses.replace(online, steps=8)
    whole = run_job(longer, tmp_path / "whole")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for path in (damaged / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))
    bar = Bar()
    run_job(longer, damaged, bar)
    said = next(line for line in bar.lines if "put aside" in line)
    assert said.endswith("it is put aside as 6.damaged, and training goes on from step 4")
    shutil.rmtree(damaged / "checkpoints" / "6.damaged")
    assert steps(damaged) == [4, 8] == [step for step in steps(whole) if step != 6]
    assert metrics(damaged) == metrics(whole)
    ours, theirs = (open_dataset(folder / "record") for folder in (damaged, whole))
    assert len(ours) == len(theirs) == 64
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.concatenate(a.responses), np.concatenate(b.responses))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("loss", ["sft", "ipo"])
def test_a_job_that_goes_on_reads_its_start_no_more(loss, sft, sft_config, pairs, tmp_path):
    """The start is damaged after the stop. It is also the reference of ipo, whose log-probs are stored."""
    shutil.copytree(sft, tmp_path / "start")
    shutil.copytree(pairs, tmp_path / "pairs")
    config = dataclasses.replace(
        sft_config,
        model=None,
        loss=LossConfig(loss),
        source=DatasetConfig(str(tmp_path / "pairs"), batch_size=8),
        reference_log_probs="stored",
        start=str(tmp_path / "start"),
        steps=4,
    )
    whole = run_job(config, tmp_path / "whole")
    run_and_stop(config, tmp_path / "stopped", after=3)
    for path in (tmp_path / "start" / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert_equal_runs(run_job(config, tmp_path / "stopped"), whole)
    with pytest.raises(UserError, match=r"start/checkpoints/6 cannot be restored \("):
        run_job(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def overflowing(chosen_logps, *, scale=1.0):
    """A loss whose value is infinite if `scale` is large."""
    return -chosen_logps * jnp.exp(scale)


@pytest.fixture(scope="module")
def diverging(sft_config):
    """A job that skips every update."""
    loss = LossConfig("test_survival:overflowing", {"scale": 1000.0})
    return dataclasses.replace(sft_config, loss=loss, steps=4, guard=GuardConfig(stop_after=3))


@pytest.mark.slow
def test_a_job_that_diverges_may_change_what_its_line_says(diverging, tmp_path):
    message = "the last 3 updates up to step 3 were skipped, the loss is inf: look at the loss and its data"
    with pytest.raises(UserError, match=message):
        run_job(diverging, tmp_path)
    assert "updates up to step 3" in json.loads((tmp_path / FAILED).read_text())["line"]
    assert [line["skipped"] for line in metrics(tmp_path)] == [1, 2, 3]
    # A changed seed still makes another job; a lower learning rate does not.
    with pytest.raises(UserError, match="seed was 0, now 1"):
        run_job(dataclasses.replace(diverging, seed=1), tmp_path)
    slower = dataclasses.replace(
        diverging, optimizer=OptimizerConfig(learning_rate=1e-3), guard=GuardConfig(stop_after=9)
    )
    run_job(slower, tmp_path)
    assert (tmp_path / DONE).exists() and not (tmp_path / FAILED).exists()
    assert metrics(tmp_path)[-1]["skipped"] == 4
    # After the job has continued, the learning rate counts as one of its settings again.
    with pytest.raises(UserError, match=r"learning_rate was 0.001, now 0.01"):
        run_job(dataclasses.replace(slower, optimizer=OptimizerConfig(learning_rate=1e-2)), tmp_path)
