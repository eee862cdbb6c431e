"""Exceptions that end a command with a one-line message."""

import errno
from collections.abc import Iterator, Sequence

# Numbers of errors that do not depend on the content of a file.
_OF_MACHINE = {
    errno.EACCES,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.EDQUOT,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class UserError(ValueError):
    """Bad input, or a condition that the user can fix: shown as one line, without a traceback.

    Args:
      line: says what is wrong, with the value, the limit and the remedy.
      may_change: settings in the remedy that the failed job may change when it runs again; see `jobs.folder`.
      page: page and section of docs/ that explain more, such as "jobs.md#train".
    """

    # The command's exit status: 2 if the user must fix something, 1 if another attempt may succeed.
    status = 2

    def __init__(self, line: str, *, may_change: Sequence[str] = (), page: str | None = None) -> None:
        super().__init__(line)
        self.may_change = tuple(may_change)
        self.page = page


class InUse(UserError):
    """Another process works in a folder; another attempt may succeed."""

    status = 1


class Interrupted(Exception):
    """A job was asked to end, and has saved its state; the same command continues from there."""


class StorageError(Exception):
    """A bucket, or a judge over HTTP, that refuses or does not answer: shown as one line, without a traceback.

    Args:
      line: says where, what is wrong, and the remedy.
      status: the command's exit status: 2 if the user must fix something, 1 if another attempt may succeed.
    """

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


def is_of_machine(error: BaseException | None) -> bool:
    """Whether the machine caused an error, and not a damaged file: it lacks memory, open files or a working disk.

    Another attempt, or another machine, may succeed.
    """
    return any(isinstance(each, MemoryError) or getattr(each, "errno", None) in _OF_MACHINE for each in _causes(error))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a full disk; tensorstore reports it in the text of another error."""
    full, text = (errno.ENOSPC, errno.EDQUOT), "No space left on device"
    return any(getattr(each, "errno", None) in full or text in str(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
