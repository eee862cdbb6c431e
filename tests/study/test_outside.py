"""A user adds an arm, a loss and a judge from outside the package; only the config names them."""

import dataclasses
import json

import numpy as np
import pytest
from job_runs import assert_equal_checkpoints
from outside import AS_ONLINE, REPLAYED
from studies import copied, newly_run, rows, run, unpacked

from alignment_gap.data.records import open_dataset
from alignment_gap.study.arms import arms_of
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.findings import study_comparisons
from alignment_gap.study.graph import study_graph
from alignment_gap.study.results import study_results
from alignment_gap.study.run import run_job


def with_arms(config, **settings):
    return dataclasses.replace(config, arms=dataclasses.replace(config.arms, **settings))


@pytest.fixture(scope="module")
def replayed(finished, config, tmp_path_factory):
    """A finished study with one more arm, and the jobs that ran for it."""
    folder = copied(finished, tmp_path_factory.mktemp("outside") / "study")
    names = (*config.arms.names, "outside:REPLAYED")
    config = dataclasses.replace(config, claims=("outside:AS_ONLINE",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: b"PNG")
        study, lines = run(with_arms(config, names=names), folder, update=True)
    return study, newly_run(lines)(study.graph)


@pytest.mark.slow
def test_an_arm_adds_its_two_jobs_and_no_other(replayed):
    study, new = replayed
    assert new == ["mirrored-ipo-beta0.1-lr0.01", "evaluation-mirrored-ipo-beta0.1-lr0.01"]
    needs = [job.name.removeprefix("seed0-") for job in study.graph.job(f"seed0-{new[0]}").needs]
    assert needs == ["sft", "online-ipo-beta0.1-lr0.01"]


@pytest.mark.slow
def test_the_stream_of_an_online_run_in_its_order_is_the_online_run(replayed):
    """The lambda in the table defines the arm completely, and suffices for the paper's sanity check."""
    study, (training, _) = replayed
    online = study.graph.job("seed0-online-ipo-beta0.1-lr0.01").folder
    for step in (2, 4):
        assert_equal_checkpoints(study.graph.job(f"seed0-{training}").folder, online, step)


@pytest.mark.slow
def test_the_arm_is_in_the_results_beside_unchanged_others(replayed, finished):
    found = rows(replayed[0])
    assert [row["step"] for row in found if row["arm"] == "mirrored"] == ["2", "4"]
    assert [row for row in found if row["arm"] != "mirrored"] == rows(finished)


@pytest.mark.slow
def test_the_arm_is_in_the_findings_and_in_every_figure(replayed):
    study, _ = replayed
    results, arms = study_results(study.graph), arms_of(study.config.arms.names)
    comparisons = study_comparisons(Evidence(results), arms)
    assert [c.metric for c in comparisons if c.first[0] == "mirrored"] == ["win_rate", "rubric"]
    page = (study.workdir / "report.html").read_text()
    assert f"<b>mirrored</b>: {REPLAYED.reads}." in page
    assert AS_ONLINE.paper in page
    assert "at equal KL" in page and "mirrored \u2212 online" in page
    (specs,) = (part.partition("</script>")[0] for part in page.split('type="application/zlib">')[1:])
    # Stages before the arms have curves without them, and curves have no marks.
    elsewhere = ("equal_kl_ipo", "equal_kl_ipo_rubric", "figure_2", "figure_3", "training_sft", "training_judges")
    for name, spec in unpacked(specs).items():
        if name not in elsewhere:
            assert "#123456" in json.dumps(spec), name
            assert "triangle-left" in json.dumps(spec) or name == "training_ipo", name


@pytest.mark.slow
def test_a_loss_and_a_judge_are_named_in_the_config(finished, config, tmp_path, undrawn):
    """The loss is a copy of IPO. Its name has a colon, which no file name may have."""
    folder = copied(finished, tmp_path / "study")
    changed = with_arms(config, losses=("outside:squared",), names=("offline",))
    study, lines = run(changed, folder, update=True)
    name = "offline-outside_squared-beta0.1-lr0.01"
    assert newly_run(lines)(study.graph) == [name, f"evaluation-{name}"]
    found = [row for row in rows(study) if row["arm"] == "offline"]
    assert [(row["loss"], row["beta"], row["step"]) for row in found] == [
        ("outside:squared", "0.1", "2"),
        ("outside:squared", "0.1", "4"),
    ]
    assert not [path for path in folder.rglob("*") if ":" in path.name]
    assert (folder / "figures" / "figure_8_outside_squared.png").exists()
    page = (folder / "report.html").read_text()
    assert "Figure 8: classification along training, outside:squared" in page


def test_policies_and_the_proxy_classify_held_out_pairs_the_stream_and_own_samples(finished, config, tmp_path):
    evaluation = dataclasses.replace(config.evaluation, classified=("heldout", "stream", "own"))
    folder = copied(finished, tmp_path / "study")
    graph = study_graph(dataclasses.replace(config, evaluation=evaluation), folder / "jobs")
    for name in ("stream", "stream-relabelled", "judge-proxy-stream", "evaluation-online-ipo-beta0.1-lr0.01"):
        job = graph.job(f"seed0-{name}")
        assert job.state == "ready"
        run_job(job, job.name)
    (seed,) = graph.seeds
    online = tuple(run for run in seed.runs if run.arm == "online")
    *policies, proxy = study_results(dataclasses.replace(graph, seeds=(dataclasses.replace(seed, runs=online),)))
    assert [(each.arm, each.step) for each in policies] == [("online", 2), ("online", 4)]
    accuracies = {"heldout_accuracy", "stream_accuracy", "own_accuracy"}
    for each in policies:
        assert accuracies < each.outcomes.keys()
        assert {len(each.outcomes[name]) for name in accuracies} == {8}
    assert proxy.arm == "proxy" and {name: len(values) for name, values in proxy.outcomes.items()} == {
        "heldout_accuracy": 8,
        "stream_accuracy": 8,
    }


@pytest.mark.slow
def test_an_arm_with_a_loss_and_a_second_source_of_its_own(finished, config, tmp_path):
    """HyPO reads recorded pairs and fresh samples. For the other arm a job samples pairs of an early policy."""
    folder = copied(finished, tmp_path / "study")
    graph = study_graph(with_arms(config, further=("hypo", "sft_vs_early")), folder / "jobs")
    for name in ("hypo-hypo-beta0.1-lr0.01", "pairs-sft_vs_early-ipo", "sft_vs_early-ipo-beta0.1-lr0.01"):
        job = graph.job(f"seed0-{name}")
        assert job.state == "ready"
        run_job(job, job.name)
    pairs = open_dataset(graph.job("seed0-pairs-sft_vs_early-ipo").folder)
    assert len(pairs) == 32 and {tuple(sorted(example.scores)) for example in pairs} <= {(0.0, 1.0), (0.5, 0.5)}


def test_a_judge_of_ones_own_is_asked_about_every_checkpoint(finished, config, tmp_path):
    judges = ("rubric", "short=outside:brevity")
    evaluation = dataclasses.replace(config.evaluation, judges=judges)
    folder = copied(finished, tmp_path / "study")
    graph = study_graph(dataclasses.replace(config, evaluation=evaluation), folder / "jobs")
    job = graph.job("seed0-evaluation-sft")
    assert job.state == "ready"
    run_job(job, job.name)
    with np.load(job.folder / "4.npz") as outcomes:
        np.testing.assert_array_equal(outcomes["reward.short"], -outcomes["length"])
        assert set(np.unique(outcomes["win_rate.short.sft"])) <= {0.0, 0.5, 1.0}
