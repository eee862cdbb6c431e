"""The report on disk: complete or absent, self-contained, and safe whatever text the data have."""

import collections
import csv
import dataclasses
import datetime
import html.parser
import math
import re

import numpy as np
import pytest
from studies import unpacked

from alignment_gap.errors import UserError
from alignment_gap.evaluation import charts
from alignment_gap.sampling import SamplerConfig
from alignment_gap.study import findings
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.arms import arms_of
from alignment_gap.study.claims import CLAIMS
from alignment_gap.study.config import ArmsConfig, StudyConfig
from alignment_gap.study.curves import TrainingRun
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.graph import GOLDEN_HELD_OUT
from alignment_gap.study.report import JudgeFacts, ReportContext, peaks_text, write_report
from alignment_gap.study.results import notes_on

# As the text of the page: the cells of a row follow one another.
FACTS = [
    "Study tiny, seed 0, 5 checkpoints",
    "golden, held-out human labels79.0%91.3%",
    "Agrees with the labels (95 %)Agrees with rubric (95 %)",
    "arms.checkpoint_steps50, 100, 200, 400",
    "arms.lossesipo, best_of_n",
    "jax0.10.2",
    "sft0:00:12",
    "arms1:07:00",
    "onlineIPObeta 0.1, lr 0.001",
    "offline: the fixed dataset D_golden, labelled by the golden model. golden:",
    "golden: two fresh samples of the policy, labelled by the golden model itself",
    "At equal KL online is better than offline.",
    "online minus offline, win rate against the golden policy, at equal KL",
]
DRAWN = {"equal_kl_ipo", "equal_kl_ipo_rubric", "figure_4", "figure_4_rubric", "training_sft", "training_ipo"}
HOSTILE = "</script><script>alert('x')</script> & <b>bold</b>"


LINES = [{"step": step, "loss": 3.0 - step, "gradient_norm": 1.0, "tokens_per_second": 1234.0} for step in (1, 2)]


def results(arms=("online", "offline"), seeds=(0,), rubric=True):
    found = []
    for seed in seeds:
        for arm, kl, rate in (("sft", 0.0, 0.3), *((arm, k, 0.4 + 0.1 * k) for arm in arms for k in (1.0, 3.0))):
            rng = np.random.default_rng([seed, int(kl)])
            outcomes = {"win_rate": (rng.random(40) < rate).astype(float), "kl": np.full(8, kl)}
            if rubric:
                outcomes["rubric"] = rng.random(40)
            loss = "sft" if arm == "sft" else "ipo"
            setting = (math.nan, math.nan) if arm == "sft" else (0.1, 1e-3)
            found.append(CheckpointResult(arm, loss, *setting, seed, int(kl), outcomes))
    return found


def context(**changes):
    samples = [
        {"arm": "online", "loss": "IPO", "step": 3, "response": HOSTILE, "rubric": None},
        {"arm": "sft", "loss": "SFT", "step": 0, "response": "fine", "rubric": 0.5},
    ]
    settings = {
        "config": StudyConfig(name="tiny"),
        "versions": {"jax": "0.10.2"},
        "judges": [JudgeFacts(0, "golden, held-out human labels", {"the labels": 0.79, "rubric": 0.913})],
        "samples": {HOSTILE: samples},
        "wall_time": {"sft": datetime.timedelta(seconds=12), "arms": datetime.timedelta(hours=1, minutes=7)},
        "notes": ["A micro size: these policies are not good models."],
        "training": [
            TrainingRun("sft", LINES, 12.0, "sft", learning_rate=1e-3),
            TrainingRun("online", LINES, 67.0, "ipo", 0.1, 1e-3),
        ],
    }
    return ReportContext(**(settings | changes))


class Page(html.parser.HTMLParser):
    """The links, texts and scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.scripts, self.text, self._in_script = [], [], "", False
        self.ids, self.folded, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in_script = tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]
        self.folded += [value for name, value in attrs if name == "id" and tag == "details"]
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data
            self.texts.append(data)


def sentences(page):
    """The sentences of a page that have more than 25 characters."""
    text = re.sub(r"\s+", " ", " ".join(page.texts))
    return [each for each in re.split(r"(?<=[.?]) (?=[A-Z])", text) if len(each) > 25]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    assert write_report(path, results(), context()) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def table(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_page_numbers_and_pictures_are_there(folder):
    assert {path.stem for path in (folder / "figures").iterdir()} == DRAWN
    assert [(row["arm"], row["step"]) for row in table(folder, "results.csv")] == [
        (r.arm, str(r.step)) for r in results()
    ]
    tables = {f"{name}.csv" for name in ("claims", "comparisons", "fits", "results")}
    assert {path.name for path in folder.iterdir()} == tables | {"facts.json", "figures", "outcomes.npz", "report.html"}


def test_comparisons_at_equal_kl_and_fits_are_tables_too(folder):
    evidence, arms = Evidence(results()), arms_of(StudyConfig().arms.names)
    (compared,) = (row for row in table(folder, "comparisons.csv") if row["metric"] == "rubric")
    comparison = evidence.compared(("online", "ipo"), ("offline", "ipo"), "rubric")
    assert (compared["first"], compared["second"], compared["seeds"]) == ("online", "offline", "1")
    assert [float(compared[name]) for name in ("kl_low", "kl_high", "mean_gap", "mean_gap_low", "peak_gap_high")] == [
        *comparison.budgets[[0, -1]],
        *(comparison.mean_gap.value, comparison.mean_gap.low, comparison.peak_gap.high),
    ]
    fits = findings.over_optimisation_fits(evidence, arms)
    rows = table(folder, "fits.csv")
    assert [(row["arm"], row["loss"], row["score"], row["curve"]) for row in rows] == [
        (*method, metric, curve) for method, metric, curve, _ in fits
    ]
    assert [float(row["b_low"]) for row in rows] == [b.low for *_, (_, b) in fits] and len(rows) == 4


def test_every_claim_is_a_row_of_a_table(folder, page):
    found = {row["claim"]: row for row in table(folder, "claims.csv")}
    assert list(found) == [claim.name for claim in CLAIMS]
    row = found["online-beats-offline"]
    assert (row["figure"], row["holds_above"], row["holds_below"], row["seeds"]) == ("1", "0.0", "inf", "1")
    assert row["verdict"] == "cannot be told" and row["reason"].startswith("one seed")
    # Both arms have the same draws, so the gap is exactly 0 in all 40 examples.
    assert row["value"] == "0.0" and -float(row["low"]) == float(row["high"]) == pytest.approx(1 - 0.05 ** (1 / 40))
    assert row["p_adjusted"] == "" and found["replay-is-online"]["value"] == ""
    assert all(claim.paper in page.text for claim in CLAIMS)
    assert "0 of 28 claims agree with the paper, 0 disagree, 28 cannot be told." in page.text


def test_page_loads_nothing(folder, page):
    assert {link for link in page.links if not link.startswith("#")} == {f"figures/{name}.png" for name in DRAWN}
    assert "default-src 'none'" in (folder / "report.html").read_text(encoding="utf-8")


def test_specifications_in_the_page_are_those_of_the_figures(page):
    specs = unpacked(page.scripts[1])
    assert set(specs) == DRAWN
    assert all("$schema" in spec for spec in specs.values())


def test_text_from_the_data_stays_text(page):
    assert page.text.count(HOSTILE) == 2
    assert len(page.scripts) == 3
    assert not any("alert('x')" in script for script in page.scripts)


def test_the_answer_comes_first_with_its_caveats(page):
    assert page.folded[:4] == ["claims", "answer", "reading", "figures"]
    assert re.search(
        r"IPO: at equal KL (no difference between online and offline can be claimed|\w+ beats \w+)\.", page.text
    )
    assert "95\u00a0% interval" in page.text
    assert "not another training run" in page.text
    assert "A micro size" in page.text


def test_contents_lead_to_every_section_and_figure(page):
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert len(page.ids) == len(set(page.ids)) and set(inside) <= set(page.ids)
    assert set(page.folded) | DRAWN <= set(inside)
    assert len(page.folded) == 12


def test_no_sentence_stands_twice(page):
    said = collections.Counter(sentences(page))
    assert len(said) > 60
    assert [each for each, count in said.items() if count > 1] == []


def test_a_figure_has_its_question_the_papers_answer_and_a_link_to_each_claim(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "Does the win rate rise with KL and fall again, and does online stay above?" in text
    assert "Both branches rise, then fall: over-optimisation." in text
    assert page.links.count("#claim-online-beats-offline") == 1 and "claim-online-beats-offline" in page.ids


def test_training_is_drawn_and_its_throughput_is_a_table(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "loss of the first and of the last line: 2 to 1 (online); updates skipped: 0." in text
    assert "1,234" in text and "Tokens/s" in text
    rows = unpacked(page.scripts[1])["training_ipo"]["data"]["values"]
    assert [row["loss"] for row in rows if "loss" in row] == [2.0, 1.0]
    assert [row["kl"] for row in rows if "kl" in row] == [1.0, 3.0]


def test_peaks_far_from_equal_kl_are_explained_where_they_stand(tmp_path, undrawn):
    """Online reaches a KL that offline does not reach, and wins there."""
    found = [r for r in results() if r.arm != "online"]
    near = [dataclasses.replace(r, arm="online") for r in found if r.arm == "offline"]
    far = dataclasses.replace(near[-1], step=9, outcomes={"kl": np.full(8, 40.0), "win_rate": np.ones(40)})
    write_report(tmp_path, [*found, *near, far], context())
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    answer = text[text.index("no difference between online and offline can be claimed") :]
    assert (
        "The two gaps differ because under IPO the best of online in win rate against the golden policy is at 40 nats, "
        "where offline, measured up to 3 nats, has no checkpoint: the gap between their peaks is one at unequal KL."
    ) in answer[:900]


def test_peaks_at_one_kl_need_no_explanation(page):
    assert "The two gaps differ" not in page.text


def test_judges_that_were_compared_with_others_have_the_same_columns(tmp_path, undrawn):
    ends = {"the labels": (0.5, 1.0), "rubric": (0.75, 0.9375)}
    judges = [
        JudgeFacts(0, "golden", {"the labels": 0.75, "rubric": 0.875}, ends),
        JudgeFacts(0, "n-grams", {"length": 0.5}),
    ]
    write_report(tmp_path, results(arms=("online",)), context(judges=judges))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Agrees with the labels (95 %)Agrees with rubric (95 %)Agrees with length (95 %)" in text
    assert (
        "golden75.0\u00a0% (50.0 to 100.0)87.5\u00a0% (75.0 to 93.8)\u2013" in text
        and "n-grams\u2013\u201350.0%" in text
    )


def test_settings_of_a_task_that_was_not_prepared_are_left_out(page, tmp_path, undrawn):
    write_report(tmp_path, results(arms=("online",)), context(config=StudyConfig(prepared="pairs")))
    prepared = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "task.seed" in page.text and "task.seed" not in prepared and "preparedpairs" in prepared


def test_over_optimisation_is_fitted(page):
    assert "4 fits" in page.text and "d(a \u2212 b log d)" in page.text


def test_missing_figures_say_why(page):
    assert "Not drawn; not measured: accuracy, chosen_log_ratio, rejected_log_ratio." in page.text


@pytest.mark.parametrize("piece", FACTS)
def test_facts_of_the_study_are_in_the_page(page, piece):
    assert piece in re.sub(r"\s+", " ", page.text)


def test_several_seeds_report_students_interval(tmp_path, undrawn):
    write_report(tmp_path, results(seeds=(0, 1, 2)), context())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 degrees of freedom" in text and "(seed 2)" in text
    assert "seeds 0, 1, 2, 15 checkpoints" in text


def test_the_arms_are_those_of_the_config(tmp_path, undrawn):
    """The page explains only the arms of the study."""
    config = StudyConfig(arms=ArmsConfig(names=("offline", "online")))
    write_report(tmp_path, results(), context(config=config))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "online: two fresh samples" in text and "shuffled:" not in text


def test_without_offline_the_question_is_left_open_and_stale_pictures_go(tmp_path, undrawn):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "equal_kl_ipo.png").write_bytes(b"old")
    (tmp_path / "figures" / "mine.png").write_bytes(b"kept")
    write_report(tmp_path, results(arms=("online",), rubric=False), ReportContext(StudyConfig(name="part")))
    assert "cannot be answered" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"figure_4.png", "mine.png"}
    assert "This report has no training jobs" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_arms_that_share_no_kl_are_not_compared(tmp_path, undrawn):
    far = [dataclasses.replace(r, outcomes=r.outcomes | {"kl": np.full(8, 9.0)}) for r in results(arms=("online",))[1:]]
    write_report(tmp_path, [*results(arms=("offline",)), *far], context())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "IPO: at equal KL online and offline cannot be compared." in text
    assert "none shared" in text and not re.search(r"\bnan\b", Page(text).text)
    row = table(tmp_path, "comparisons.csv")[0]
    assert row["kl_low"] == row["mean_gap"] == row["better"] == "" and row["peak_gap"] != ""


def test_a_failure_leaves_the_finished_report(tmp_path, monkeypatch, undrawn):
    (tmp_path / "report.html").write_text("finished")

    def fail(spec, scale=2.0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(charts, "png", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, results(), context())
    assert (tmp_path / "report.html").read_text() == "finished"
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_checkpoints_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="no evaluated checkpoints"):
        write_report(tmp_path, [], context())


def test_peaks_are_those_of_the_study_s_own_size(tmp_path, undrawn):
    other = [dataclasses.replace(result, size="large") for result in results(arms=("shuffled",))]
    assert "shuffled" not in peaks_text([*results(), *other])
    write_report(tmp_path, [*results(), *other], context())
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Cross-fitted" in text and "IPOshuffled" not in text


@pytest.mark.parametrize(
    ("sampler", "is_told"),
    [(SamplerConfig(), False), (SamplerConfig(weights_dtype="int8"), False), (SamplerConfig(top_p=0.9), True)],
)
def test_restricted_samples_are_told(sampler, is_told):
    judges = [JudgeFacts(0, GOLDEN_HELD_OUT, {"the labels": 0.8})]
    notes = notes_on(StudyConfig(sampler=sampler), judges)
    assert any("temperature, top_k or top_p" in note for note in notes) == is_told


def test_peaks_for_a_terminal():
    lines = peaks_text(results(rubric=False)).splitlines()
    assert lines[0].split()[:2] == ["Loss", "Arm"]
    assert [line.split()[:2] for line in lines[1:]] == [["SFT", "sft"], ["IPO", "online"], ["IPO", "offline"]]
