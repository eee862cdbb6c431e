"""The flags of a command: flags from the dataclasses of a config, and flags that all commands share."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from alignment_gap.checks import nearest
from alignment_gap.configuration import from_dict
from alignment_gap.errors import UserError
from alignment_gap.installation import COMPILATION_CACHE
from alignment_gap.jobs.words import flag_name

Config = TypeVar("Config")

HELP_XML = "--helpxml"
_PROCESSES = "JAX_NUM_PROCESSES"


def parse(
    arguments: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    help_text: str | None,
    *,
    positional: int = 0,
    also: tuple[type[Exception], ...] = (),
) -> tuple[flags.FlagValues, list[str]] | None:
    """Parses the flags and the other arguments of a command; returns None after it has printed the help.

    --help prints a text and the flags. --helpxml prints only the flags, in absl's XML, which `completion` reads.

    Args:
      arguments: the command line; the first argument is the name of the command.
      define: adds the command's flags.
      help_text: the text that help prints before the flags.
      positional: maximum number of arguments that are not flags.
      also: further errors that the user can fix, in addition to flag errors.

    Raises:
      UserError: a flag is unknown or has an invalid value, or there are too many arguments.
    """
    values = flags.FlagValues()
    define(values)
    if "--help" in arguments or "-h" in arguments:
        print(inspect.cleandoc(help_text or ""), values.get_help(), sep="\n")
        return None
    if HELP_XML in arguments:
        values.write_help_in_xml_format(sys.stdout)
        return None
    to_mend: tuple[type[Exception], ...] = (flags.Error, *also)
    try:
        rest = values(arguments)[1:]
    except to_mend as error:
        met = "" if isinstance(error, flags.Error) else f"the config file raises {type(error).__name__}: "
        first, *others = str(error).strip().splitlines()
        # An error in a config file arrives as text: a traceback whose last line is the reason.
        reason = f" {others[-1]}" if any(line.startswith("Traceback") for line in others) else ""
        raise UserError(met + first + reason) from error
    if len(rest) > positional:
        raise UserError(f"unexpected argument {rest[positional]!r}: flags are written --flag=value")
    return values, rest


def run_subcommand(
    arguments: Sequence[str], subcommands: Mapping[str, Callable[[list[str]], None]], help_text: str | None
) -> None:
    """Runs the sub-command that the first argument names; without arguments, prints all help texts.

    Raises:
      UserError: the first argument is not a sub-command.
    """
    command, *rest = arguments
    if not rest or rest[0] in ("--help", "-h"):
        texts = (help_text, *(run.__doc__ for run in subcommands.values()))
        print(*(inspect.cleandoc(text or "") for text in texts), sep="\n\n")
        return
    name, *rest = rest
    if name not in subcommands:
        raise UserError(
            f"unknown command {command.removeprefix('alignment-gap ')} {name!r}: {nearest(name, subcommands)}"
        )
    subcommands[name]([f"{command} {name}", *rest])


def define_config(values: flags.FlagValues, cls: type, short: Mapping[str, str]) -> None:
    """Adds a flag for every setting of a dataclass and the dataclasses in it; the docstrings are the help."""
    for path, hint, default, text in _settings(cls, ""):
        name, wanted = flag_name(path, short), [each for each in _options(hint) if each is not type(None)]
        if bool in wanted:
            flags.DEFINE_boolean(name, default, text, flag_values=values)
        elif typing.get_origin(wanted[0]) is tuple:
            flags.DEFINE_list(name, default and [*map(str, default)], text, flag_values=values)
        else:
            make = flags.DEFINE_integer if wanted == [int] else flags.DEFINE_float if float in wanted else _define_text
            make(name, default, text, flag_values=values)


def read_config(values: flags.FlagValues, cls: type[Config], short: Mapping[str, str]) -> Config:
    """The dataclass from the flags of `define_config`; raises UserError if it refuses a value."""
    tree: dict[str, Any] = {}
    for path, hint, _, _ in _settings(cls, ""):
        name = flag_name(path, short)
        if not values[name].present:
            continue
        *groups, leaf = path.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = _value(values[name].value, hint, name)
    try:
        return from_dict(cls, tree, path="--")
    except UserError as error:
        names = {path: flag_name(path, short) for path, *_ in _settings(cls, "")}
        # An error has the path of its setting, such as --limits.prompt_length, whose flag may be shorter.
        line = re.sub(r"^--([\w.]+)", lambda found: f"--{names.get(found[1], found[1])}", str(error))
        raise UserError(line, may_change=error.may_change, page=error.page) from error


def define_shared(values: flags.FlagValues) -> None:
    """Adds the flags of every command that computes: the compilation cache, and several processes."""
    flags.DEFINE_string(
        "compilation_cache",
        COMPILATION_CACHE,
        "Folder for the cache of compiled functions; empty for no cache.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "HOST:PORT of process 0, for a run of several processes; auto finds it on TPU pods and Slurm.",
        flag_values=values,
    )
    for name, variable, default, meaning in (
        ("processes", _PROCESSES, 1, "Number of processes that run together."),
        ("process", "JAX_PROCESS_ID", 0, "Index of this process, from 0."),
    ):
        flags.DEFINE_integer(name, _from_environment(variable, default), meaning, flag_values=values)


def start_jax(values: flags.FlagValues) -> None:
    """Sets jax's compilation cache and connects this process to the others, according to the shared flags."""
    import jax

    from alignment_gap.sharding import initialize

    if values.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(values.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    initialize(values.coordinator, values.processes, values.process)


def require(values: flags.FlagValues, name: str) -> str:
    """The value of a required flag; raises UserError if it is not set."""
    if not values[name].value:
        raise UserError(f"--{name} is not set: add --{name}=VALUE")
    return str(values[name].value)


def _settings(cls: Any, path: str) -> Iterator[tuple[str, Any, Any, str]]:
    """Path, type, default and description of every setting of a dataclass and the dataclasses in it."""
    hints, about = typing.get_type_hints(cls), _attributes(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = next((each for each in _options(hint) if dataclasses.is_dataclass(each)), None)
        if inner is not None:
            yield from _settings(inner, f"{path}{field.name}.")
        elif typing.get_origin(hint) is Mapping:
            yield f"{path}{field.name}", hint, None, f"{about.get(field.name, '')} A dict in Python's notation."
        elif field.default is not dataclasses.MISSING:
            yield f"{path}{field.name}", hint, field.default, about.get(field.name, "")


def _attributes(cls: type) -> dict[str, str]:
    """The description of each field in a docstring's section "Attributes:", as one line."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^  (\w+): ((?:.|\n(?!  \w+: ))*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _value(value: Any, hint: Any, name: str) -> Any:
    """Converts a flag's value to the type of its setting; only the items of lists, and dicts, are still texts."""
    if typing.get_origin(hint) is Mapping:
        return _literal_dict(value, name)
    if not isinstance(value, list):
        return value
    of = next(typing.get_args(each)[0] for each in _options(hint) if typing.get_origin(each) is tuple)
    try:
        return tuple(of(item) for item in value)
    except ValueError:
        raise UserError(f"--{name}={','.join(value)}: give values of type {of.__name__}, separated by commas") from None


def _literal_dict(text: str, name: str) -> dict[str, Any]:
    with contextlib.suppress(SyntaxError, ValueError):
        if isinstance(value := ast.literal_eval(text), dict):
            return value
    raise UserError(f"--{name}={text}: give a dict in Python's notation, such as {{'mlp': None}}")


def _define_text(name: str, default: str | None, text: str, flag_values: flags.FlagValues) -> None:
    flags.DEFINE_string(name, default, text, flag_values=flag_values)


def _from_environment(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise UserError(f"{variable} is {value!r} in the environment: set it to a number, or unset it")
    return int(value)
