"""The tables of docs/jobs.md on equal bits name a test in every line, and these tests exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("## What gives the same bits") : TEXT.index("## In code")]
ROWS = re.findall(r"^\| (?!---|the same, bit for bit|the same within)(.*) \|$", SECTION, flags=re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_test_of_a_line_is_there(row):
    path, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.rpartition("| ")[2]).groups()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_there_are_lines_of_both_kinds():
    assert len(ROWS) == SECTION.count("`tests/") > 20
