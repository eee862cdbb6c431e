"""The `alignment-gap` command: one entry point, a module for each sub-command."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches

from alignment_gap import __version__
from alignment_gap.errors import UserError

COMMANDS = {
    "study": "run the controlled study, or what is left of it, and write its report",
    "train": "train one policy offline from gin files",
    "data": "prepare datasets, make new ones from them, score them, show what they are",
    "plan": "tell whether a job fits a TPU slice and how fast it is at best, without a TPU",
    "losses": "list the losses",
    "checkpoint": "checkpoints of other libraries in and out, and what a checkpoint holds",
}

# Of another library's message, as much as one line bears.
LONGEST = 120

USAGE = f"""alignment-gap {__version__}: preference training of language models in JAX, online and offline

usage: alignment-gap COMMAND [flags]

{{commands}}

alignment-gap COMMAND --help tells a command's flags."""


def main() -> None:
    """Runs a command; what the user can mend is one line on standard error and exit status 2."""
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
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {hint}")
    importlib.import_module(f"alignment_gap.cli.{name}").main(["alignment-gap " + name, *arguments[1:]])


def guarded(run: Callable[[], None]) -> int:
    """Exit status of `run`: 0, or 2 after one line where the user can mend what went wrong, 130 after ctrl-c."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not _disk_full(error):
            raise
        place = getattr(error, "filename", None) or str(error)[:LONGEST].splitlines()[0]
        print(
            f"error: the disk is full ({place}): free some space and run the same command again; what is done is kept",
            file=sys.stderr,
        )
        return 2
    return 0


def _disk_full(error: BaseException | None) -> bool:
    """Whether this or what caused it is a full disk; tensorstore reports that in the text of another error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
