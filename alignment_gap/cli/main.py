"""The `alignment-gap` command: one entry point, and a module for each sub-command."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from alignment_gap import __version__, freed_memory
from alignment_gap.checks import nearest
from alignment_gap.errors import Interrupted, StorageError, UserError, is_disk_full
from alignment_gap.interruption import TRY_AGAIN, from_keyboard, has_received, signals_caught

COMMANDS = {
    "study": "run the controlled study, or continue it, and write its report",
    "report": "compare studies or training jobs side by side on one page",
    "launch": "run a command, or the jobs of a study, on an engine: this machine, Slurm, Kubernetes",
    "train": "train a policy or a preference model, online or offline, from gin files",
    "evaluate": "measure the checkpoints of a run: win rates by any judge, KL, accuracy, length",
    "sample": "sample responses of a policy to prompts from a dataset, a file or the keyboard",
    "data": "prepare datasets, make new ones from them, score them, show them",
    "plan": "check whether a job fits TPUs or GPUs, and how fast it can be, without them",
    "losses": "list the losses",
    "checkpoint": "import and export checkpoints of other libraries, show what a checkpoint holds",
    "doctor": "show what is installed, which devices there are, and what each command lacks",
    "completion": "print a script for bash, zsh or fish that completes commands and flags",
}

# The exit status of a program that SIGPIPE ends.
UNREAD = 141
# The longest part of another library's message that an error line quotes.
LONGEST = 120
# The errors of a path that no file can have: a name is too long, or a part of it is a file and no folder.
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR)

USAGE = f"""alignment-gap {__version__}: preference training of language models in JAX, online and offline

usage: alignment-gap COMMAND [flags]

{{commands}}

alignment-gap COMMAND --help shows a command's flags."""


def main() -> None:
    """Runs a command; an error that the user can fix is one line on standard error, with exit status 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        sys.exit(0)
    sys.exit(guarded(lambda: _run(arguments)))


def _run(arguments: list[str]) -> None:
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {nearest(name, COMMANDS)}")
    freed_memory.keep_on_cpu()
    try:
        command = importlib.import_module(f"alignment_gap.cli.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] == "alignment_gap":
            raise
        raise UserError(
            f"{name} needs {error.name!r}, which is not installed: `alignment-gap doctor` prints the command that "
            "installs what is missing"
        ) from error
    command.main(["alignment-gap " + name, *arguments[1:]])


def guarded(run: Callable[[], None]) -> int:
    """Calls `run`; returns the exit status.

    The status is 0 after success, 2 after one line on an error that the user can fix, and 130 after ctrl-c. After
    SIGTERM it is 75, which asks a scheduler to run the command again. It is 141 if the reader of the output has ended.
    Any other exception is raised, and ends Python with status 1. If one of several processes fails, all end with its
    status.
    """
    with signals_caught(), _late_callbacks_ignored():
        return _status(run)


@contextlib.contextmanager
def _late_callbacks_ignored() -> Iterator[None]:
    """Hides errors of late callbacks: after a failed read or save, they call Orbax's event loop, which is closed."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _status(run: Callable[[], None]) -> int:
    try:
        run()
        sys.stdout.flush()
    except UserError as error:
        return _failed(str(error) + (f" (see docs/{error.page})" if error.page else ""), error.status)
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        return UNREAD
    except StorageError as error:
        return _failed(str(error), error.status)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted{f', {error}' if str(error) else ''}: the same command continues from here", file=sys.stderr)
        asked = isinstance(error, Interrupted) or has_received()
        return TRY_AGAIN if asked and not from_keyboard() else 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
            return _failed(
                f"{str(error.filename)[:LONGEST]} cannot be a path here ({error.strerror}): give another one"
            )
        if not is_disk_full(error):
            _fail_together(f"{type(error).__name__}: {error}", traceback.print_exc, status=1)
            raise
        place = getattr(error, "filename", None) or str(error)[:LONGEST].splitlines()[0]
        return _failed(
            f"the disk is full ({place}): free some space and run the same command again; what is done is kept"
        )
    return 0


def _is_unread(stream: TextIO) -> bool:
    """Whether the reader of a stream has ended, as `head` does; if so, sends the last flush to /dev/null."""
    try:
        number = stream.fileno()
    except OSError:  # Not a stream of the system.
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def _failed(line: str, status: int = 2) -> int:
    def say() -> None:
        print(f"error: {line}", file=sys.stderr)

    _fail_together(line, say, status)
    say()
    return status


def _fail_together(line: str, show: Callable[[], None], status: int) -> None:
    """Shows the error and ends all processes of a run, if there are several; jax is imported in that case."""
    if "alignment_gap.sharding" in sys.modules and "jax" in sys.modules:
        from alignment_gap.sharding import fail_together

        fail_together(line.splitlines()[0], show, status)
