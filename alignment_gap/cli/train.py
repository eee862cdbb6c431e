"""Train one policy offline from gin files; a job that was stopped goes on in its folder.

alignment-gap train --gin_file=gin/runs/offline_ipo.gin --gin.DATASET=pairs --gin.START=runs/sft --workdir=runs/ipo

The conventions are those of T5X: --gin_file can be given several times, later ones win; --gin.NAME=value sets a macro
(--gin.TRAIN_STEPS=100) or a field (--gin.OptimizerConfig.clip_norm=0.5); files include each other and are looked for
in this folder, in --gin_search_paths and in the gin/ of this repository. A value that is not in Python's notation, a
reference (@NAME) or a macro (%NAME) is taken as a text, so that a path needs no quotes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from absl import flags

from alignment_gap.cli.parsing import (
    define_compilation_cache,
    define_processes,
    join_processes,
    parse_flags,
    use_compilation_cache,
)
from alignment_gap.errors import UserError

if TYPE_CHECKING:
    from alignment_gap.training.job import JobConfig

# A plain import would be taken by ruff and mypy for the folder gin/ of this repository.
gin: Any = importlib.import_module("gin")
# gin would look for runs/job.gin in a package named runs, and fail where the folder of that name holds runs instead.
gin.config._FILE_READERS = [(open, os.path.isfile)]

OVERRIDE = "--gin."
GIN_FOLDER = Path(__file__).parents[2] / "gin"


def main(arguments: list[str]) -> None:
    """Runs the job; raises UserError for flags or settings that cannot be used."""
    values = make_flags()
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, values.get_help(), sep="\n")
        return
    overrides = [argument.removeprefix(OVERRIDE) for argument in arguments if argument.startswith(OVERRIDE)]
    parse_flags(values, [argument for argument in arguments if not argument.startswith(OVERRIDE)])
    config = read_config(values.gin_file, overrides, values.gin_search_paths)

    from alignment_gap.checkpoints import CHECKPOINTS
    from alignment_gap.progress import progress_bar
    from alignment_gap.sharding import is_first_process
    from alignment_gap.training.job import run_job

    use_compilation_cache(values)
    join_processes(values)
    workdir, silent = Path(values.workdir), not is_first_process()
    with progress_bar(config.steps or None, workdir.name, silent=silent) as bar:
        run_job(config, workdir, bar.update, bar.write)
    if not silent:
        print(f"checkpoints: {workdir / CHECKPOINTS}")


def make_flags() -> flags.FlagValues:
    """The command's flags, but for --gin.NAME=value."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times.", flag_values=values)
    flags.DEFINE_list("gin_search_paths", [], "Folders in which gin files are looked for.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/train", "Folder of the job; one that was stopped goes on.", flag_values=values)
    define_compilation_cache(values)
    define_processes(values)
    return values


def read_config(files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str] = ()) -> JobConfig:
    """The job of gin files and of "NAME=value" overrides; raises UserError for what they cannot mean."""
    from alignment_gap.configuration import from_dict, to_dict
    from alignment_gap.training.job import JobConfig

    if not files:
        raise UserError("no --gin_file: give a run's gin file, such as --gin_file=gin/runs/offline_ipo.gin")
    configurable_job = _register()
    gin.clear_config()
    # gin logs an error for every folder that does not have a file before it finds it in another.
    logging.disable(logging.ERROR)
    try:
        for file in files:
            gin.parse_config_file(_find(file, search_paths))
        for override in overrides:
            gin.parse_config(_binding(override, gin.config_str()))
        _check_required(gin.config_str())
        built = to_dict(configurable_job())
    except (AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError, TokenError) as error:
        raise UserError(_one_line(error)) from error
    except (OSError, ImportError) as error:
        raise UserError(f"{_one_line(error)}: check the path, or give its folder by --gin_search_paths") from error
    finally:
        logging.disable(logging.NOTSET)
        gin.clear_config()
    return from_dict(JobConfig, built, path="JobConfig")


@functools.cache
def _register() -> Any:
    """Makes gin know the dataclasses of a job by their names; returns its `JobConfig`."""
    from alignment_gap.models import DecoderConfig, T5Config
    from alignment_gap.sharding import MeshConfig
    from alignment_gap.training import OptimizerConfig
    from alignment_gap.training.job import DatasetConfig, JobConfig, LossConfig

    for part in (T5Config, DecoderConfig, LossConfig, DatasetConfig, OptimizerConfig, MeshConfig):
        gin.external_configurable(part)
    return gin.external_configurable(JobConfig)


def _find(file: str, search_paths: Sequence[str]) -> str:
    """The path of a gin file; the folders are searched for what it includes, too."""
    folders = [*search_paths, str(GIN_FOLDER)]
    for folder in folders:
        gin.add_config_file_search_path(folder)
    found = [path for path in (Path(folder) / file for folder in ("", *folders)) if path.is_file()]
    if not found:
        raise UserError(f"--gin_file={file}: there is no such file in {', '.join(('.', *folders))}")
    return str(found[0])


def _binding(override: str, config: str) -> str:
    """An override in gin's notation; raises UserError for a macro that no file has."""
    name, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--gin.{override}: write --gin.NAME=value")
    macros = re.findall(r"^(\w+) = ", config, flags=re.MULTILINE) + re.findall(r"%(\w+)", config)
    if re.fullmatch(r"\w+", name) and name not in macros:
        near = get_close_matches(name, macros, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they have {', '.join(sorted(set(macros))) or 'none'}"
        raise UserError(f"--gin.{name}: no macro of the gin files has this name: {hint}")
    return f"{name} = {value if _is_notation(value) else repr(value)}"


def _is_notation(value: str) -> bool:
    """Whether a value is a reference, a macro, a container that may hold them, or Python's notation of a value."""
    if value.strip().startswith(("@", "%", "{", "[", "(", "'", '"')):
        return True
    try:
        ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return False
    return True


def _check_required(config: str) -> None:
    missing = re.findall(r"^([\w.]+) = %gin\.REQUIRED", config, flags=re.MULTILINE)
    if missing:
        raise UserError(f"{missing[0]} is not set: add --gin.{missing[0]}=value")


def _one_line(error: Exception) -> str:
    """gin's message with the place in the file, which it puts on further lines."""
    if isinstance(error, TokenError):
        return f"a gin file ends inside of a statement: {error.args[0]}"
    if unset := re.search(r"configurable 'macro' .* in scope '(\w+)'", str(error)):
        return f"the macro {unset[1]} is not set: add --gin.{unset[1]}=value, or a gin file that sets it"
    if isinstance(error, UserError):
        return str(error).splitlines()[0]
    message = error.msg if isinstance(error, SyntaxError) and error.msg else str(error)
    return " ".join(line.strip() for line in message.strip().splitlines()[:3])
