"""What the site has beside docs/: README, changelog, benchmarks, notebooks and API pages; formulas become MathML."""

from __future__ import annotations

import html
import json
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from files outside of docs/, each where the links of docs/ lead."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {"index.md": re.sub(r"\]\(docs/", "](", readme)}
    for path in [ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").rglob("*.md")]:
        name = path.relative_to(ROOT).as_posix()
        pages[name] = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", path.read_text(encoding="utf-8"))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        pages[f"notebooks/{path.stem}.md"] = _notebook(path)
    for page in re.findall(r"api/([\w.]+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")):
        pages[f"api/{page}.md"] = f"# alignment_gap.{page}\n\n::: alignment_gap.{page}\n"
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for path in (ROOT / "benchmarks").rglob("*.json"):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links to files outside of docs/ to their pages."""
    if not page.file.generated_by:
        markdown = markdown.replace("](../README.md", "](index.md").replace("](../", "](")
    return re.sub(r"\]\(((?:\.\./)*notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Writes formulas as MathML, which browsers show without a script; an unknown command is an error here."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    written = convert(html.unescape(match[3]).strip(), display="inline" if match[2] == "(" else "block")
    return written.replace("<mi>log</mi>", '<mo rspace="0.17em">log</mo>')  # A thin space before its argument.


def _notebook(path: pathlib.Path) -> str:
    """The cells of a notebook as a page."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ("".join(cell["source"]) for cell in cells)
    written = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([*written, ""])
