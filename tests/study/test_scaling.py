"""A scaling study: its sizes share some jobs, and each size is a study."""

import dataclasses
import datetime

import pytest
from planted import two_runs

from alignment_gap.errors import UserError
from alignment_gap.models import count_parameters, make_policy, sizes
from alignment_gap.study import run
from alignment_gap.study.config import BaseConfig
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.report import ReportContext
from alignment_gap.study.run import of_size, open_studies

SIZES = ("palm_10m", "t5_small")


def scaling(config, **settings):
    """The study over two sizes; the golden policy and the judges have one network."""
    return dataclasses.replace(config, **({"sizes": SIZES, "base": BaseConfig(config.policy)} | settings))


def test_sizes_are_studies_in_folders_of_their_own_over_the_same_jobs(config, tmp_path):
    studies = open_studies(scaling(config), tmp_path)
    assert [(study.config.name, study.workdir) for study in studies] == [
        (f"nano {name}", tmp_path / name) for name in SIZES
    ]
    assert all(study.config.sizes == () for study in studies)
    assert {job.folder.parent for study in studies for job in study.graph.jobs} == {tmp_path / "jobs"}
    assert not list(tmp_path.iterdir())


def test_data_judges_labels_and_golden_policy_are_shared_and_nothing_else(config, tmp_path):
    first, second = ({job.name: job.folder for job in s.graph.jobs} for s in open_studies(scaling(config), tmp_path))
    assert first.keys() == second.keys()
    shared = {name.removeprefix("seed0-") for name in first if first[name] == second[name]}
    assert shared == {
        *("data", "golden", "relabelled-train", "relabelled-validation", "proxy"),
        *("judge-golden", "judge-proxy-train", "judge-proxy-validation"),
        *("base", "golden-ipo-beta0.1-lr0.01", "opponent-golden"),
    }


def test_the_golden_policy_and_the_judges_start_from_the_base_and_arms_from_their_own_sft(config, tmp_path):
    study, _ = open_studies(scaling(config), tmp_path)
    jobs = {job.name.removeprefix("seed0-"): job for job in study.graph.jobs}
    base, sft = str(jobs["base"].folder), str(jobs["sft"].folder)
    golden, online = (jobs[f"{arm}-ipo-beta0.1-lr0.01"].config for arm in ("golden", "online"))
    assert jobs["base"].config.model == config.policy and jobs["sft"].config.model == study.config.policy
    assert {jobs[name].config.start for name in ("golden", "proxy")} == {golden.start} == {base}
    assert online.start == sft
    measured = {arm: jobs[f"evaluation-{arm}-ipo-beta0.1-lr0.01"].config.reference for arm in ("golden", "online")}
    assert measured == {"golden": base, "online": sft}
    assert jobs["evaluation-sft"].config.reference == sft


def test_a_size_has_settings_of_its_own(config):
    sft = dataclasses.replace(config.sft, start="imported/{size}")
    by_size = ("arms.batch_size=16,8", "sft.steps=3,4", "arms.offline_learning_rates=(1e-2,),(1e-3,)")
    study = scaling(config, by_size=by_size, sft=sft)
    first, second = (of_size(study, name) for name in SIZES)
    assert (first.arms.batch_size, second.arms.batch_size) == (16, 8)
    assert (first.sft.steps, second.sft.steps) == (3, 4)
    assert (first.arms.offline_learning_rates, second.arms.offline_learning_rates) == ((1e-2,), (1e-3,))
    assert first.base.batch_size == second.base.batch_size == config.arms.batch_size
    assert (first.sft.start, second.sft.start) == ("imported/palm_10m", "imported/t5_small")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sft.step=3,4", "by_size has 'sft.step=3,4': did you mean sft.steps"),
        ("sft.steps=3", "by_size has 'sft.steps=3', but there are 2 sizes: give a value for each"),
        ("sft.steps=3,four", "write NAME=VALUE,VALUE with a value for each of sizes"),
    ],
)
def test_a_setting_by_size_that_cannot_be_read(config, given, message):
    with pytest.raises(UserError, match=message):
        scaling(config, by_size=(given,))


def test_a_setting_by_size_out_of_its_range(config):
    with pytest.raises(UserError, match=r"sft\.steps is 0: it must be at least 1"):
        of_size(scaling(config, by_size=("sft.steps=0,4",)), SIZES[0])


def test_the_report_over_sizes_pools_them_by_their_parameters(config, tmp_path, monkeypatch):
    studies, written = open_studies(scaling(config), tmp_path), []
    with pytest.raises(UserError, match="jobs are not done"):
        run.write_sizes_report(scaling(config), studies, tmp_path)
    monkeypatch.setattr(run, "check_done", lambda study: None)
    monkeypatch.setattr(run, "study_results", lambda graph: two_runs())
    monkeypatch.setattr(run, "report_context", lambda config, graph: ReportContext(config))
    monkeypatch.setattr(run, "write_report", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(run, "wall_time", lambda job: datetime.timedelta(seconds=len(str(job.folder))))
    run.write_sizes_report(scaling(config), studies, tmp_path, lambda line: None)
    ((folder, results, context),) = written
    assert folder == tmp_path and context.config.sizes == SIZES
    counts = {result.size: result.parameters for result in results}
    expected = [count_parameters(make_policy(study.config.policy)) for study in studies]
    assert counts == {"": expected[0], "t5_small": expected[1]}
    assert len(Evidence(results).sizes) == 2
    # A job that both sizes share counts once, a job of each size for each.
    assert len(context.wall_time) == len({job.folder for study in studies for job in study.graph.jobs})
    assert {"seed0-data", "seed0-base", "palm_10m-seed0-sft", "t5_small-seed0-sft"} < context.wall_time.keys()


def test_judges_that_start_from_the_policy_are_of_each_size(config, tmp_path):
    studies = open_studies(scaling(config, base=None), tmp_path)
    first, second = ({job.name: job.folder for job in study.graph.jobs} for study in studies)
    assert {name for name in first if first[name] == second[name]} == {"seed0-data"}


def test_a_size_keeps_vocabulary_and_computation_of_the_policy(config):
    config = dataclasses.replace(
        config, sizes=SIZES, policy=dataclasses.replace(config.policy, dtype="bfloat16", remat="full")
    )
    policy = of_size(config, "palm_10m").policy
    vocabulary_size = config.policy.vocabulary_size
    assert policy == sizes.get("palm_10m", vocabulary_size=vocabulary_size, dtype="bfloat16", remat="full")


def test_judges_of_another_network_cannot_start_from_the_base(config, tmp_path):
    golden = dataclasses.replace(config.golden, model=dataclasses.replace(config.policy, width=32))
    with pytest.raises(UserError, match=r"golden\.model differs from the base.*set golden\.start to None"):
        open_studies(scaling(config, golden=golden), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_size_leaves_the_shared_jobs_to_the_next(config, tmp_path, monkeypatch):
    """The second size only reports jobs that the first one has done. Every size writes its own report."""
    made = []

    def make(kind, settings, folder, open_bar):
        made.append(folder)
        folder.mkdir(parents=True)
        (folder / "done.json").write_text('{"settings": {}}')
        (folder / "results.csv").write_text("")

    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run, "write_study_report", lambda study, say: say(f"report of {study.config.name}"))
    first, second = open_studies(scaling(config), tmp_path)
    lines = []
    run.run_study(first, say=lines.append)
    assert len(made) == len(first.graph.jobs) and lines == ["report of nano palm_10m"]
    run.run_study(second, say=lines.append)
    assert len(set(made)) == len(made) == len(first.graph.jobs) + len(second.graph.jobs) - 11
    assert sum(line.endswith("finished before") for line in lines) == 11
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", *SIZES}
