"""The site builds from the pages without a warning; it has the formulas and the API pages."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason='mkdocs is not installed: pip install -e ".[docs]"',
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_formulas_are_mathml(site):
    text = (site / "formulas" / "index.html").read_text(encoding="utf-8")
    shown = text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"')
    assert shown == (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8").count("\n$$\n") / 2
    assert "arithmatex" not in text


@pytest.mark.slow
def test_an_api_page_has_every_public_name(site):
    from alignment_gap import losses

    text = (site / "api" / "losses" / "index.html").read_text(encoding="utf-8")
    missing = {name for name in losses.__all__ if f'id="alignment_gap.losses.{name}"' not in text}
    assert missing == set()


def test_no_page_loads_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', text) == [], path
