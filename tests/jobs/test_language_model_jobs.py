"""Jobs with a language model over HTTP as the judge: labels, online batches and win rates; the server misbehaves."""

import dataclasses
import json

import numpy as np
import pytest
from job_runs import (
    Bar,
    Stopped,
    arrays,
    assert_equal_checkpoints,
    assert_equal_runs,
    changed,
    metrics,
    run_and_stop,
    run_job,
)
from judge_server import MODEL, SECRET, parts, shorter

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.errors import StorageError, UserError
from alignment_gap.jobs import parts as job_parts
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig, load_outcomes
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.generate import GENERATE, GenerateConfig
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.judges import JudgeConfig

pytestmark = pytest.mark.usefixtures("quick_endpoint")
# Answers the trial question.
OK = (200, {}, '{"choices": [{"message": {"content": "A"}}]}')


@pytest.fixture
def name(server, tmp_path):
    """A judge that asks three times before it gives up."""
    path = tmp_path / "judge.json"
    path.write_text(json.dumps({"url": server.url, "model": MODEL, "retries": 2}))
    return str(path)


def labelled(config, folder, bar=None):
    make(LABEL, config, folder, bar or Bar())
    return open_dataset(folder)


def speechless(unlucky):
    """Prefers the shorter response, but never gives a verdict about responses to one prompt."""
    return lambda messages: "Both." if parts(messages)[0] == unlucky else shorter(messages)


def hard(example, vocabulary):
    first, second = (len(vocabulary.decode(response).split()) for response in example.responses)
    return [0.5, 0.5] if first == second else [float(first < second), float(first > second)]


def test_killed_half_way_it_asks_nothing_twice_and_tells_all(pairs, name, server, tmp_path, monkeypatch):
    monkeypatch.setattr(job_parts, "part_size", lambda count: 16)
    config = LabelConfig(str(pairs), JudgeConfig(name), batch_size=8)
    server.faults = [OK, (500, {}, "oops"), (429, {"Retry-After": "0"}, SECRET)]
    with pytest.raises(Stopped):
        labelled(config, tmp_path / "out", Bar(stop_at=20))
    begun = len(server.questions)
    assert 0 < begun < 96
    found = labelled(config, tmp_path / "out")
    vocabulary = find_vocabulary(found)
    assert [each.scores.tolist() for each in found] == [hard(each, vocabulary) for each in open_dataset(pairs)]
    # Each question once, and two retries after failures.
    distinct = {*server.questions}
    assert len(server.asked) == len(distinct) + 1 + 2
    summary = LABEL.summary(tmp_path / "out")
    asked = len(distinct)
    assert f"judge: {asked} answered, {7 * asked} completion tokens, 0 given up" in summary
    assert f"{asked} questions, {asked + 2} requests, 2 retried" in summary
    made = found.card.provenance
    assert (made["judge"], made["labels"]) == (server.name, "hard") and len(made["judge.digest"]) == 64
    # In another folder the stored answers suffice.
    assert labelled(config, tmp_path / "again").card.digest == found.card.digest
    assert len(server.asked) == len(distinct) + 3
    assert (tmp_path / "again" / "judge.json").read_bytes() == (tmp_path / "out" / "judge.json").read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_an_example_without_a_verdict_is_left_out_and_counted(pairs, name, server, tmp_path):
    before = open_dataset(pairs)
    server.answer = speechless(find_vocabulary(before).decode(before[3].prompt))
    found = labelled(LabelConfig(str(pairs), JudgeConfig(name), batch_size=16), tmp_path / "out")
    wanted = [each for each in before if each.prompt.tolist() != before[3].prompt.tolist()]
    assert [each.prompt_id for each in found] == [each.prompt_id for each in wanted] and len(found) < 48
    assert found.card.provenance["inputs"][0]["count"] == 48
    assert " 2 given up, " in LABEL.summary(tmp_path / "out")


def test_generated_responses_are_labelled_and_told_too(pairs, sft, name, server, tmp_path):
    config = GenerateConfig(str(pairs), (str(sft),), JudgeConfig(name), limit=8, response_length=6, batch_size=8)
    make(GENERATE, config, tmp_path / "out", Bar())
    found = open_dataset(tmp_path / "out")
    vocabulary = find_vocabulary(found)
    assert [each.scores.tolist() for each in found] == [hard(each, vocabulary) for each in found]
    assert "judge: " in GENERATE.summary(tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ((401, {}, SECRET), UserError, "refuses the key in OPENAI_API_KEY"),
        ((503, {}, SECRET), StorageError, r"tries: 3, at last status 503: \*\*\*\): run the same command"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_told_before_anything_is_written(
    fault, error, message, pairs, name, server, tmp_path
):
    server.faults = [fault] * 3
    with pytest.raises(error, match=message) as raised:
        labelled(LabelConfig(str(pairs), JudgeConfig(name)), tmp_path / "out")
    assert "\n" not in str(raised.value) and SECRET not in str(raised.value) and not (tmp_path / "out").exists()


def test_an_endpoint_that_goes_down_leaves_the_line_in_the_folder(pairs, name, server, tmp_path):
    server.faults = [OK, *[(502, {}, SECRET)] * 96 * 3]
    with pytest.raises(StorageError, match="tries: 3, at last status 502"):
        labelled(LabelConfig(str(pairs), JudgeConfig(name)), tmp_path / "out")
    failed = (tmp_path / "out" / "failed.json").read_text()
    assert "status 502: ***" in failed and SECRET not in failed
    server.faults = []
    assert len(labelled(LabelConfig(str(pairs), JudgeConfig(name)), tmp_path / "out")) == 48


@pytest.fixture(scope="module")
def online(online):
    """The job, with a function as the judge: it compares samples by their words."""
    return changed(online, judge=JudgeConfig("judge_functions:brevity"), response_length=8)


def learned(folder):
    """The metrics, except those of the judge."""
    return [{key: value for key, value in line.items() if "judge" not in key} for line in metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_an_online_run_is_that_of_a_function_with_the_same_preferences(refresh_every, online, name, server, tmp_path):
    """Even if the next batch is sampled while one is judged, and if the run is stopped meanwhile."""
    by_function = run_job(changed(online, refresh_every=refresh_every), tmp_path / "function")
    config = changed(online, refresh_every=refresh_every, judge=JudgeConfig(name))
    run = run_job(config, tmp_path / "run")
    assert_equal_checkpoints(run, by_function)
    assert learned(run) == learned(by_function)
    assert open_dataset(run / "record").card.digest == open_dataset(by_function / "record").card.digest
    assert open_dataset(run / "record").card.provenance["refresh_every"] == refresh_every
    asked = len(server.questions)
    assert asked == len({*server.questions})
    run_and_stop(config, tmp_path / "stopped", after=4)
    assert_equal_runs(run_job(config, tmp_path / "stopped"), run)
    assert len(server.questions) == asked


@pytest.mark.slow
def test_every_line_of_metrics_tells_what_was_asked(online, name, server, tmp_path):
    run = run_job(changed(dataclasses.replace(online, log_every=2), judge=JudgeConfig(name)), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    total = {key: sum(line[key] for line in lines) for key in lines[0] if key.startswith("judge_")}
    assert total["judge_questions"] == total["judge_requests"] == total["judge_answered"] >= len(server.questions) > 0
    assert total["judge_prompt_tokens"] == 100 * total["judge_requests"]
    assert total["judge_retried"] == total["judge_given_up"] == 0
    assert all(line["seconds_judge_answer"] > 0 and line["seconds_judging"] > 0 for line in lines)


@pytest.mark.slow
def test_a_prompt_without_a_verdict_gives_its_place_to_another(online, name, server, pairs, tmp_path):
    before = open_dataset(pairs)
    vocabulary = find_vocabulary(before)
    unlucky = vocabulary.decode(before[0].prompt)
    server.answer = speechless(unlucky)
    run = run_job(changed(online, judge=JudgeConfig(name)), tmp_path / "run")
    record = open_dataset(run / "record")
    assert len(record) == 48
    assert all(each.scores.tolist() == hard(each, vocabulary) for each in record)
    assert unlucky not in {vocabulary.decode(each.prompt) for each in record}
    assert sum(line["judge_given_up"] for line in metrics(run)) >= 2
    assert all(line["skipped"] == 0 for line in metrics(run))
    # The run trained on exactly its record.
    source = DatasetConfig(str(run / "record"), batch_size=8, order="recorded")
    replayed = run_job(dataclasses.replace(online, source=source), tmp_path / "replayed")
    ours, theirs = arrays(run), arrays(replayed)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def test_win_rates_leave_out_what_has_no_verdict_and_count_it(sft, pairs, name, server, tmp_path):
    before = open_dataset(pairs)
    vocabulary = find_vocabulary(before)
    server.answer = speechless(vocabulary.decode(before[1].prompt))
    config = EvaluateConfig(
        run=str(sft),
        steps=(6,),
        dataset=str(pairs),
        judges=(f"model={name}",),
        opponents=(f"start={sft}",),
        reference=str(sft),
        prompts=8,
        kl_prompts=8,
        pairs=0,
        response_length=6,
        batch_size=8,
    )
    make(EVALUATE, config, tmp_path / "out", Bar())
    found = load_outcomes(tmp_path / "out" / "6.npz")
    wins, given_up = found["win_rate.model.start"], found["given_up.model.start"]
    assert given_up.sum() == 1 and np.isnan(wins[given_up == 1]).all() and {*wins[given_up == 0]} <= {0.0, 0.5, 1.0}
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(row["win_rate.model.start"]) == pytest.approx(wins[given_up == 0].mean())
    assert float(row["given_up.model.start"]) == 1 / 8
    asked = len(server.asked)
    best = dataclasses.replace(config, best_of=(2,), best_by=name, judges=(), opponents=())
    with pytest.raises(UserError, match="it chose none of the 2 responses to 1 of the prompts: raise its retries"):
        make(EVALUATE, best, tmp_path / "best", Bar())
    assert len(server.asked) > asked
