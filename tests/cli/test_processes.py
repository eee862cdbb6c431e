"""Several processes do every kind of job as one process does; a failure in one of them ends all, with one line."""

import csv
import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from built_in import write_posts
from job_runs import arrays, assert_equal_checkpoints, metrics, steps
from process_runs import TINY_T5, run_processes, said_by
from random_examples import plain
from tiny_models import texts

from alignment_gap.cli.main import main
from alignment_gap.data.batches import collate
from alignment_gap.data.records import open_dataset
from alignment_gap.jobs import reference
from alignment_gap.models import score
from alignment_gap.training import load_policy

pytestmark = pytest.mark.slow

SHARED = {
    "BATCH_SIZE": 8,
    "CHECKPOINT_EVERY": 2,
    "JobConfig.log_every": 1,
    # Parameters and batches are split over all processes.
    "MeshConfig.fsdp": 8,
    "MeshConfig.data": 1,
    "LEARNING_RATE": 0.01,
    "WARMUP_STEPS": 0,
}
MESH = ["--mesh.data=1", "--mesh.fsdp=8", "--batch_size=8"]


def train(name, workdir, **settings):
    words = [f"--gin.{key}={value}" for key, value in (SHARED | settings).items()]
    return ["train", f"--gin_file=runs/{name}.gin", *words, f"--workdir={workdir}"]


SFT = train("sft", "sft", DATASET="pairs", TRAIN_STEPS=4, **TINY_T5)
JUDGE = train("preference_model", "judge", DATASET="pairs", START="sft", TRAIN_STEPS=4)
# The learning rate is so high that it ruins the policy. So the best checkpoint is not the last.
BEST = TINY_T5 | {
    "DATASET": "pairs",
    "LEARNING_RATE": 1.0,
    "CHECKPOINT_EVERY": 1,
    "MonitorConfig.validation": "pairs",
    "KeepConfig.last": 1,
    "KeepConfig.best": 1,
}
ONLINE = functools.partial(train, "online_ipo", PROMPTS="pairs", START="sft", JUDGE="judge", RESPONSE_LENGTH=6)
EVALUATE = [
    *("evaluate", "--run=online", "--dataset=pairs", "--judges=judge,rubric", "--opponents=sft,drawn"),
    *("--prompts=16", "--kl_prompts=8", "--pairs=8", "--response_length=6", *MESH, "--output=evaluation"),
]
CHAIN = [
    SFT,
    JUDGE,
    ONLINE("online", TRAIN_STEPS=4),
    [
        "data",
        "label",
        "--dataset=pairs",
        "--judge=judge",
        "--judge.labels=soft",
        "--buckets=1",
        *MESH,
        "--output=labelled",
    ],
    ["data", "label", "--dataset=pairs", "--judge=rubric", "--buckets=1", *MESH, "--output=graded"],
    [
        *("data", "generate", "--prompts=pairs", "--policies=sft", "--limit=16", "--response_length=6"),
        *("--judge=judge", "--buckets=1", *MESH, "--output=drawn"),
    ],
    ["data", "compose", "--datasets=labelled,pairs", "--weights=1,1", "--output=mixed"],
    EVALUATE,
    ["sample", "--run=online", "--prompts=drawn", "--limit=3", "--response_length=6", "--format=jsonl", *MESH],
]
KEEPING_THE_BEST = [train("sft", "best", **BEST, TRAIN_STEPS=steps) for steps in (2, 4)]
STOPPED_HALF_WAY = [ONLINE("two", TRAIN_STEPS=2), ONLINE("four", TRAIN_STEPS=2), KEEPING_THE_BEST[0]]
IPO = functools.partial(train, "offline_ipo", DATASET="pairs", START="sft", TRAIN_STEPS=3)
SCORE = ["data", "reference", "--checkpoint=sft", "--mesh.layout=fsdp", "--batch_size=16"]
FROM_STORE, IN_ROWS = {"REFERENCE_LOG_PROBS": "stored"}, {"BATCH_SIZE": 16}
STORED = [
    [*SCORE, "--dataset=pairs", "--output=scored"],
    IPO("ipo_two", **FROM_STORE),
    IPO("ipo_packed", **IN_ROWS, PACKING=2),
]
FAILING = """
import jax
def judge(prompts, responses):
    assert jax.process_index() == 0, "process 1 is out of luck"
    return [[0.0 for _ in each] for each in responses]
"""
LABEL_FAILING = ["data", "label", "--dataset=pairs", "--judge=failing:judge", "--buckets=1", *MESH, "--output=failed"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a chain of jobs that this process ran alone."""
    folder = tmp_path_factory.mktemp("alone")
    write_posts(folder / "pairs", 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in CHAIN[:-1]:
            assert run(patch, words) == 0
    return folder


def run(patch, words):
    patch.setattr(sys, "argv", ["alignment-gap", *words, "--compilation_cache="])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of two processes that ran all jobs, and their outputs; starting takes longer than most commands.

    The job that fails ends the processes, so it comes last, here and below.
    """
    folder = tmp_path_factory.mktemp("together")
    write_posts(folder / "pairs", 32)
    (folder / "failing.py").write_text(FAILING)
    commands = [*CHAIN, *STOPPED_HALF_WAY, *STORED, LABEL_FAILING]
    statuses, outputs = run_processes(folder, commands, commands)
    assert statuses == [2, 2], outputs
    return folder, outputs


@pytest.fixture(scope="module")
def again(together):
    """Outputs of two other processes that continue a run; then one of them does not find its dataset."""
    going_on = [ONLINE("two", TRAIN_STEPS=4), KEEPING_THE_BEST[1]]
    commands = ([*going_on, [*SCORE, f"--dataset={name}", f"--output=scored_{name}"]] for name in ("pairs", "nowhere"))
    statuses, outputs = run_processes(together[0], *commands)
    assert statuses == [2, 2], outputs
    return outputs


@pytest.fixture(scope="module")
def four(together):
    """Outputs of four processes.

    They continue a run of two processes, twice; then they run a finished job with other settings.
    """
    shutil.copytree(together[0] / "four", together[0] / "four again")
    going_on = [ONLINE(name, TRAIN_STEPS=4) for name in ("four", "four again")]
    statuses, outputs = run_processes(together[0], *4 * [[*going_on, [*SFT, "--gin.SEED=5"]]])
    assert statuses == [2] * 4, outputs
    return outputs


def assert_close_runs(ours, theirs):
    """Sums over devices have another order, and Adam's division can enlarge the difference."""
    assert steps(ours) == steps(theirs)
    for line, expected in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(line[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    expected = arrays(theirs)
    for name, value in arrays(ours).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("name", ["sft", "judge", "online"])
def test_two_processes_train_what_one_does(name, alone, together):
    assert_close_runs(together[0] / name, alone / name)


@pytest.mark.parametrize("name", ["drawn", "mixed", "graded", "online/record"])
def test_two_processes_make_the_datasets_that_one_does(name, alone, together):
    ours, theirs = (open_dataset(folder / name) for folder in (together[0], alone))
    assert [plain(e)[1:3] for e in ours] == [plain(e)[1:3] for e in theirs]
    np.testing.assert_allclose([e.scores for e in ours], [e.scores for e in theirs], atol=1e-4)


def test_two_processes_label_what_one_does(alone, together):
    ours, theirs = (open_dataset(folder / "labelled") for folder in (together[0], alone))
    np.testing.assert_allclose([e.scores for e in ours], [e.scores for e in theirs], atol=1e-4)


def test_two_processes_evaluate_what_one_does(alone, together):
    tables = []
    for folder in (together[0], alone):
        with (folder / "evaluation" / "results.csv").open(newline="") as file:
            tables.append([*csv.DictReader(file)])
    for ours, theirs in zip(*tables, strict=True):
        assert ours.keys() == theirs.keys() and "win_rate.judge.drawn" in ours
        for name in ours.keys() - {"run"}:
            np.testing.assert_allclose(float(ours[name]), float(theirs[name]), rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_processes_ask_a_language_model_about_their_own_rows(together, server, monkeypatch):
    """Each process has its own machine. In the online run the next batch is sampled while a judge answers."""
    folder = together[0]
    label = ["data", "label", "--dataset=pairs", f"--judge={server.name}", "--buckets=1", *MESH]
    online = functools.partial(ONLINE, JUDGE=server.name, REFRESH_EVERY=2, TRAIN_STEPS=4)
    both = [[*label, "--output=asked"], online("online_asked")]
    statuses, outputs = run_processes(folder, both, both, caches=True)
    assert statuses == [0, 0], outputs
    # One trial question in each process. No process asks about a text twice.
    questions = 2 * len(open_dataset(folder / "pairs"))
    (parts,) = json.loads((folder / "asked" / "judge.json").read_text()).values()
    assert parts["judge_questions"] == parts["judge_answered"] == questions
    assert parts["judge_prompt_tokens"] == 100 * questions
    asked = len(server.asked) - len(server.questions), len(server.questions)
    assert asked[0] == 2 and asked[1] <= questions + sum(
        line["judge_questions"] for line in metrics(folder / "online_asked")
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(folder / "cache"))
    for words in ([*label, "--output=asked_alone"], online("online_asked_alone")):
        assert run(monkeypatch, words) == 0
    ours, theirs = (open_dataset(folder / name) for name in ("asked", "asked_alone"))
    assert [e.scores.tolist() for e in ours] == [e.scores.tolist() for e in theirs]
    assert_close_runs(folder / "online_asked", folder / "online_asked_alone")


def test_the_first_alone_speaks(together):
    (first, _), (second, _) = together[1]
    for said in ("sft/checkpoints", "online/checkpoints", "labelled: 32 examples", "mean (95 % interval)"):
        assert said in first
    assert not said_by(second)
    records = [json.loads(line) for line in first.splitlines() if line.startswith("{")]
    assert len(records) == 3 and all(len(record["responses"]) == 1 for record in records)


def test_online_is_resumed_bit_for_bit_by_as_many_processes_and_closely_by_more(together, again, four):
    """Two processes stop half way and continue. Four processes continue from the same place, twice."""
    folder, _ = together
    assert metrics(folder / "two") == metrics(folder / "online")
    assert_equal_checkpoints(folder / "two", folder / "online")
    assert metrics(folder / "four again") == metrics(folder / "four")
    assert_equal_checkpoints(folder / "four again", folder / "four")
    assert_close_runs(folder / "four", folder / "online")
    drawn = [[plain(e)[2] for e in open_dataset(folder / name / "record")] for name in ("four", "online")]
    assert drawn[0] == drawn[1]


def test_two_processes_keep_the_best_checkpoint_over_a_resume(together, again):
    folder = together[0] / "best"
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert steps(folder) == sorted({4, min(lines, key=lambda line: line["loss"])["step"]})


def test_the_settings_of_another_job_are_refused_by_all(four):
    assert all("seed was 0, now 5" in error.strip().splitlines()[-1] for _, error in four)


def test_a_folder_that_one_process_does_not_find_ends_all(again):
    errors = [error.strip().splitlines()[-1] for _, error in again]
    assert errors[1].startswith("error: nowhere is not a finished dataset")
    assert errors[0].startswith("error: process 1: nowhere is not a finished dataset")


def test_a_judge_that_fails_in_one_process_ends_all(together):
    folder, outputs = together
    # The progress bar of the first process may be closed after the line.
    told = [[line for line in errors.splitlines() if line.startswith("error: ")] for _, errors in outputs]
    raised = "the judge failing:judge raises AssertionError('process 1 is out of luck')"
    assert told[0][0].startswith(f"error: process 1: {raised}") and told[1][0].startswith(f"error: {raised}")
    assert not any("Traceback" in errors for _, errors in outputs)
    assert not (folder / "failed" / "done.json").exists()


def test_two_processes_store_the_log_probs_that_one_and_two_train_with(together, mesh, monkeypatch):
    folder, outputs = together
    # Only the first process prints.
    assert ["pairs: log-probs of 32 examples" in output for output, _ in outputs] == [True, False]
    assert ["scoring" in error for _, error in outputs] == [True, False]
    dataset = open_dataset(folder / "pairs")
    policy, params = load_policy(folder / "sft", mesh)
    batch = collate(dataset[:], dataset.card.max_prompt_length, dataset.card.max_response_length)
    expected = jax.jit(functools.partial(score, policy))(params, *texts(batch))
    (values,) = folder.glob("pairs/reference/*/log_probs.npy")
    inside = np.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]
    np.testing.assert_allclose(np.load(values), np.asarray(expected)[inside], atol=1e-5)
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        # One process finds what two have stored, and does not compute log-probs of the reference.
        patch.setattr(reference, "make_score", None)
        assert run(patch, IPO("ipo_one", **FROM_STORE)) == 0
    assert run(monkeypatch, IPO("ipo_plain", **IN_ROWS)) == 0
    assert_close_runs(folder / "ipo_two", folder / "ipo_one")
    # Packing fills rows over the whole batch, so each process reads other prompts than without packing.
    for line, wanted in zip(metrics(folder / "ipo_packed"), metrics(folder / "ipo_plain"), strict=True):
        assert line["prompts"] == wanted["prompts"] == 16
        for name in ("loss", "gradient_norm", "log_prob", "margin"):
            np.testing.assert_allclose(line[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)
