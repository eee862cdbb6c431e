"""A study runs until its report exists; after a kill it continues with the same numbers; no job runs twice."""

import dataclasses
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from job_runs import arrays, assert_equal_runs, metrics
from studies import CACHE, copied, newly_run, quiet, rows, run, unwritten

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import card_text, find_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import locked
from alignment_gap.jobs.folder import make
from alignment_gap.study.config import SftConfig
from alignment_gap.study.results import report_context, study_results
from alignment_gap.study.run import open_studies, owned, run_job, run_study, write_study_report
from alignment_gap.training import OptimizerConfig

HERE = pathlib.Path(__file__).parent
ARMS = ("golden", "online", "shuffled", "offline")


# A whole study.


def test_a_row_for_every_checkpoint_of_every_arm(finished):
    found = rows(finished)
    assert [(row["arm"], row["step"]) for row in found] == [
        ("sft", "0"),
        *((arm, step) for arm in ARMS for step in ("2", "4")),
    ]
    assert {row["loss"] for row in found[1:]} == {"ipo"} and {row["seed"] for row in found} == {"0"}
    for row in found:
        assert 0 <= float(row["win_rate_low"]) <= float(row["win_rate"]) <= float(row["win_rate_high"]) <= 1
        empty = {name for name in row if not row[name] and "_accuracy" not in name}
        assert empty <= {"beta", "learning_rate", "size"}
    assert [row["beta"] for row in found] == ["", *["0.1"] * 8]


@pytest.mark.slow
def test_log_probs_that_a_job_stored_change_no_result(config, finished, tmp_path, undrawn):
    """Only the job itself, the run that reads it, and the evaluation of this run are new."""
    stored = dataclasses.replace(config, arms=dataclasses.replace(config.arms, stored_reference=True))
    study, lines = run(stored, copied(finished, tmp_path / "stored"), update=True)
    offline = "offline-ipo-beta0.1-lr0.01"
    assert newly_run(lines)(study.graph) == ["reference", offline, f"evaluation-{offline}"]
    assert rows(study) == rows(finished)
    # One file: the run found what the job had stored, and scored nothing itself.
    assert len([*study.graph.job("seed0-relabelled-train").folder.glob("reference/*/log_probs.npy")]) == 1


def test_the_origin_has_no_divergence_and_classifies_nothing(finished):
    origin = rows(finished)[0]
    assert float(origin["kl"]) == 0
    assert float(origin["accuracy"]) == 0.5
    assert float(origin["chosen_log_ratio"]) == float(origin["rejected_log_ratio"]) == 0


def test_trained_policies_have_left_the_origin(finished):
    assert all(float(row["kl"]) > 0 for row in rows(finished)[1:])
    assert len({row["kl"] for row in rows(finished)}) == 9


def test_the_report_lies_beside_the_jobs(finished):
    assert {path.name for path in finished.workdir.iterdir()} == {
        *("jobs", "figures", "report.html", "results.csv", "claims.csv", "comparisons.csv", "fits.csv"),
        *("outcomes.npz", "facts.json", "study.json", ".lock"),
    }
    page = (finished.workdir / "report.html").read_text()
    assert "http-equiv" in page and "<script src" not in page
    assert {path.stem for path in (finished.workdir / "figures").iterdir()} == {
        *("equal_kl_ipo", "equal_kl_ipo_rubric", "figure_2", "figure_3", "figure_4", "figure_4_rubric"),
        *("figure_7", "figure_7_rubric", "figure_8_ipo", "training_sft", "training_judges", "training_ipo"),
    }
    for job in finished.graph.jobs:
        assert job.state == "done" and job.name in page


def test_results_are_the_outcomes_of_the_evaluations(finished):
    results = study_results(finished.graph)
    (seed,) = finished.graph.seeds
    (evaluation,) = (run.evaluation for run in seed.runs if run.arm == "online")
    (last,) = (result for result in results if (result.arm, result.step) == ("online", 4))
    with np.load(evaluation.folder / "4.npz") as outcomes:
        np.testing.assert_array_equal(last.outcomes["win_rate"], outcomes["win_rate.golden.golden"])
        np.testing.assert_array_equal(last.outcomes["win_rate_sft"], outcomes["win_rate.golden.sft"])
        np.testing.assert_array_equal(last.outcomes["proxy_win_rate"], outcomes["win_rate.proxy.golden"])
        np.testing.assert_array_equal(last.outcomes["rubric"], outcomes["reward.rubric"])
        np.testing.assert_array_equal(last.outcomes["kl"], outcomes["kl"])
    sizes = {name: len(values) for name, values in last.outcomes.items()}
    assert sizes["win_rate"] == sizes["length"] == 16 and sizes["kl"] == sizes["accuracy"] == 8
    assert set(np.unique(last.outcomes["win_rate"])) <= {0.0, 0.5, 1.0}


def test_the_report_knows_judges_samples_and_times(finished):
    context = report_context(finished.config, finished.graph)
    assert [(facts.seed, facts.measured) for facts in context.judges] == [
        *((0, "golden, held-out human labels"), (0, "proxy, its training pairs"), (0, "proxy, held-out pairs"))
    ]
    for facts in context.judges:
        assert facts.shares.keys() == {"the labels", "rubric"}
        assert all(0 <= share <= 1 for share in facts.shares.values())
    assert [(run.name, run.loss) for run in context.training] == [
        *(("sft", "sft"), ("golden model", ""), ("proxy model", "")),
        *((arm, "ipo") for arm in ARMS),
    ]
    offline = context.training[-1]
    assert (offline.beta, offline.learning_rate, offline.steps_factor, offline.seed) == (0.1, 1e-2, 1, 0)
    assert offline.setting == study_results(finished.graph)[-1].setting
    logged = finished.graph.job("seed0-offline-ipo-beta0.1-lr0.01").folder / "metrics.jsonl"
    assert offline.lines == [json.loads(line) for line in logged.read_text().splitlines()] and offline.seconds > 0
    assert context.wall_time.keys() == {job.name for job in finished.graph.jobs}
    assert len(context.samples) == 2
    for samples in context.samples.values():
        assert [(sample["arm"], sample["step"]) for sample in samples] == [("sft", 0), *((arm, 4) for arm in ARMS)]
        assert all(0 <= sample["rubric"] <= 1 for sample in samples)


def test_the_report_shows_what_the_golden_model_has_to_beat(finished, config, tmp_path):
    evaluation = dataclasses.replace(config.evaluation, baselines=True)
    (study,) = open_studies(dataclasses.replace(config, evaluation=evaluation), finished.workdir)
    job = study.graph.job("seed0-judge-baselines")
    make(job.kind, job.config, tmp_path / "told")
    told = dataclasses.replace(job, folder=tmp_path / "told")
    seeds = tuple(dataclasses.replace(seed, baselines=told) for seed in finished.graph.seeds)
    judges = report_context(finished.config, dataclasses.replace(finished.graph, seeds=seeds)).judges
    assert [facts.measured for facts in judges[3:]] == [
        "the shorter response, held-out human labels",
        "n-grams, held-out human labels",
    ]
    assert all(facts.shares.keys() == {"the labels"} and 0 <= facts.shares["the labels"] <= 1 for facts in judges[3:])


def test_the_datasets_of_a_study_lead_back_to_the_human_pairs(finished):
    online, golden = (finished.graph.job(f"seed0-{name}").folder for name in ("online-ipo-beta0.1-lr0.01", "golden"))
    text = card_text(open_dataset(online / "record"))
    made_by = [line.strip() for line in text.splitlines() if line.strip() in ("online", "label", "prepare")]
    assert made_by == ["online", "label", "prepare"]
    assert golden.name in text
    record = open_dataset(online / "record")
    assert len(record) == 32
    assert find_vocabulary(record).digest == record.card.vocabulary_digest


# No job runs twice.


def test_a_finished_study_runs_no_job_again(finished, config, tmp_path, undrawn):
    folder = copied(finished, tmp_path / "copy")
    with unwritten(folder / "jobs"):
        _, lines = run(config, folder)
    said = [line for line in lines if line.startswith("[")]
    jobs = enumerate(finished.graph.jobs, 1)
    # Two jobs run at a time, so lines of independent jobs may come in any order.
    assert sorted(said) == sorted(f"[{number}/20] {job.name}: finished before" for number, job in jobs)
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert lines[-2].startswith("Loss  Arm")


@pytest.mark.parametrize("name", ["data", "relabelled-train", "shuffled-ipo-beta0.1-lr0.01", "judge-golden"])
def test_the_job_of_a_finished_study_by_itself_changes_nothing(finished, name):
    job = finished.graph.job(f"seed0-{name}")
    with unwritten(job.folder):
        assert not make(job.kind, job.config, job.folder)


def test_the_report_waits_for_every_job(config, tmp_path):
    (study,) = open_studies(config, tmp_path)
    with pytest.raises(UserError, match="20 jobs are not done, such as seed0-data: run the study, or these jobs"):
        write_study_report(study, quiet)
    assert not list(tmp_path.iterdir())


def test_a_job_before_its_inputs_says_what_is_missing(config, tmp_path):
    (study,) = open_studies(config, tmp_path)
    job = study.graph.job("seed0-sft")
    with pytest.raises(UserError, match=r"^[^\n]*seed0-data-[^\n]*$"):
        run_job(job, job.name, quiet)
    assert not (job.folder / "done.json").exists()


# A folder with another config.


def test_another_config_is_refused_and_update_redoes_only_what_depends_on_it(finished, config, tmp_path, undrawn):
    folder = copied(finished, tmp_path / "copy")
    changed = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, shown=1))
    with pytest.raises(UserError, match=r"evaluation\.shown was 2, now 1.*--workdir, or --update"):
        run(changed, folder)
    with unwritten(folder / "jobs"):
        study, lines = run(changed, folder, update=True)
    assert newly_run(lines)(study.graph) == []
    assert "1 prompt with responses" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match=r"evaluation\.shown was 1, now 2"):
        run(config, folder)


def test_two_runs_in_one_folder_are_refused(finished):
    with locked(finished.workdir), pytest.raises(UserError, match="is in use by another run"):
        run_study(finished, say=quiet)


# Other starting points.


def test_sft_starts_from_another_run_and_pools_prepared_datasets(finished, config, tmp_path):
    """The learning rate is almost 0, so SFT stays at its start; the judge gets the network of that start."""
    data, sft, pairs = (finished.graph.job(f"seed0-{name}").folder for name in ("data", "sft", "relabelled-train"))
    settings = SftConfig(
        start=str(sft),
        also=(str(pairs), str(data / "validation")),
        weights=(2.0, 1.0, 1.0),
        steps=2,
        batch_size=8,
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-30),
    )
    (study,) = open_studies(dataclasses.replace(config, prepared=str(data), sft=settings, policy=None), tmp_path)
    for name in ("sft", "golden"):
        job = study.graph.job(f"seed0-{name}")
        assert job.state == "ready"
        run_job(job, job.name, quiet)
        assert job.state == "done"
    ours, theirs = arrays(study.graph.job("seed0-sft").folder), arrays(sft)
    for name in (name for name in ours if name.startswith("params.")):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert math.isfinite(metrics(study.graph.job("seed0-golden").folder)[-1]["loss"])


def test_a_study_of_the_network_of_its_start_is_opened_again(finished, config, tmp_path):
    sft = dataclasses.replace(config.sft, start=str(finished.graph.job("seed0-sft").folder))
    (study,) = open_studies(dataclasses.replace(config, sft=sft, policy=None), tmp_path)
    for _ in range(2):
        with owned(study, update=False):
            assert json.loads((tmp_path / "study.json").read_text())["policy"] is None


def test_a_prepared_dataset_in_the_place_of_the_task_gives_the_same_policy(finished, config, tmp_path):
    """The dataset is that of the built-in task, so the results equal those of a study of the task."""
    data = finished.graph.job("seed0-data").folder
    (study,) = open_studies(dataclasses.replace(config, prepared=str(data)), tmp_path)
    job = study.graph.job("seed0-sft")
    run_job(job, job.name, quiet)
    assert_equal_runs(job.folder, finished.graph.job("seed0-sft").folder)
    names = {each.name for each in study.graph.jobs}
    assert names == {each.name for each in finished.graph.jobs} - {"seed0-data"}


@pytest.mark.slow
def test_judges_and_arms_start_from_any_run(finished, config, tmp_path):
    """The learning rate is almost 0, so they stay at their start. The reference of the arm is still SFT."""
    runs = {name: finished.graph.job(f"seed0-{name}").folder for name in ("golden", "online-ipo-beta0.1-lr0.01")}
    golden, online = runs.values()
    still = OptimizerConfig(name="sgd", learning_rate=1e-30)
    proxy = dataclasses.replace(config.proxy, start=str(golden), steps=1, optimizer=still)
    arms = {"start": str(online), "checkpoint_steps": (1,), "optimizer": still, "offline_learning_rates": (1e-30,)}
    changed = dataclasses.replace(config, proxy=proxy, arms=dataclasses.replace(config.arms, **arms))
    (study,) = open_studies(changed, copied(finished, tmp_path / "study"))
    for name, start in (("proxy", golden), ("offline-ipo-beta0.1-lr1e-30", online)):
        job = study.graph.job(f"seed0-{name}")
        assert job.state == "ready"
        run_job(job, job.name, quiet)
        ours, theirs = arrays(job.folder), arrays(start)
        for array in (array for array in ours if array.startswith("params.")):
            np.testing.assert_array_equal(ours[array], theirs[array], err_msg=array)
    # IPO is (1 / (2 beta))**2 if the policy is the reference.
    assert abs(metrics(job.folder)[0]["loss"] - 25) > 0.1


# Killed.


@pytest.mark.slow
def test_a_study_of_a_prepared_dataset_killed_with_signal_9_goes_on_to_the_same_numbers(
    finished, config, tmp_path, without_tensorflow
):
    """Another study prepared the dataset, so all numbers equal that study's. No process can import TensorFlow."""
    data, names = finished.graph.job("seed0-data").folder, ("online",)
    command = [sys.executable, "-c", "from alignment_gap.cli.main import main; main()", "study"]
    command += [f"--config={HERE / 'nano.py'}", f"--workdir={tmp_path}", f"--config.prepared={data}", CACHE]
    command += [f"--config.arms.names={names}"]
    # Only the online arm and its evaluation are missing.
    arms = dataclasses.replace(config.arms, names=names)
    (study,) = open_studies(dataclasses.replace(config, prepared=str(data), arms=arms), tmp_path)
    for job in study.graph.jobs:
        if "online" not in job.name:
            shutil.copytree(finished.graph.job(job.name).folder, job.folder)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=without_tensorflow)
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "jobs").glob("seed0-online-*/checkpoints/2")):
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline, "the online arm did not reach its first checkpoint"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not list((tmp_path / "jobs").glob("seed0-online-*/done.json"))
    done = subprocess.run(command, capture_output=True, text=True, env=without_tensorflow)
    assert done.returncode == 0, done.stderr
    assert "seed0-proxy: finished before" in done.stdout and "online-ipo-beta0.1-lr0.01: finished" not in done.stdout
    assert f"report: {tmp_path / 'report.html'}" in done.stdout
    lines = (finished.workdir / "results.csv").read_text().splitlines()
    expected = [line for line in lines if not line.startswith(("shuffled", "offline"))]
    assert (tmp_path / "results.csv").read_text().splitlines() == expected
