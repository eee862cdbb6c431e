"""What an engine runs: a command that fills a folder, and the commands that have to end before it."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence

from alignment_gap.folders import AnyPath
from alignment_gap.jobs.folder import finished_with

# This installation's alignment-gap, whatever the PATH of the process that runs it.
COMMAND = (sys.executable, "-c", "from alignment_gap.cli.main import main; main()")
# The exit status of what the user has to mend: another attempt would meet the same.
USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A command of a graph.

    Attributes:
      name: unique in its graph.
      words: of the command, after "alignment-gap".
      folder: of the job; None for a command that leaves none, which is run in any case.
      needs: names of the tasks that come before it.
      processes: whether it may run in several processes.
    """

    name: str
    words: tuple[str, ...]
    folder: AnyPath | None = None
    needs: tuple[str, ...] = ()
    processes: bool = True

    @property
    def is_done(self) -> bool:
        """Whether its folder is complete."""
        return self.folder is not None and finished_with(self.folder) is not None

    @property
    def file_name(self) -> str:
        """Its name as that of a file."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name)


def waiting_tasks(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are not done, without the needs that are."""
    waiting = [task for task in tasks if not task.is_done]
    names = {task.name for task in waiting}
    return [dataclasses.replace(task, needs=tuple(n for n in task.needs if n in names)) for task in waiting]
