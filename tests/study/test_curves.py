"""Training curves: the metrics that are drawn, how curves are thinned, and the table of throughput."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.arms import ARMS, GOLDEN, MAIN, WINDOWS
from alignment_gap.study.curves import TrainingRun, curves_figure, read_lines, stage_figures, throughput_table
from alignment_gap.study.marks import Figure

BASE = Figure("training", "Training", "How?", "Nothing.")


def lines(count, **metrics):
    """Lines of metrics. Each metric is a function of the step."""
    return [
        {"step": step, "loss": 1.0} | {name: of(step) for name, of in metrics.items()} for step in range(1, count + 1)
    ]


def panels(figure):
    """The titles of the panels' y axes, by field."""
    layers = [panel["layer"][0]["encoding"]["y"] for panel in figure.spec["concat"]]
    return {y["field"]: y["title"] for y in layers}


def test_what_was_logged_has_a_panel_and_what_was_not_has_none():
    run = TrainingRun(
        "online", lines(3, margin=float, gradient_norm=float, learning_rate=lambda step: 1e-3), 1.0, "ipo"
    )
    figure = curves_figure(BASE, [run], {"online": "#000000"})
    assert list(panels(figure)) == ["loss", "margin", "gradient_norm", "learning_rate"]
    older = curves_figure(BASE, [TrainingRun("sft", lines(3), 1.0, "sft")], {"sft": "#000000"})
    assert list(panels(older)) == ["loss"]
    assert figure.png().startswith(b"\x89PNG")


def test_a_run_of_one_line_is_a_point():
    """Without it, two runs of one line each would be two empty axes."""
    runs = [TrainingRun(name, lines(1), 1.0) for name in ("short", "long")]
    runs[1].lines[0]["step"] = 9
    pixels = np.asarray(
        Image.open(io.BytesIO(curves_figure(BASE, runs, {"short": "#ff0000", "long": "#0000ff"}).png()))
    )
    panel = pixels[100:, :, :3]  # Below the legend.
    assert (panel == (255, 0, 0)).all(axis=-1).sum() > 9 and (panel == (0, 0, 255)).all(axis=-1).sum() > 9


def test_a_long_run_is_thinned_to_means_that_keep_its_total():
    figure = curves_figure(BASE, [TrainingRun("sft", lines(1000, margin=float), 1.0)], {"sft": "#000000"})
    rows = figure.spec["data"]["values"]
    assert len(rows) == 50 and [rows[0]["step"], rows[-1]["step"]] == [20, 1000]
    assert rows[0]["margin"] == 10.5 and np.mean([row["margin"] for row in rows]) == pytest.approx(500.5, rel=1e-3)


def test_many_runs_have_fewer_points_each():
    runs = [TrainingRun(f"run{i}", lines(100), 1.0) for i in range(100)]
    rows = curves_figure(BASE, runs, {run.name: "#000000" for run in runs}).spec["data"]["values"]
    assert len(rows) == 100 * 15


def test_values_that_no_axis_can_show_are_left_out():
    """A page holds strict JSON, and a logarithmic axis needs positive numbers."""
    bad = lines(3, gradient_norm=lambda step: 0.0 if step == 1 else 1.0, margin=lambda step: math.nan)
    figure = curves_figure(BASE, [TrainingRun("sft", bad, 1.0)], {"sft": "#000000"})
    rows = figure.spec["data"]["values"]
    assert [row.get("gradient_norm") for row in rows] == [None, 1.0, 1.0] and "margin" not in panels(figure)
    json.dumps(figure.spec, allow_nan=False)


def test_without_a_line_the_figure_says_so():
    assert curves_figure(BASE, [TrainingRun("sft", [], 1.0)], {}).missing == "the runs have no line of metrics"


def test_stages_are_sft_the_judges_and_the_arms_by_loss_or_panel():
    arms = [arm for arm in ARMS if arm.panel in (MAIN, WINDOWS)]
    runs = [
        TrainingRun("sft", lines(2), 1.0, "sft"),
        TrainingRun("golden model", lines(2), 1.0),
        TrainingRun("proxy model", lines(2), 1.0),
        *(TrainingRun(name, lines(2), 1.0, "ipo", 0.1, 1e-3) for name in ("golden", "online", "replayed")),
        TrainingRun("online", lines(2), 1.0, "best_of_n", learning_rate=1e-3),
    ]
    kl = CheckpointResult("online", "ipo", 0.1, 1e-3, 0, 2, {"kl": np.array([1.0, 3.0])})
    figures = {figure.name: figure for figure in stage_figures(runs, [kl], arms)}
    drawn = {name: [row["series"] for row in figure.spec["data"]["values"]] for name, figure in figures.items()}
    assert drawn == {
        "training_sft": ["sft"] * 2,
        "training_judges": ["golden model"] * 2 + ["proxy model"] * 2,
        "training_ipo": ["golden"] * 2 + ["online"] * 3,
        "training_figure_13": ["replayed"] * 2,
        "training_best_of_n": ["online"] * 2,
    }
    (measured,) = (row for row in figures["training_ipo"].spec["data"]["values"] if "kl" in row)
    assert (measured["series"], measured["step"], measured["kl"]) == ("online", 2, 2.0)
    colour = figures["training_ipo"].spec["concat"][0]["layer"][0]["encoding"]["color"]["scale"]
    assert dict(zip(colour["domain"], colour["range"], strict=True)) == {
        arm.name: arm.colour for arm in (*ARMS, GOLDEN) if arm.name in ("golden", "online")
    }
    said = [text for figure in figures.values() for text in (figure.question, figure.paper, *figure.sentences)]
    assert len(said) == len(set(said))


def test_further_proxies_have_colours_of_their_own():
    names = ("golden model", "proxy model", "proxy-500", "proxy-2000")
    (figure,) = stage_figures([TrainingRun(name, lines(2), 1.0) for name in names], [], [])
    scale = figure.spec["concat"][0]["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [*names] and len(set(scale["range"])) == 4


def test_curves_of_a_sweep_are_told_apart():
    runs = [
        TrainingRun("offline", lines(2), 1.0, "ipo", beta, rate)
        for beta, rate in ((0.1, 1e-3), (1.0, 1e-3), (1.0, 1e-2))
    ]
    (figure,) = stage_figures(runs, [], [arm for arm in ARMS if arm.panel == MAIN])
    encoding = figure.spec["concat"][0]["layer"][0]["encoding"]
    assert encoding["strokeDash"]["scale"]["domain"] == ["0.001", "0.01"] and encoding["strokeDash"]["legend"]
    assert encoding["opacity"]["scale"]["domain"] == ["0.1", "1"] and encoding["opacity"]["legend"]
    assert {row["setting"] for row in figure.spec["data"]["values"]} == {run.setting for run in runs}


def test_throughput_is_the_mean_over_jobs_of_medians_over_lines():
    timed = {"pairs_per_second": lambda step: 100.0 * step, "seconds_update": lambda step: 0.3}
    fast = TrainingRun("online", lines(3, **timed, seconds_sampling=lambda step: 0.1), 10.0, "ipo")
    slow = TrainingRun("online", lines(1, **timed, seconds_sampling=lambda step: 0.1), 20.0, "ipo")
    judge = TrainingRun("golden model", lines(2), math.nan)
    first, second = throughput_table([fast, slow, judge])
    assert (first["Run"], first["Loss"], first["Jobs"], first["Steps"]) == ("online", "IPO", "2", "1 to 3")
    assert (first["Pairs/s"], first["Update"], first["Sampling"], first["Judging"]) == ("150", "75%", "25%", "\u2013")
    assert first["Seconds a job"] == "15"
    assert (second["Run"], second["Loss"], second["Seconds a job"]) == ("golden model", "preference", "\u2013")


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    assert read_lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_value_that_was_not_finite_breaks_no_curve_and_no_table(tmp_path):
    """metrics.jsonl has null in its place, such as in a step whose update was skipped."""
    written = [{"step": 1, "loss": 2.0, "skipped": 0.0}, {"step": 2, "loss": None, "skipped": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    run = TrainingRun("online", read_lines(tmp_path), 10.0, "ipo")
    figure = curves_figure(Figure("training", "Training"), [run], {"online": "#000000"})
    assert "loss of the first and of the last line: 2 to nan (online); updates skipped: 1." in figure.sentences[0]
    assert [row.get("loss") for row in figure.spec["data"]["values"]] == [2.0, None]
    assert throughput_table([run])[0]["Steps"] == "2"
