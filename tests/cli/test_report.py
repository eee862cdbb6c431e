"""The report command: it reads folders, and prints one line for each thing that it cannot read."""

import json
import sys

import pytest

from alignment_gap.cli.main import main


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in a folder with a training job in runs/sft; returns the exit status and the output."""
    folder = tmp_path / "runs" / "sft"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"kind": "policy", "loss.name": "sft"}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: b"")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["alignment-gap", "report", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return run


def test_the_page_of_a_job_is_written_and_its_path_printed(command, tmp_path):
    status, printed = command("--runs=runs/sft", "--workdir=curves")
    assert (status, printed.out) == (0, "report: curves/report.html\n")
    assert "1 training job" in (tmp_path / "curves" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "curves" / "figures" / "training.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--runs is not set: add --runs=VALUE"),
        (["--runs=runs/nowhere"], "runs/nowhere has neither claims.csv of a finished study nor metrics.jsonl"),
        (["--runs=runs/sft", "--workdir=runs/sft"], "give another --workdir"),
    ],
)
def test_a_wrong_call_is_one_line(words, message, command):
    status, printed = command(*words)
    assert status == 2 and message in printed.err and printed.err.count("\n") == 1
