"""The disk fills up while a checkpoint is written: one line, saved checkpoints stay, the same command can continue."""

import gc
import os
import pathlib
import subprocess
import sys

import pytest
from built_in import write_posts
from job_runs import assert_equal_runs, steps
from process_runs import TINY_T5

from alignment_gap.cli.main import main

SIZES = TINY_T5 | {
    "T5Config.width": 64,
    "BATCH_SIZE": 8,
    "CHECKPOINT_EVERY": 1,
    "JobConfig.log_every": 1,
}
GIN = pathlib.Path(__file__).parents[2] / "gin" / "runs" / "sft.gin"
ENOUGH = 32 * 2**20


@pytest.fixture
def small(tmp_path):
    """A small disk of its own for the test: its folder, and a function that sets its size in bytes."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(size, words=("-o", "remount")):
        command = ["mount", *words, "-o", f"size={size}", folder]
        return subprocess.run(command, capture_output=True, text=True)

    made = resize(ENOUGH, ("-t", "tmpfs", "tmpfs"))
    if made.returncode:
        pytest.skip(f"no disk of a given size can be made here: {made.stderr.strip()}")
    yield folder, resize
    subprocess.run(["umount", folder], check=True)


def train(patch, pairs, workdir, count):
    words = [f"--gin.{key}={value}" for key, value in (SIZES | {"DATASET": pairs, "TRAIN_STEPS": count}).items()]
    words = ["train", f"--gin_file={GIN}", *words, f"--workdir={workdir}", "--compilation_cache="]
    patch.setattr(sys, "argv", ["alignment-gap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def used(folder):
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(small, tmp_path, monkeypatch, capfd, caplog):
    folder, resize = small
    write_posts(tmp_path / "pairs", 32)
    assert train(monkeypatch, tmp_path / "pairs", folder / "run", 1) == 0
    # Half of the second checkpoint fits.
    assert not resize(used(folder) * 3 // 2).returncode
    capfd.readouterr()
    assert train(monkeypatch, tmp_path / "pairs", folder / "run", 4) == 2
    gc.collect()  # The other tasks of the failed save are collected now; they print nothing either.
    said = capfd.readouterr().err
    place = folder / "run" / "checkpoints"
    assert said.splitlines()[-1] == (
        f"error: no space is left for a checkpoint in {place}: free some and run the same command again, which goes "
        "on from step 1"
    )
    assert said.count("\n") <= 2 and not caplog.records  # The second line is the progress bar's.
    assert not resize(ENOUGH).returncode
    assert (place / "1").is_dir() and not (place / "2").is_dir()
    assert train(monkeypatch, tmp_path / "pairs", folder / "run", 4) == 0
    assert train(monkeypatch, tmp_path / "pairs", tmp_path / "whole", 4) == 0
    assert steps(folder / "run") == [1, 2, 3, 4]
    assert_equal_runs(folder / "run", tmp_path / "whole")
