"""The loop and its checkpoints with the smallest update step there is."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_batch

from alignment_gap.errors import UserError
from alignment_gap.training import Checkpoints, TrainState, make_refresh, train
from alignment_gap.training.loop import truncate_metrics

BATCH = make_batch(4)
ABSTRACT = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)}


def fresh():
    return TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)})


def walk(loss_at=None, gradient_at=None):
    """An update step that adds one, and reports nan after the given step."""

    @jax.jit
    def update_step(state, batch):
        step = state.step + 1
        params = jax.tree.map(lambda leaf: leaf + 1, state.params)
        metrics = {
            "loss": jnp.where(step == (loss_at or -1), jnp.nan, 1.0 / step.astype(jnp.float32)),
            "gradient_norm": jnp.where(step == (gradient_at or -1), jnp.inf, 2.0),
            "prompts": jnp.int32(4),
        }
        return TrainState(step, params, state.optimizer_state, state.copies), metrics

    return update_step


def run(folder, update_step=None, *, source=lambda step, state: BATCH, start=fresh, **settings):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return train(
            start(),
            update_step or walk(),
            source,
            **{"checkpoint_steps": (2, 5), "log_every": 3} | settings,
            checkpoints=checkpoints,
            metrics_path=folder / "metrics.jsonl",
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
    """A batch that tells its step, and what the state was made of when it was asked for."""
    return dataclasses.replace(BATCH, prompt_ids=jnp.full(4, step), scores=jnp.full((4, 2), state.params["w"][0]))


def test_the_recorder_gets_every_batch_once_before_its_checkpoint(tmp_path):
    seen = []

    def record(step, batches):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            steps = [int(batch.prompt_ids[0]) for batch in batches]
            seen.append((step, steps, [float(batch.scores[0, 0]) for batch in batches], checkpoints.steps()))

    run(tmp_path, source=allowed(numbered), record=record)
    # Each is of the state before its update, and none of them is kept for longer.
    assert seen == [(2, [0, 1], [1, 2], []), (5, [2, 3, 4], [3, 4, 5], [2])]


def allowed(source):
    """The source, which may make arrays of numbers inside of the loop."""

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
    """The refresh of a copy of the parameters, and a source that writes down what the copy was at each step."""
    seen = []
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), with_copy()
    )

    def source(step, state):
        seen.append((step, float(jax.device_get(state.copies["sampler"]["w"])[0])))
        return BATCH

    return {"refresh": make_refresh("sampler", every, abstract), "source": source, "start": with_copy}, seen


def test_a_copy_is_that_of_the_last_refresh(tmp_path):
    """The parameter is step + 1. Refreshed before the steps 0, 2 and 4, the copy is 1, 1, 3, 3, 5."""
    settings, seen = lagging(2)
    state = run(tmp_path, **settings)
    assert seen == [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5)]
    np.testing.assert_array_equal(state.copies["sampler"]["w"], 5.0)
    np.testing.assert_array_equal(state.params["w"], 6.0)


def test_a_copy_outlives_a_restart_between_two_refreshes(tmp_path):
    """Stopped after step 2 of a copy that is refreshed every 3 steps; one made anew would be of step 2."""
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
    """Writes down what a bar is told."""

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
        raise AssertionError("the loop has nothing to say")


def test_progress_counts_what_was_done_before_a_restart(tmp_path):
    """The rate counts from the first step on; the loss is shown with each line of metrics."""
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
    """Killed after the line of step 3, whose checkpoint was never written."""

    def killed(step, state):
        if step == 4:
            raise KeyboardInterrupt
        return BATCH

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=killed)
    assert [line["step"] for line in lines(tmp_path)] == [3]
    run(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [3, 5]


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_a_run_that_diverges_stops_and_saves_nothing_of_it(which, tmp_path):
    """Also between two lines of metrics: the checkpoint of step 2 is good, that of step 4 is never written."""
    name = {"loss": "loss is nan", "gradient": "gradient_norm is inf"}[which]
    with pytest.raises(UserError, match=f"the {name} at step 4: lower learning_rate or clip_norm"):
        run(tmp_path, walk(**{f"{which}_at": 4}), checkpoint_steps=(2, 4, 6), log_every=100)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]


def test_a_diverged_line_names_its_step(tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        run(tmp_path, walk(loss_at=3))


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
