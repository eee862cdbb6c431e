"""The graph of a study: its jobs, their inputs, folders and commands."""

import dataclasses
import fnmatch
import itertools
import math
import shlex
from pathlib import Path

import pytest
from absl import flags

from alignment_gap.cli import gin_files
from alignment_gap.cli.flags import define_config, parse, read_config
from alignment_gap.data.text import TextSourceConfig
from alignment_gap.errors import UserError
from alignment_gap.folders import JOB
from alignment_gap.jobs.config import DatasetConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EVALUATE
from alignment_gap.jobs.folder import DONE
from alignment_gap.jobs.generate import GENERATE
from alignment_gap.jobs.label import LABEL
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.reference import REFERENCE
from alignment_gap.jobs.train import TRAIN
from alignment_gap.sampling import SamplerConfig
from alignment_gap.study.arms import ARMS, Arm, Branch
from alignment_gap.study.graph import study_graph, takes_beta

ROOT = Path("somewhere/jobs")
# Every job of the nano study and the jobs that it needs, without "seed0-".
NEEDS = {
    "data": "",
    "sft": "data",
    "golden": "data sft",
    "relabelled-train": "data golden",
    "relabelled-validation": "data golden",
    "proxy": "sft relabelled-train",
    "judge-golden": "data golden",
    "judge-proxy-train": "relabelled-train proxy",
    "judge-proxy-validation": "relabelled-validation proxy",
    "golden-ipo-beta0.1-lr0.01": "sft golden relabelled-train",
    "opponent-golden": "relabelled-train golden-ipo-beta0.1-lr0.01",
    "opponent-sft": "sft relabelled-train",
    "evaluation-sft": "sft golden relabelled-train proxy opponent-golden opponent-sft",
    "online-ipo-beta0.1-lr0.01": "sft relabelled-train proxy",
    "shuffled-ipo-beta0.1-lr0.01": "sft online-ipo-beta0.1-lr0.01",
    "offline-ipo-beta0.1-lr0.01": "sft relabelled-train",
    **{
        f"evaluation-{arm}-ipo-beta0.1-lr0.01": (
            f"sft golden relabelled-train proxy {arm}-ipo-beta0.1-lr0.01 opponent-golden opponent-sft"
        )
        for arm in ("golden", "online", "shuffled", "offline")
    },
}
KINDS = {"data": PREPARE, "relabelled": LABEL, "opponent": GENERATE, "evaluation": EVALUATE, "judge": EVALUATE}


def build(config, root=ROOT):
    return study_graph(config, root)


def changed(config, **parts):
    """The config with some settings of its parts replaced: `arms={"beta": 1.0}`."""
    inner = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in parts.items()}
    return dataclasses.replace(config, **inner)


def short(job):
    return job.name.removeprefix("seed0-")


def jobs_of(graph):
    return {short(job): job for job in graph.jobs}


def reread(job):
    """The config and the folder that the command line reads from a job's command."""
    words = shlex.split(job.command)
    assert words[: 1 + len(job.kind.command.split())] == ["alignment-gap", *job.kind.command.split()]
    words, overrides = gin_files.split_overrides(words[len(job.kind.command.split()) :])

    def define(values):
        flags.DEFINE_string(job.kind.output, None, "", flag_values=values)
        if job.kind is not TRAIN:
            define_config(values, job.kind.config, job.kind.short)

    values, _ = parse(words, define, "")
    given = gin_files.read_config([], overrides) if overrides else read_config(values, job.kind.config, job.kind.short)
    return given, Path(values[job.kind.output].value)


# The jobs.


def test_the_jobs_and_what_each_needs(config):
    jobs = build(config).jobs
    assert {short(job): sorted(map(short, job.needs)) for job in jobs} == {
        name: sorted(needs.split()) for name, needs in NEEDS.items()
    }
    assert {short(job): job.kind for job in jobs} == {name: KINDS.get(name.split("-")[0], TRAIN) for name in NEEDS}


def test_a_job_comes_after_those_that_it_needs(config):
    for graph in (build(config), build(dataclasses.replace(config, seeds=3))):
        place = {job.name: number for number, job in enumerate(graph.jobs)}
        assert len(place) == len(graph.jobs)
        assert all(place[needed.name] < place[job.name] for job in graph.jobs for needed in job.needs)


def test_it_is_a_pure_function_of_the_config(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build(config) == build(config)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_the_name_and_a_digest_wherever_the_study_is(config):
    graph = build(config)
    for job in graph.jobs:
        digest = job.folder.name.removeprefix(f"{job.name}-")
        assert job.folder.parent == ROOT and len(digest) == 12 and int(digest, 16) >= 0
    for root in (Path("elsewhere/zoë's study/jobs"), Path("/jobs")):
        there = build(config, root)
        assert [job.folder.name for job in there.jobs] == [job.folder.name for job in graph.jobs]
        assert [[need.name for need in job.needs] for job in there.jobs] == [
            [need.name for need in job.needs] for job in graph.jobs
        ]


def test_one_job_scores_the_pairs_for_all_offline_runs_whose_loss_has_a_reference(config):
    arms = {"losses": ("ipo", "best_of_n"), "offline_betas": (0.1, 0.3), "names": ("online", "shuffled", "offline")}
    without = jobs_of(build(changed(config, arms=arms)))
    jobs = jobs_of(build(changed(config, arms=arms | {"stored_reference": True})))
    assert jobs.keys() - without.keys() == {"reference"}
    scored = jobs["reference"]
    assert scored.kind is REFERENCE and sorted(map(short, scored.needs)) == ["relabelled-train", "sft"]
    assert scored.config.dataset == str(jobs["relabelled-train"].folder)
    assert scored.config.checkpoint == str(jobs["sft"].folder)
    readers = {name for name, job in jobs.items() if scored in job.needs}
    assert readers == {"offline-ipo-beta0.1-lr0.01", "offline-ipo-beta0.3-lr0.01"}
    assert {name for name, job in jobs.items() if "stored" in job.command} == readers
    others = jobs.keys() - readers - {"reference", *(f"evaluation-{name}" for name in readers)}
    assert all(jobs[name].folder == without[name].folder for name in others)


@pytest.mark.parametrize(
    ("parts", "patterns"),
    [
        ({"task": {"validation": 0.5}}, "data"),
        ({"sft": {"steps": 5}}, "sft evaluation-sft"),
        ({"golden": {"batch_size": 16}}, "golden"),
        ({"golden": {"steps": 5}}, "golden judge-golden"),
        ({"proxy": {"kind": "bradley_terry"}}, "proxy"),
        ({"arms": {"batch_size": 16}}, "*-ipo-*"),
        ({"arms": {"checkpoint_steps": (2, 3)}}, "*-ipo-*"),
        ({"evaluation": {"kl_prompts": 4}}, "evaluation-*"),
        ({"evaluation": {"judges": ()}}, "evaluation-* judge-*"),
        ({"sampler": {"temperature": 0.5}}, "golden-ipo-* online-* opponent-* evaluation-*"),
    ],
)
def test_a_change_renames_what_it_changes_and_all_that_needs_it(config, parts, patterns):
    before, after = (jobs_of(build(each)) for each in (config, changed(config, **parts)))
    expected = {name for name in NEEDS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split())}
    for name, needs in NEEDS.items():
        if expected & set(needs.split()):
            expected.add(name)
    assert {name for name in NEEDS if after[name].folder != before[name].folder} == expected


@pytest.mark.parametrize(
    "parts", [{"evaluation": {"shown": 9}}, {"task": {"workers": 2}}, {"arms": {"offline_betas": (0.1,)}}]
)
def test_what_changes_no_result_renames_nothing(config, parts):
    other = dataclasses.replace(changed(config, **parts), checkpoint_every=3, name="renamed")
    assert [job.folder for job in build(other).jobs] == [job.folder for job in build(config).jobs]


def test_seeds_are_studies_of_their_own_with_seeds_of_their_own(config):
    graph = build(dataclasses.replace(config, seed=4, seeds=2))
    assert [seed.seed for seed in graph.seeds] == [4, 5]
    first, second = ([job for job in graph.jobs if job.name.startswith(f"seed{seed}-")] for seed in (4, 5))
    assert len(first) == len(second) == len(NEEDS)
    assert not {need.name for job in second for need in job.needs} & {job.name for job in first}
    assert (first[0].config.source.posts.seed, second[0].config.source.posts.seed) == (4, 5)
    assert (first[0].config.seed, second[0].config.seed) == (4, 5)
    seeds = [job.config.seed for job in graph.jobs if job.kind in (TRAIN, GENERATE)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_of_a_users_own_pairs_split_them_differently(config):
    given = changed(config, task={"source": TextSourceConfig("pairs.jsonl"), "vocabulary": "bytes"})
    prepared = [job.config for job in build(dataclasses.replace(given, seeds=2)).jobs if job.kind is PREPARE]
    assert [task.seed for task in prepared] == [0, 1]
    assert [task.source for task in prepared] == [TextSourceConfig("pairs.jsonl")] * 2


def test_a_job_is_found_by_its_name_and_the_nearest_is_named(config):
    graph = build(config)
    assert graph.job("seed0-proxy") is jobs_of(graph)["proxy"]
    with pytest.raises(UserError, match="no job 'seed0-prox': did you mean seed0-proxy"):
        graph.job("seed0-prox")


# The work of each job.


def test_arms_differ_in_nothing_but_their_source(config):
    jobs = jobs_of(build(config))
    trained = [jobs[f"{arm}-ipo-beta0.1-lr0.01"].config for arm in ("golden", "online", "shuffled", "offline")]
    alike = [dataclasses.replace(each, source=DatasetConfig(), seed=0) for each in trained]
    assert alike[0].loss == LossConfig("ipo", {"beta": 0.1}) and alike[0].start == str(jobs["sft"].folder)
    assert all(each == alike[0] for each in alike)
    golden, online, shuffled, offline = (each.source for each in trained)
    pairs = str(jobs["relabelled-train"].folder)
    assert isinstance(online, OnlineConfig) and online.record and online.samples == 2 and online.refresh_every == 1
    assert online.judge.judge == str(jobs["proxy"].folder)
    assert golden == dataclasses.replace(online, judge=golden.judge)
    assert golden.judge.judge == str(jobs["golden"].folder) and golden.judge.labels == "hard"
    assert online.prompts == offline == DatasetConfig(pairs, batch_size=8)
    record = jobs["online-ipo-beta0.1-lr0.01"].folder / "record"
    assert shuffled == DatasetConfig(str(record), batch_size=8, order="shuffle")


def test_the_golden_model_learns_human_labels_and_the_proxy_learns_the_golden_models(config):
    jobs = jobs_of(build(config))
    human = f"{jobs['data'].folder}/train"
    sft, golden, proxy = (jobs[name].config for name in ("sft", "golden", "proxy"))
    assert (sft.source.folder, golden.source.folder) == (human, human)
    assert proxy.source.folder == str(jobs["relabelled-train"].folder)
    assert golden.kind == proxy.kind == "pairwise"
    assert golden.start == proxy.start == str(jobs["sft"].folder) and golden.model is None
    assert sft.model == config.policy and sft.start is None and sft.loss == LossConfig("sft")
    for split in ("train", "validation"):
        label = jobs[f"relabelled-{split}"].config
        assert label.dataset == f"{jobs['data'].folder}/{split}"
        assert (label.judge.judge, label.judge.labels) == (str(jobs["golden"].folder), "hard")


def test_every_checkpoint_is_measured_by_both_judges_against_both_opponents(config):
    jobs = jobs_of(build(config))
    for arm in ("golden", "online", "shuffled", "offline"):
        measured = jobs[f"evaluation-{arm}-ipo-beta0.1-lr0.01"].config
        assert measured.run == str(jobs[f"{arm}-ipo-beta0.1-lr0.01"].folder)
        assert measured.steps == jobs[f"{arm}-ipo-beta0.1-lr0.01"].config.checkpoint_steps == (2, 4)
        assert measured.judges == (f"golden={jobs['golden'].folder}", f"proxy={jobs['proxy'].folder}", "rubric")
        assert measured.opponents == (
            f"golden={jobs['opponent-golden'].folder}",
            f"sft={jobs['opponent-sft'].folder}",
        )
        assert measured.reference == str(jobs["sft"].folder)
        assert measured.dataset == str(jobs["relabelled-train"].folder)
        assert (measured.prompts, measured.kl_prompts, measured.pairs) == (16, 8, 8)
    origin = jobs["evaluation-sft"].config
    assert (origin.run, origin.steps) == (str(jobs["sft"].folder), (4,))
    answers = jobs["opponent-golden"].config
    assert answers.policies == (str(jobs["golden-ipo-beta0.1-lr0.01"].folder),)
    assert (answers.samples, answers.limit, answers.prompts) == (1, 16, measured.dataset)


def test_the_report_reads_every_run(config):
    (seed,) = build(config).seeds
    assert [(run.arm, run.loss) for run in seed.runs] == [
        ("sft", "sft"),
        *((arm, "ipo") for arm in ("golden", "online", "shuffled", "offline")),
    ]
    assert math.isnan(seed.runs[0].beta)
    assert {(run.beta, run.learning_rate) for run in seed.runs[1:]} == {(0.1, 0.01)}
    assert [short(run.evaluation) for run in seed.runs] == [
        "evaluation-sft",
        *(f"evaluation-{arm}-ipo-beta0.1-lr0.01" for arm in ("golden", "online", "shuffled", "offline")),
    ]


# Every arm of the table.

FURTHER = tuple(arm.name for arm in ARMS if arm.name not in ("online", "shuffled", "offline"))


@pytest.fixture
def every(config):
    """The jobs of a study with every arm of the table, two losses, and all sets that policies may classify."""
    arms = {"further": FURTHER, "losses": ("ipo", "best_of_n"), "checkpoint_steps": (2, 4, 40)}
    return jobs_of(build(changed(config, arms=arms, evaluation={"classified": ("heldout", "stream", "own")})))


def test_further_arms_are_trained_once_under_the_first_loss_or_their_own(every):
    own = {arm.name: arm.loss for arm in ARMS if arm.loss}
    trained = [arm.name for arm in ARMS if arm.name in FURTHER and arm.source]
    losses = {
        name: sorted(job.config.loss.name for job in every.values() if job.name.startswith(f"seed0-{name}-"))
        for name in trained
    }
    assert losses == {name: [own.get(name, "ipo")] for name in trained}
    assert {"online-best_of_n-lr0.01", "shuffled-best_of_n-lr0.01", "offline-best_of_n-lr0.01"} < every.keys()


def test_the_stream_is_replayed_in_its_order_and_shuffled_within_windows(every):
    orders = {}
    for name in ("replayed", "small_windows", "large_windows", "shuffled"):
        source = every[f"{name}-ipo-beta0.1-lr0.01"].config.source
        assert source.folder == str(every["online-ipo-beta0.1-lr0.01"].folder / "record")
        orders[name] = (source.order, source.window)
    assert orders == {
        "replayed": ("recorded", None),
        "small_windows": ("window", 2),
        "large_windows": ("window", 5),
        "shuffled": ("shuffle", None),
    }
    folders = (Path("golden"), Path("proxy"), Path("sft"), Path("pairs"))
    branch = Branch(*folders, 32, SamplerConfig(), (800, 4000), {"online": Path("run")}, Path, Path)
    assert (branch.stream(1000).window, branch.stream(8).window) == (4, 500)
    assert branch.early_of("online") == Path("run/checkpoints/800")


def test_a_proxy_of_fewer_labels_learns_from_a_part_of_the_golden_pairs(every):
    for labels in (500, 2000, 8000):
        some, proxy = every[f"labels-{labels}"], every[f"proxy-{labels}"]
        assert (some.config.datasets, some.config.limit) == ((str(every["relabelled-train"].folder),), labels)
        assert proxy.config.source == dataclasses.replace(every["proxy"].config.source, folder=str(some.folder))
        assert (proxy.config.steps, proxy.config.start) == (every["proxy"].config.steps, str(every["sft"].folder))
        arm = every[f"proxy_of_{labels}-ipo-beta0.1-lr0.01"].config
        assert arm.source.judge.judge == str(proxy.folder)
        measured = every[f"judge-proxy-{labels}"].config
        assert (measured.run, measured.dataset) == (str(proxy.folder), str(every["relabelled-validation"].folder))
    assert every["online-ipo-beta0.1-lr0.01"].config.source.judge.judge == str(every["proxy"].folder)


def test_what_the_golden_model_has_to_beat_is_measured_on_its_own_pairs_where_that_is_asked_for(config, every):
    asked = jobs_of(build(changed(config, evaluation={"baselines": True})))
    told, golden = asked["judge-baselines"].config, asked["judge-golden"].config
    assert (told.dataset, told.pairs) == (golden.dataset, golden.pairs)
    assert told.train == asked["golden"].config.source.folder
    assert "judge-baselines" not in every


def test_the_best_of_n_samples_of_sft_is_measured_and_nothing_is_trained_for_it(every, config):
    measured = every["evaluation-sft_best_of_n"].config
    assert (measured.run, measured.best_of) == (str(every["sft"].folder), (2, 4, 8, 16))
    assert measured.best_by == str(every["proxy"].folder) and measured.numbers == measured.best_of
    assert (measured.opponents, measured.prompts) == (
        every["evaluation-sft"].config.opponents,
        every["evaluation-sft"].config.prompts,
    )
    assert not any(name.startswith("sft_best_of_n") for name in every)
    with pytest.raises(UserError, match="the arm idle has source=None, best_of=\\(\\): give one of them"):
        Arm("idle", "nothing")


def test_an_arm_has_its_multiple_of_the_studys_beta(every):
    assert every["low_beta-ipo-beta0.01-lr0.01"].config.loss.settings["beta"] == pytest.approx(0.01)
    assert every["high_beta-ipo-beta0.3-lr0.01"].config.loss.settings["beta"] == pytest.approx(0.3)


def test_pairs_of_policies_are_sampled_once_and_labelled_by_the_golden_model(every):
    online, sft = str(every["online-ipo-beta0.1-lr0.01"].folder), str(every["sft"].folder)
    early = f"{online}/checkpoints/4"
    policies = {"final_vs_final": (online,), "sft_vs_early": (sft, early), "early_vs_final": (early, online)}
    for name, expected in policies.items():
        job, arm = every[f"pairs-{name}-ipo"], every[f"{name}-ipo-beta0.1-lr0.01"]
        assert job.kind is GENERATE and job.config.policies == expected
        assert (job.config.judge.judge, job.config.judge.labels) == (str(every["golden"].folder), "hard")
        assert (job.config.limit, job.config.each * len(expected)) == (40 * 8, 2)
        assert arm.config.source == DatasetConfig(str(job.folder), batch_size=8)
        assert {short(need) for need in arm.needs} == {"sft", f"pairs-{name}-ipo"}


def test_pairs_of_policies_serve_every_setting_of_a_sweep(config):
    arms = {"further": ("sft_vs_early",), "swept": ("sft_vs_early",), "offline_betas": (0.1, 0.5)}
    jobs = jobs_of(build(changed(config, arms=arms)))
    assert [name for name in jobs if name.startswith("pairs-")] == ["pairs-sft_vs_early-ipo"]
    assert {jobs[f"sft_vs_early-ipo-beta{beta}-lr0.01"].config.source.folder for beta in (0.1, 0.5)} == {
        str(jobs["pairs-sft_vs_early-ipo"].folder)
    }


def test_fresh_samples_by_how_many_how_old_and_against_whom(every):
    online = every["online-ipo-beta0.1-lr0.01"].config.source
    changes = {
        "refresh_4-ipo-beta0.1": {"refresh_every": 4},
        "refresh_16-ipo-beta0.1": {"refresh_every": 16},
        "refresh_64-ipo-beta0.1": {"refresh_every": 64},
        "refresh_never-ipo-beta0.1": {"refresh_every": 0},
        "best_of_4-best_of_n": {"samples": 4},
        "best_of_8-best_of_n": {"samples": 8},
        "best_vs_worst_4-ipo-beta0.1": {"samples": 4, "keep": "best_and_worst"},
        "best_vs_worst_8-ipo-beta0.1": {"samples": 8, "keep": "best_and_worst"},
    }
    for name, change in changes.items():
        assert every[f"{name}-lr0.01"].config.source == dataclasses.replace(online, **change), name
    soft = dataclasses.replace(online, judge=dataclasses.replace(online.judge, labels="soft"), mixture=0.125)
    assert every["ipo_md-ipo_md-beta0.1-lr0.01"].config.source == soft
    assert every["nash_md-nash_md-beta0.1-lr0.01"].config.source == dataclasses.replace(soft, against="mixture")


def test_offline_objectives_read_golden_pairs_and_hypo_fresh_samples_beside_them(every):
    pairs = DatasetConfig(str(every["relabelled-train"].folder), batch_size=8)
    hypo, chi_po = (every[f"{name}-{name}-beta0.1-lr0.01"].config for name in ("hypo", "chi_po"))
    assert hypo.source == chi_po.source == hypo.fresh.prompts == pairs
    assert chi_po.fresh is None and hypo.fresh.judge.judge is None and not hypo.fresh.record


def test_policies_and_the_proxy_classify_the_same_pairs(every):
    stream = every["stream-relabelled"]
    assert {short(need) for need in stream.needs} == {"stream", "golden"}
    assert every["stream"].config.datasets == (str(every["online-ipo-beta0.1-lr0.01"].folder / "record"),)
    assert every["stream"].config.limit == 8
    for name in ("evaluation-sft", "evaluation-golden-ipo-beta0.1-lr0.01", "evaluation-hypo-hypo-beta0.1-lr0.01"):
        assert every[name].config.classified == (
            f"heldout={every['relabelled-validation'].folder}",
            f"stream={stream.folder}",
        )
        assert every[name].config.own_labels == str(every["golden"].folder)
    assert every["judge-proxy-stream"].config.dataset == str(stream.folder)
    assert every["judge-proxy-validation"].config.dataset == str(every["relabelled-validation"].folder)


def test_an_unknown_loss_is_refused_by_its_setting(config):
    with pytest.raises(UserError, match=r"^arms\.losses has 'dpoo': .* did you mean 'dpo'"):
        build(changed(config, arms={"losses": ("ipo", "dpoo")}))


def test_the_stream_needs_an_online_arm(config):
    settings = {"arms": {"names": ("offline",)}, "evaluation": {"classified": ("stream",)}}
    with pytest.raises(UserError, match="classified has 'stream', but no arm is named 'online'"):
        build(changed(config, **settings))


def test_nothing_is_made_twice(config, every):
    """No two jobs have the same settings or the same folder."""
    seen = {}
    for name, job in every.items():
        settings = repr(dataclasses.replace(job.config, seed=0) if hasattr(job.config, "seed") else job.config)
        assert seen.setdefault((job.kind.name, settings), name) == name
    assert len({job.folder for job in every.values()}) == len(every)


# Settings.


def test_the_steps_of_the_sweep_are_multiples_of_the_online_steps(config):
    graph = build(changed(config, arms={"offline_steps": (1, 5), "swept": ("offline", "shuffled")}))
    jobs = jobs_of(graph)
    one, five = (jobs[f"offline-ipo-beta0.1-lr0.01{end}"].config for end in ("", "-steps5x"))
    assert (one.steps, one.checkpoint_steps) == (4, (2, 4))
    assert (five.steps, five.checkpoint_steps) == (20, (10, 20))
    assert jobs["evaluation-offline-ipo-beta0.1-lr0.01-steps5x"].config.steps == (10, 20)
    runs = {(run.arm, run.steps_factor) for run in graph.seeds[0].runs}
    assert {("offline", 1), ("offline", 5), ("online", 1)} < runs and ("online", 5) not in runs
    # Only the first swept arm also varies its steps.
    assert ("shuffled", 1) in runs and ("shuffled", 5) not in runs


def test_any_arm_may_be_swept(config):
    swept = {"swept": ("offline", "shuffled"), "offline_betas": (0.1, 0.5)}
    names = jobs_of(build(changed(config, arms=swept))).keys()
    assert {f"{arm}-ipo-beta{beta}-lr0.01" for arm in ("offline", "shuffled") for beta in (0.1, 0.5)} < names
    assert "online-ipo-beta0.5-lr0.01" not in names


def test_a_sweep_is_of_the_arms_that_are_swept_and_of_a_beta_only_where_the_loss_has_one(config):
    swept = changed(
        config,
        arms={
            "losses": ("ipo", "best_of_n"),
            "offline_betas": (0.1, 0.5),
            "offline_learning_rates": (1e-3, 1e-2),
        },
    )
    (seed,) = build(swept).seeds
    settings = {
        key: [(run.beta, run.learning_rate) for run in runs]
        for key, runs in itertools.groupby(seed.runs, key=lambda run: (run.arm, run.loss))
    }
    assert settings["offline", "ipo"] == [(0.1, 1e-3), (0.1, 1e-2), (0.5, 1e-3), (0.5, 1e-2)]
    assert settings["online", "ipo"] == settings["shuffled", "ipo"] == [(0.1, 1e-2)]
    assert [rate for beta, rate in settings["offline", "best_of_n"] if math.isnan(beta)] == [1e-3, 1e-2]
    losses = {short(job): job.config.loss for job in build(swept).jobs if job.kind is TRAIN}
    assert losses["offline-ipo-beta0.5-lr0.001"] == LossConfig("ipo", {"beta": 0.5})
    assert losses["offline-best_of_n-lr0.001"] == LossConfig("best_of_n")
    # The stream of an online run is replayed with the loss of that run.
    shuffled = jobs_of(build(swept))["shuffled-best_of_n-lr0.01"]
    assert "online-best_of_n-lr0.01" in map(short, shuffled.needs)
    assert takes_beta("dpo", "arms.losses") and not takes_beta("best_of_n", "arms.losses")


def test_a_prepared_dataset_is_every_seeds_task_and_no_job(config):
    graph = build(dataclasses.replace(config, prepared="runs/hh", seeds=2))
    assert not [job for job in graph.jobs if job.kind is PREPARE]
    humans = ("seed0-sft", "seed0-golden", "seed1-sft", "seed1-golden")
    assert {graph.job(name).config.source.folder for name in humans} == {"runs/hh/train"}
    assert {job.config.dataset for job in graph.jobs if job.kind is LABEL} == {"runs/hh/train", "runs/hh/validation"}
    assert not graph.job("seed1-sft").needs


def test_sft_and_judges_may_have_batches_of_several_shapes_but_arms_have_one(config):
    jobs = jobs_of(build(changed(config, sft={"buckets": 3}, golden={"buckets": 2})))
    sources = {name: job.config.source for name, job in jobs.items() if job.kind is TRAIN}
    buckets = {name: source.buckets for name, source in sources.items() if isinstance(source, DatasetConfig)}
    shapes = {name: buckets.pop(name) for name in ("sft", "golden")}
    assert shapes == {"sft": 3, "golden": 2} and "proxy" in buckets and len(buckets) > 1
    assert set(buckets.values()) == {1}


def test_sft_starts_from_a_run_and_pools_datasets_by_weight(config):
    settings = {"start": "runs/t5", "also": ("runs/chat/train", "runs/help/train"), "weights": (2.0, 1.0, 1.0)}
    graph = build(dataclasses.replace(changed(config, sft=settings), policy=None))
    jobs = jobs_of(graph)
    sft = jobs["sft"].config
    assert sft.source.folder == f"{jobs['data'].folder}/train,runs/chat/train,runs/help/train"
    assert sft.source.weights == (2.0, 1.0, 1.0)
    assert sft.start == "runs/t5" and sft.model is None
    assert jobs["golden"].config.source.folder == f"{jobs['data'].folder}/train"
    assert jobs["golden"].config.model is None


def test_judges_and_arms_start_where_they_are_told(config):
    starts = changed(config, golden={"start": "runs/rm"}, proxy={"start": None, "model": config.policy})
    jobs = jobs_of(build(changed(starts, arms={"start": "runs/other"})))
    assert jobs["golden"].config.start == "runs/rm"
    assert (jobs["proxy"].config.start, jobs["proxy"].config.model) == (None, config.policy)
    assert "sft" not in map(short, jobs["proxy"].needs)
    arm = jobs["offline-ipo-beta0.1-lr0.01"].config
    assert (arm.start, arm.reference) == ("runs/other", str(jobs["sft"].folder))
    assert jobs["evaluation-sft"].config.reference == str(jobs["sft"].folder)


def test_a_judge_of_another_network_cannot_start_from_the_policy(config):
    other = dataclasses.replace(config.policy, width=32)
    with pytest.raises(UserError, match=r"proxy\.model differs from the policy.*set proxy\.start to None"):
        build(changed(config, proxy={"model": other}))
    build(changed(config, proxy={"model": config.policy}))


def test_an_arm_that_reads_another_comes_after_it(config):
    for names in (("shuffled", "online"), ("shuffled",)):
        with pytest.raises(
            UserError, match=r"^config.arms.names has an arm that reads the run of 'online': add 'online' before it$"
        ):
            build(changed(config, arms={"names": names}))


def test_a_loss_of_ones_own_has_a_folder_without_a_colon(config):
    jobs = jobs_of(build(changed(config, arms={"losses": ("outside:squared", "outside:logistic")})))
    assert jobs["online-outside_squared-beta0.1-lr0.01"].config.loss == LossConfig("outside:squared", {"beta": 0.1})
    assert jobs["online-outside_logistic-lr0.01"].config.loss == LossConfig("outside:logistic")
    assert not [job.folder for job in jobs.values() if ":" in str(job.folder)]


# States and commands.


def test_the_state_of_a_job_is_read_off_the_folders(graph):
    jobs = jobs_of(graph)
    assert {name for name, job in jobs.items() if job.state == "ready"} == {"data"}
    assert {job.state for name, job in jobs.items() if name != "data"} == {"waiting"}

    def leave(name, file):
        jobs[name].folder.mkdir(parents=True, exist_ok=True)
        (jobs[name].folder / file).write_text('{"settings": {}}')

    leave("data", JOB)
    assert (jobs["data"].state, jobs["sft"].state) == ("begun", "waiting")
    leave("data", DONE)
    assert (jobs["data"].state, jobs["sft"].state, jobs["golden"].state) == ("done", "ready", "waiting")
    leave("sft", DONE)
    assert {name for name, job in jobs.items() if job.state == "ready"} == {"golden"}


def variants(config):
    judges = {"judges": ("rubric", "short=outside:brevity")}
    yield config
    yield dataclasses.replace(config, seeds=2, microbatches=2, prepared="runs/h h")
    yield changed(config, evaluation=judges, sampler={"temperature": 0.5, "top_k": 5}, golden={"kind": "bradley_terry"})
    yield changed(config, arms={"losses": ("best_of_n", "outside:squared"), "start": "runs/a'b"})
    yield changed(config, sft={"also": ("runs/chat",), "weights": (1.0, 0.5), "start": "runs/t5"})


@pytest.mark.parametrize("number", range(5))
def test_the_command_of_a_job_gives_its_config_and_its_folder(config, number):
    for job in build(list(variants(config))[number], Path("a study/jobs")).jobs:
        given, folder = reread(job)
        assert given == job.config, job.name
        assert folder == job.folder
