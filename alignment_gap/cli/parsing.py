"""Reading a command's flags."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from alignment_gap.errors import UserError


def parse_flags(
    values: flags.FlagValues,
    arguments: Sequence[str],
    *,
    positional: int = 0,
    also: tuple[type[Exception], ...] = (),
) -> list[str]:
    """Sets the flags from the arguments, of which the first names the command; returns what is no flag.

    Args:
      values: the command's flags.
      arguments: what the user wrote.
      positional: how many arguments may be no flags.
      also: errors beside those of flags that are the user's to mend.

    Raises:
      UserError: for a flag that is unknown or has a value that it cannot have, or an argument too many.
    """
    to_mend: tuple[type[Exception], ...] = (flags.Error, *also)
    try:
        rest = values(arguments)[1:]
    except to_mend as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    if len(rest) > positional:
        raise UserError(f"unexpected argument {rest[positional]!r}: flags are written --flag=value")
    return rest
