"""The monitor of a run: times, a profile, TensorBoard's files, validation lines, and a watchdog."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from tiny_models import make_batch

from alignment_gap.training import TrainState
from alignment_gap.training.monitor import Monitor, Times, Validation, is_of_the_clock

BATCH = make_batch(4)
ROOT = str(pathlib.Path(__file__).parents[2])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {})


def slow(value):
    time.sleep(0.02)
    return jnp.asarray(value)


def test_the_host_is_timed_in_every_step_and_devices_where_a_step_is_measured():
    times = Times()
    read, update = times.of_host("data", slow), times.of_devices("update", slow)
    for step in range(4):
        times.measures = step == 3
        assert (int(read(step)), int(update(step))) == (step, step)
    found = times.line(4)
    assert found.keys() == {"seconds_data", "seconds_update"} and all(is_of_the_clock(name) for name in found)
    assert found["seconds_data"] >= 0.02 and found["seconds_update"] >= 0.02
    # This is the time of one step. The sum over the four would be more than 0.08.
    assert not times.measures and times.line(4) == {}


def test_a_call_that_serves_several_steps_is_timed_once_a_line_and_divided(monkeypatch):
    times, clock = Times(), itertools.count(step=8)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    draw = times.of_devices("sampling", jnp.asarray, 4)
    for _ in range(2):
        times.measures = True
        assert [int(draw(value)) for value in range(3)] == [0, 1, 2]
        # The clock is read twice, before and after the first of the three calls.
        assert times.line(12) == {"seconds_sampling": 2.0}
    assert times.line(12) == {} and next(clock) == 32


def test_what_compiling_took_is_forgotten():
    times = Times()
    times.of_host("data", slow)(1)
    times.forget()
    assert times.line(1) == {}


@pytest.mark.parametrize(
    ("name", "expected"), [("pairs_per_second", True), ("seconds_data", True), ("mfu", True), ("loss", False)]
)
def test_names_that_tell_times(name, expected):
    assert is_of_the_clock(name) == expected


def test_utilisation_is_the_least_time_of_the_update_over_what_it_took(tmp_path):
    """10^12 model FLOPs take at least 5 ms on two devices of 100 * 10^12 FLOP/s. They took 20 ms."""
    monitor = Monitor(tmp_path, least_seconds=lambda batch: 1e12 / 200e12)
    assert monitor.utilisation(BATCH, {"loss": 1.0, "seconds_update": 0.02}) == {"mfu": pytest.approx(0.25)}
    assert monitor.utilisation(BATCH, {"loss": 1.0}) == {}
    assert Monitor(tmp_path).utilisation(BATCH, {"seconds_update": 0.02}) == {}


def test_the_learning_rate_of_a_line_is_that_of_the_last_update_that_was_made(tmp_path):
    monitor = Monitor(tmp_path, learning_rate=lambda made: 1 / (1 + made))
    for step, skipped in ((1, 1.0), (4, 1.0), (6, 2.0)):
        monitor.write(step, {"loss": 1.0, "skipped": skipped})
    # There were no updates, then three, then four.
    assert [line["learning_rate"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 1 / 3, 1 / 4]


def test_further_counts_are_in_every_line(tmp_path):
    counts = iter([{"judge_requests": 3.0}, {"judge_requests": 5.0}])
    monitor = Monitor(tmp_path, counts=lambda: next(counts))
    for step in (1, 2):
        monitor.write(step, {"loss": 1.0})
    assert [line["judge_requests"] for line in lines(tmp_path / "metrics.jsonl")] == [3, 5]


def test_validation_every_few_steps_and_at_the_end(tmp_path):
    """A run that continues from step 3 drops the lines of later steps."""
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": 9.0}\n')
    monitor = Monitor(
        tmp_path, validation=Validation(2, lambda state: {"loss": float(state.step), "accuracy": float("nan")})
    )
    with monitor.running(3):
        for step in range(4, 8):
            monitor.end(step, state(step), is_last=step == 7)
    assert lines(tmp_path / "validation.jsonl") == [
        {"step": 2, "loss": 9.0},
        *({"step": step, "loss": float(step), "accuracy": None} for step in (4, 6, 7)),
    ]
    assert monitor.times.line(1)["seconds_validation"] >= 0


@pytest.mark.slow
def test_a_profile_of_the_steps_asked_for(tmp_path):
    monitor = Monitor(tmp_path, profile=(2, 3))
    with monitor.running(0):
        for step in range(1, 5):
            monitor.begin(step, state(step), is_logged=False)
            jnp.ones(2).block_until_ready()
            assert (tmp_path / "profile").exists() == (step > 3)
            monitor.end(step, state(step), is_last=False)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_ends_within_its_profile_writes_it(tmp_path):
    with pytest.raises(ZeroDivisionError), (monitor := Monitor(tmp_path, profile=(1, 9))).running(0):
        monitor.begin(1, state(1), is_logged=False)
        raise ZeroDivisionError
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, tensorboard=True, validation=Validation(1, lambda state: {"loss": 0.5}))
    with monitor.running(0):
        for step in (1, 2):
            monitor.write(step, {"loss": 1.0 / step})
            monitor.end(step, state(step), is_last=step == 2)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    found = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert set(found.Tags()["tensors"]) == {"loss", "validation/loss"}
    assert [event.step for event in found.Tensors("loss")] == [1, 2]


def test_without_clu_tensorboard_is_refused_in_one_line(without_tensorflow):
    program = "from alignment_gap.training.tensorboard import check_tensorboard; check_tensorboard()"
    done = subprocess.run([sys.executable, "-c", program], env=without_tensorflow, capture_output=True, text=True)
    assert "UserError: TensorBoard's files cannot be written (No module named" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_stood_still_itself_goes_on(tmp_path):
    """The process stops for longer than the limit. When it runs again, it gets the full time for a step."""
    program = HANGING.replace("time.sleep(100)", "pass").replace("hang_after=0.5", "hang_after=4.0")
    program = program.replace("time.sleep(0.2)", "print('on', flush=True); time.sleep(2.4)")
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as started:
        assert started.stdout.readline() == "on\n"
        started.send_signal(signal.SIGSTOP)
        time.sleep(6)
        started.send_signal(signal.SIGCONT)
        assert started.wait(timeout=60) == 0


HANGING = """
import sys, time
from pathlib import Path
from alignment_gap.training import TrainState
from alignment_gap.training.monitor import Monitor
monitor = Monitor(Path(sys.argv[1]), hang_after=0.5)
with monitor.running(36):
    time.sleep(0.2)
    monitor.end(37, None, is_last=False)
    def where_it_hangs():
        time.sleep(100)
    where_it_hangs()
"""


def test_a_run_without_a_step_ends_and_says_where_it_hangs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=90, cwd=ROOT
    )
    assert done.returncode == 1
    assert "where_it_hangs" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: no step was done for 0.5 s after step 37: see above where each thread waits"
