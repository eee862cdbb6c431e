"""Runs side by side: studies by their tables, training jobs by their logs, and one line for wrong inputs."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from studies import unpacked

from alignment_gap.errors import UserError
from alignment_gap.evaluation.results import csv_text
from alignment_gap.study.analysis import COLUMNS, CheckpointResult, results_table
from alignment_gap.study.compare import write_comparison
from alignment_gap.study.report import CLAIM_COLUMNS


def checkpoint(arm, step, win_rate, loss="ipo"):
    beta, rate = (math.nan, math.nan) if arm == "sft" else (0.1, 1e-3)
    outcomes = {"kl": np.full(8, float(step)), "win_rate": np.full(8, win_rate)}
    return CheckpointResult(arm, "sft" if arm == "sft" else loss, beta, rate, 0, step, outcomes)


def claim(name, verdict="cannot be told", **numbers):
    row = dict.fromkeys(CLAIM_COLUMNS, "") | {"claim": name, "paper": f"The paper on {name}.", "figure": "1"}
    return row | {"verdict": verdict, "seeds": 3, "detectable": 0.02} | numbers


def study(folder, win_rate, settings, *claims, arms=("online", "offline")):
    """The folder of a finished study."""
    folder.mkdir(parents=True)
    results = [checkpoint("sft", 0, 0.2), *(checkpoint(arm, step, win_rate) for arm in arms for step in (1, 4))]
    (folder / "results.csv").write_text(csv_text(results_table(results), COLUMNS))
    (folder / "claims.csv").write_text(csv_text(claims, CLAIM_COLUMNS))
    (folder / "study.json").write_text(json.dumps(settings))
    return folder


def job(folder, losses, **settings):
    """The folder of an unfinished training job."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"kind": "policy", "loss.name": "ipo", "steps": 9} | settings))
    lines = [{"step": step, "loss": loss, "pairs_per_second": 10.0 * step} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(html.parser.HTMLParser):
    """The cells of the tables by row, the text, and the specifications of the figures."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.text, self.scripts, self.links, self.ids, self._tag = [], "", [], [], [], ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))
        self.specs = unpacked(self.scripts[1])

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        self.links += [value for name, value in attrs if name == "href"]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._tag == "script":
            self.scripts[-1] += data
        else:
            self.text += data
            if self._in_cell and data.strip():
                self.rows[-1][-1] += data.strip() + " "

    def row(self, start):
        (found,) = (row for row in self.rows if row[0].strip() == start)
        return [cell.strip() for cell in found]


@pytest.fixture
def studies(tmp_path):
    """Two studies that differ in a claim, a win rate and a setting."""
    online = claim("online-beats-offline", "agrees", value=0.064, low=0.045, high=0.082)
    level = claim("online-beats-offline", value=0.01, low=-0.02, high=0.04)
    first = study(
        tmp_path / "runs" / "a",
        0.5,
        {"seeds": 3, "arms.beta": 0.1},
        online,
        claim("of-its-own", value=0.5, low=0, high=1),
    )
    return first, study(tmp_path / "runs" / "b", 0.7, {"seeds": 3, "arms.beta": 0.5}, level)


def test_claims_stand_in_columns(studies, tmp_path, undrawn):
    page = Page(write_comparison(studies, tmp_path / "compared"))
    assert page.row("The paper on online-beats-offline.") == [
        *("The paper on online-beats-offline.", "1"),
        "agrees with the paper +6.4 points; 3 seeds +4.5 to +8.2",
        "cannot be told +1.0 points; 3 seeds \u22122.0 to +4.0",
    ]
    assert page.row("The paper on of-its-own.")[2:] == ["cannot be told 0.5; 3 seeds 0 to 1", "not asked"]
    assert ["The paper", "Figure", "a", "b"] in [[cell.strip() for cell in row] for row in page.rows]


def test_a_claim_that_no_study_measured_is_left_out(tmp_path, undrawn):
    unmeasured, measured = claim("of-neither", seeds=0), claim("of-one", value=0.5, low=0, high=1)
    folders = [
        study(tmp_path / "a", 0.5, {}, unmeasured, measured | {"seeds": 0, "value": "", "low": "", "high": ""}),
        study(tmp_path / "b", 0.5, {}, unmeasured, measured),
    ]
    page = Page(write_comparison(folders, tmp_path / "compared"))
    assert page.row("The paper on of-one.")[2:] == ["cannot be told", "cannot be told 0.5; 3 seeds 0 to 1"]
    assert "of-neither" not in page.text


def test_only_settings_that_differ_are_listed(studies, tmp_path, undrawn):
    page = Page(write_comparison(studies, tmp_path / "compared"))
    assert page.row("arms.beta") == ["arms.beta", "0.1", "0.5"]
    assert not [row for row in page.rows if row[0].startswith("seeds")]


def test_main_figures_have_a_panel_for_each_study_on_the_same_axes(studies, tmp_path, undrawn):
    path = write_comparison(studies, tmp_path / "compared")
    page = Page(path)
    spec = page.specs["figure_4_ipo_win_rate"]
    assert [panel["title"] for panel in spec["concat"]] == ["a", "b"]
    assert spec["resolve"]["scale"] == {"x": "shared", "y": "shared"}
    means = [{row["win_rate"] for row in panel["data"]["values"] if row["arm"] == "online"} for panel in spec["concat"]]
    assert means == [{0.2, 0.5}, {0.2, 0.7}]
    (values,) = (layer["data"]["values"] for layer in page.specs["claims"]["layer"][1:2])
    assert [(row["study"], round(row["value"], 6)) for row in values] == [("a", 6.4), ("b", 1.0)]
    assert {path.name for path in (path.parent / "figures").iterdir()} == {"claims.png", "figure_4_ipo_win_rate.png"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_the_best_checkpoint_of_every_method(studies, tmp_path, undrawn):
    page = Page(write_comparison(studies, tmp_path / "compared"))
    peaks = [[cell.strip() for cell in row] for row in page.rows if row[0].strip() in ("a", "b")]
    assert [row[:3] for row in peaks] == [
        [name, loss, arm] for name in "ab" for loss, arm in (("SFT", "sft"), ("IPO", "online"), ("IPO", "offline"))
    ]
    assert peaks[1][-1] == "50.0\u00a0% (50.0 to 50.0)"


def test_arms_that_the_table_lacks_are_drawn_in_colours_of_their_own(studies, tmp_path, undrawn):
    own = study(tmp_path / "own", 0.6, {}, arms=("online", "lagging"))
    spec = Page(write_comparison([studies[0], own], tmp_path / "compared")).specs["figure_4_ipo_win_rate"]
    colour = next(
        layer["encoding"]["color"]["scale"] for layer in spec["concat"][0]["layer"] if "color" in layer["encoding"]
    )
    assert set(colour["domain"]) == {"online", "offline", "lagging", "sft"}
    assert len(set(colour["range"])) == 4


def test_training_jobs_side_by_side(tmp_path, undrawn):
    folders = [
        job(tmp_path / "jobs" / "seed0-online-0123456789ab", (3.0, 2.0, 1.0), steps=3),
        job(tmp_path / "jobs" / "sft", (5.0, 4.0), kind="policy", **{"loss.name": "sft"}),
    ]
    page = Page(write_comparison(folders, tmp_path / "compared"))
    assert page.row("Metric") == ["Metric", "seed0-online", "sft"]
    assert page.row("loss") == ["loss", "1", "4"] and page.row("step") == ["step", "3", "2"]
    assert page.row("loss.name") == ["loss.name", "ipo", "sft"] and page.row("steps") == ["steps", "3", "9"]
    assert not [row for row in page.rows if row[0].startswith("kind")]
    throughput = page.row("seed0-online")
    assert throughput[:5] == ["seed0-online", "IPO", "1", "3", "20"]
    rows = page.specs["training"]["data"]["values"]
    assert [row["loss"] for row in rows if row["series"] == "sft"] == [5.0, 4.0]
    said = re.sub(r"\s+", " ", page.text)
    assert "3 to 1 (seed0-online), 5 to 4 (sft); updates skipped: 0." in said


def test_one_training_job_has_a_page_too(tmp_path, undrawn):
    page = Page(write_comparison([job(tmp_path / "sft", (5.0, 4.0))], tmp_path / "compared"))
    assert "1 training job" in page.text and page.row("loss") == ["loss", "4"]


def test_folders_that_end_alike_are_called_by_their_whole_paths(tmp_path, undrawn):
    folders = [job(tmp_path / name / "sft", (1.0,)) for name in ("a", "b")]
    assert Page(write_comparison(folders, tmp_path / "compared")).row("Metric") == ["Metric", *map(str, folders)]


def test_what_cannot_be_read_together_is_one_line_and_writes_nothing(studies, tmp_path):
    sft, empty = job(tmp_path / "sft", (1.0,)), tmp_path / "empty"
    empty.mkdir()
    for folders, message in (
        ([studies[0], sft], "a is a study and .*sft is a training job: give folders of one kind"),
        ([sft, empty], "empty has neither claims.csv of a finished study nor metrics.jsonl of a training job"),
        ([sft, sft], "sft is given twice: give each folder once"),
        ([studies[0]], "a is the only study: give a second one, or .*study --job=report"),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
            write_comparison(folders, tmp_path / "compared")
    assert not (tmp_path / "compared").exists()
    for taken in (studies[1], sft):
        before = sorted(path.name for path in taken.iterdir())
        with pytest.raises(UserError, match="holds a study or a job, and this would replace its report"):
            write_comparison(studies, taken)
        assert sorted(path.name for path in taken.iterdir()) == before
