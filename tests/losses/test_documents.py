"""The code of the notebook and of the documentation runs as printed."""

import json
import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def strict_promotion():
    """A user's loop has JAX's own dtype promotion."""


@pytest.mark.slow
def test_notebook_trains_with_every_loss():
    cells = json.loads((ROOT / "notebooks" / "losses.ipynb").read_text(encoding="utf-8"))["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    shares = scope["shares"]
    np.testing.assert_allclose(shares.pop("online_kl"), 0.2, atol=1e-3)
    # These losses imitate all responses, whatever their scores (at a temperature of 1, almost).
    imitation = [shares.pop(name) for name in ("sft", "rwr", "reward_weighted_regression")]
    np.testing.assert_allclose(imitation, 0.2, atol=0.03)
    # At its default temperature DiscoPOP lowers the margin at first; test_golden has its slope.
    assert shares.pop("discopop") < 0.2
    assert {name: share for name, share in shares.items() if not share > 0.25} == {}


def test_documentation_code_trains():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    training, own = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope: dict = {}
    exec(training, scope)
    exec(own, scope)
    # This is the order of the rewards. Each of the three pairs pulls its margin to 1 / (2 beta) = 5 nats.
    assert np.all(np.diff(scope["policy"]) > 1.0)
    assert scope["losses"].reads(scope["centred"]) == {scope["losses"].OTHER_PROMPTS}


def test_documentation_names_every_loss():
    from alignment_gap import losses

    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert [name for name in losses.names() if f"`{name}" not in text] == []


def test_documentation_says_what_each_loss_reads():
    from alignment_gap import losses

    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    described = {getattr(losses, constant): set(re.findall(r"`(\w+)`", written)) for constant, written in rows}
    names = [name for name in losses.names() if name not in losses.aliases()]
    # The table has a setting of wpo; by default wpo does not read this array.
    found = {name: losses.get(name, **({"alignment": "sampled"} if name == "wpo" else {})) for name in names}
    assert described == {
        each: {name for name, loss in found.items() if each in losses.reads(loss)} for each in described
    }
    assert set().union(*map(losses.reads, found.values())) == set(described)
