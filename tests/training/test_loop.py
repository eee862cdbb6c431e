"""The loop and its checkpoints, with a minimal update step."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import random
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from tiny_models import make_batch

from alignment_gap.errors import Interrupted, StorageError, UserError
from alignment_gap.interruption import signals_caught
from alignment_gap.training import Checkpoints, GuardConfig, KeepConfig, TrainState, make_refresh, train
from alignment_gap.training.monitor import Monitor, Validation, truncate_metrics

BATCH = make_batch(4)
ALL = KeepConfig()
ABSTRACT = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)}


def fresh():
    return TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)})


def walk(loss_at=None, gradient_at=None, skipping_from=None):
    """An update step that adds 1. It reports nan or inf in the given steps, and skips from a given step on."""

    @jax.jit
    def update_step(state, batch):
        step = state.step + 1
        params = jax.tree.map(lambda leaf: leaf + 1, state.params)
        metrics = {
            "loss": jnp.where(step == (loss_at or -1), jnp.nan, 1.0 / step.astype(jnp.float32)),
            "gradient_norm": jnp.where(step == (gradient_at or -1), jnp.inf, 2.0),
            "prompts": jnp.int32(4),
            "skipped_in_a_row": jnp.maximum(0, step - (skipping_from or 100)),
        }
        skipped = dataclasses.replace(state.skipped, total=metrics["skipped_in_a_row"])
        return TrainState(step, params, state.optimizer_state, state.copies, skipped), metrics

    return update_step


def abstract_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def run(
    folder,
    update_step=None,
    *,
    source=lambda step, state: BATCH,
    start=fresh,
    said=None,
    keep=ALL,
    watched=None,
    **settings,
):
    said = [] if said is None else said
    with Checkpoints(folder / "checkpoints", keep=keep) as checkpoints:
        return train(
            checkpoints.restore_last(abstract_of(start()), said.append) or start(),
            update_step or walk(),
            source,
            **{"checkpoint_steps": (2, 5), "log_every": 3} | settings,
            checkpoints=checkpoints,
            monitor=Monitor(folder, **watched or {}),
        )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_every_few_steps_and_at_the_end(tmp_path):
    state = run(tmp_path)
    np.testing.assert_array_equal(state.params["w"], 6.0)
    assert [line["step"] for line in lines(tmp_path)] == [3, 5]
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], [1 / 3, 1 / 5], rtol=1e-6)
    assert all(line["pairs_per_second"] > 0 for line in lines(tmp_path))


def numbered(step, state):
    """A batch that records its step, and the parameter of the state at that time."""
    return dataclasses.replace(BATCH, prompt_ids=jnp.full(4, step), scores=jnp.full((4, 2), state.params["w"][0]))


def test_the_recorder_gets_every_batch_once_before_its_checkpoint(tmp_path):
    recorder = Noted(tmp_path)
    run(tmp_path, source=allowed(numbered), recorder=recorder)
    # Each batch comes from the state before its update. The recorder gets each batch once.
    assert recorder.seen == [(1, 0, 1), (2, 1, 2), "saved", (3, 2, 3), (4, 3, 4), (5, 4, 5), "saved"]


class Noted:
    """A recorder that notes the number and the first prompt and score of each batch."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def add(self, step, batch):
        self.seen.append((step, int(batch.prompt_ids[0]), float(batch.scores[0, 0])))

    def save(self):
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            assert self.seen[-1][0] not in checkpoints.steps()
        self.seen.append("saved")


def allowed(source):
    """The source, with leave to make arrays from numbers inside the loop."""

    def unguarded(step, state):
        with jax.transfer_guard("allow"):
            return source(step, state)

    return unguarded


def test_nothing_is_copied_in_the_loop_unasked(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run(tmp_path, source=numbered)


def with_copy():
    return TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)}, {"sampler": {"w": jnp.ones(3)}})


def lagging(every):
    """The refresh of a copy of the parameters, and a source that records the copy at each step."""
    seen = []
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), with_copy()
    )

    def source(step, state):
        seen.append((step, float(jax.device_get(state.copies["sampler"]["w"])[0])))
        return BATCH

    return {"refresh": make_refresh("sampler", every, abstract), "source": source, "start": with_copy}, seen


def test_a_copy_is_that_of_the_last_refresh(tmp_path):
    """The parameter is step + 1. With refreshes before steps 0, 2 and 4 the copy is 1, 1, 3, 3, 5."""
    settings, seen = lagging(2)
    state = run(tmp_path, **settings)
    assert seen == [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5)]
    np.testing.assert_array_equal(state.copies["sampler"]["w"], 5.0)
    np.testing.assert_array_equal(state.params["w"], 6.0)


def test_a_copy_outlives_a_restart_between_two_refreshes(tmp_path):
    """The copy is refreshed every 3 steps, and the run stops after step 2. A new copy would be that of step 2."""
    settings, seen = lagging(3)
    run(tmp_path, checkpoint_steps=(2,), **settings)
    run(tmp_path, **settings)
    assert seen == [(0, 1), (1, 1), (2, 1), (3, 4), (4, 4)]


def test_a_refresh_keeps_what_it_copied(tmp_path):
    """The update step reuses the buffers of parameters, so a copy may not share them."""
    settings, _ = lagging(1)
    state = settings["refresh"](0, with_copy())
    state.params["w"].delete()
    np.testing.assert_array_equal(state.copies["sampler"]["w"], 1.0)


class Bar:
    """Records the calls of a progress bar."""

    def __init__(self):
        self.told = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n=1):
        self.told.append(n)

    def unpause(self):
        self.told.append("unpause")

    def set_postfix(self, *, loss, refresh):
        self.told.append(loss)

    def write(self, s):
        self.told.append(s)


def test_progress_counts_what_was_done_before_a_restart(tmp_path):
    """The rate counts from the first step. Each line of metrics updates the loss."""
    bar = Bar()
    run(tmp_path, checkpoint_steps=(2,), bar=bar)
    assert bar.told == [0, "unpause", 1, 1, "0.5"]
    bar = Bar()
    run(tmp_path, bar=bar)
    assert bar.told == [2, "unpause", 1, "0.3333", 1, 1, "0.2"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(tmp_path)
    before = lines(tmp_path)

    def never(step, state):
        raise AssertionError("a batch was asked for")

    state = run(tmp_path, source=never)
    np.testing.assert_array_equal(state.params["w"], 6.0)
    assert lines(tmp_path) == before


def test_metrics_of_steps_that_are_done_again_are_written_once(tmp_path):
    """The run is killed after the line of step 3, before a checkpoint of this step."""

    def killed(step, state):
        if step == 4:
            raise KeyboardInterrupt
        return BATCH

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=killed)
    assert [line["step"] for line in lines(tmp_path)] == [3]
    run(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [3, 5]


def test_a_run_whose_updates_are_skipped_stops_with_what_to_change(tmp_path):
    """Updates are skipped from step 4 on. The third in a row is step 6, which has the next line of metrics."""
    with pytest.raises(UserError, match="the last 3 updates up to step 6 were skipped, the loss is nan") as error:
        run(tmp_path, walk(loss_at=6, skipping_from=3), checkpoint_steps=(2, 4, 9), skip=GuardConfig(stop_after=3))
    assert "optimizer.learning_rate" in error.value.may_change
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4]


def test_a_few_skipped_updates_stop_nothing_and_are_told_at_the_end(tmp_path):
    bar = Bar()
    state = run(tmp_path, walk(loss_at=3, gradient_at=6, skipping_from=3), checkpoint_steps=(6,), bar=bar)
    assert int(state.step) == 6
    assert bar.told[-1].startswith("3 of 6 updates were skipped, because the loss or the gradient was not finite")
    assert [line["loss"] is None for line in lines(tmp_path)] == [True, False]
    assert [line["gradient_norm"] for line in lines(tmp_path)] == [2.0, None]


def test_saves_of_several_threads_begin_one_after_the_other(tmp_path, monkeypatch):
    """Orbax counts the saves of all threads together.

    Two saves that begin at once would wait for each other's signals.
    """
    inside, most, save = [], [], ocp.CheckpointManager.save

    def watched(*arguments, **settings):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return save(*arguments, **settings)
        finally:
            inside.pop()

    monkeypatch.setattr(ocp.CheckpointManager, "save", watched)
    steps = (1, 2, 3, 4)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: run(tmp_path / name, checkpoint_steps=steps), ("a", "b", "c")))
    assert len(most) == 3 * len(steps) and max(most) == 1
    for name in ("a", "b", "c"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            assert tuple(checkpoints.steps()) == steps


def interrupted(at, then=BATCH):
    """A source that raises SIGTERM while it makes the batch of step `at`."""

    def source(step, state):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return then

    return source


def test_a_signal_saves_where_the_run_stands_and_leaves_no_trace(tmp_path):
    """SIGTERM comes in step 4 of 5, and no checkpoint is due yet.

    The interim checkpoint is deleted with the next one.
    """
    recorder = Noted(tmp_path)
    with signals_caught(), pytest.raises(Interrupted, match="saved at step 4 of 5"):
        run(tmp_path, checkpoint_steps=(5,), source=interrupted(3), recorder=recorder)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4]
    state = run(tmp_path, checkpoint_steps=(5,), recorder=recorder)
    np.testing.assert_array_equal(state.params["w"], 6.0)
    assert [each if each == "saved" else each[0] for each in recorder.seen] == [1, 2, 3, 4, "saved", 5, "saved"]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [5]


def test_a_signal_at_a_step_that_is_due_saves_no_other(tmp_path):
    with signals_caught(), pytest.raises(Interrupted, match="saved at step 2 of 5"):
        run(tmp_path, source=interrupted(1))
    run(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 5]


def test_a_signal_in_the_last_step_ends_nothing(tmp_path):
    with signals_caught():
        assert int(run(tmp_path, source=interrupted(4)).step) == 5


def test_the_second_signal_ends_at_once(tmp_path):
    def twice(step, state):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with signals_caught(), pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=twice)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "keep, left",
    [(KeepConfig(), [1, 2, 3, 4, 5]), (KeepConfig(last=2), [4, 5]), (KeepConfig(last=1, every=2), [2, 4, 5])],
)
def test_the_checkpoints_that_are_kept(keep, left, tmp_path):
    run(tmp_path, checkpoint_steps=(1, 2, 3, 4, 5), keep=keep)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == left
        np.testing.assert_array_equal(checkpoints.restore_params(ABSTRACT, left[0])["w"], left[0] + 1)


def test_an_interim_checkpoint_takes_no_place_of_those_that_are_kept(tmp_path):
    """SIGTERM comes in step 4. Without its checkpoint, the last two of 2, 3 and 5 are 3 and 5."""
    settings = {"checkpoint_steps": (2, 3, 5), "keep": KeepConfig(last=2)}
    with signals_caught(), pytest.raises(Interrupted):
        run(tmp_path, source=interrupted(3), **settings)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 3, 4]
    run(tmp_path, **settings)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3, 5]


# The validation result of each step, for both loss and accuracy.
MEASURED = [0.0, 0.5, 0.1, 0.4, float("nan"), 0.3]
VALIDATED = {
    "validation": Validation(
        100, lambda state: dict.fromkeys(("loss", "accuracy"), MEASURED[int(state.step)]), at_checkpoints=True
    )
}


@pytest.mark.parametrize(
    "keep, left",
    [
        (KeepConfig(last=1, best=1), [2, 5]),
        (KeepConfig(last=1, best=3), [2, 3, 5]),
        (KeepConfig(last=1, best=4), [1, 2, 3, 5]),
        (KeepConfig(last=1, best=1, metric="accuracy"), [1, 5]),
        (KeepConfig(last=1, every=4, best=1), [2, 4, 5]),
    ],
)
def test_the_best_checkpoints_stay_however_often_the_run_is_stopped(keep, left, tmp_path):
    """One run is not stopped.

    The other ends after step 3, and then stops in step 4 with an interim checkpoint without metrics.
    """
    settings = {"keep": keep, "watched": VALIDATED}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", checkpoint_steps=(1, 2, 3, 4, 5), **settings)
    run(tmp_path / "stopped", checkpoint_steps=(1, 2, 3), **settings)
    with signals_caught(), pytest.raises(Interrupted, match="saved at step 4"):
        run(tmp_path / "stopped", checkpoint_steps=(5,), source=interrupted(3), **settings)
    run(tmp_path / "stopped", checkpoint_steps=(5,), **settings)
    with Checkpoints(tmp_path / "whole" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == left
        np.testing.assert_array_equal(checkpoints.restore_params(ABSTRACT, left[0])["w"], left[0] + 1)
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        # Step 4 has no regular checkpoint.
        assert checkpoints.steps() == [step for step in left if step != 4]


def test_damaged_metrics_of_a_checkpoint_are_one_line(tmp_path):
    keep = KeepConfig(last=1, best=1)
    run(tmp_path, checkpoint_steps=(1,), watched=VALIDATED, keep=keep)
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(UserError, match="or metrics of one of its steps are damaged, move that step away"):
        run(tmp_path, checkpoint_steps=(2,), watched=VALIDATED, keep=keep)


def test_a_checkpoint_that_was_saved_before_the_best_were_asked_for_is_none_of_them(tmp_path):
    run(tmp_path, checkpoint_steps=(1, 2), watched=VALIDATED)
    run(tmp_path, checkpoint_steps=(3, 4, 5), watched=VALIDATED, keep=KeepConfig(last=1, best=2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3, 5]


def changed_weight(folder):
    """Changes one bit of a weight, and writes it as Orbax would. Only the digest can detect this."""
    with open_array(folder / "params", "w") as array:
        array[1] = np.nextafter(array[1], np.float32(9))


def changed_moment(folder):
    with open_array(folder / "optimizer", "optimizer_state.m") as array:
        array[0] = 0.25


@contextlib.contextmanager
def open_array(store, name):
    kvstore = {"driver": "ocdbt", "base": store.absolute().as_uri() + "/", "path": name + "/"}
    stored = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    values = stored.read().result()
    yield values
    stored.write(values).result()


def changed_network(folder):
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["network"] = {"width": 1}
    path.write_text(json.dumps(content))


def no_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").write_text("{")


def cut_parameters(folder):
    cut(folder / "params")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize(
    "damage, reason",
    [
        (changed_weight, "params are not what was saved"),
        (changed_moment, "optimizer are not what was saved"),
        (changed_network, "network are not what was saved"),
        (no_metadata, "_CHECKPOINT_METADATA cannot be read"),
        (cut_parameters, "."),
    ],
)
def test_a_damaged_last_checkpoint_is_put_aside(damage, reason, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "5")
    said = []
    state = run(tmp_path, said=said)
    np.testing.assert_array_equal(state.params["w"], 6.0)
    (line,) = said
    assert re.search(rf"checkpoints/5 cannot be restored \(.*{reason}.*\)", line) and "\n" not in line
    assert line.endswith("it is put aside as 5.damaged, and training goes on from step 2")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "5.damaged"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("damage", [no_metadata, changed_weight])
def test_if_all_checkpoints_are_damaged_the_user_decides(damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for step in ("2", "5"):
        damage(tmp_path / "checkpoints" / step)
    with pytest.raises(
        UserError, match=r"checkpoints/2 .* put aside as 2.damaged, and no other is left: run the command"
    ):
        run(tmp_path)
    assert {"2.damaged", "5.damaged"} == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert int(run(tmp_path).step) == 5


@pytest.mark.parametrize(("first", "step"), [(2, 2), (5, 5), (7, None)])
def test_all_processes_restore_the_last_step_that_the_first_one_sees(first, step, finished, tmp_path, monkeypatch):
    """A network's file system may show a new checkpoint to some processes earlier."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("alignment_gap.training.checkpoints.first_says", lambda function: np.array(first))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        if step is None:
            with pytest.raises(StorageError, match=r"process 0 sees the checkpoint .*/7, but another process does not"):
                checkpoints.restore_last(abstract_of(fresh()), print)
        else:
            assert int(checkpoints.restore_last(abstract_of(fresh()), print).step) == step


@pytest.mark.parametrize("failing", ["restore", "metadata"])
def test_a_machine_that_fails_is_no_damage(failing, finished, tmp_path, monkeypatch):
    """With no file left to open, every checkpoint would be put aside, and training would begin anew."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

    def fails(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    if failing == "restore":
        monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    else:
        monkeypatch.setattr(Checkpoints, "_difference", fails)
    with pytest.raises(OSError, match="Too many open files"):
        run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint whose arrays are separate files, and its state."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(64, 32)).astype(np.float32)) for _ in range(2)]
    state = TrainState(jnp.int32(5), {"w": arrays[0], "b": jnp.ones(3)}, {"m": arrays[1], "count": jnp.int32(3)})
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state)
    return folder, state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("seed", range(6))
def test_whatever_byte_is_damaged_no_other_state_is_restored(seed, large, tmp_path):
    """One file of a checkpoint is cut, emptied or has a flipped bit. Then the state is either unchanged or refused."""
    folder, state = large
    draw, told = random.Random(seed), 0
    files = [path for path in sorted((folder / "5").rglob("*")) if path.is_file() and path.stat().st_size]
    # Damage to some files does not change the restored state. If the largest file is emptied, this is always detected.
    largest = max(files, key=lambda path: path.stat().st_size)
    for number in range(8):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        path = copy / (draw.choice(files) if number else largest).relative_to(folder)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(draw.choice([content, content[:place], b""]) if number else b"")
        try:
            with Checkpoints(copy) as checkpoints:
                jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract_of(state), 5), state)
        except UserError as error:
            assert "\n" not in str(error)
            told += 1
    assert told


def test_a_checkpoint_without_digests_is_of_an_earlier_version(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    del content["custom_metadata"]["digests"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="was imported, or saved by an earlier version, and has no whole state of a run"
    ):
        run(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore_params(ABSTRACT, 5)["w"], 6.0)


def test_a_line_that_was_cut_short_and_those_after_the_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    truncate_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    truncate_metrics(tmp_path / "none.jsonl", 4)
    assert not (tmp_path / "none.jsonl").exists()


def test_no_checkpoint_is_said_so(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="holds no complete checkpoint: train"):
        checkpoints.restore_params(ABSTRACT)


def test_a_step_that_is_not_there_is_said_so(tmp_path):
    run(tmp_path)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(UserError, match="checkpoints/3 cannot be restored"),
    ):
        checkpoints.restore_params(ABSTRACT, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def everything(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def empty(folder):
    for path in everything(folder):
        path.write_bytes(b"")


def garble(folder):
    for path in everything(folder):
        path.write_bytes(bytes(reversed(path.read_bytes())))


def cut(folder):
    for path in everything(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(folder):
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("damage", [empty, garble, cut, remove])
def test_a_damaged_checkpoint_is_one_line(damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "5" / "params")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/5 cannot be restored \(.*\): it is damaged") as error:
            checkpoints.restore_params(ABSTRACT, 5)
        assert "\n" not in str(error.value)
        np.testing.assert_array_equal(checkpoints.restore_params(ABSTRACT, 2)["w"], 3.0)


def test_a_checkpoint_of_another_model_is_one_line(finished):
    other = {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jnp.ones(4).sharding)}
    with (
        Checkpoints(finished / "checkpoints") as checkpoints,
        pytest.raises(UserError, match=r"w has the shape \(3,\), the model has \(4,\)"),
    ):
        checkpoints.restore_params(other)
