"""Model cards: method and data of the job, and an evaluation's measurements, but nothing about the machine."""

import csv
import dataclasses
import shutil

import pytest
from huggingface_hub import ModelCard
from job_runs import Bar, run_job

from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.model_card import model_card


@pytest.fixture(scope="module")
def run(online, tmp_path_factory):
    """An online run with checkpoints 1 and 2."""
    config = dataclasses.replace(online, steps=2, checkpoint_every=1)
    return run_job(config, tmp_path_factory.mktemp("card") / "online")


@pytest.fixture(scope="module")
def evaluation(run, pairs, sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "measured"
    config = EvaluateConfig(
        run=str(run),
        dataset=str(pairs),
        judges=("rubric",),
        opponents=(f"start={sft}",),
        prompts=8,
        kl_prompts=8,
        pairs=8,
        response_length=6,
        batch_size=8,
    )
    make(EVALUATE, config, folder, Bar())
    return folder


def table(text, title):
    """The rows of the table under a title, without the header."""
    lines = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.slow
def test_method_and_data_are_those_of_the_job(run, judge, sft, pairs, tmp_path):
    text = model_card(run, "mine", "transformers")
    method = dict(table(text, "Method"))
    assert method["loss"] == "ipo (beta=0.1)" and method["steps"] == "2" and method["samples for each prompt"] == "2"
    assert method["prompts in a step"] == "8" and method["learning rate"] == "0.01"
    assert method["judge"].startswith(f"{judge.name}, digest ") and method["start"].startswith(f"{sft.name}, digest ")
    assert not any("adapters" in label for label in method)
    card = open_dataset(pairs).card
    assert table(text, "Data") == [["pairs", "48", "posts", card.digest[:12]]]
    assert "Step 2 of a policy that was trained by online ipo" in text and "No evaluation was given." in text
    # Nothing about the machine is published.
    assert str(run.parent) not in text and str(pairs.parent) not in text


def test_what_was_measured_stands_in_the_table_and_in_the_hub_s_metadata(run, evaluation):
    with (evaluation / "results.csv").open() as file:
        expected = {row["step"]: row for row in csv.DictReader(file)}["1"]
    text = model_card(run, "mine", "peft", step=1, evaluation=str(evaluation))
    rows = {name: (mean, interval) for name, mean, interval in table(text, "Evaluation")}
    assert {"kl", "win_rate.rubric.start"} <= {*rows}
    for name, (mean, interval) in rows.items():
        assert mean == f"{float(expected[name]):.3f}"
        assert interval == f"{float(expected[f'{name}_low']):.3f} to {float(expected[f'{name}_high']):.3f}"
    data = ModelCard(text).data
    assert (data.library_name, data.tags) == ("peft", ["alignment_gap", "ipo", "online"])
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {name: float(expected[name]) for name in rows}


def test_a_preference_model_has_its_kind_in_the_place_of_a_loss(judge):
    text = model_card(judge, "mine", "transformers")
    method = dict(table(text, "Method"))
    assert method["kind"] == "pairwise" and "loss" not in method
    assert "of a preference model that was trained by offline pairwise" in text


def test_a_dataset_that_has_gone_is_named(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    job = (copy / "job.json").read_text()
    (copy / "job.json").write_text(job.replace('/pairs"', '/gone"'))
    assert table(model_card(copy, "mine", "transformers"), "Data") == [["gone", "", "", ""]]


def test_an_import_says_that_it_was_not_trained_here(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "import" / "checkpoints")
    text = model_card(tmp_path / "import", "mine", "transformers")
    assert "imported, not trained here" in text and "## Method" not in text


def test_an_evaluation_of_something_else_is_one_line(run, evaluation, sft, pairs):
    for path, place, message in (
        (run, str(pairs), r"pairs is not a finished evaluation: give the --output of alignment-gap evaluate"),
        (sft, str(evaluation), r"measured measured the steps 1, 2 of .*online, and step 6 of .*sft is exported: give"),
    ):
        with pytest.raises(UserError, match=message) as error:
            model_card(path, "mine", "transformers", evaluation=place)
        assert "\n" not in str(error.value)
