"""docs/formulas.md has every loss once, with the settings and the papers that its function has."""

import inspect
import pathlib
import re

import pytest

from alignment_gap import losses

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "formulas.md").read_text(encoding="utf-8")
SECTIONS = {
    name: body.partition("\n## ")[0] for name, body in re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", TEXT, re.M | re.S)
}
NAMES = [name for name in losses.names() if name not in losses.aliases()]
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def test_every_loss_is_there_once():
    assert sorted(re.findall(r"^### (\w+)$", TEXT, re.M)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_has_a_formula_its_settings_and_its_sources(name):
    section, loss = SECTIONS[name], losses.get(name)
    assert re.match(r"\n\$\$\n.+\n\$\$\n", section)
    parameters = inspect.signature(loss).parameters.values()
    settings = [f"`{each.name}={each.default!r}`" for each in parameters if each.kind is each.KEYWORD_ONLY]
    (written,) = re.findall(r"^Settings: (.*)$", section, re.M)
    assert written == (", ".join(settings) or "none")
    # The docstring before its arguments; hypo's formula names no other paper.
    assert set(ARXIV.findall(section)) == set(ARXIV.findall(inspect.getdoc(loss).partition("Args:")[0]))
