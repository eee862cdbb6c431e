"""The commands of docs/plan.md: the first runs, the others are plans that could be made."""

import json
import pathlib
import re
import shlex
import sys

import pytest

from alignment_gap.cli import plan
from alignment_gap.cli.main import main
from alignment_gap.plan.plan import batch_parts

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]


def test_the_first_command_plans(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", COMMANDS[0])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "fits:" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["devices"] == 8


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_the_other_commands_can_be_planned(command):
    values = plan.make_flags()
    assert values(command[1:]) == ["plan"]
    config = plan.read_config(values)
    assert config.lengths.batch % batch_parts(config) == 0
