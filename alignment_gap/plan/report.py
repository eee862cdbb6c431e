"""A plan as a table for the terminal, as JSON, and as a picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from alignment_gap.configuration import to_dict
from alignment_gap.errors import UserError
from alignment_gap.plan.chips import GIB
from alignment_gap.plan.plan import Part, Plan, parameters

_BOUNDS = {"compute": "arithmetic", "hbm": "HBM", "interconnect": "interconnect"}
_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C8C8C",
    "#B8A000",
    "#7B4FA3",
    "#5A5A5A",
)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything of the plan, in bytes, FLOPs and seconds; numbers that are not finite are null."""
    parts = []
    for part in plan.parts:
        values = to_dict(part)
        del values["request"]
        compiled = values["compiled"]
        compiled |= {"peak": part.compiled.peak, "collectives": [to_dict(each) for each in part.compiled.collectives]}
        if part.times:
            values["times"] |= {"seconds": part.times.seconds, "bound": part.times.bound}
        parts.append(values)
    finite = math.isfinite(plan.step_seconds)
    return {
        "config": to_dict(plan.config),
        "devices": plan.config.topology.devices,
        "parameters": parameters(plan.config),
        "fits": plan.fits,
        "capacity": int(plan.capacity),
        "needed": plan.needed,
        "resident": plan.resident,
        "working": plan.working,
        "step_seconds": plan.step_seconds if finite else None,
        "utilisation": plan.utilisation if finite else None,
        "largest_batch": plan.largest_batch,
        "advice": list(plan.advice),
        "programs": parts,
    }


def as_text(plan: Plan) -> str:
    """The plan for the terminal."""
    config, topology = plan.config, plan.config.topology
    data, fsdp, model = config.mesh.shape(topology.devices)
    lengths = config.lengths
    head = [
        f"{parameters(config):,} parameters on {topology.devices} devices ({topology.name}"
        + (f", {topology.slices} slices" if topology.slices > 1 else "")
        + f"), mesh data={data} fsdp={fsdp} model={model}",
        f"batch {lengths.batch} prompts of {lengths.prompt} tokens, {lengths.samples} responses of {lengths.response}",
        "",
    ]
    return "\n".join(
        [*head, *_memory_lines(plan), "", *_time_lines(plan), "", *_collective_lines(plan), *_verdict(plan)]
    )


def _memory_lines(plan: Plan) -> list[str]:
    rows = [["HBM of a device, GiB", "arguments", "outputs", "aliased", "temporaries", "code", "peak"]]
    for part in plan.parts:
        c = part.compiled
        sizes = [c.arguments, c.outputs, c.aliased, c.temporaries, c.code]
        cells = ["-"] * 5 if c.exceeded else [_gib(size) for size in sizes]
        rows.append([part.name, *cells, _gib(c.peak)])
    lines = _table(rows)
    lines.append(
        "resident from step to step: " + ", ".join(f"{name} {_gib(size)}" for name, size in plan.resident.items())
    )
    lines.append(
        f"and {_gib(plan.working)} that a program of the step works in; "
        f"in all {_gib(plan.needed)} of {_gib(plan.capacity)} GiB"
    )
    return lines


def _time_lines(plan: Plan) -> list[str]:
    rows = [["at best, ms", "arithmetic", "HBM", "interconnect", "takes", "bound by", "model TFLOP", "recomputed"]]
    for part in plan.parts:
        t = part.times
        cells = [_ms(t.compute), _ms(t.hbm), _ms(t.interconnect), _ms(t.seconds), _BOUNDS[t.bound]] if t else ["-"] * 5
        rows.append(
            [part.name, *cells, *(f"{count / 1e12:,.3g}" for count in (part.model_flops, part.recomputed_flops))]
        )
    lines = _table(rows)
    for part in plan.parts:
        if part.tokens and part.times:
            each = part.times.seconds / part.tokens
            lines.append(
                f"sampling: {_ms(each)} ms a token, its part of the prompts among it; reading parameters and "
                f"cache once takes {_ms(part.token_seconds)} ms"
            )
    if math.isfinite(plan.step_seconds):
        rate = plan.config.lengths.batch / plan.step_seconds
        lines.append(
            f"a step {plan.step_seconds:.3g} s, {rate:,.0f} prompts/s, MFU {plan.utilisation:.0%}: at best, the three "
            "overlapping wholly"
        )
    return lines


def _collective_lines(plan: Plan) -> list[str]:
    rows = [["collectives of a call", "kind", "mesh axes", "devices", "count", "GiB", "ms"]]
    for part in plan.parts:
        for moved in part.compiled.collectives[:4]:
            sizes = [str(moved.devices), f"{moved.count:,}", f"{moved.bytes / GIB:.2f}", _ms(moved.seconds)]
            rows.append([part.name, moved.kind, moved.axes, *sizes])
    return [*_table(rows), ""] if len(rows) > 1 else []


def _verdict(plan: Plan) -> list[str]:
    lines = []
    if plan.largest_batch is not None:
        lines.append(f"largest batch that fits: {plan.largest_batch or 'none'}")
    if plan.fits:
        return [*lines, f"fits: {_gib(plan.capacity - plan.needed)} GiB a device are free"]
    lines.append(f"does not fit: {_gib(plan.needed - plan.capacity)} GiB a device too many; what would help:")
    return lines + [f"  {each}" for each in plan.advice]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def write_picture(plan: Plan, path: Path) -> None:
    """A PNG or SVG, by the path's suffix: HBM of a device by part, and each program's time by what bounds it.

    Raises:
      UserError: as `check_picture`.
    """
    check_picture(path)
    import altair as alt
    import vl_convert

    memory = (
        alt.Chart(alt.Data(values=_memory_rows(plan)))
        .mark_bar()
        .encode(
            alt.X("gib:Q", title="HBM of a device (GiB)"),
            alt.Y("program:N", title=None, sort=None),
            alt.Color("part:N", title=None, sort=None, scale=alt.Scale(range=_COLOURS)),
            alt.Order("order:Q"),
        )
    )
    limit = (
        alt.Chart(alt.Data(values=[{"gib": plan.capacity / GIB}])).mark_rule(strokeDash=[4, 4]).encode(alt.X("gib:Q"))
    )
    time = (
        alt.Chart(alt.Data(values=_time_rows(plan.parts)))
        .mark_bar()
        .encode(
            alt.X("ms:Q", title="Time of a call at best, each alone (ms)"),
            alt.Y("program:N", title=None, sort=None),
            alt.YOffset("bound:N", sort=None),
            alt.Color("bound:N", title=None, sort=None, scale=alt.Scale(range=_COLOURS[:3])),
        )
    )
    panels = [(memory + limit).properties(width=420, height=alt.Step(42))] + (
        [time.properties(width=420, height=alt.Step(18))] if _time_rows(plan.parts) else []
    )
    chart = alt.hconcat(*panels).resolve_scale(color="independent").configure_legend(orient="top", columns=3)
    draw = vl_convert.vegalite_to_svg if path.suffix == ".svg" else vl_convert.vegalite_to_png
    picture = draw(chart.to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.encode() if isinstance(picture, str) else picture)


def check_picture(path: Path) -> None:
    """Raises UserError for a path of neither kind, or where the drawing library is not installed."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--picture={path}: give a path that ends in .png or .svg")
    for name in ("altair", "vl_convert"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} draws the picture and is not installed: pip install alignment-gap[study]")


def _memory_rows(plan: Plan) -> list[dict[str, Any]]:
    """All that stays and the most that one program works in; then each program alone."""
    everything = [*plan.resident.items(), ("working", plan.working)]
    rows = [("the step", name, size) for name, size in everything]
    for part in plan.parts:
        c = part.compiled
        if c.exceeded:
            rows.append((part.name, "needed", c.exceeded))
        else:
            new = c.outputs - c.aliased
            rows += [(part.name, *each) for each in (("arguments", c.arguments), ("outputs", new))]
            rows += [(part.name, *each) for each in (("temporaries", c.temporaries), ("code", c.code))]
    return [
        {"program": program, "part": part, "gib": size / GIB, "order": order}
        for order, (program, part, size) in enumerate(rows)
    ]


def _time_rows(parts: tuple[Part, ...]) -> list[dict[str, Any]]:
    return [
        {"program": part.name, "bound": text, "ms": 1e3 * getattr(part.times, bound)}
        for part in parts
        if part.times
        for bound, text in _BOUNDS.items()
    ]
