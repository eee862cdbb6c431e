"""The `alignment-gap` command: its help, its exit statuses, and one line for a user's mistake."""

import sys

import pytest

from alignment_gap import __version__
from alignment_gap.cli.main import COMMANDS, guarded, main
from alignment_gap.errors import UserError


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2)])
def test_help_names_every_command(words, status, monkeypatch, capsys):
    assert run(monkeypatch, *words) == status
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_an_example(name, monkeypatch, capsys):
    assert run(monkeypatch, name, "--help") == 0
    assert f"\nalignment-gap {name}" in capsys.readouterr().out


def test_an_unknown_command(monkeypatch, capsys):
    assert run(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train?\n"


def test_exit_statuses(capsys):
    def refuse():
        raise UserError("the value, the limit, the remedy")

    def interrupt():
        raise KeyboardInterrupt

    assert guarded(lambda: None) == 0
    assert guarded(refuse) == 2
    assert guarded(interrupt) == 130
    assert capsys.readouterr().err == (
        "error: the value, the limit, the remedy\ninterrupted: the same command goes on from here\n"
    )
