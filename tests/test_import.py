"""What an import of the package loads."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import alignment_gap

PACKAGE = pathlib.Path(alignment_gap.__file__).parent
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
# Only these modules may import these libraries at module level.
READERS = {"data/tasks/seqio_prepared.py", "data/tasks/seqio_tasks.py", "data/tasks/tfds_pairs.py", "t5x/policy.py"}
# It writes with this library, and imports it in functions.
WRITER = "training/tensorboard.py"
HEAVY = ("tensorflow", "seqio", "matplotlib", "altair", "grain", "orbax", "orbax.checkpoint", "scipy", "pandas")


@pytest.mark.parametrize("statement", ["import alignment_gap", "from alignment_gap import losses"])
def test_the_import_is_light(statement):
    program = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def needed(*names):
    """These distributions, and the distributions that they need."""
    wanted, found = [*names], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def with_jax_and_chex_alone(program):
    """Runs a program while all other packages are hidden, as if they were not installed."""
    there = needed("jax", "chex") | {"alignment-gap"}
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not there & {canonicalize_name(name) for name in names}}
    assert {"jaxtyping", "flax", "optax", "tqdm"} <= hidden
    hide = f"""
from importlib.machinery import PathFinder

find_spec, hidden = PathFinder.find_spec, {hidden}
PathFinder.find_spec = staticmethod(lambda name, *at: None if name.split(".")[0] in hidden else find_spec(name, *at))
"""
    return subprocess.run([sys.executable, "-c", hide + program], capture_output=True, text=True)


def test_the_losses_need_jax_and_chex_alone():
    done = with_jax_and_chex_alone("""
import jax.numpy as jnp
from alignment_gap import losses

chosen, rejected, reference = jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0])
print(losses.get("ipo", beta=0.1)(chosen, rejected, reference, reference))
import jaxtyping
""")
    # (2 - 1 / (2 * 0.1))**2
    assert done.stdout == "[9.]\n", done.stderr
    assert done.stderr.endswith("No module named 'jaxtyping'\n")


def test_with_jax_and_chex_alone_losses_are_listed_and_other_commands_end_with_one_line():
    command = "import sys\nfrom alignment_gap.cli.main import main\nsys.argv = ['alignment-gap', {!r}]\nmain()"
    done = with_jax_and_chex_alone(command.format("losses"))
    assert done.returncode == 0 and "\nipo " in done.stdout, done.stderr
    done = with_jax_and_chex_alone(command.format("train"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: train needs '") and "alignment-gap doctor" in done.stderr


def test_tensorflow_is_imported_by_the_modules_made_for_it_alone():
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if TENSORFLOW & {name.split(".")[0] for name in names}:
                importers.add(str(path.relative_to(PACKAGE)))
    assert importers == READERS | {WRITER}


def test_every_other_module_imports_where_there_is_no_tensorflow(without_tensorflow):
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    readers = {"alignment_gap." + name.removesuffix(".py").replace("/", ".") for name in READERS}
    readers.add("alignment_gap.t5x.__init__")
    program = f"import importlib\nfor name in {sorted(set(modules) - readers)!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program], env=without_tensorflow, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = "import tensorflow"
    done = subprocess.run([sys.executable, "-c", program], env=without_tensorflow, capture_output=True, text=True)
    assert "No module named 'tensorflow'" in done.stderr
