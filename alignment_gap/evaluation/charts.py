"""The look that all charts share, and the KL axis. Charts use Vega-Lite through altair, from the extra `study`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment_gap.errors import UserError

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise UserError(f'{error.name} draws charts and is not installed: pip install "alignment-gap[study]"') from error

INK = "#606060"
LINE = "#999999"
GRID = "#E4E4E4"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7B4FA3", "#B8A000")
# The smallest distance between two ticks, as a fraction of the axis.
_TICK_GAP = 0.055
# Legends stand above the chart, one below the other; each is one row that starts with its title. Vega reads "layout"
# from the configuration, although Vega-Lite's schema does not list it.
_LEGEND = {"symbolSize": 90, "symbolOpacity": 1, "orient": "top", "direction": "horizontal", "titleOrient": "left"}
_LEGEND |= {"labelLimit": 300, "layout": {"top": {"direction": "vertical", "anchor": "start", "margin": 4}}}
_KL_TICKS = (0, 0.1, 0.3, 1, 2, 4, 6, *(k * 2**power for power in range(10) for k in (8, 12)))


def kl_axis(largest: float) -> alt.X:
    """The axis for KL to the reference: a square-root scale from 0 to slightly above the largest value."""
    ticks: list[float] = []
    for tick in (tick for tick in _KL_TICKS if tick <= 1.05 * largest):
        if not ticks or math.sqrt(tick) - math.sqrt(ticks[-1]) > _TICK_GAP * math.sqrt(1.05 * largest):
            ticks.append(tick)
    scale = alt.Scale(type="sqrt", domainMin=0, domainMax=1.05 * largest or 1.0, nice=False)
    title = "KL to the reference (nats, square-root scale)"
    return alt.X("kl:Q", title=title, scale=scale, axis=alt.Axis(values=ticks, format=".3~g"))


def finish(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart's specification in the shared look; a page inverts the greys on a dark screen."""
    text: dict[str, Any] = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 13}
    text["titleFontWeight"] = "normal"
    lines = {"labelFlush": False, "gridColor": GRID, "domainColor": LINE, "tickColor": LINE, "titlePadding": 10}
    config = {
        "font": "Helvetica, Arial, sans-serif",
        "background": "white",
        "padding": 8,
        "axis": text | lines,
        "legend": text | _LEGEND,
        "view": {"stroke": None},
        "title": {"color": INK, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    }
    return chart.to_dict() | {"config": config}


def png(spec: Mapping[str, Any], scale: float = 2.0) -> bytes:
    """Draws a specification as a PNG on white."""
    return vl_convert.vegalite_to_png(dict(spec), scale=scale)
