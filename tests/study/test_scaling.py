"""A scaling study: what its sizes share, and that each is a study of its own."""

import dataclasses

import pytest

from alignment_gap.errors import UserError
from alignment_gap.models import sizes
from alignment_gap.study import run
from alignment_gap.study.run import of_size, open_studies

SIZES = ("palm_10m", "t5_small")


def scaling(config, **judge):
    """The study over two sizes; judges of one network, whatever the policy's, where no other start is given."""
    judge = {"model": config.policy, "start": None} | judge
    judges = {name: dataclasses.replace(getattr(config, name), **judge) for name in ("golden", "proxy")}
    return dataclasses.replace(config, sizes=SIZES, **judges)


def test_sizes_are_studies_in_folders_of_their_own_over_the_same_jobs(config, tmp_path):
    studies = open_studies(scaling(config), tmp_path)
    assert [(study.config.name, study.workdir) for study in studies] == [
        (f"nano {name}", tmp_path / name) for name in SIZES
    ]
    assert all(study.config.sizes == () for study in studies)
    assert {job.folder.parent for study in studies for job in study.graph.jobs} == {tmp_path / "jobs"}
    assert not list(tmp_path.iterdir())


def test_data_judges_and_labels_are_shared_and_nothing_else(config, tmp_path):
    first, second = ({job.name: job.folder for job in s.graph.jobs} for s in open_studies(scaling(config), tmp_path))
    assert first.keys() == second.keys()
    shared = {name.removeprefix("seed0-") for name in first if first[name] == second[name]}
    assert shared == {
        *("data", "golden", "relabelled-train", "relabelled-validation", "proxy"),
        *("judge-golden", "judge-proxy-train", "judge-proxy-validation"),
    }


def test_judges_that_start_from_the_policy_are_of_each_size(config, tmp_path):
    studies = open_studies(scaling(config, model=None, start="sft"), tmp_path)
    first, second = ({job.name: job.folder for job in study.graph.jobs} for study in studies)
    assert {name for name in first if first[name] == second[name]} == {"seed0-data"}


def test_a_size_keeps_vocabulary_and_computation_of_the_policy(config):
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, dtype="bfloat16", remat="full"))
    policy = of_size(config, "palm_10m").policy
    vocabulary_size = config.policy.vocabulary_size
    assert policy == sizes.get("palm_10m", vocabulary_size=vocabulary_size, dtype="bfloat16", remat="full")


def test_judges_of_another_network_cannot_start_from_the_policy(config, tmp_path):
    with pytest.raises(UserError, match=r"golden\.model differs from the policy.*set golden\.start to None"):
        open_studies(scaling(config, start="sft"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_size_leaves_the_shared_jobs_to_the_next(config, tmp_path, monkeypatch):
    """What the first size has made, the second only reports; every size writes its own report."""
    made = []

    def make(kind, settings, folder, open_bar):
        made.append(folder)
        folder.mkdir(parents=True)
        (folder / "done.json").write_text('{"settings": {}}')

    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run, "write_study_report", lambda study, say: say(f"report of {study.config.name}"))
    first, second = open_studies(scaling(config), tmp_path)
    lines = []
    run.run_study(first, say=lines.append)
    assert len(made) == len(first.graph.jobs) and lines == ["report of nano palm_10m"]
    run.run_study(second, say=lines.append)
    assert len(set(made)) == len(made) == len(first.graph.jobs) + len(second.graph.jobs) - 8
    assert sum(line.endswith("finished before") for line in lines) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", *SIZES}
