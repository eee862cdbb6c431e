"""Which sub-packages of data import which others."""

import ast
import pathlib
import subprocess
import sys

import alignment_gap.data

ROOMS = ("text", "records", "batches", "tasks")
FOLDER = pathlib.Path(alignment_gap.data.__file__).parent


def imported_rooms(file: pathlib.Path) -> set[str]:
    """The sub-packages whose modules a file imports, at module level or within a function."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
    return {name.split(".")[2] for name in names if name.startswith("alignment_gap.data.")}


def test_a_room_imports_only_from_rooms_before_it():
    for number, room in enumerate(ROOMS):
        found = set().union(*(imported_rooms(file) for file in (FOLDER / room).glob("*.py")))
        assert room in found and found <= set(ROOMS[: number + 1]), room


def test_text_records_and_batches_never_import_tensorflow():
    script = (
        "import sys, alignment_gap.data.batches, alignment_gap.data.records, alignment_gap.data.text\n"
        "assert not {'grain', 'tensorflow', 'seqio', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
