"""Two processes without a shared disk train into a bucket; the result is the same as in a folder."""

import pytest
from built_in import write_posts
from job_runs import assert_equal_runs
from process_runs import TINY_T5, run_processes

from alignment_gap.launch import Task, status_text

SETTINGS = TINY_T5 | {
    "BATCH_SIZE": 8,
    "CHECKPOINT_EVERY": 2,
    "JobConfig.log_every": 1,
    "MeshConfig.fsdp": 8,
    "MeshConfig.data": 1,
    "WARMUP_STEPS": 0,
}


def train(dataset, workdir, steps):
    settings = SETTINGS | {"DATASET": dataset, "TRAIN_STEPS": steps}
    words = [f"--gin.{name}={value}" for name, value in settings.items()]
    return ["train", "--gin_file=runs/sft.gin", *words, f"--workdir={workdir}"]


@pytest.mark.slow
def test_two_processes_without_a_shared_disk(s3_folder, tmp_path):
    for place in (tmp_path, s3_folder):
        write_posts(place / "pairs", 32)
    there = s3_folder / "sft"
    commands = [
        train("pairs", "sft", 4),
        train(s3_folder / "pairs", there, 2),
        train(s3_folder / "pairs", there, 4),
    ]
    statuses, outputs = run_processes(tmp_path, commands, commands, caches=True)
    assert statuses == [0, 0], outputs
    assert f"checkpoints: {there}/checkpoints" in outputs[0][0]
    assert_equal_runs(there, tmp_path / "sft")
    assert {path.name for path in tmp_path.glob("cache*/files/*")} and not (there / ".lock").exists()
    assert status_text([Task("sft", (), there)]) == "sft  done"
