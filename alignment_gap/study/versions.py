"""The software behind a report: versions of packages, and the git commit of a checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import alignment_gap

VERSIONS = ("alignment-gap", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "array-record", "numpy")
COMMIT = "git commit"


def versions() -> dict[str, str]:
    """Versions by package; with the commit if this package is in a git checkout."""
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    found["python"] = platform.python_version()
    commit = git_commit(Path(alignment_gap.__file__))
    return found | ({COMMIT: commit} if commit else {})


def git_commit(file: Path) -> str:
    """The commit of the checkout that tracks a file, and whether tracked files are changed; empty if none tracks it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # The package may be installed inside an unrelated checkout.
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}, with changes that are not committed" if changed else commit
