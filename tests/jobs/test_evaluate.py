"""Evaluation of a run: outcomes follow from the stored responses; means with intervals; resumption."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from job_runs import Bar, Stopped, metrics, run_job

from alignment_gap.data.records import open_dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.errors import UserError
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import LossConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig, load_outcomes, results_text
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.generate import GENERATE, GenerateConfig, policy_network
from alignment_gap.judges import open_judge
from alignment_gap.sampling import SamplerConfig


@pytest.fixture(scope="module")
def run(sft, sft_config, tmp_path_factory):
    """An IPO run with checkpoints 2, 4 and 6."""
    config = dataclasses.replace(sft_config, loss=LossConfig("ipo", {"beta": 0.1}), start=str(sft), seed=4)
    return run_job(config, tmp_path_factory.mktemp("evaluate") / "ipo")


@pytest.fixture(scope="module")
def answers(pairs, sft, tmp_path_factory):
    """A dataset with one response of the supervised policy to each of the first prompts."""
    folder = tmp_path_factory.mktemp("evaluate") / "answers"
    sampler = SamplerConfig(temperature=0.7)
    config = GenerateConfig(str(pairs), (str(sft),), samples=1, limit=24, sampler=sampler, response_length=6)
    make(GENERATE, dataclasses.replace(config, batch_size=8), folder, Bar())
    return folder


@pytest.fixture(scope="module")
def config(run, pairs, judge, reward_model, answers, sft):
    return EvaluateConfig(
        run=str(run),
        dataset=str(pairs),
        judges=(f"proxy={judge}", f"rewards={reward_model}", "rubric"),
        opponents=(f"recorded={answers}", f"start={sft}"),
        prompts=24,
        kl_prompts=8,
        pairs=16,
        response_length=6,
        batch_size=8,
    )


def evaluated(config, folder, bar=None):
    make(EVALUATE, config, folder, bar or Bar())
    return folder


@pytest.fixture(scope="module")
def evaluation(config, tmp_path_factory):
    return evaluated(config, tmp_path_factory.mktemp("evaluate") / "out")


def stored(folder, step):
    with np.load(folder / f"{step}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.slow
def test_the_rubric_s_outcomes_are_those_of_the_stored_responses(evaluation, answers, pairs):
    found, rubric = stored(evaluation, 4), rubric_of(open_dataset(pairs))
    prompts = [example.prompt for example in open_dataset(pairs)[:24]]
    ours = [row[:length] for row, length in zip(found["responses"], found["lengths"], strict=True)]
    theirs = [example.responses[0] for example in open_dataset(answers)]
    mine, others = rubric(prompts, ours), rubric(prompts, theirs)
    np.testing.assert_allclose(found["reward.rubric"], mine, rtol=1e-6)
    np.testing.assert_array_equal(found["win_rate.rubric.recorded"], (np.sign(mine - others) + 1) / 2)
    np.testing.assert_array_equal(found["length"], found["lengths"])


def test_every_judge_meets_every_opponent_and_every_checkpoint_is_measured(evaluation):
    pairs = {f"win_rate.{judge}.{other}" for judge in ("proxy", "rewards", "rubric") for other in ("recorded", "start")}
    other = {"reward.rubric", "reward.rewards", "length", "kl", "accuracy", "chosen_log_ratio", "rejected_log_ratio"}
    for step in (2, 4, 6):
        outcomes = load_outcomes(evaluation / f"{step}.npz")
        assert outcomes.keys() == pairs | other
        assert {len(outcomes[name]) for name in pairs} == {24} and len(outcomes["kl"]) == 8
        assert len(outcomes["accuracy"]) == 16
        assert {value for name in pairs for value in outcomes[name]} <= {0.0, 0.5, 1.0}


def test_a_policy_classifies_further_pairs_and_samples_of_its_own(config, evaluation, pairs, tmp_path):
    """The first of two samples is the response that is measured; the second one is new."""
    few = tmp_path / "few"
    make(COMPOSE, ComposeConfig((str(pairs),), order="recorded", limit=12), few, Bar())
    further, (_, judge) = (f"same={pairs}", f"few={few}"), config.judges[0].split("=")
    changed = dataclasses.replace(config, classified=further, own_labels=judge, steps=(4,))
    found, before = stored(evaluated(changed, tmp_path / "out"), 4), stored(evaluation, 4)
    assert found.keys() - before.keys() == {"accuracy.same", "accuracy.few", "accuracy.own"}
    for name in before:
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    np.testing.assert_array_equal(found["accuracy.same"], found["accuracy"])
    assert len(found["accuracy.few"]) == 12 and len(found["accuracy.own"]) == 8
    assert set(found["accuracy.own"]) <= {0.0, 0.5, 1.0} and set(found["accuracy.own"]) != {0.5}


def test_a_judge_with_two_tasks_is_in_memory_once(config, tmp_path, monkeypatch):
    opened = []

    def open_and_count(asked, *rest):
        opened.append(asked.judge)
        return open_judge(asked, *rest)

    monkeypatch.setattr("alignment_gap.jobs.evaluate.open_judge", open_and_count)
    name, place = config.judges[0].split("=")
    asked = {"judges": (f"{name}={place}",), "own_labels": place, "steps": (2,), "opponents": ()}
    evaluated(dataclasses.replace(config, **asked), tmp_path / "own")
    assert opened == [place]
    evaluated(dataclasses.replace(config, **asked | {"own_labels": "rubric"}), tmp_path / "other")
    assert opened == [place, place, "rubric"]


def test_further_pairs_are_pairs(config, answers, tmp_path):
    changed = dataclasses.replace(config, classified=(f"answers={answers}",))
    with pytest.raises(UserError, match=r"classified has .*answers: give datasets of pairs"):
        evaluated(changed, tmp_path / "out")


def test_the_policy_leaves_its_reference(evaluation, run):
    kl = [load_outcomes(evaluation / f"{step}.npz")["kl"].mean() for step in (2, 4, 6)]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]


def test_a_start_that_was_trained_further_is_not_taken_for_the_reference(config, run, sft, tmp_path):
    other = shutil.copytree(run, tmp_path / "ipo")
    settings = json.loads((other / "job.json").read_text())
    (other / "job.json").write_text(json.dumps(settings | {"start.digest": "0" * 64}))
    with pytest.raises(UserError, match=rf"was trained with another checkpoint of {sft} than 6, its last one now: set"):
        evaluated(dataclasses.replace(config, run=str(other)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_policy_has_no_distance_from_itself(config, sft, tmp_path):
    settings = {"judges": (), "opponents": (), "reference": str(sft), "steps": (6,)}
    folder = evaluated(dataclasses.replace(config, run=str(sft), **settings), tmp_path / "own")
    outcomes = load_outcomes(folder / "6.npz")
    assert outcomes.keys() == {"length", "kl", "accuracy", "chosen_log_ratio", "rejected_log_ratio"}
    np.testing.assert_allclose(outcomes["kl"], 0, atol=1e-6)
    assert set(outcomes["accuracy"]) == {0.5} and set(outcomes["chosen_log_ratio"]) == {0.0}


def test_a_reference_of_another_network_is_refused(config, sft, tmp_path, monkeypatch):
    """Its parameters would be run through the network of the policy."""

    def network_of(folder, step):
        network = policy_network(folder, step)
        changed = dataclasses.replace(network.model, relative_position_max_distance=6)
        return dataclasses.replace(network, model=changed) if folder == str(sft) else network

    monkeypatch.setattr("alignment_gap.jobs.evaluate.policy_network", network_of)
    with pytest.raises(
        UserError, match=r"sft is of another model \(relative_position_max_distance .*: give a reference"
    ):
        evaluated(dataclasses.replace(config, reference=str(sft)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_has_means_with_intervals_that_hold_them(evaluation):
    with (evaluation / "results.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for row in rows:
        for name, values in load_outcomes(evaluation / f"{row['step']}.npz").items():
            assert float(row[name]) == pytest.approx(values.mean())
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
    text = results_text(evaluation)
    assert text.splitlines()[0].split() == ["mean", "(95", "%", "interval)", "step", "2", "step", "4", "step", "6"]
    assert any(line.startswith("win_rate.rubric.start") for line in text.splitlines()) and "fewer" not in text
    assert (evaluation / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_killed_after_a_checkpoint_it_goes_on_and_ends_the_same(config, evaluation, tmp_path):
    """Batches of another size give the same result up to rounding."""
    with pytest.raises(Stopped):
        evaluated(config, tmp_path / "out", Bar(stop_at=1))
    first = (tmp_path / "out" / "2.npz").stat().st_mtime_ns
    (tmp_path / "out" / "4.npz").write_bytes(b"half a fi")
    evaluated(config, tmp_path / "out")
    assert (tmp_path / "out" / "2.npz").stat().st_mtime_ns == first
    assert (tmp_path / "out" / "results.csv").read_bytes() == (evaluation / "results.csv").read_bytes()
    other = evaluated(dataclasses.replace(config, batch_size=16, steps=(4,)), tmp_path / "other")
    ours, theirs = stored(other, 4), stored(evaluation, 4)
    np.testing.assert_array_equal(ours["responses"], theirs["responses"])
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_damaged_file_of_a_finished_evaluation_is_measured_anew(config, evaluation, tmp_path):
    """One bit of one outcome is flipped. The checksum detects it in every reader."""
    folder = tmp_path / "out"
    shutil.copytree(evaluation, folder)
    whole = (folder / "4.npz").read_bytes()
    place = whole.index(b"length.npy") + 200
    (folder / "4.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"4.npz is missing or damaged: run its job again"):
        load_outcomes(folder / "4.npz")
    evaluated(config, folder)
    for name, values in stored(evaluation, 4).items():
        np.testing.assert_array_equal(stored(folder, 4)[name], values)


def test_a_missing_file_of_a_finished_evaluation_is_made_anew(config, evaluation, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(evaluation, folder)
    for name in ("4.npz", "results.csv"):
        (folder / name).unlink()
    assert make(EVALUATE, config, folder, Bar())
    assert (folder / "results.csv").read_bytes() == (evaluation / "results.csv").read_bytes()


def test_a_preference_model_is_compared_with_labels_and_with_judges(judge, pairs, tmp_path):
    config = EvaluateConfig(str(judge), dataset=str(pairs), judges=("rubric",), pairs=16, batch_size=8)
    outcomes = load_outcomes(evaluated(config, tmp_path / "out") / "4.npz")
    assert outcomes.keys() == {"accuracy", "agreement.rubric"}
    assert {len(values) for values in outcomes.values()} == {16}
    alone = dataclasses.replace(config, judges=(f"self={judge}",))
    agreement = load_outcomes(evaluated(alone, tmp_path / "self") / "4.npz")["agreement.self"]
    # With itself as the judge; none of its probabilities is a tie.
    np.testing.assert_allclose(agreement, 1, atol=1e-6)


def test_a_preference_model_has_no_opponents(judge, sft, pairs, tmp_path):
    config = EvaluateConfig(str(judge), dataset=str(pairs), judges=("rubric",), opponents=(str(sft),))
    with pytest.raises(UserError, match=r"opponents is set, but .* is a preference model, which writes no responses"):
        evaluated(config, tmp_path / "out")


def test_a_judge_by_name(config, tmp_path):
    changes = {"judges": ("short=judge_functions:brevity",), "opponents": (), "steps": (2,)}
    outcomes = load_outcomes(evaluated(dataclasses.replace(config, **changes), tmp_path / "out") / "2.npz")
    words = stored(tmp_path / "out", 2)["lengths"] - 1
    assert outcomes["reward.short"].max() <= 0
    assert np.corrcoef(outcomes["reward.short"], words)[0, 1] < -0.9


def test_the_best_of_n_is_the_best_of_the_first_n_responses_by_its_judge(config, tmp_path):
    """The choosing judge is also a measuring judge. So its reward rises with the number of responses."""
    judges = {"judges": ("short=judge_functions:brevity",), "opponents": (config.opponents[0],)}
    choice = {"best_of": (1, 2, 4), "best_by": "judge_functions:brevity"}
    asked = dataclasses.replace(config, **judges, **choice)
    folder = evaluated(asked, tmp_path / "best")
    one, two, four = (stored(folder, number) for number in (1, 2, 4))
    better = [b["reward.short"] - a["reward.short"] for a, b in ((one, two), (two, four))]
    assert all((gain >= 0).all() and (gain > 0).any() for gain in better)
    for number, found in ((1, one), (2, two), (4, four)):
        assert found["kl"] == pytest.approx(np.full(8, math.log(number) - (number - 1) / number))
        assert found.keys() == {"reward.short", "win_rate.short.recorded", "length", "kl", "responses", "lengths"}
    # The best of one response is this response, the one that the plain evaluation draws.
    plain = evaluated(dataclasses.replace(config, **judges, steps=(6,)), tmp_path / "plain")
    np.testing.assert_array_equal(stored(plain, 6)["responses"], one["responses"])
    assert [line.split(",")[1] for line in (folder / "results.csv").read_text().splitlines()] == ["step", "1", "2", "4"]


BAD = {
    "best of none": ({"best_of": (0, 2), "best_by": "rubric"}, r"best_of is \(0, 2\): give numbers of at least 1"),
    "best by nobody": ({"best_of": (2,)}, r"best_of is \(2,\) and best_by is None: set both"),
    "best of, classified": (
        {"best_of": (2,), "best_by": "rubric", "own_labels": "rubric"},
        "best_of is set, and then nothing is classified: leave classified and own_labels out",
    ),
    "best of a judge": (
        {"run": "JUDGE", "best_of": (2,), "best_by": "rubric"},
        "which writes no responses: leave it out",
    ),
    "no run": ({"run": None}, "run is not set"),
    "missing run": ({"run": "nowhere"}, "nowhere has no complete checkpoint"),
    "no step": ({"steps": (3,)}, "3"),
    "no dataset": ({"dataset": None}, "dataset is not set"),
    "judge": (
        {"judges": ("nowhere",)},
        "the judge nowhere is not there: give the folder of a preference model, rubric",
    ),
    "a name twice": ({"judges": ("a=rubric", "a=runs/b")}, "judges has the names a, a, and one comes twice"),
    "opponents without a judge": (
        {"judges": ()},
        "and no judge compares with them: set judges, or leave opponents out",
    ),
    "opponent": ({"opponents": ("nowhere",)}, "nowhere has no complete checkpoint"),
    "prompts": ({"prompts": 0}, "prompts is 0"),
    "kl": ({"kl_prompts": 30}, "kl_prompts is 30, over prompts=24"),
    "batch": ({"batch_size": 9}, "batch_size is 9"),
    "reference": ({"run": "SFT"}, "was trained without a reference: set reference"),
    "answers": ({"prompts": 48}, "answers 24 of the 48 prompts"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_told_before_anything_is_written(name, config, sft, judge, tmp_path):
    changes, message = BAD[name]
    runs = {"SFT": str(sft), "JUDGE": str(judge)}
    changes = {key: runs.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        evaluated(dataclasses.replace(config, **changes), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_prompts_come_once(config, pairs, tmp_path):
    """The dataset has every pair twice."""
    make(COMPOSE, ComposeConfig((str(pairs), str(pairs)), order="recorded"), tmp_path / "twice", Bar())
    changes = {"dataset": str(tmp_path / "twice"), "judges": (), "opponents": (), "steps": (2,), "prompts": 512}
    folder = evaluated(dataclasses.replace(config, **changes), tmp_path / "out")
    assert len(stored(folder, 2)["lengths"]) == 48
    assert f"{tmp_path / 'twice'} has 48 prompts, fewer than prompts=512: all are answered" in results_text(folder)
