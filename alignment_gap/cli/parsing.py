"""Reading a command's flags, and the flag of all that compile."""

from __future__ import annotations

import os
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


def define_compilation_cache(values: flags.FlagValues) -> None:
    """Adds --compilation_cache."""
    flags.DEFINE_string(
        "compilation_cache", ".cache/jax", "Folder that keeps compiled functions; empty for none.", flag_values=values
    )


def use_compilation_cache(values: flags.FlagValues) -> None:
    """Has jax keep compiled functions where --compilation_cache says."""
    import jax

    if values.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(values.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
