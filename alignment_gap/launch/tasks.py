"""The tasks that an engine runs: commands that fill a folder, and the tasks that must end before them."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alignment_gap.folders import AnyPath
from alignment_gap.jobs.folder import finished_with

# Runs alignment-gap of this installation, whatever PATH is.
COMMAND = (sys.executable, "-c", "from alignment_gap.cli.main import main; main()")
# The exit status of an error that the user must fix; another attempt would fail again.
USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A command of a graph.

    Attributes:
      name: a name that is unique in the graph.
      words: the command's words after "alignment-gap".
      folder: folder of the job; None if the command leaves no folder: then it always runs.
      needs: names of the tasks that must come before.
      processes: whether it may run in several processes.
      settings: the settings of the job, for a folder that may have been made with others; None if the folder's name
        tells them, as in a study.
    """

    name: str
    words: tuple[str, ...]
    folder: AnyPath | None = None
    needs: tuple[str, ...] = ()
    processes: bool = True
    settings: Mapping[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        """Whether its folder is complete, and was made with these settings."""
        found = finished_with(self.folder) if self.folder is not None else None
        if found is None:
            return False
        # A folder of an earlier version lacks newer settings.
        return all(found.get(name, value) == value for name, value in (self.settings or {}).items())

    @property
    def file_name(self) -> str:
        """Its name in a form that is valid for a file."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name)


def waiting_tasks(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are not done; their `needs` omit the tasks that are done."""
    waiting = [task for task in tasks if not task.is_done]
    names = {task.name for task in waiting}
    return [dataclasses.replace(task, needs=tuple(n for n in task.needs if n in names)) for task in waiting]
