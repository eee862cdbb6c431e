"""Jobs with a moving reference: resumed and replayed bit for bit, with adapters, in a mixture, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from job_runs import Bar, arrays, assert_equal_runs, metrics, run_and_stop, run_job

from alignment_gap.checkpoints import open_checkpoint
from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, MonitorConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.train import open_training
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import AdapterConfig
from alignment_gap.training import OptimizerConfig

COPY = "copies.reference."


@pytest.fixture(scope="module")
def averaged(sft, pairs):
    """DPO on pairs. The reference is a moving average."""
    return JobConfig(
        loss=LossConfig("dpo", {"beta": 0.1}),
        source=DatasetConfig(str(pairs), batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        start=str(sft),
        steps=6,
        checkpoint_every=2,
        log_every=1,
        reference_every=2,
        reference_alpha=0.25,
    )


@pytest.fixture(scope="module")
def run(averaged, tmp_path_factory):
    return run_job(averaged, tmp_path_factory.mktemp("moving") / "run")


def copied(folder, step):
    """The parameters of a checkpoint, and its copy of the reference."""
    found = arrays(folder, step)
    return {
        prefix: {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        for prefix in (COPY, "params.")
    }


@pytest.mark.slow
def test_the_copy_in_a_checkpoint_is_the_moving_average(run, sft):
    """A checkpoint is saved before the move of its step.

    At step 2 the copy is the start; at step 4 it has moved once.
    """
    start, two, four = (copied(folder, step) for folder, step in ((sft, 6), (run, 2), (run, 4)))
    assert start["params."].keys() == two[COPY].keys()
    for name, value in start["params."].items():
        np.testing.assert_array_equal(two[COPY][name], value, err_msg=name)
        expected = 0.25 * two["params."][name] + 0.75 * value
        np.testing.assert_allclose(four[COPY][name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


# Between two moves, and after a checkpoint that is saved before a move.
@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 4])
def test_killed_it_goes_on_with_the_same_bits(after, run, averaged, tmp_path):
    run_and_stop(averaged, tmp_path, after)
    assert_equal_runs(run_job(averaged, tmp_path), run)


@pytest.mark.slow
def test_a_synced_reference_has_no_margin_right_after_its_move(averaged, tmp_path):
    config = dataclasses.replace(averaged, reference_alpha=1.0, steps=4)
    margins = [line["margin"] for line in metrics(run_job(config, tmp_path))]
    np.testing.assert_allclose([margins[0], margins[2]], 0.0, atol=1e-5)
    assert min(margins[1], margins[3]) > 1e-3


@pytest.mark.slow
def test_it_may_begin_elsewhere_than_the_policy(averaged, sft, tmp_path):
    config = dataclasses.replace(averaged, reference=str(sft), reference_step=2, steps=2)
    run_job(config, tmp_path)
    assert metrics(tmp_path)[0]["chosen_log_ratio"] > 1.0
    expected = copied(sft, 2)["params."]
    for name, value in copied(tmp_path, 2)[COPY].items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_online_its_record_is_replayed_without_it(averaged, judge, pairs, tmp_path):
    """The sampler is a mixture with the moving reference. The record holds the reference's log-probs."""
    source = OnlineConfig(DatasetConfig(str(pairs), batch_size=8), judge=JudgeConfig(str(judge)), mixture=1.0)
    config = dataclasses.replace(averaged, loss=LossConfig("ipo_md"), source=source, steps=4)
    online = run_job(config, tmp_path / "run")
    record = open_dataset(online / "record")
    for example in (record[0], record[-1]):
        for sampled, reference in zip(example.sampler_log_probs, example.reference_log_probs, strict=True):
            np.testing.assert_allclose(sampled, reference, atol=1e-4)
    run_and_stop(config, tmp_path / "stopped", 3)
    assert_equal_runs(run_job(config, tmp_path / "stopped"), online)
    recorded = DatasetConfig(str(online / "record"), batch_size=8, order="recorded")
    replay = dataclasses.replace(config, source=recorded, reference_every=None, reference_alpha=1.0)
    replayed = run_job(replay, tmp_path / "replayed")
    assert metrics(replayed) == metrics(online)
    ours, theirs = arrays(replayed), arrays(online)
    assert {name for name in theirs.keys() - ours.keys() if not name.startswith(COPY)} == set()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    with pytest.raises(UserError, match="has the log-probs of a fixed reference: leave reference_every=2 out"):
        run_job(dataclasses.replace(config, source=recorded), tmp_path / "refused")


@pytest.mark.slow
def test_of_adapters_the_adapters_alone_are_copied(averaged, tmp_path):
    adapter = AdapterConfig(2, targets=("query",))
    config = dataclasses.replace(averaged, adapter=adapter, reference_alpha=1.0, steps=4)
    run = run_job(config, tmp_path / "run")
    names = [name for name in arrays(run) if name.startswith(COPY)]
    assert len(names) == len(open_checkpoint(run).tensors)
    margins = [line["margin"] for line in metrics(run)]
    assert margins[0] == 0.0 and margins[2] == pytest.approx(0.0, abs=1e-5) and abs(margins[3]) > 1e-4
    run_and_stop(config, tmp_path / "stopped", 3)
    assert_equal_runs(run_job(config, tmp_path / "stopped"), run)


def test_it_stays_in_memory_once(averaged, tmp_path):
    """Only as the copy: the run releases the parameters that it read for the start."""
    opened = open_training(dataclasses.replace(averaged, steps=1))
    opened.run(tmp_path, Bar())
    _, inputs = opened.run.args
    assert inputs.start.read.cache_info().currsize == 0


@pytest.mark.slow
def test_it_is_evaluated_against_the_start(run, sft, pairs, tmp_path):
    config = EvaluateConfig(run=str(run), dataset=str(pairs), prompts=8, kl_prompts=8, pairs=8, batch_size=8)
    digests = []
    for name, reference in (("own", None), ("start", str(sft))):
        settings = dataclasses.replace(config, reference=reference, response_length=4, steps=(6,))
        make(EVALUATE, settings, tmp_path / name, Bar())
        digests.append(json.loads((tmp_path / name / "job.json").read_text())["reference.digest"])
    assert digests[0] == digests[1]


def test_held_out_pairs_are_measured_against_it_where_it_is(averaged, pairs, tmp_path):
    """The margin grows until step 3. Then the reference is set to the policy."""
    monitor = MonitorConfig(validation=str(pairs), validate_every=1)
    config = dataclasses.replace(averaged, monitor=monitor, reference_every=3, reference_alpha=1.0, steps=4)
    lines = (run_job(config, tmp_path) / "validation.jsonl").read_text().splitlines()
    margins = [json.loads(line)["margin"] for line in lines]
    assert margins[0] < margins[1] < margins[2] > 2 * margins[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_every": 0}, "reference_every is 0: it must be at least 1"),
        ({"reference_alpha": 0.0}, "reference_alpha is 0.0: it must be above 0"),
        ({"reference_alpha": 1.5}, "reference_alpha is 1.5: it must be from 0 to 1"),
        ({"reference_every": None}, "reference_alpha is 0.25, but reference_every is not set"),
        ({"kind": "pairwise"}, "reference_every is 2: a preference model has no reference"),
        ({"start": None}, "reference_every is 2, but there is no reference: set start or reference"),
        ({"reference_log_probs": "stored"}, "stored log-probs are of a fixed reference"),
        ({"adapter": AdapterConfig(2), "reference": "x"}, "with adapters a moving reference begins at start"),
        (
            {"source": OnlineConfig(mixture=0.5, refresh_every=4, steps_per_draw=4)},
            "reference_every is 2 and steps_per_draw is 4: the steps of a draw share the mixture's reference",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message, averaged):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(averaged, **changes)


def test_a_loss_without_a_reference_is_refused(averaged, tmp_path):
    with pytest.raises(UserError, match="reference_every is 2, but the loss simpo reads no reference: leave it out"):
        run_job(dataclasses.replace(averaged, loss=LossConfig("simpo")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
