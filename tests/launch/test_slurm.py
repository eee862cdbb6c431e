"""Slurm: its scripts; and where Slurm is installed, a real controller with several nodes runs them."""

import subprocess
import time

import pytest
import slurm_cluster

from alignment_gap.errors import UserError
from alignment_gap.launch import SlurmConfig, submit_slurm
from alignment_gap.launch.slurm import batches, script, slurm_text

needs_slurm = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is Slurm")


@pytest.fixture(scope="module")
def environment():
    with slurm_cluster.cluster(nodes=3) as found, pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, found[name])
        yield


def words_of(batch):
    return [task.name for task in batch.tasks], list(batch.needs)


def test_what_needs_the_same_becomes_an_array_in_the_order_of_needs(task_of):
    tasks = [
        task_of("data"),
        task_of("sft-0", "trains", "data"),
        task_of("sft-1", "trains", "data"),
        task_of("labels", "labels", "data"),
        task_of("arm", "trains", "sft-0", "labels"),
    ]
    assert [words_of(batch) for batch in batches(tasks)] == [
        (["data"], []),
        (["sft-0", "sft-1"], ["data"]),
        (["labels"], ["data"]),
        (["arm"], ["labels", "sft-0"]),
    ]
    # Finished jobs are left out, and other jobs do not wait for them.
    tasks[0].folder.mkdir(parents=True)
    (tasks[0].folder / "done.json").write_text('{"settings": {}}')
    assert words_of(batches(tasks)[0]) == (["sft-0", "sft-1"], [])


def test_the_script_asks_for_what_the_settings_say(task_of, tmp_path):
    (batch,) = batches([task_of("a"), task_of("b")])
    config = SlurmConfig(nodes=4, partition="tpu", time="4:00:00", gres="gpu:8", setup="module load cuda", at_once=2)
    lines = script(batch, config, tmp_path).splitlines()
    wanted = [
        "nodes=4",
        "ntasks-per-node=1",
        "partition=tpu",
        "time=4:00:00",
        "gres=gpu:8",
        "signal=TERM@120",
        "requeue",
    ]
    assert all(f"#SBATCH --{option}" in lines for option in [*wanted, "array=0-1%2"])
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if "srun" in line)
    assert any(line.startswith("0) srun") and line.endswith("--coordinator=auto ;;") for line in lines)
    assert not any("account" in line or "mem=" in line for line in lines)


def test_a_command_of_one_process_asks_for_one_node(task_of, tmp_path):
    (batch,) = batches([task_of("a", processes=False)])
    text = script(batch, SlurmConfig(nodes=4, processes=2), tmp_path)
    assert "--nodes=1\n" in text and "ntasks-per-node=1\n" in text and "coordinator" not in text


def test_what_would_be_submitted_is_printed(task_of, tmp_path):
    text = slurm_text([task_of("a"), task_of("b", "ends", "a")], SlurmConfig(), tmp_path)
    assert text.startswith("# sbatch\n#!/bin/bash\n") and "# sbatch --dependency=afterok:<a>\n" in text


@pytest.mark.parametrize("settings", [{"nodes": 0}, {"processes": 0}, {"grace": 0}, {"at_once": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} is 0"):
        SlurmConfig(**settings)


def test_a_job_waits_for_the_elements_that_it_needs_alone(task_of, tmp_path, monkeypatch):
    """A program stands in for sbatch: it numbers jobs from 100 on, and keeps its words."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/bash\ncat > /dev/null; echo "$*" >> {tmp_path}/asked; echo $((99 + $(wc -l < {tmp_path}/asked)))\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    tasks = [*(task_of(f"sft-{i}") for i in range(3)), *(task_of(f"arm-{i}", "ends", f"sft-{i}") for i in range(2))]
    submit([*tasks, task_of("report", "ends", "arm-0", "sft-2")], tmp_path)
    after = [line.partition("afterok:")[2].split(" ")[0] for line in (tmp_path / "asked").read_text().splitlines()]
    assert after == ["", "100_0", "100_1", "100_2:101"]


@pytest.mark.parametrize(
    ("statuses", "queued", "left"),
    [
        ([75, 75, 75, 9, 9, 9], [True, True, True, True, True, False], ""),
        ([9, 75, 0], [True, True, False], ""),
        ([9, 75], [True, True], "9\n"),
        ([9, 2], [True, False], ""),
    ],
)
@pytest.mark.parametrize("names", ["a", "ab"])
def test_only_crashes_use_up_retries(task_of, tmp_path, monkeypatch, statuses, queued, left, names):
    """The script runs with programs in place of Slurm's; the job may crash twice."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", f"exit $(cat {tmp_path}/status)"), ("scontrol", f'echo "$*" >> {tmp_path}/queued')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (batch,) = batches([task_of(name) for name in names])
    text, found = script(batch, SlurmConfig(retries=2), tmp_path), []
    number = "7" if len(names) == 1 else "7_1"
    for count, status in enumerate(statuses):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        (tmp_path / "status").write_text(str(status))
        assert subprocess.run(["bash", "-c", text]).returncode == status
        lines = (tmp_path / "queued").read_text().splitlines()
        found.append(len(lines) > sum(found))
        assert set(lines) == {f"requeue {number}"}
    crashes = tmp_path / f"{number}.crashes"
    assert found == queued and (crashes.read_text() if crashes.exists() else "") == left


def test_no_slurm_is_one_line(task_of, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no sbatch: launch from a login node"):
        submit_slurm([task_of("a")], SlurmConfig(), tmp_path)


def submit(tasks, folder, **settings):
    """Submits the tasks; returns the numbers of the jobs by name."""
    said = []
    submit_slurm(tasks, SlurmConfig(**settings), folder / "logs", said.append)
    return {line.split()[1]: line.split()[0] for line in said}


def queue():
    """The jobs that have not ended, with their states."""
    done = subprocess.run(["squeue", "-h", "-o", "%j %T"], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


def wait_until(is_so, seconds=180):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, queue()
        time.sleep(0.2)


@pytest.mark.slow
@needs_slurm
def test_a_graph_runs_in_order_and_a_failure_stops_what_needs_it(environment, task_of, attempts, tmp_path):
    tasks = [
        task_of("first"),
        task_of("left", "ends", "first"),
        task_of("right", "fails", "first"),
        task_of("after-left", "ends", "left"),
        task_of("after-right", "ends", "right"),
    ]
    submit(tasks, tmp_path)
    wait_until(lambda: not queue())
    assert attempts() == {"first": 1, "left": 1, "right": 1, "after-left": 1} and next(iter(attempts())) == "first"
    assert [task.name for task in tasks if not task.is_done] == ["right", "after-right"]
    (log,) = (tmp_path / "logs").glob("right-*.log")
    assert "error: it fails: mend it" in log.read_text()
    # After the mistake is mended, only this job and jobs that need it run.
    mended = [task_of("right") if task.name == "right" else task for task in tasks]
    assert list(submit(mended, tmp_path)) == ["right", "after-right"]
    wait_until(lambda: all(task.is_done for task in mended))


@needs_slurm
def test_an_array_runs_each_of_its_tasks(environment, task_of, attempts, tmp_path):
    tasks = [task_of(f"seed-{i}") for i in range(4)]
    assert list(submit(tasks, tmp_path, at_once=2)) == ["ends-4-seed-0"]
    wait_until(lambda: all(task.is_done for task in tasks))
    assert attempts() == {f"seed-{i}": 1 for i in range(4)}


@pytest.mark.slow
@needs_slurm
def test_a_job_that_dies_is_queued_again_so_often(environment, task_of, attempts, tmp_path):
    again, never = task_of("again", "dies"), task_of("never", "dies")
    submit([again], tmp_path)
    submit([never], tmp_path, retries=0)
    wait_until(lambda: again.is_done and not queue())
    assert attempts() == {"again": 2, "never": 1} and not never.is_done


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_saves_is_requeued_and_goes_on(environment, task_of, attempts, tmp_path):
    """A job in a partition of higher priority takes all nodes.

    Jobs that need the preempted one wait for its second attempt.
    """
    tasks = [task_of("long", "saves"), task_of("next", "ends", "long")]
    folder = tasks[0].folder
    submit(tasks, tmp_path, partition="low")
    wait_until((folder / "job.json").exists)
    subprocess.run(["sbatch", "-N3", "-p", "high", "--wrap=true"], check=True, capture_output=True, cwd=tmp_path)
    wait_until((folder / "saved-0").exists)
    assert not tasks[1].folder.exists()
    wait_until(lambda: all(task.is_done for task in tasks))
    assert attempts() == {"long": 2, "next": 1}


@pytest.mark.slow
@needs_slurm
def test_a_job_near_its_time_limit_saves_and_goes_on_in_another(environment, task_of, attempts, tmp_path):
    """Slurm's limits have a resolution of a minute, so the signal comes within a minute."""
    task = task_of("limited", "saves")
    submit([task], tmp_path, time="1", grace=58)
    wait_until(lambda: task.is_done)
    assert attempts() == {"limited": 2} and (task.folder / "saved-0").exists()


@needs_slurm
def test_a_cancelled_job_has_saved(environment, task_of, tmp_path):
    task = task_of("cancelled", "saves")
    numbers = submit([task], tmp_path)
    wait_until((task.folder / "job.json").exists)
    subprocess.run(["scancel", numbers["cancelled"]], check=True)
    wait_until(lambda: not queue())
    assert (task.folder / "saved-0").exists() and not task.is_done
    submit([task], tmp_path)
    wait_until(lambda: task.is_done)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("3", 180),
        ("3:20", 200),
        ("4:00:00", 14400),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("0", None),
        ("UNLIMITED", None),
    ],
)
def test_a_job_has_time_to_save_before_its_limit(time, seconds):
    """In every notation of Slurm, the limit is above the seconds in which a job saves."""
    if seconds is None:
        SlurmConfig(time=time, grace=10**9)
    else:
        SlurmConfig(time=time, grace=seconds - 1)
        with pytest.raises(
            UserError, match=f"grace is {seconds} seconds, but time={time} gives a job {seconds}: raise"
        ):
            SlurmConfig(time=time, grace=seconds)


def test_a_time_limit_is_in_slurm_s_notation():
    with pytest.raises(UserError, match="time is '4hours': write minutes, hours:minutes:seconds, or days-hours"):
        SlurmConfig(time="4hours")


@needs_slurm
def test_a_refusal_is_one_line(environment, task_of, tmp_path):
    with pytest.raises(UserError, match=r"sbatch refused a: .*Invalid partition") as error:
        submit([task_of("a")], tmp_path, partition="nowhere")
    assert "\n" not in str(error.value)


def test_memory_is_in_slurm_s_notation():
    assert [SlurmConfig(memory=memory).memory for memory in ("64G", "64gb", "2000")] == ["64G", "64gb", "2000"]
    with pytest.raises(UserError, match="memory is 'lots': write a number with K, M, G or T, such as 64G"):
        SlurmConfig(memory="lots")
