"""The recipes of gin/recipes: each is the gin file of its plan, and a job takes it for the slice in its name."""

import json
import pathlib

import pytest

from alignment_gap.cli.gin_files import read_config
from alignment_gap.models import sizes
from alignment_gap.plan.roofline import milliseconds
from alignment_gap.sharding.chips import parse_topology

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "gin" / "recipes").glob("*.gin"))
MACROS = ["PROMPTS='prompts'", "START='start'", "JUDGE='judge'"]


def plan_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / "recipes" / f"{name}.json").read_text())


def test_every_recipe_has_a_plan_and_a_row():
    plans = {path.stem for path in (ROOT / "benchmarks" / "results" / "recipes").glob("*.json")}
    assert plans == {*RECIPES} != set()
    rows = (ROOT / "benchmarks" / "results" / "recipes.md").read_text()
    assert all(f"recipes/{name}.json" in rows for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_takes_a_recipe(name):
    files = [str(ROOT / "gin" / path) for path in ("runs/online_ipo.gin", f"recipes/{name}.gin")]
    job, plan = read_config(files, MACROS), plan_of(name)
    planned, topology = plan["config"]["job"], plan["config"]["topology"]
    model = plan["parts"][0]["program"]["facts"]["network"]["model"]
    assert job.model == sizes.get(name.rpartition("_")[0], remat=model["remat"], dtype="bfloat16")
    devices = parse_topology(f"{topology['kind']}:{'x'.join(map(str, topology['shape']))}").devices
    assert devices == plan["devices"]
    assert job.mesh.shape(devices) == tuple(planned["mesh"][axis] for axis in ("data", "fsdp", "model"))
    assert (job.mesh.layout, job.microbatches) == (planned["mesh"]["layout"], planned["microbatches"])
    assert job.recorded.batch_size == plan["parts"][0]["program"]["facts"]["batch"]["batch"]
    assert plan["fits"] and plan["complete"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_tells_its_command_and_its_plan(name):
    text, plan = (ROOT / "gin" / "recipes" / f"{name}.gin").read_text(), plan_of(name)
    assert " ".join(plan["command"]) in text
    assert f"takes at best {milliseconds(plan['step_seconds'])} ms," in text
