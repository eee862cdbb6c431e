"""The page on policies: its Python runs, and its tables match the configs."""

import pathlib
import re

from alignment_gap.models import DecoderConfig, sizes

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
FAMILIES = {
    "PaLM": "palm_8b",
    "Gemma": "gemma_7b",
    "Gemma 2": "gemma2_2b",
    "Gemma 3": "gemma3_1b",
    "Llama 3": "llama3_8b",
    "Qwen 2.5": "qwen2.5_7b",
    "Qwen 3": "qwen3_8b",
    "Pythia": "pythia_6.9b",
}


def test_the_python_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["mt5"].width == 512


def test_every_size_is_in_the_table_once():
    table = TEXT.partition("| names |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([\w.]+)`", table)) == sorted(sizes.NAMES)


def test_the_table_of_families_is_what_their_configs_say():
    table = [line.strip("|").split("|") for line in TEXT.partition("## One")[2].splitlines() if line.startswith("|")]
    (_, *families), _, *rows = [[cell.strip(" `") for cell in line] for line in table]
    assert families == list(FAMILIES)
    assert len(rows) > 10
    for field, *cells in rows:
        for family, cell in zip(families, cells, strict=True):
            assert cell == _written(field, getattr(sizes.get(FAMILIES[family]), field)), (field, family)


def _written(field, value):
    """A string stays, true is yes, a number has no trailing zeros.

    A number or a truth value that is the default is empty.
    """
    if isinstance(value, str):
        return value
    if value == getattr(DecoderConfig(), field):
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:g}"
