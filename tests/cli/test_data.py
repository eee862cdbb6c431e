"""`alignment-gap data` prints one line for every wrong input; tests/docs/test_data.py runs the commands."""

import sys

import numpy as np
import pytest

from alignment_gap.cli.main import main
from alignment_gap.data.records import Example, write_dataset


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "pairs"
    tokens = np.array([2, 3, 1], np.int32)
    examples = [Example(i, tokens, (tokens, tokens[1:]), np.array([1, 0], np.float32)) for i in range(3)]
    write_dataset(folder, examples, vocabulary_digest="v", provenance={})
    return str(folder)


BAD = {
    "command": (["shuffle"], "unknown command data 'shuffle': choose one of vocabulary, prepare"),
    "no source": (["prepare", "--vocabulary=bytes", "--output=x"], "source"),
    "no vocabulary": (["prepare", "--source=PAIRS", "--output=x"], "vocabulary is not set"),
    "source": (["prepare", "--source=nowhere.jsonl", "--vocabulary=bytes", "--output=x"], "nowhere.jsonl"),
    "flag": (["prepare", "--sourc=x"], "Unknown command line flag 'sourc'"),
    "number": (["prepare", "--prompt_length=many"], "--prompt_length=many"),
    "length of prompts": (["prepare", "--source=x", "--prompt_length=0"], "--prompt_length is 0"),
    "choice": (["prepare", "--source=x", "--vocabulary=bytes", "--output=x", "--ties=toss"], "ties is 'toss': choose"),
    "workers": (["prepare", "--source=x", "--vocabulary=bytes", "--output=x", "--workers=0"], "workers is 0"),
    "argument": (["prepare", "x"], "unexpected argument 'x'"),
    "no output": (["prepare", "--source=PAIRS", "--vocabulary=bytes"], "--output is not set"),
    "no folder": (["show"], "data show needs the folder of a dataset"),
    "no dataset": (["show", "nowhere"], "nowhere is not a finished dataset"),
    "no vocabulary of it": (["show", "PAIRS"], "does not say where its vocabulary is: give --vocabulary"),
    "other vocabulary": (["show", "PAIRS", "--vocabulary=bytes"], "was encoded with the vocabulary v, but bytes is"),
    "window": (["compose", "--datasets=PAIRS", "--output=x", "--order=window", "--window=0"], "--window is 0"),
    "seed": (["compose", "--datasets=PAIRS", "--output=x", "--seed=-1"], "--seed is -1"),
    "weights": (["compose", "--datasets=PAIRS,PAIRS", "--weights=1", "--output=x"], "there are 2 datasets: give one"),
    "weight": (["compose", "--datasets=PAIRS", "--weights=much", "--output=x"], "--weights=much: give values of type"),
    "no judge": (["label", "--dataset=PAIRS", "--output=x"], "judge"),
    "judge": (["label", "--dataset=PAIRS", "--output=x", "--judge=nowhere"], "nowhere"),
    "labels": (
        ["label", "--dataset=PAIRS", "--output=x", "--judge=x", "--judge.labels=best"],
        "--judge.labels is 'best'",
    ),
    "shapes": (["label", "--dataset=PAIRS", "--output=x", "--judge=x", "--buckets=0"], "--buckets is 0"),
    "policies": (["generate", "--prompts=PAIRS", "--output=x", "--policies=a,b,c"], "policies has 3 folders"),
    "no dataset to score": (["reference", "--checkpoint=x", "--output=x"], "dataset is not set"),
    "no checkpoint": (["reference", "--dataset=PAIRS", "--output=x"], "checkpoint is not set"),
    "checkpoint": (
        ["reference", "--dataset=PAIRS", "--checkpoint=nowhere", "--output=x"],
        "nowhere has no complete checkpoint",
    ),
    "length": (
        ["reference", "--dataset=PAIRS", "--checkpoint=x", "--prompt_length=2", "--output=x"],
        "prompt_length is 2",
    ),
    "buckets": (["reference", "--dataset=PAIRS", "--checkpoint=x", "--buckets=0"], "--buckets is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, pairs, monkeypatch, capsys, tmp_path):
    words, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "data", *(word.replace("PAIRS", pairs) for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [[], ["--help"], ["prepare", "--help"], ["generate", "-h"]])
def test_help(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "data", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--source" in capsys.readouterr().out or words[:1] == ["generate"]
