"""The losses command as a user types it."""

import re
import sys

import pytest

from alignment_gap import losses
from alignment_gap.cli.main import main


@pytest.fixture
def printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "losses"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    return capsys.readouterr().out


def cells(table, name):
    """The cells of a row, split at the columns of the header."""
    header, *rows = table.splitlines()
    starts = [title.start() for title in re.finditer(r"\S+( \S+)*", header)]
    assert header.split("  ")[0] in ("loss", "alias")
    (row,) = (row for row in rows if row.split()[0] == name)
    return [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]


def test_losses_and_aliases_are_two_tables(printed):
    table, aliases = printed.split("\n\n")
    assert [row.split()[0] for row in table.splitlines()[1:]] == sorted(losses.names() - losses.aliases().keys())
    assert [row.split()[0] for row in aliases.splitlines()[1:]] == sorted(losses.aliases())
    assert cells(table, "ipo") == ["ipo", "beta=0.1, over_tokens='sum'", ""]
    assert cells(table, "dr_grpo")[2] == "sampler log-probs, width"
    assert cells(table, "raft") == ["raft", "keep=1", ""]
    assert cells(table, "online_kl") == ["online_kl", "", "own samples"]
    assert cells(aliases, "hinge") == ["hinge", "slic"]
    assert cells(aliases, "bco_pair") == ["bco_pair", "bco, shift=0.0"]
    assert not [line for line in printed.splitlines() if line != line.rstrip()]


def test_settings_are_shown_without_annotations(printed):
    assert "Literal" not in printed and ": " not in printed
