"""Run the controlled study, or what is left of it, and write its report.

alignment-gap study --config=configs/study/tiny.py --config.seeds=3 --workdir=runs/study
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from alignment_gap.cli.parsing import define_compilation_cache, parse_flags, use_compilation_cache
from alignment_gap.configuration import flatten, from_dict
from alignment_gap.errors import UserError

OVERRIDE = "--config."
# What running a config file, or setting one of its keys, may raise.
CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError)


def main(arguments: list[str]) -> None:
    """Runs the study; raises UserError for flags or settings that cannot be used."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, make_flags()[0].get_help(), sep="\n")
        return
    values, settings = parse(arguments)

    from alignment_gap.study.config import StudyConfig
    from alignment_gap.study.run import run_sizes, run_study

    use_compilation_cache(values)
    study = from_dict(StudyConfig, settings)
    run = run_sizes if study.sizes else run_study
    run(study, Path(values.workdir), update=values.update)


def make_flags(arguments: Sequence[str] = ()) -> tuple[flags.FlagValues, Any]:
    """The flags that the arguments may set, and the holder of the config among them."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "A study's config file; --config.KEY=VALUE changes a setting.",
        flag_values=values,
        sys_argv=[*arguments],
    )
    flags.DEFINE_string(
        "workdir", "runs/study", "Folder of the study; one that was stopped goes on there.", flag_values=values
    )
    flags.DEFINE_boolean(
        "update", False, "Allow the folder of another config; redo only what the change affects.", flag_values=values
    )
    define_compilation_cache(values)
    return values, config


def parse(arguments: Sequence[str]) -> tuple[flags.FlagValues, dict[str, Any]]:
    """Flags and settings; the config's own keys are known before its overrides are read, to name the nearest."""
    without = [argument for argument in arguments if not argument.startswith(OVERRIDE)]
    values, config = make_flags(without)
    parse_flags(values, without, also=CONFIG_ERRORS)
    path = values["config"].value and config_flags.get_config_filename(values["config"])
    if not path:
        raise UserError("no --config: give a study's config file, such as --config=configs/study/tiny.py")
    if not Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file; configs/study/ has some to start from")
    keys = list(flatten(config.value.to_dict()))
    for argument in arguments:
        key = argument.removeprefix(OVERRIDE).partition("=")[0]
        if argument.startswith(OVERRIDE) and key not in keys:
            near = get_close_matches(key, keys, n=1, cutoff=0.4)
            raise UserError(f"unknown setting --config.{key}: did you mean --config.{near[0] if near else keys[0]}?")
    values, config = make_flags(arguments)
    parse_flags(values, arguments, also=CONFIG_ERRORS)
    return values, config.value.to_dict()
