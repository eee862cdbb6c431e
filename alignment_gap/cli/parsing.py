"""Reading a command's flags, and the flags of all that compile or run in several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from absl import flags

from alignment_gap.errors import UserError

_PROCESSES = "JAX_NUM_PROCESSES"


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


def define_processes(values: flags.FlagValues) -> None:
    """Adds --coordinator, --processes and --process, which the environment may say in JAX's own variables."""
    flags.DEFINE_string(
        "coordinator",
        os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "HOST:PORT of process 0 of a run of several processes; auto finds it on TPU pods and Slurm.",
        flag_values=values,
    )
    for name, variable, default, meaning in (
        ("processes", _PROCESSES, 1, "How many processes run together."),
        ("process", "JAX_PROCESS_ID", 0, "Number of this process, from 0."),
    ):
        flags.DEFINE_integer(name, _from_environment(variable, default), meaning, flag_values=values)


def join_processes(values: flags.FlagValues) -> None:
    """Joins this process to the others of the flags; before anything asks jax for its devices."""
    from alignment_gap.sharding import initialize

    initialize(values.coordinator, values.processes, values.process)


def refuse_processes(command: str) -> None:
    """Raises UserError where the environment says that a command that runs in one process is one of several."""
    if (count := _from_environment(_PROCESSES, 1)) > 1:
        raise UserError(
            f"{_PROCESSES} is {count} in the environment, but {command} runs in one process: start it once, with "
            f"{_PROCESSES} unset"
        )


def _from_environment(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise UserError(f"{variable} is {value!r} in the environment: set it to a number, or unset it")
    return int(value)
