"""docs/architecture.md: packages import only from lower floors, and everything that the page names exists."""

import ast
import inspect
import pathlib
import re

import jax.numpy as jnp
import pytest
from setuptools import find_packages

import alignment_gap
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.training import loss_inputs

PACKAGE = pathlib.Path(alignment_gap.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = re.findall(r"^\| `(\w+)` \| ", TEXT[TEXT.index("| floor |") : TEXT.index("Beside them")], flags=re.MULTILINE)


def imported(path):
    """The packages and modules of ours that a file imports, by the first part of their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "alignment_gap":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignment_gap."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("alignment_gap."))


def test_the_table_has_every_package_and_an_installation_too():
    packages = [path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))]
    assert sorted(FLOORS) == sorted(packages)
    installed = find_packages(PACKAGE.parent, include=["alignment_gap", "alignment_gap.*"])
    assert {f"alignment_gap.{name}" for name in packages} <= {*installed}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_package_imports_only_from_floors_below(floor):
    above = {*FLOORS[: FLOORS.index(floor)]}
    found = {name for path in (PACKAGE / floor).rglob("*.py") for name in imported(path)}
    assert found & above == set()


def test_what_stands_beside_the_floors_imports_no_floor():
    for path in PACKAGE.glob("*.py"):
        assert {*imported(path)} & {*FLOORS} == set(), path.name


def test_losses_import_nothing_of_ours():
    names = {name for path in (PACKAGE / "losses").rglob("*.py") for name in imported(path)}
    assert names <= {"losses"}


def test_the_command_line_alone_reads_flags_and_config_files():
    for path in PACKAGE.rglob("*.py"):
        if "cli" not in path.parts:
            assert not re.search(r"^\s*(import|from) (absl|gin|ml_collections)\b", path.read_text(), flags=re.MULTILINE)


def test_every_field_of_a_batch_is_in_its_table():
    table = TEXT[TEXT.index("| field |") : TEXT.index("K = 2 is a pair")]
    assert set(re.findall(r"`(\w+)`", table)) == set(PreferenceBatch.__dataclass_fields__)


def test_every_array_that_a_loss_may_name_is_in_its_table():
    ints, log_probs = jnp.ones((2, 2), jnp.int32), jnp.zeros((2, 2, 3))
    batch = PreferenceBatch(
        prompt_ids=ints[:, 0],
        prompts=ints,
        prompt_lengths=ints[:, 0],
        responses=jnp.ones((2, 2, 3), jnp.int32),
        response_lengths=ints,
        scores=jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        reference_log_probs=log_probs,
        sampler_log_probs=log_probs,
    )
    beside = {"fresh_logps", "ref_fresh_logps", "kl_logps", "ref_kl_logps"}
    table = TEXT[TEXT.index("| name | shape |") : TEXT.index("Log-probs are in nats")]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:] if row))) == {
        *loss_inputs(batch, log_probs, log_probs),
        *beside,
    }


def test_the_modules_and_tests_that_it_names_are_there():
    for path in re.findall(r"`((?:tests|benchmarks|gin|configs)/[\w/.]*)`", TEXT):
        assert (PACKAGE.parent / path).exists(), path
    for path in re.findall(r"`((?:plan|judges|losses|models|study|checkpoints|sharding|jobs)/[\w/]+\.py)`", TEXT):
        assert (PACKAGE / path).exists(), path


def test_a_kind_of_judge_has_what_the_table_says():
    from alignment_gap import judges

    for kind in judges._KINDS:
        for name in ("accepts", "own_labels", "check", "open_judge"):
            assert inspect.isfunction(getattr(kind, name))
