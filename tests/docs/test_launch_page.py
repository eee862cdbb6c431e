"""Every command of docs/launch.md prints its jobs; the tables of engines and of exit statuses match the code."""

import pathlib
import re
import shlex
import sys

import pytest

from alignment_gap.cli.launch import ENGINES, LaunchConfig
from alignment_gap.cli.main import main
from alignment_gap.interruption import TRY_AGAIN
from alignment_gap.jobs.config import MonitorConfig
from alignment_gap.sharding.processes import _SILENT
from alignment_gap.training import GuardConfig, KeepConfig

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_the_command_of_the_page_is_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gin", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    program, name, *words = shlex.split(command)
    asked = [] if "--status" in words else ["--dry_run"]
    monkeypatch.setattr(sys, "argv", [program, name, *asked, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and not (tmp_path / "runs").exists()
    assert "ready" in said if "--status" in words else "alignment-gap" in said or "#SBATCH" in said
    if "study" in words:
        assert "seed0-online-ipo" in said and "report" in said


def test_the_page_names_what_the_code_has():
    assert re.findall(r"^\| `(\w+)` \| (?!`)", TEXT, flags=re.MULTILINE) == [*ENGINES]
    settings = re.findall(rf"--({'|'.join(ENGINES)})\.(\w+)", TEXT)
    assert {engine for engine, _ in settings} == {*ENGINES} - {"here"}
    for engine, name in settings:
        assert hasattr(getattr(LaunchConfig(), engine), name)
    assert f"| {TRY_AGAIN}: run the command again |" in TEXT and f"after some {_SILENT:.0f} s all others" in TEXT


def test_defaults_that_docs_jobs_states():
    text = " ".join((ROOT / "docs" / "jobs.md").read_text(encoding="utf-8").split())
    assert "After ten in a row (`GuardConfig.stop_after`)" in text and GuardConfig().stop_after == 10
    monitor = MonitorConfig()
    assert f"between two validations, {monitor.validate_every} |" in text
    assert f"seconds without a step, {monitor.hang_after:.0f}, after which" in text
    assert "All stay, unless `KeepConfig.last`" in text and KeepConfig().last is None
