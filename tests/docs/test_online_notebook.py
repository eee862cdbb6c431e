"""notebooks/online_run.ipynb runs, and prints what its text says."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
CELLS = json.loads((ROOT / "notebooks" / "online_run.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def scope():
    """The names of the notebook after fewer steps."""
    scope: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS, PROMPTS, BETA = 40,", "STEPS, PROMPTS, BETA = 10,")
            exec(source.replace("steps=200", "steps=10").replace("pairs=512", "pairs=64"), scope)
    return scope


def test_the_first_step_is_that_of_the_reference(scope):
    first = scope["metrics"][0]
    assert first["loss"] == pytest.approx(25.0, rel=1e-5)
    assert (first["accuracy"], first["margin"]) == pytest.approx((0.5, 0.0), abs=1e-5)
    assert [line["step"] for line in scope["metrics"]] == list(range(1, 11))


def test_the_record_has_every_pair_with_the_log_probs_of_the_policy(scope):
    assert len(scope["record"]) == 10 * 32
    assert scope["mask"].mean() > 0 and scope["difference"] < 1e-4
    assert scope["quality"].shape == (10, 32)


def test_the_replay_is_the_run(scope):
    assert scope["equal"]
