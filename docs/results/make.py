"""Makes all that follows from the measurements in docs/results, and the tables in README and in the page beside this.

docs/results/STUDY/PIECE/   outcomes.npz and facts.json, as a study's report left them: measured once, and kept
docs/results/STUDY/         the tables (.csv), facts.json and figures/, made from the pieces
docs/results/kinds/         figures/ of all studies kinds_* side by side

python docs/results/make.py            every study that has two pieces or more
python docs/results/make.py paper      one of them
"""

from __future__ import annotations

import csv
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence

from alignment_gap.evaluation.intervals import Interval
from alignment_gap.folders import at
from alignment_gap.study import findings
from alignment_gap.study.analysis import loss_name
from alignment_gap.study.arms import ARMS, DATASETS, WINDOWS
from alignment_gap.study.arms import MAIN as MAIN_PANEL
from alignment_gap.study.compare import claims_table, read_study, write_comparison
from alignment_gap.study.outcomes import OUTCOMES
from alignment_gap.study.pool import write_pooled

HERE = pathlib.Path(__file__).parent
README = HERE.parents[1] / "README.md"
PAGE = HERE / "README.md"
# The study whose claims README shows, and those on real texts, whose claims the page shows.
MAIN, REAL = "paper", ("hh", "hh_helpful", "tldr")
MADE = ("results.csv", "claims.csv", "comparisons.csv", "fits.csv", "facts.json", "figures")
# Studies with this name and a kind are compared.
KINDS = "kinds"
# The figures whose arms are the paper's.
OF_THE_PAPER = (MAIN_PANEL, WINDOWS, DATASETS)


def pieces_of(study: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a study's pieces, by name."""
    return sorted(path.parent for path in study.glob(f"*/{OUTCOMES}"))


def make(study: pathlib.Path) -> None:
    """Writes a study's tables and figures from its pieces, two or more."""
    with tempfile.TemporaryDirectory() as folder:
        write_pooled([at(piece) for piece in pieces_of(study)], at(folder))
        for name in MADE:
            made, kept = pathlib.Path(folder, name), study / name
            if made.is_dir():
                shutil.rmtree(kept, ignore_errors=True)
            shutil.move(made, kept)


def claims_markdown(study: pathlib.Path) -> str:
    """The claims of a study as a table in Markdown: those that it measured, by the paper's figures."""
    columns = ("The paper", "figure", "here", "measured, with its 95 % interval", "seeds", "could see")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in claims_table([read_study(study.name, at(study))]):
        (cell,) = row["cells"]
        number = " ".join(filter(None, (cell["value"], cell["interval"] and f"({cell['interval']})")))
        words = (row["paper"], row["figure"], cell["verdict"], number, cell["seeds"], cell["could_see"])
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def kinds_made(results: pathlib.Path) -> list[pathlib.Path]:
    """The studies of kinds that have their tables."""
    return sorted(path.parent for path in results.glob(f"{KINDS}_*/claims.csv"))


def kinds_markdown(studies: Sequence[pathlib.Path]) -> str:
    """The claims of several kinds as a table in Markdown, with a column for each: those that one of them measured."""
    names = [study.name.removeprefix(f"{KINDS}_") for study in studies]
    lines = [f"| The paper | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in claims_table([read_study(study.name, at(study)) for study in studies]):
        cells = [f"{cell['verdict']}: {cell['value']} ({cell['interval']})" for cell in row["cells"]]
        lines.append(f"| {' | '.join((row['paper'], *cells))} |")
    return "\n".join(lines)


def comparisons_markdown(study: pathlib.Path) -> str:
    """The comparisons at equal KL of the arms that the paper lacks, as a table in Markdown, a row for each two arms."""
    panels = {arm.name: arm.panel for arm in ARMS}
    pairs: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    with (study / "comparisons.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if panels[row["first"]] not in OF_THE_PAPER:
                pair = row["first"], row["first_loss"], row["second"], row["second_loss"]
                pairs.setdefault(pair, {})[row["metric"]] = row
    lines = ["| question | arms | win rate | rubric | win rate between the peaks |", "|---|---|---|---|---|"]
    for (first, loss, second, other), rows in pairs.items():
        of_other = "" if other == loss else f" ({loss_name(other)})"
        gaps = [
            _gap(rows[metric], gap) for metric, gap in (("win_rate", "mean"), ("rubric", "mean"), ("win_rate", "peak"))
        ]
        lines.append(f"| {panels[first]} | `{first}` {findings.MINUS} `{second}`{of_other} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def _gap(row: dict[str, str], name: str) -> str:
    """A gap with its interval, in percentage points or in the unit of the rubric; a dash if the arms share no KL."""
    ends = [row[f"{name}_gap{end}"] for end in ("", "_low", "_high")]
    return findings.in_table(Interval(*map(float, ends)), row["metric"]) if all(ends) else "\u2013"


def compare(studies: Sequence[pathlib.Path], made: pathlib.Path) -> None:
    """Writes the figures of several studies side by side to figures/ in `made`."""
    with tempfile.TemporaryDirectory() as folder:
        write_comparison([at(study) for study in studies], at(folder))
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        shutil.move(pathlib.Path(folder, "figures"), made / "figures")


def between_marks(text: str, table: str, what: str = "claims") -> str:
    """A page with the table between its two marks."""
    block = rf"(<!-- {what}: made by `make results` -->\n).*?(<!-- end of {what} -->)"
    return re.sub(block, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.DOTALL)


def main(names: Iterable[str]) -> None:
    """Makes the studies of these names, and README where its study is there."""
    studies = [HERE / name for name in names]
    for study in studies:
        if (count := len(pieces_of(study))) < 2:
            sys.exit(f"error: docs/results/{study.name} has {count} pieces: name a study that has two or more")
    for study in studies:
        make(study)
    if (HERE / MAIN / "claims.csv").exists():
        README.write_text(between_marks(README.read_text("utf-8"), claims_markdown(HERE / MAIN)), "utf-8")
        beyond = comparisons_markdown(HERE / MAIN)
        PAGE.write_text(between_marks(PAGE.read_text("utf-8"), beyond, "comparisons"), "utf-8")
    for name in REAL:
        if (HERE / name / "claims.csv").exists():
            PAGE.write_text(between_marks(PAGE.read_text("utf-8"), claims_markdown(HERE / name), name), "utf-8")
    if len(kinds := kinds_made(HERE)) > 1:
        compare(kinds, HERE / KINDS)
        PAGE.write_text(between_marks(PAGE.read_text("utf-8"), kinds_markdown(kinds)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or [study.name for study in sorted(HERE.iterdir()) if len(pieces_of(study)) > 1])
