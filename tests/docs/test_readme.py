"""The README's Python runs, its files exist, and its commands are commands."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from alignment_gap.cli.main import COMMANDS

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_trains():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    # Each pair pulls its margin to 1 / (2 beta) = 1 nat.
    policy = scope["policy"]
    np.testing.assert_allclose(policy[jnp.array([3, 3, 2])] - policy[jnp.array([0, 1, 1])], 1.0, atol=0.05)


def test_links_lead_to_files():
    for document in DOCUMENTS:
        links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_commands_and_config_files_exist():
    assert set(re.findall(r"^alignment-gap (\w+)", TEXT, flags=re.MULTILINE)) <= set(COMMANDS)
    paths = re.findall(r"(?:--config|--gin_file)=([\w/]+\.\w+)", TEXT)
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_folder_of_the_table_is_there():
    for folder in re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE):
        assert folder == "runs" or (ROOT / folder).is_dir()
