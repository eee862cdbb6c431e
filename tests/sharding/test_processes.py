"""What processes do together: in a single process, with a fake client, and as two real processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax._src import distributed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import MESHES

from alignment_gap.errors import UserError
from alignment_gap.sharding import (
    batch_sharding,
    fail_together,
    first_says,
    host_rows,
    initialize,
    is_first_process,
    make_mesh,
    on_every_process,
    on_first_process,
    own_rows,
    processes,
    put_batch,
    put_replicated,
    replicated,
    to_host,
)


def refuse():
    raise UserError("refused")


def test_a_single_process_is_the_first_and_holds_all_rows():
    done = []
    on_first_process(lambda: done.append(1))
    assert done == [1] and on_every_process(lambda: 2) == 2 and is_first_process()
    np.testing.assert_array_equal(first_says(lambda: 3), 3)
    np.testing.assert_array_equal(first_says(lambda: np.arange(4)), np.arange(4))
    for mesh in MESHES.values():
        np.testing.assert_array_equal(host_rows(make_mesh(mesh), 16), np.arange(16))


def test_a_single_process_raises_what_its_function_raises():
    for call in (on_first_process, on_every_process, first_says):
        with pytest.raises(UserError, match=r"^refused$"):
            call(refuse)
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 // 0)


def test_a_single_process_fails_alone():
    shown = []
    fail_together("a line", lambda: shown.append(1))
    assert shown == []


@pytest.mark.parametrize("name", MESHES)
def test_own_rows_undo_put_batch(name):
    mesh, rng = make_mesh(MESHES[name]), np.random.default_rng(0)
    rows = {"x": rng.random((8, 3, 2), np.float32), "n": rng.integers(0, 9, 8, np.int32), "b": rng.random(8) < 0.5}
    with jax.transfer_guard("disallow"):
        batch = put_batch(rows, mesh, 8)
    for got in (own_rows(batch), to_host(batch)):
        for key, array in rows.items():
            assert isinstance(got[key], np.ndarray) and got[key].dtype == array.dtype
            np.testing.assert_array_equal(got[key], array)
    assert batch["n"].sharding == batch_sharding(mesh)
    with pytest.raises(ValueError, match="put_batch: 4 rows given, but this process holds 8 of 8"):
        put_batch(rows["x"][:4], mesh, 8)


def test_rows_of_a_process_that_holds_every_other_part(unchecked):
    """As if a slice of another process were between two slices of this one."""
    mesh = make_mesh(MESHES["data"])
    batch = put_batch(np.arange(16).reshape(16, 1), mesh, 16)
    mine = [shard for shard in batch.addressable_shards if shard.index[0].start % 4 == 0]
    np.testing.assert_array_equal(
        own_rows(types.SimpleNamespace(addressable_shards=mine))[:, 0], [0, 1, 4, 5, 8, 9, 12, 13]
    )


def test_what_all_have_alike_is_whole_on_every_device():
    mesh = make_mesh(MESHES["all"])
    tree = {"key": jax.random.key(3), "step": np.int32(4), "table": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    put = put_replicated(tree, mesh)
    for name in ("step", "table"):
        assert put[name].sharding == replicated(mesh) and put[name].dtype == tree[name].dtype
        assert len(put[name].addressable_shards) == 8
        np.testing.assert_array_equal(put[name], tree[name])
    # A random key stays a key, and draws the same numbers.
    assert jax.dtypes.issubdtype(put["key"].dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(jax.random.key_data(put["key"]), jax.random.key_data(tree["key"]))


def test_arrays_come_whole_to_the_host_wherever_their_parts_lie():
    mesh, array = make_mesh(MESHES["all"]), np.arange(32).reshape(4, 8)
    for spec in (P(), P("data"), P("fsdp", "model"), P(None, ("data", "fsdp", "model"))):
        found = to_host([jax.device_put(array, NamedSharding(mesh.devices, spec))])
        assert isinstance(found[0], np.ndarray)
        np.testing.assert_array_equal(found[0], array)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((None, 2, 0), "2 processes without a coordinator: give the HOST:PORT of process 0, or auto"),
        ((None, 1, 1), "1 processes without a coordinator"),
        (("host:1", 2, 2), "process 2 of 2: processes are numbered from 0 to 1"),
        (("host:1", 2, -1), "process -1 of 2: processes are numbered from 0 to 1"),
        (("host", 2, 1), "coordinator host has no port: give the HOST:PORT of process 0, or auto"),
        (("host:", 2, 1), "coordinator host: has no port"),
        (("auto", 1, 0), "coordinator auto: .*: give its HOST:PORT, the number of processes and the number"),
    ],
)
def test_processes_that_cannot_meet_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        initialize(*settings)


class Ended(BaseException):
    """Replaces the end of the process."""


class Store:
    """The key-value store of a run, as its client sees it; returns prepared answers in turn."""

    def __init__(self, *answers):
        self.answers, self.written = list(answers), {}

    def key_value_try_get(self, key):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.written and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.written[key] = value


@pytest.fixture
def ended(monkeypatch):
    """This is one of two processes; collects the statuses with which it ends."""
    statuses = []
    jax.devices()  # jax opens its devices before it sees the fake client.

    def end(status):
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(processes, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(processes, "_failure_told", threading.Lock())
    monkeypatch.setattr(distributed.global_state, "num_processes", 2)
    return statuses


def test_a_process_that_fails_shows_why_then_tells_the_others_then_ends(ended, monkeypatch):
    store, order = Store(), []
    monkeypatch.setattr(distributed.global_state, "client", store)
    with pytest.raises(Ended):
        fail_together("no space left on device", lambda: order.append(dict(store.written)))
    assert order == [{}] and ended == [2]
    assert store.written == {processes._FAILURE: "2 process 0: no space left on device"}


def test_the_first_failure_is_the_one_that_all_are_told(ended, monkeypatch):
    """Later failures are not told, such as that of a sum that waits for the failed process."""
    store = Store()
    store.written[processes._FAILURE] = "2 process 1: no space left on device"
    monkeypatch.setattr(distributed.global_state, "client", store)
    with pytest.raises(Ended):
        fail_together("connection closed by peer")
    assert store.written == {processes._FAILURE: "2 process 1: no space left on device"} and ended == [2]


def test_a_process_ends_with_the_line_of_another(ended, monkeypatch, capfd):
    """The store raises as long as no process has failed."""
    store = Store(KeyError("none"), RuntimeError("gone"), "1 process 1: disk full: free space")
    monkeypatch.setattr(distributed.global_state, "client", store)
    with pytest.raises(Ended):
        processes._end_when_another_fails()
    assert ended == [1] and store.answers == []
    assert capfd.readouterr().err == "\nerror: process 1: disk full: free space\n"


def test_a_failure_that_is_passed_on_names_the_process_it_comes_from(ended, monkeypatch, capfd):
    """No matter which process tells the failure first."""
    store = Store()
    monkeypatch.setattr(distributed.global_state, "client", store)
    with pytest.raises(Ended):
        fail_together("process 1: disk full")
    assert store.written == {processes._FAILURE: "2 process 1: disk full"}

    for process, told in ((0, "process 1: disk full"), (1, "disk full")):
        monkeypatch.setattr(processes, "_failure_told", threading.Lock())
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(distributed.global_state, "client", Store("2 process 1: disk full"))
        with pytest.raises(Ended):
            processes._end_when_another_fails()
        assert capfd.readouterr().err == f"\nerror: {told}\n"


def test_a_process_that_tells_of_its_own_failure_tells_of_no_other(ended, monkeypatch, capfd):
    monkeypatch.setattr(distributed.global_state, "client", Store("2 process 0: what this one said"))
    assert processes._failure_told.acquire(blocking=False)
    assert processes._end_when_another_fails() is None
    assert ended == [] and capfd.readouterr().err == ""


def test_the_next_process_is_silent(ended, monkeypatch, capfd):
    """Its last sign of life is the third beat. The status is 1, so that engines run the job again."""
    beats = [KeyError("not yet"), "1", "2", "3", *40 * ["3"]]
    store, clock = Store(*beats), iter(range(100))
    monkeypatch.setattr(distributed.global_state, "client", store)
    monkeypatch.setattr(distributed.global_state, "process_id", 0)
    monkeypatch.setattr(processes, "_BEAT_EVERY", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(Ended):
        processes._tell_when_the_next_is_silent()
    line = "process 1 has died or hangs: nothing was heard of it for 30 s"
    assert ended == [1] and capfd.readouterr().err == f"\nerror: {line}\n"
    assert store.written[processes._FAILURE] == f"1 {line}"
    # It waited for 31 of 40 beats, and reported its own life each time.
    assert len(store.answers) == 40 - 31 and store.written[f"{processes._ALIVE}/0"] == str(4 + 31)


def test_a_notice_of_the_scheduler_ends_all_unless_a_loop_saves_first(ended, monkeypatch, capfd):
    """The status is that of a job that was asked to end; a loop runs at the first two looks."""
    store, loops = Store(KeyError("none"), RuntimeError("gone"), "the notice"), [True, True, False, False, False]
    monkeypatch.setattr(distributed.global_state, "client", store)
    monkeypatch.setattr(processes, "is_left_to_a_loop", lambda: loops.pop(0))
    with pytest.raises(Ended):
        processes._end_when_asked()
    line = "interrupted: the same command continues from here"
    assert ended == [75] and loops == store.answers == [] and capfd.readouterr().err == f"\n{line}\n"
    assert store.written == {processes._FAILURE: f"75 process 0: {line}"}


@pytest.mark.parametrize(("process", "waits"), [(0, 8), (1, 2)])
def test_the_first_process_ends_last(process, waits, ended, monkeypatch):
    """It keeps the store. jax aborts a process that does not find the store."""
    slept = []
    monkeypatch.setattr(processes, "_LOOK_EVERY", 1.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(distributed.global_state, "client", Store())
    with pytest.raises(Ended):
        fail_together("no space left on device")
    assert slept == [waits] and ended == [2]


def test_nobody_watches_where_no_others_are():
    assert distributed.global_state.client is None
    assert processes._end_when_another_fails() is None


def test_the_watching_threads_end_before_python_does():
    """If a thread is in the key-value store when Python ends, the process aborts, although its work is done."""
    program = """
import atexit, sys, threading
watching = lambda: sorted(t.name for t in threading.enumerate() if t.name.startswith("alignment_gap"))
atexit.register(lambda: print(watching(), flush=True))  # Called after what is registered later.
from alignment_gap.sharding import initialize
initialize(f"127.0.0.1:{sys.argv[1]}", 1, 0)
print(watching(), flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, free_port()], env=environment, capture_output=True, text=True, timeout=200
    )
    # A single process does not watch others.
    assert done.stdout.splitlines() == ["['alignment_gap _end_when_another_fails']", "[]"] and done.returncode == 0


# Two processes of two devices each: each prints its findings as a line of JSON. Then the second one fails, which ends
# both.
PROGRAM = """
import json, sys, time
import jax, numpy as np
from alignment_gap.errors import UserError
from alignment_gap.sharding import *

port, number = sys.argv[1], int(sys.argv[2])
initialize(f"127.0.0.1:{port}", 2, number)
mesh = make_mesh(MeshConfig())
found = {"first": is_first_process(), "rows": host_rows(mesh, 8).tolist()}
rows = np.arange(16.0).reshape(8, 2)
batch = put_batch(rows[host_rows(mesh, 8)], mesh, 8)
found["own"] = own_rows(batch).tolist()
found["whole"] = to_host(batch).tolist()
found["total"] = float(jax.jit(jax.numpy.sum)(batch))
found["replicated"] = to_host(put_replicated(np.arange(3), mesh)).tolist()
found["said"] = first_says(lambda: np.array([7 + number, number])).tolist()
called = []
on_first_process(lambda: called.append(number))
found["called"] = called

def caught(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

def fails_in(numbers, error):
    def function():
        if number in numbers:
            raise error
        return 0
    return function

found["second refuses"] = caught(lambda: on_every_process(fails_in([1], UserError("no such file\\nthere"))))
found["both refuse"] = caught(lambda: on_every_process(fails_in([0, 1], UserError(f"line of {number}"))))
found["without a word"] = caught(lambda: first_says(fails_in([0], KeyError())))
# Two bytes a letter, of which the limit would cut the last one in two.
found["long"] = caught(lambda: on_every_process(fails_in([1], UserError("x" + "\u00e9" * 2000))))
found["first alone"] = caught(lambda: on_first_process(fails_in([0, 1], ValueError("disk"))))
found["goes on"] = on_every_process(lambda: number)
print(json.dumps(found), flush=True)
if number:
    fail_together("out of luck", lambda: print("all of it", file=sys.stderr))
time.sleep(60)
"""


# Two processes that do something else than training. The second one receives SIGTERM.
ASKED = """
import os, signal, sys, time
from alignment_gap.cli.main import guarded
from alignment_gap.sharding import initialize

def work():
    initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
    if sys.argv[2] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

sys.exit(guarded(work))
"""


@pytest.mark.slow
def test_one_signal_ends_the_processes_of_a_job_without_a_loop():
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", ASKED]
    begun = [
        subprocess.Popen([*command, port, number], env=environment, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]
    said = [process.communicate(timeout=200)[1] for process in begun]
    assert [process.returncode for process in begun] == [75, 75]
    assert all("interrupted: the same command continues from here" in lines for lines in said)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two():
    """Statuses, findings and errors of two processes."""
    port = free_port()
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(output for output, _ in outputs), outputs
    # Gloo prints on standard output that it has connected.
    lines = [[line for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]
    return [process.returncode for process in started], [json.loads(line) for (line,) in lines], [e for _, e in outputs]


def test_two_processes_hold_their_own_rows_of_one_batch(two):
    _, found, _ = two
    assert [each["first"] for each in found] == [True, False]
    assert [each["rows"] for each in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rows = np.arange(16.0).reshape(8, 2).tolist()
    assert [each["own"] for each in found] == [rows[:4], rows[4:]]
    for each in found:
        assert (each["whole"], each["total"], each["replicated"]) == (rows, 120.0, [0, 1, 2])


def test_two_processes_hear_what_the_first_says_and_does(two):
    _, found, _ = two
    assert [each["said"] for each in found] == [[7, 0], [7, 0]]
    assert [each["called"] for each in found] == [[0], []]


def test_where_one_of_two_raises_both_do_and_the_other_is_named(two):
    _, (first, second), _ = two
    assert second["second refuses"] == ["UserError", "no such file\nthere"]
    assert first["second refuses"] == ["UserError", "process 1: no such file"]
    assert [each["both refuse"] for each in (first, second)] == [["UserError", f"line of {n}"] for n in (0, 1)]
    assert first["without a word"] == ["KeyError", ""]
    assert second["without a word"] == ["UserError", "process 0: KeyError"]
    assert first["first alone"] == ["ValueError", "disk"] and second["first alone"] == ["UserError", "process 0: disk"]
    assert (first["goes on"], second["goes on"]) == (0, 1)


def test_a_long_line_reaches_the_other_up_to_its_last_whole_letter(two):
    _, (first, second), _ = two
    assert second["long"] == ["UserError", "x" + "é" * 2000]
    # 2048 bytes. "process 1: x" takes 12 of them, so 1018 letters of two bytes fit.
    assert first["long"] == ["UserError", "process 1: x" + "é" * 1018]


def test_the_failure_of_one_ends_both_with_its_line(two):
    statuses, _, errors = two
    assert statuses == [2, 2]
    assert errors[0].splitlines()[-1] == "error: process 1: out of luck"
    assert errors[1].splitlines()[-1] == "all of it"
