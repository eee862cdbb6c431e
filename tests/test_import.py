"""What an import costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

import alignment_gap

PACKAGE = pathlib.Path(alignment_gap.__file__).parent
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
# The modules that are made for it; no other may import one of them at its top.
READERS = {"data/tasks/seqio_tasks.py", "data/tasks/tfds_pairs.py"}
# It writes with it, and imports it in functions.
WRITER = "training/tensorboard.py"
HEAVY = ("tensorflow", "seqio", "matplotlib", "altair", "grain", "orbax", "orbax.checkpoint", "scipy", "pandas")


@pytest.mark.parametrize("statement", ["import alignment_gap", "from alignment_gap import losses"])
def test_the_import_is_light(statement):
    program = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    program = f"import importlib\nfor name in {sorted(set(modules) - readers)!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program], env=without_tensorflow, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = "import tensorflow"
    done = subprocess.run([sys.executable, "-c", program], env=without_tensorflow, capture_output=True, text=True)
    assert "No module named 'tensorflow'" in done.stderr
