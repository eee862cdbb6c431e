"""The section of docs/jobs.md on a language model over HTTP: its command runs, and the package has its settings."""

import dataclasses
import json
import pathlib
import re
import shlex
import sys

import pytest
from built_in import write_posts
from judge_server import MODEL

from alignment_gap.cli import gin_files
from alignment_gap.cli.main import main
from alignment_gap.data.records import open_dataset
from alignment_gap.judges import check_judge
from alignment_gap.judges.language_model import LanguageModelConfig

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("### A language model over HTTP") : TEXT.index("## Datasets from datasets")]
ROWS = re.findall(r"^\| `(\w+)` \|([^|]*)\|", SECTION, flags=re.MULTILINE)
TABLE = {name: default.strip(" `") for name, default in ROWS}


def test_the_table_has_every_setting_with_its_default():
    fields = {field.name: field for field in dataclasses.fields(LanguageModelConfig)}
    assert {*TABLE} == {*fields}
    for name in ("key_variable", "timeout", "retries", "parallel"):
        assert TABLE[name] == f"{fields[name].default:{'' if name == 'key_variable' else 'g'}}"
    assert json.loads(TABLE["request"]) == fields["request"].default_factory()


def test_its_file_holds_settings(tmp_path):
    (content,) = re.findall(r"```json\n(.*?)```", SECTION, flags=re.DOTALL)
    (tmp_path / "judge.json").write_text(content)
    check_judge(str(tmp_path / "judge.json"))
    assert {*json.loads(content)} <= {*TABLE}


def test_its_command_labels_a_dataset(server, tmp_path, monkeypatch, capsys):
    write_posts(tmp_path / "pairs", 8)
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path / "cache"))
    (command,) = re.findall(r"^alignment-gap data label .*", SECTION, flags=re.MULTILINE)
    named = {"runs/prepared/train": tmp_path / "pairs", "http://localhost:8000/v1": server.url}
    named |= {"#MODEL": f"#{MODEL}", "runs/labelled": tmp_path / "out"}
    for there, here in named.items():
        assert command.count(there) == 1
        command = command.replace(there, str(here))
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--batch_size=8"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and len(open_dataset(tmp_path / "out")) == 8
    assert "judge: 16 answered, 112 completion tokens, 0 given up" in capsys.readouterr().out


def test_an_endpoint_that_is_down_is_one_line(server, tmp_path, monkeypatch, capsys):
    write_posts(tmp_path / "pairs", 8)
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "judge.json").write_text(json.dumps({"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}))
    words = ["data", "label", f"--dataset={tmp_path / 'pairs'}", f"--judge={tmp_path / 'judge.json'}"]
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *words, f"--output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as ended:
        main()
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1 and "(tries: 1, at last Connection refused)" in line
    assert not (tmp_path / "out").exists()


def test_gin_takes_both_names():
    for name in ("http://localhost:8000/v1#Qwen/Qwen3-8B", "judges/model.json"):
        _, overrides = gin_files.split_overrides([f"--gin.JUDGE={name}", "--gin.PROMPTS=a", "--gin.START=b"])
        config = gin_files.read_config(["gin/runs/online_ipo.gin"], overrides)
        assert config.online.judge.judge == name
