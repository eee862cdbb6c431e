"""The figure of an evaluation: win rates, rewards and accuracy of a run's checkpoints against KL."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any


def kl_picture(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> bytes | None:
    """A PNG with a panel each for win rates, rewards and accuracy, against KL to the reference.

    Args:
      rows: one for each checkpoint: "step", and every metric with the ends of its interval as METRIC_low and
        METRIC_high.
      metrics: names of the measured metrics.

    Returns:
      The picture; None if KL was not measured, there is nothing to draw, or altair or vl_convert is not installed.
    """
    if (
        "kl" not in metrics
        or importlib.util.find_spec("altair") is None
        or importlib.util.find_spec("vl_convert") is None
    ):
        return None
    import altair as alt

    from alignment_gap.evaluation.charts import COLOURS, finish, kl_axis, png

    def panel(title: str, chosen: Sequence[str]) -> Any:
        values = [
            {"metric": metric, "kl": row["kl"], "step": row["step"]}
            | {end: row[f"{metric}{suffix}"] for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))}
            for metric in chosen
            for row in rows
            if math.isfinite(row[f"{metric}_low"])
        ]
        x = kl_axis(max(row["kl"] for row in rows))
        colour = alt.Color("metric:N", title=None, sort=None, scale=alt.Scale(range=COLOURS))
        chart = alt.Chart(alt.Data(values=values)).encode(x, colour)
        y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
        bars = chart.mark_rule(opacity=0.5).encode(alt.Y("low:Q", title=title), alt.Y2("high:Q"))
        line = chart.mark_line(opacity=0.4).encode(y, alt.Order("step:Q"))
        return alt.layer(bars, line, chart.mark_point(filled=True, size=55).encode(y)).properties(width=340, height=280)

    panels = []
    for title, prefix in (("Win rate", "win_rate."), ("Reward", "reward."), ("Accuracy", "accuracy")):
        if chosen := [metric for metric in metrics if metric.startswith(prefix)]:
            panels.append(panel(title, chosen))
    return png(finish(alt.concat(*panels, columns=2).resolve_scale(color="independent"))) if panels else None
