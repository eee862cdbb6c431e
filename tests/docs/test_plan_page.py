"""The commands of docs/plan.md: the first one runs, the others are valid. The tables are complete.

The plans of whole studies run with a compiler that says at once that every program takes a second.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import sys

import pytest

from alignment_gap.cli import plan
from alignment_gap.cli.main import main
from alignment_gap.plan import programs
from alignment_gap.plan.known import Overrides
from alignment_gap.sharding.chips import CHIPS, parse_topology

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.slow
def test_the_first_command_plans(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", COMMANDS[0])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "fits:" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["devices"] == 8


def is_whole_study(command):
    words = [word.partition("=")[0] for word in command]
    return "--config" in words and "--job" not in words


@pytest.mark.slow
@pytest.mark.parametrize("command", filter(is_whole_study, COMMANDS), ids=" ".join)
def test_whole_studies_can_be_planned(command, monkeypatch, capsys):
    def compile_(config, program):
        return programs.Compiled(parameters=1, traffic=int(config.topology.chip.hbm_bandwidth))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("alignment_gap.plan.kept.kept", lambda folder, say: compile_)
    written = {}
    monkeypatch.setattr("alignment_gap.folders.write_bytes", lambda path, content: written.update({path: content}))
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "longest chain" in capsys.readouterr().out
    assert len(written) == any(word.startswith("--json") for word in command)


@pytest.mark.parametrize("command", [each for each in COMMANDS[1:] if not is_whole_study(each)], ids=" ".join)
def test_the_other_commands_can_be_planned(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, name, *arguments = command
    assert (program, name) == ("alignment-gap", "plan")
    config, _ = plan.read_config(["alignment-gap plan", *arguments])
    assert all(each.batch.batch % config.batch_unit == 0 for each in config.programs)


def test_the_table_of_flags_is_that_of_the_overrides():
    rows = re.findall(r"^\| (`--.*?) \|", TEXT, flags=re.MULTILINE)
    written = [name for row in rows for name in re.findall(r"`--(\w+)`", row)]
    assert sorted(written) == sorted(field.name for field in dataclasses.fields(Overrides))


def test_every_kind_of_chip_is_named_with_a_shape():
    named = [parse_topology(text) for text in re.findall(r"`((?:v|tpu|cpu|h)\w*:[\dx]+)`", TEXT)]
    assert {topology.kind for topology in named} == set(CHIPS)
