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
_INLINE_CODE = re.compile(r"(?<=<code>)[^<\n]*(?=</code>)")
_COMMANDS = re.compile(r'<div class="language-(?:sh|bash|console) highlight">.*?</div>', re.DOTALL)
_UNNAMED_COMMANDS = re.compile(r"language-text(?= highlight\"><pre><span></span><code>(?:alignment-gap|python) )")
_HYPHENATED = r"-*\w+(?:-\w+)+|--?[A-Za-z]\w*"  # Flags, and names such as alignment-gap.


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from files outside of docs/, each where the links of docs/ lead."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {"index.md": readme.replace("](docs/", "](").replace("[docs/", "[")}
    for path in [ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").rglob("*.md")]:
        name = path.relative_to(ROOT).as_posix()
        content = path.read_text(encoding="utf-8").replace("[docs/", "[")
        pages[name] = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", content)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        pages[f"notebooks/{path.stem}.md"] = _notebook(path)
    for page in re.findall(r"api/([\w.]+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")):
        pages[f"api/{page}.md"] = f"# alignment_gap.<wbr>{page.replace('.', '.<wbr>')}\n\n::: alignment_gap.{page}\n"
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for path in (ROOT / "benchmarks").rglob("*.json"):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links to files outside of docs/ to their pages."""
    if not page.file.generated_by:
        folder = "../" * page.file.src_uri.count("/")
        markdown = markdown.replace("../README.md", "../index.md").replace(f"]({folder}../", f"]({folder}")
    return re.sub(r"\]\(((?:\.\./)*notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Writes formulas as MathML, which browsers show without a script; lets code break at the ends of its words."""
    content = _UNNAMED_COMMANDS.sub("language-sh", content)
    content = _COMMANDS.sub(lambda block: re.sub(r"(?<=>)[^<]+", _keep_flags, block[0]), content)
    content = _INLINE_CODE.sub(_breakable, content)
    content = re.sub(r"\b\d+e-\d+(?=[^<>]*<)", r'<span class="whole">\g<0></span>', content)
    return _FORMULA.sub(_mathml, content)


def _keep_flags(text: re.Match[str]) -> str:
    """Text whose words with hyphens, such as flags, stay on one line."""
    return re.sub(rf"(?<![\w&;-])(?:{_HYPHENATED})", r'<span class="whole">\g<0></span>', text[0])


def _breakable(text: re.Match[str]) -> str:
    """Code that breaks after a sign inside a long word, and at no hyphen."""
    words = [word if len(html.unescape(word)) <= 18 else _broken(word) for word in re.split(r"(\s+)", text[0])]
    return re.sub(_HYPHENATED, r'<span class="whole">\g<0></span>', "".join(words))


def _broken(word: str) -> str:
    """A word that breaks after signs, and after underscores or between capitals where that is not enough."""
    parts = re.split(r"(?<=[/=:,])(?=[\w\"'])|(?<=\.)(?=\w{5})", word)
    inside = [r"(?<=[^\W_]_)(?=\w)" if "_" in part else r"(?<=[a-z]{3})(?=[A-Z][a-z])" for part in parts]
    return "<wbr>".join(
        re.sub(border, "<wbr>", part) if len(part) > 18 else part for border, part in zip(inside, parts, strict=True)
    )


def _mathml(match: re.Match[str]) -> str:
    """A formula; `\\qquad` separates parts that may stand below each other. An unknown command is an error."""
    formula = html.unescape(match[3]).strip()
    if match[2] == "(":
        return _spaced(convert(formula, display="inline"))
    first, *others = (_spaced(convert(part, display="block")) for part in formula.split(r"\qquad"))
    others = [part.replace('display="block"', 'displaystyle="true"') for part in others]
    return f'<div class="formula">{"".join([first, *others])}</div>'


def _spaced(written: str) -> str:
    """Names of functions with a thin space before them, and after them unless a bracket follows; bars without."""
    written = written.replace("<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0" stretchy="false">&#x0007C;</mo>')
    written = re.sub(r"<m[io]>([A-Za-z]{2,})</m[io]>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', written)
    bracket = r"(?:<mrow>)?<mo[^>]*>(?:\(|\[|&#x00028;)"
    return re.sub(rf'rspace="0.17em">(\w+)</mo>(?={bracket})', r'rspace="0">\1</mo>', written)


def _notebook(path: pathlib.Path) -> str:
    """The cells of a notebook as a page."""
    cells = json.loads(path.read_text(encoding="utf-8").replace("[docs/", "[").replace("](../docs/", "](../"))["cells"]
    texts = ("".join(cell["source"]) for cell in cells)
    written = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([*written, ""])
