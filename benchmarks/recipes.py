"""Recipes: the settings of an online step with the least time that fits, as a gin file, by size and slice or GPUs.

    python benchmarks/recipes.py
    python benchmarks/recipes.py t5_large_v5e-8

Each is made by the search of `alignment-gap plan --best` and written to gin/recipes/NAME.gin, its plan to
benchmarks/results/recipes/NAME.json. Recipes that exist are not made again. The compiler's figures are kept in
.cache/plan, so that a stopped search continues. No TPU or GPU is needed. A search compiles up to 80 programs; on one
core each takes a minute or more for TPUs, and 10 to 40 seconds for GPUs. The script also writes a table of all recipes,
benchmarks/results/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from alignment_gap.cli.plan import read_config
from alignment_gap.plan.best import find_best
from alignment_gap.plan.kept import kept
from alignment_gap.plan.report import as_json, gin_text
from alignment_gap.sharding import AXES
from alignment_gap.sharding.chips import GIB

ROOT = Path(__file__).parents[1]
GIN, RESULTS = ROOT / "gin" / "recipes", ROOT / "benchmarks" / "results" / "recipes"
KEPT = Path(".cache/plan")
# The topology, the judge, and the prompts of a step, by recipe: SIZE_SLICE, with the vendor's name of the slice, or
# SIZE_GPU, with a count if there are several.
RECIPES = {
    "t5_large_v5e-8": ("v5e:2x4", "t5_large", 32),
    "t5_xl_v5e-16": ("v5e:4x4", "t5_large", 32),
    "t5_xxl_v5e-256": ("v5e:16x16", "t5_large", 512),
    "t5_xxl_v5p-128": ("v5p:4x4x4", "t5_large", 512),
    "palm_1b_v5e-16": ("v5e:4x4", "palm_300m", 64),
    "gemma_2b_v5e-8": ("v5e:2x4", "gemma_2b", 32),
    "qwen2.5_1.5b_v5e-8": ("v5e:2x4", "qwen2.5_1.5b", 32),
    "llama3_8b_v5e-16": ("v5e:4x4", "llama3_8b", 32),
    "llama3_8b_v6e-64": ("v6e:8x8", "llama3_8b", 128),
    "t5_large_h100": ("h100:1", "t5_large", 32),
    "palm_1b_h100": ("h100:1", "palm_300m", 32),
    "qwen2.5_1.5b_h100": ("h100:1", "qwen2.5_1.5b", 32),
    "t5_xl_h100-8": ("h100:8", "t5_large", 64),
    "llama3_8b_h100-8": ("h100:8", "llama3_8b", 64),
}


def words(name: str) -> list[str]:
    """The flags of the search for a recipe."""
    topology, judge, batch = RECIPES[name]
    model = name.rpartition("_")[0]
    lengths = ["--prompt_length=512", "--response_length=128"]
    return [f"--model={model}", f"--topology={topology}", "--online", f"--judge={judge}", f"--batch={batch}", *lengths]


def make(name: str) -> None:
    """Makes a recipe, unless it exists."""
    if (RESULTS / f"{name}.json").exists():
        return
    parsed = read_config(["alignment-gap plan", *words(name)])
    assert parsed is not None
    config, flags = parsed
    search = find_best(config, flags.compiles, kept(KEPT, print))
    if search.best is None:
        print(f"{name}: nothing fits")
        return
    command = ["alignment-gap", "plan", *words(name), f"--best=gin/recipes/{name}.gin"]
    for folder in (GIN, RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
    (GIN / f"{name}.gin").write_text(gin_text(search, shlex.join(command), name.rpartition("_")[0]))
    counts = {"compiled": search.compiled, "tried": len(search.trials), "complete": search.is_complete}
    found = {"command": command, **counts, **as_json(search.best.plan)}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def table() -> str:
    """A row for each recipe that exists, in markdown."""
    columns = ("recipe", "prompts", "mesh", "remat", "microbatches", "step s", "MFU", "HBM GiB", "of")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name in RECIPES:
        if (RESULTS / f"{name}.json").exists():
            cells = _cells(json.loads((RESULTS / f"{name}.json").read_text()))
            lines.append("| " + " | ".join([f"[{name}](recipes/{name}.json)", *cells]) + " |")
    return "\n".join(lines)


def _cells(plan: dict[str, Any]) -> list[str]:
    job, facts = plan["config"]["job"], plan["parts"][0]["program"]["facts"]
    sizes = ", ".join(f"{axis} {job['mesh'][axis]}" for axis in AXES)
    return [
        str(facts["batch"]["batch"]),
        f"{job['mesh']['layout']}: {sizes}",
        facts["network"]["model"]["remat"],
        str(job["microbatches"]),
        f"{plan['step_seconds']:.3g}",
        f"{plan['utilisation']:.0%}",
        f"{plan['needed'] / GIB:.1f}",
        f"{plan['capacity'] / GIB:.1f}",
    ]


def main() -> None:
    """Makes the missing recipes, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(RECIPES)}")
    names = parser.parse_args().names or [*RECIPES]
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"the recipe {unknown[0]!r} is unknown: choose from {', '.join(RECIPES)}")
    for name in names:
        make(name)
        about = (
            "Made by `python benchmarks/recipes.py`: online IPO with a judge, prompts of 512 tokens, two responses of "
            "128.\nThe times are bounds by the compiler's figures. Nobody has run these on TPUs or GPUs."
        )
        RESULTS.with_suffix(".md").write_text(f"# Recipes\n\n{about}\n\n{table()}\n")


if __name__ == "__main__":
    main()
