"""The figure of an evaluation; the tests read the specification of the picture."""

import importlib.util
import math
import struct

import altair as alt
import pytest

from alignment_gap.evaluation import charts
from alignment_gap.evaluation.figure import kl_picture

METRICS = ["win_rate.golden.sft", "win_rate.rubric.sft", "reward.rubric", "accuracy", "kl", "length"]


def rows(**changes):
    """Three checkpoints with each metric; the ends of the intervals are 0.1 away."""
    made = []
    for number, kl in enumerate((0.1, 1.5, 9.0)):
        values = {"win_rate.golden.sft": 0.5, "win_rate.rubric.sft": 0.4, "reward.rubric": 3.0, "accuracy": 0.6}
        values = {name: value + 0.01 * number for name, value in values.items()} | {"kl": kl, "length": 8.0}
        row = {"step": 10 * (number + 1)}
        for name, value in values.items():
            row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
        made.append(row | changes)
    return made


@pytest.fixture
def drawn(monkeypatch):
    """The specifications that the code asks to draw."""
    specs = []
    monkeypatch.setattr(charts, "png", lambda spec, scale=2.0: specs.append(spec) or b"drawn")
    return specs


def panels(spec):
    return {panel["layer"][1]["encoding"]["y"]["title"]: panel for panel in spec["concat"]}


def points(panel):
    """The values of a panel, in whichever layer they are."""
    return panel.get("data", panel["layer"][0].get("data"))["values"]


def test_a_panel_for_each_kind_of_metric(drawn):
    assert kl_picture(rows(), METRICS) == b"drawn"
    (spec,) = drawn
    assert list(panels(spec)) == ["Win rate", "Reward", "Accuracy"]
    values = points(panels(spec)["Win rate"])
    assert {value["metric"] for value in values} == {"win_rate.golden.sft", "win_rate.rubric.sft"}
    assert len(values) == 6
    last = next(v for v in values if v["metric"] == "win_rate.rubric.sft" and v["step"] == 30)
    assert last["kl"] == 9.0 and last["value"] == pytest.approx(0.42)
    assert (last["low"], last["high"]) == (pytest.approx(0.32), pytest.approx(0.52))
    assert {value["metric"] for value in points(panels(spec)["Reward"])} == {"reward.rubric"}


def test_the_line_follows_the_steps_and_the_bars_are_the_intervals(drawn):
    kl_picture(rows(), METRICS)
    bars, line, dots = panels(drawn[0])["Accuracy"]["layer"]
    assert line["encoding"]["order"]["field"] == "step" and line["mark"]["type"] == "line"
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["y2"]["field"]) == ("low", "high")
    assert dots["encoding"]["y"]["field"] == "value" and dots["mark"]["type"] == "point"
    for layer in (bars, line, dots):
        assert layer["encoding"]["x"]["field"] == "kl"


def test_a_checkpoint_without_an_interval_is_left_out(drawn):
    made = rows()
    made[1]["accuracy_low"] = math.nan
    kl_picture(made, METRICS)
    assert [value["step"] for value in points(panels(drawn[0])["Accuracy"])] == [10, 30]


@pytest.mark.parametrize("metrics", [["accuracy", "length"], ["kl", "length"], []])
def test_nothing_is_drawn_without_kl_or_without_a_metric_over_it(metrics, drawn):
    assert kl_picture(rows(), metrics) is None
    assert not drawn


@pytest.mark.parametrize("absent", ["altair", "vl_convert"])
def test_nothing_is_drawn_where_what_draws_is_not_installed(absent, drawn, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else found(name, *rest))
    assert kl_picture(rows(), METRICS) is None


def test_the_picture_is_a_png_on_white():
    picture = kl_picture(rows(), METRICS)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    # Two panels of 340 by 280 side by side and a third below, at twice the size.
    assert width > 2 * 2 * 340 and height > 2 * 2 * 280


def test_one_checkpoint_is_a_picture_too():
    assert kl_picture(rows()[:1], METRICS)[:4] == b"\x89PNG"


@pytest.mark.parametrize(("largest", "last"), [(0.5, 0.3), (6.0, 6), (100.0, 96), (0.0, 0)])
def test_the_axis_of_kl_starts_at_zero_and_ends_a_little_over_the_largest(largest, last):
    axis = charts.kl_axis(largest).to_dict()
    low, high = axis["scale"]["domainMin"], axis["scale"]["domainMax"]
    assert axis["scale"]["type"] == "sqrt" and low == 0
    assert high == (pytest.approx(1.05 * largest) if largest else 1.0)
    ticks = axis["axis"]["values"]
    assert ticks == sorted(set(ticks)) and ticks[0] == 0 and ticks[-1] == last
    assert all(tick <= high for tick in ticks)


def test_the_shared_look_is_added_to_what_is_drawn():
    chart = alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(alt.X("x:Q"))
    spec = charts.finish(chart)
    assert spec["config"]["background"] == "white" and spec["config"]["axis"]["labelColor"] == charts.INK
    assert spec["encoding"]["x"]["field"] == "x"
    assert charts.png(spec)[:4] == b"\x89PNG"
    small, large = (len(charts.png(spec, scale=scale)) for scale in (1.0, 4.0))
    assert small < large


def test_colours_are_distinct():
    assert len(set(charts.COLOURS)) == len(charts.COLOURS) == 8
