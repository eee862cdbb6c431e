"""The exceptions that end a command with one line."""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input or a condition the user can mend: shown as one line, without a traceback.

    Args:
      line: says what is wrong, with the value, the limit and the remedy.
      may_change: settings that the remedy names, which the job that failed may then change; see `jobs.folder`.
      page: of docs/, with the section that explains more than one line can, such as "jobs.md#train".
    """

    def __init__(self, line: str, *, may_change: Sequence[str] = (), page: str | None = None) -> None:
        super().__init__(line)
        self.may_change = tuple(may_change)
        self.page = page


class Interrupted(Exception):
    """A job was asked to end and has saved where it stood; the same command goes on from there."""


class StorageError(Exception):
    """A bucket, or a judge over HTTP, that refuses or does not answer: shown as one line, without a traceback.

    Args:
      line: says where, what is wrong, and the remedy.
      status: the command's exit status: 2 where the user has to mend something, 1 where another attempt may do.
    """

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this or what caused it is a full disk; tensorstore reports that in the text of another error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
