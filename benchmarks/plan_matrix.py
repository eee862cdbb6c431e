"""Plans of the paper's networks and of the PaLM sizes, one JSON file each; existing plans are not made again.

    python benchmarks/plan_matrix.py
    python benchmarks/plan_matrix.py palm_10m t5_xxl_online_v5e

The paper's online step has the policies T5 Large, XL and XXL, each with a reference of its size and the judge T5 Large.
A v5e-256 has 256 chips. The name v5p-128 counts cores, two per chip, so it has 64 chips, 4x4x4. No TPU is needed. Each
of the four programs of T5-XXL takes several minutes on two cores. The script also writes a table of all plans,
benchmarks/results/plan.md, and the pictures plan/memory.png and plan/time.png.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import altair as alt
import vl_convert

from alignment_gap.cli.plan import read_config
from alignment_gap.errors import UserError
from alignment_gap.plan.kept import kept
from alignment_gap.plan.plan import make_plan
from alignment_gap.plan.report import as_json
from alignment_gap.sharding.chips import GIB

RESULTS = Path(__file__).parent / "results" / "plan"
CACHE = Path(".cache/plan")
V5E, V5P = "v5e:16x16", "v5p:4x4x4"
LADDER = {
    "palm_10m": "v5e:2x4",
    "palm_30m": "v5e:2x4",
    "palm_100m": "v5e:2x4",
    "palm_300m": "v5e:2x4",
    "palm_1b": "v5e:4x4",
    "palm_3b": "v5e:4x8",
    "palm_8b": "v5e:16x16",
    "palm_62b": "v5p:4x4x8",
    "palm_540b": "v5p:8x8x16",
}


def commands() -> dict[str, list[str]]:
    """The flags of each plan, by name."""
    plans = {}
    for model, topology in LADDER.items():
        batch = {"v5e:2x4": 32, "v5e:4x4": 64, "v5e:4x8": 128}.get(topology, 1024)
        plans[model] = [f"--model={model}", f"--topology={topology}", f"--batch={batch}", "--nosearch"]
    for model in ("t5_large", "t5_xl", "t5_xxl"):
        for topology in (V5E, V5P):
            name = f"{model}_online_{topology.partition(':')[0]}"
            plans[name] = [f"--model={model}", f"--topology={topology}", "--online", "--judge=t5_large", "--nosearch"]
    return plans


def make(name: str, arguments: list[str]) -> None:
    """Makes one plan, unless it exists."""
    path = RESULTS / f"{name}.json"
    if path.exists():
        return
    words = ["alignment-gap", "plan", *arguments]
    config, _ = read_config(words[1:])
    found = as_json(make_plan(config, kept(CACHE, print)))
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": words, **found}, indent=1) + "\n")


def results() -> dict[str, dict[str, Any]]:
    """All existing plans."""
    paths = {name: RESULTS / f"{name}.json" for name in commands()}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def table(plans: dict[str, dict[str, Any]]) -> str:
    """A row for each plan, in markdown."""
    columns = ("plan", "devices", "batch", "HBM GiB", "of", "step s", "bound by", "MFU", "token ms", "fits")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name, plan in plans.items():
        parts = [part for part in plan["parts"] if part["times"]]
        longest = max(parts, key=lambda part: part["times"]["seconds"], default=None)
        tokens = [part["times"]["seconds"] / part["tokens"] for part in parts if part["tokens"]]
        cells = (
            f"[{name}](plan/{name}.json)",
            str(plan["devices"]),
            str(plan["parts"][0]["program"]["facts"]["batch"]["batch"]),
            f"{plan['needed'] / GIB:.1f}",
            f"{plan['capacity'] / GIB:.1f}",
            f"{plan['step_seconds']:.3g}" if plan["step_seconds"] else "",
            f"{longest['program']['name']}: {longest['times']['bound']}" if longest else "",
            f"{plan['utilisation']:.0%}" if plan["utilisation"] else "",
            f"{1e3 * tokens[0]:.3g}" if tokens else "",
            "yes" if plan["fits"] else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(plans: dict[str, dict[str, Any]]) -> None:
    """Draws HBM by part and time by bound, for every plan."""
    memory = [
        {"plan": name, "part": part, "value": size / plan["capacity"]}
        for name, plan in plans.items()
        for part, size in [*plan["resident"].items(), ("working", plan["working"])]
    ]
    time = [
        {"plan": f"{name}: {part['program']['name']}", "part": bound, "value": part["times"][bound]}
        for name, plan in plans.items()
        for part in plan["parts"]
        if part["times"]
        for bound in ("compute", "hbm", "interconnect")
    ]
    charts = {
        "memory": _bars(memory, "Share of a device's HBM"),
        "time": _points(time, "Seconds of a call at best, each alone (logarithmic)"),
    }
    for stem, chart in charts.items():
        (RESULTS / f"{stem}.png").write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=1.5))


def _bars(rows: list[dict[str, Any]], title: str) -> alt.Chart:
    return _chart(alt.Chart(alt.Data(values=rows)).mark_bar(), alt.X("value:Q", title=title))


def _points(rows: list[dict[str, Any]], title: str) -> alt.Chart:
    marks = alt.Chart(alt.Data(values=[row for row in rows if row["value"] > 0])).mark_point(filled=True, size=60)
    return _chart(marks, alt.X("value:Q", title=title, scale=alt.Scale(type="log"), axis=alt.Axis(format="~g")))


def _chart(marks: alt.Chart, x: alt.X) -> alt.Chart:
    colour = alt.Color("part:N", title=None, sort=None, legend=alt.Legend(orient="top", columns=4))
    return marks.encode(x, alt.Y("plan:N", title=None, sort=None), colour).properties(width=560)


def main() -> None:
    """Makes the missing plans, then writes the table and the pictures again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"plans to make, by default all: {', '.join(commands())}"
    )
    for name in parser.parse_args().names or commands():
        arguments = commands()[name]
        try:
            make(name, arguments)
        except UserError as error:
            print(f"{name}: {error}")
        except Exception:
            traceback.print_exc()
        plans = results()
        text = f"# Plans\n\nMade by `python benchmarks/plan_matrix.py`.\n\n{table(plans)}\n"
        RESULTS.with_suffix(".md").write_text(text)
        if plans:
            draw(plans)


if __name__ == "__main__":
    main()
