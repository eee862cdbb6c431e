"""The gin files and study configs that come with the package.

In a clone, gin/ and configs/ are beside the package; in an installation, they are inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# The folder that holds gin/ and configs/; in an installation, setup.py fills it.
FILES = _PACKAGE / "_files" if (_PACKAGE / "_files").is_dir() else _PACKAGE.parent
GIN = FILES / "gin"


def find_file(flag: str, file: str, folders: Sequence[str | Path] = ()) -> Path | None:
    """The path of the file that a flag names: in this folder, in `folders`, or among the package's own files.

    If it is one of the package's own files, prints its path on standard error.
    """
    found = [path for path in (Path(folder) / file for folder in ("", *folders)) if path.is_file()]
    if found:
        return found[0]
    ours = next((path for path in (FILES / file, GIN / file) if path.is_file()), None)
    if ours:
        print(f"--{flag}={file} is not in this folder: taken from {ours}", file=sys.stderr)
    return ours
