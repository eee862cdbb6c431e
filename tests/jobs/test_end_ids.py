"""A checkpoint's further end ids, in its generation_config.json: every job that samples from it stops at them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from job_runs import MODEL, Bar, run_job

from alignment_gap.data.records import open_dataset
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig, load_outcomes
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.generate import GENERATE, GenerateConfig

IDS = [*range(MODEL.vocabulary_size)]
FURTHER = [i for i in IDS if i != 1]


@pytest.fixture(scope="module")
def terse(sft, tmp_path_factory):
    """The supervised run with a generation_config.json in which every id ends an answer."""
    folder = tmp_path_factory.mktemp("ends") / "terse"
    shutil.copytree(sft, folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": IDS}))
    return folder


def settings_of(folder):
    return json.loads((folder / "job.json").read_text())


def test_generated_responses_end_with_the_further_ids_of_their_own_policy(pairs, sft, terse, tmp_path):
    """The first policy has none: its responses are longer, and its folder says nothing of end ids."""
    config = GenerateConfig(str(pairs), (str(sft), str(terse)), limit=16, response_length=6, batch_size=8, buckets=1)
    make(GENERATE, config, tmp_path / "out", Bar())
    lengths = [[*map(len, example.responses)] for example in open_dataset(tmp_path / "out")]
    assert max(first for first, _ in lengths) > 1 and {second for _, second in lengths} == {1}
    settings = settings_of(tmp_path / "out")
    assert settings["policy 1.end_ids"] == FURTHER and "policy 0.end_ids" not in settings


def test_an_evaluation_ends_the_answers_of_each_policy_with_its_own_ids(pairs, sft, terse, tmp_path):
    """The judge prefers the response with fewer tokens: one of a single token wins, or ties with another of them."""
    judge, numbers = "short=judge_functions:fewest_tokens", {"prompts": 16, "kl_prompts": 8, "pairs": 0, "steps": (6,)}
    common = {"dataset": str(pairs), "judges": (judge,), "reference": str(sft), "response_length": 6, "batch_size": 8}
    for run, other, named in ((terse, sft, "run"), (sft, terse, "opponent other")):
        config = EvaluateConfig(run=str(run), opponents=(f"other={other}",), **common, **numbers)
        folder = tmp_path / named.replace(" ", "_")
        make(EVALUATE, config, folder, Bar())
        outcomes = load_outcomes(folder / "6.npz")
        lengths, wins = outcomes["length"], outcomes["win_rate.short.other"]
        if run is terse:
            assert {*lengths} == {1.0} and {*wins} <= {0.5, 1.0} and wins.mean() > 0.5
        else:
            assert lengths.max() > 1
            np.testing.assert_array_equal(wins, np.where(lengths > 1, 0.0, 0.5))
        assert {name for name in settings_of(folder) if name.endswith("end_ids")} == {f"{named}.end_ids"}


def test_online_samples_end_with_the_further_ids_of_the_start(online, terse, tmp_path):
    config = dataclasses.replace(online, start=str(terse), steps=1)
    folder = run_job(config, tmp_path / "run")
    assert {len(response) for example in open_dataset(folder / "record") for response in example.responses} == {1}
    assert settings_of(folder)["start.end_ids"] == FURTHER
    # The run's own samples end like those that it was trained on.
    assert (folder / "tokenizer" / "generation_config.json").read_bytes()


def test_a_recorded_job_has_no_fact_of_end_ids(sft_config, terse, tmp_path):
    folder = run_job(dataclasses.replace(sft_config, start=str(terse), steps=1), tmp_path / "run")
    assert not [name for name in settings_of(folder) if name.endswith("end_ids")]
