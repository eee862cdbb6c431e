"""A training job from gin files, in T5X's conventions.

--gin_file may be given several times; later files win. `--gin.NAME=value` sets a macro (--gin.TRAIN_STEPS=100) or a
field (--gin.OptimizerConfig.clip_norm=0.5). Files may include other files. A file is looked for in this folder, in
--gin_search_paths, and among the files of the package. A value is read as Python, as a reference (@NAME) or as a macro
(%NAME); anything else is a text, so paths need no quotes. A macro without a value has the default of its field.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
import re
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from absl import flags

from alignment_gap.checks import nearest
from alignment_gap.cli.packaged import FILES, GIN, find_file
from alignment_gap.errors import UserError
from alignment_gap.jobs.words import is_notation

if TYPE_CHECKING:
    from alignment_gap.jobs.config import JobConfig

# Ruff and mypy would take a plain import for the folder gin/ of this repository.
gin: Any = importlib.import_module("gin")
# By default, gin would also look for runs/job.gin in a package named runs, and fail if a folder runs/ holds runs.
gin.config._FILE_READERS = [(open, os.path.isfile)]

OVERRIDE = "--gin."


class NotHere(UserError):
    """A gin file, or what it includes or imports, cannot be read on this machine; another machine may have it."""


def define_gin(values: flags.FlagValues) -> None:
    """Adds --gin_file and --gin_search_paths; `split_overrides` reads --gin.NAME=value, because absl cannot."""
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times.", flag_values=values)
    flags.DEFINE_list("gin_search_paths", [], "Further folders with gin files.", flag_values=values)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments: those without --gin.NAME=value, and the overrides as NAME=value."""
    overrides = [argument.removeprefix(OVERRIDE) for argument in arguments if argument.startswith(OVERRIDE)]
    return [argument for argument in arguments if not argument.startswith(OVERRIDE)], overrides


def read_config(files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str] = ()) -> JobConfig:
    """The job from gin files and "NAME=value" overrides.

    Raises:
      UserError: they are not valid; `NotHere` if a file cannot be read.
    """
    from alignment_gap.configuration import from_dict, to_dict
    from alignment_gap.jobs.config import JobConfig

    if not files and not overrides:
        raise UserError("no --gin_file: give a run's gin file, such as --gin_file=gin/runs/offline_ipo.gin")
    classes = _register()
    for override in overrides:
        _check_field(override)  # Needs no file, which may be on another machine alone.
    gin.clear_config()
    # gin logs an error for every folder without the file, even if it then finds the file in another folder.
    logging.disable(logging.ERROR)
    try:
        for file in files:
            gin.parse_config_file(_find(file, search_paths))
        for override in overrides:
            gin.parse_config(_binding(override, gin.config_str()))
        _check_read(overrides, gin.config_str())
        _check_required(gin.config_str())
        gin.parse_config(_defaults(gin.config_str(), classes))
        built = to_dict(classes["JobConfig"]())
    except NotHere:
        raise
    except RecursionError:
        raise UserError(f"{', '.join(files)}: a gin file includes itself: remove the include") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{', '.join(files)}: a gin file is not UTF-8 ({error.reason}): save it as UTF-8") from None
    except (AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError, TokenError) as error:
        raise UserError(_one_line(error)) from error
    except (OSError, ImportError) as error:
        raise NotHere(f"{_one_line(error)}: check the path, or give its folder with --gin_search_paths") from error
    finally:
        logging.disable(logging.NOTSET)
        gin.clear_config()
    return from_dict(JobConfig, built, path="JobConfig")


@functools.cache
def _register() -> dict[str, Any]:
    """Registers the dataclasses of a job with gin by name; returns gin's versions of them."""
    from alignment_gap.jobs.config import JobConfig

    return {part.__name__: gin.external_configurable(part) for part in dict.fromkeys(_parts(JobConfig))}


def _parts(cls: Any) -> Iterator[Any]:
    """All dataclasses inside a dataclass, then the dataclass itself."""
    for hint in typing.get_type_hints(cls).values():
        for each in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(each):
                yield from _parts(each)
    yield cls


def _defaults(config: str, classes: dict[str, Any]) -> str:
    """Bindings that set each macro without a value to the default of its field."""
    bound = set(re.findall(r"^(\w+) = ", config, flags=re.MULTILINE))
    lines = []
    for name, field, macro in re.findall(r"^(?:\w+/)?(?:\w+\.)*(\w+)\.(\w+) = %(\w+)$", config, flags=re.MULTILINE):
        fields = (
            {each.name: repr(each.default) for each in dataclasses.fields(classes[name])} if name in classes else {}
        )
        if macro not in bound and is_notation(fields.get(field, "")):
            lines.append(f"{macro} = {fields[field]}")
            bound.add(macro)
    return "\n".join(lines)


def _find(file: str, search_paths: Sequence[str]) -> str:
    """The path of a gin file; the search folders also apply to the files that it includes."""
    for folder in (*search_paths, str(GIN), str(FILES)):
        gin.add_config_file_search_path(folder)
    found = find_file("gin_file", file, search_paths)
    if found is None:
        folders = ", ".join((".", *search_paths, str(GIN)))
        raise NotHere(f"--gin_file={file}: there is no such file in {folders}{_near(file)}")
    return str(found)


def _near(file: str) -> str:
    """What the package has in place of a file: the file with the nearest name, or those of the same folder."""
    ours = [path.relative_to(FILES) for path in sorted(GIN.rglob("*.gin"))]
    beside = [path for path in ours if path.parent.name == Path(file).parent.name]
    by_name = {path.stem: path for path in beside or ours}
    if near := get_close_matches(Path(file).stem, by_name, n=1):
        return f": did you mean {by_name[near[0]]}?"
    return f": {beside[0].parent} has {', '.join(path.name for path in beside)}" if beside else ""


def _binding(override: str, config: str) -> str:
    """An override in gin's notation; raises UserError if no file has its macro."""
    name, _, value = override.partition("=")
    macros = re.findall(r"^(\w+) = ", config, flags=re.MULTILINE) + re.findall(r"%(\w+)(?![\w.])", config)
    if re.fullmatch(r"\w+", name) and name not in macros:
        remedy = (
            nearest(name, sorted({*macros})) if macros else "the command names no gin file; give one with --gin_file"
        )
        raise UserError(f"--gin.{name}: no macro of the gin files has this name: {remedy}")
    return f"{name} = {value if is_notation(value) else repr(value)}"


def _check_field(override: str) -> None:
    """Raises UserError if an override has no value, or its group has no such setting."""
    name, equals, _ = override.partition("=")
    if not equals:
        raise UserError(f"--gin.{override}: write --gin.NAME=value")
    group, _, field = name.rpartition(".")
    if group in (classes := _register()):
        fields = [each.name for each in dataclasses.fields(classes[group])]
        if field not in fields:
            raise UserError(f"--gin.{name}: {group} has no setting of this name: {nearest(field, fields)}")


def _check_read(overrides: Sequence[str], config: str) -> None:
    """Raises UserError if a macro is overridden that no setting reads any more, because other overrides replaced it."""
    for name in (override.partition("=")[0] for override in overrides):
        if re.fullmatch(r"\w+", name) and not re.search(rf"%{name}(?![\w.])", config):
            raise UserError(f"--gin.{name}: the other overrides replace every setting that reads {name}: leave it out")


def _check_required(config: str) -> None:
    missing = re.findall(r"^([\w.]+) = %gin\.REQUIRED", config, flags=re.MULTILINE)
    if missing:
        raise UserError(f"{missing[0]} is not set: add --gin.{missing[0]}=value")


def _one_line(error: Exception) -> str:
    """gin's message in one line, with the place in the file, which gin puts on further lines."""
    if isinstance(error, TokenError):
        return f"a gin file ends inside a statement: {error.args[0]}"
    if unset := re.search(r"configurable 'macro' .* in scope '(\w+)'", str(error)):
        return f"the macro {unset[1]} is not set: add --gin.{unset[1]}=value, or a gin file that sets it"
    if isinstance(error, UserError):
        place = re.search(r"In call to configurable '(\w+)'", str(error))
        return (f"{place[1]}." if place else "") + str(error).splitlines()[0]
    message = error.msg if isinstance(error, SyntaxError) and error.msg else str(error)
    return " ".join(line.strip() for line in message.strip().splitlines()[:3])
