"""Run the controlled study, or continue it, and write its report.

alignment-gap study --config=configs/study/tiny.py --config.seeds=3 --workdir=runs/study
alignment-gap study --config=configs/study/tiny.py --workdir=runs/study --list
alignment-gap study --config=configs/study/tiny.py --workdir=runs/study --job=seed0-sft

--list prints every job with its state and its own command. --job runs one job, or writes the report.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignment_gap.checks import nearest
from alignment_gap.cli.flags import define_shared, parse, start_jax
from alignment_gap.cli.packaged import FILES, find_file
from alignment_gap.configuration import flatten, from_dict
from alignment_gap.errors import UserError
from alignment_gap.folders import at

OVERRIDE = "--config."
REPORT = "report"
ABOUT = "A study's config file; --config.KEY=VALUE changes a setting."
# Errors that a config file may raise.
CONFIG_ERRORS = (AttributeError, ImportError, KeyError, NameError, OSError, SyntaxError, TypeError, ValueError)


def main(arguments: list[str]) -> None:
    """Runs the study; raises UserError for flags or settings that cannot be used."""
    parsed = read(arguments, define, __doc__)
    if parsed is None:
        return
    values, settings = parsed

    from alignment_gap.sharding import on_first_process
    from alignment_gap.study.config import StudyConfig
    from alignment_gap.study.run import (
        check_done,
        list_text,
        open_studies,
        owned,
        run_job,
        run_study,
        say_once,
        write_sizes_report,
        write_study_report,
    )

    if values.list and values.job is not None:
        raise UserError(f"--list prints all jobs, but --job={values.job} names one: leave one of them out")
    config = from_dict(StudyConfig, settings)
    start_jax(values)
    studies = open_studies(config, at(values.workdir))
    if values.list:
        sizes = [[f"--config.sizes=({size!r},)"] for size in config.sizes] or [[]]
        for study, size in zip(studies, sizes, strict=True):
            say_once(list_text(study.graph, shlex.join([*_alone(arguments), *size, f"--job={REPORT}"])))
        if len(studies) > 1:
            command = shlex.join([*_alone(arguments), f"--job={REPORT}"])
            say_once(f"report over sizes\n  needs   the report of each size\n  {command}")
    elif values.job is None:
        for study in studies:
            run_study(study, update=values.update, at_once=values.at_once)
        if len(studies) > 1:
            on_first_process(lambda: write_sizes_report(config, studies, at(values.workdir)))
    elif len(studies) > 1 and values.job == REPORT:
        on_first_process(lambda: write_sizes_report(config, studies, at(values.workdir)))
    elif len(studies) > 1:
        raise UserError(f'--job={values.job}: name one of the sizes, such as --config.sizes="({config.sizes[0]!r},)"')
    elif values.job == REPORT:
        on_first_process(lambda: check_done(studies[0]))  # Before anything is written.
        with owned(studies[0], update=values.update):
            on_first_process(lambda: write_study_report(studies[0]))
    else:
        job = studies[0].graph.job(values.job)
        run_job(job, job.name)


def define(values: flags.FlagValues) -> None:
    """Adds the flags of the command, except --config."""
    flags.DEFINE_string("workdir", "runs/study", "Folder of the study; a stopped study continues.", flag_values=values)
    flags.DEFINE_boolean("list", False, "Print the jobs without running them.", flag_values=values)
    flags.DEFINE_string(
        "job", None, "Run only this job; report writes the report of finished jobs.", flag_values=values
    )
    flags.DEFINE_integer(
        "at_once",
        None,
        "Number of jobs that run at the same time; it does not change the results. By default 2 for one process on a "
        "CPU, otherwise 1.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "update",
        False,
        "Allow a folder with the study of another config; redo only what the change affects.",
        flag_values=values,
    )
    define_shared(values)


def _alone(arguments: Sequence[str]) -> list[str]:
    """The words of this command without --list."""
    kept = (word for word in arguments[1:] if word.lstrip("-").partition("=")[0] != "list")
    return [*arguments[0].split(), *kept]


def read(
    arguments: Sequence[str], define: Any, help_text: str | None
) -> tuple[flags.FlagValues, dict[str, Any]] | None:
    """The flags, and the settings of a config file changed by `--config.KEY=VALUE`; None after help."""
    words = iter(arguments)
    joined = [f"{word}={next(words, '')}" if word == "--config" else word for word in words]
    changes = [word.removeprefix(OVERRIDE) for word in joined if word.startswith(OVERRIDE)]
    others = [_located(word) for word in joined if not word.startswith(OVERRIDE)]

    def define_all(values: flags.FlagValues) -> None:
        config_flags.DEFINE_config_file("config", None, ABOUT, flag_values=values, sys_argv=others)
        define(values)

    parsed = parse(others, define_all, help_text, also=CONFIG_ERRORS)
    if parsed is None:
        return None
    values, _ = parsed
    path = values["config"].value and config_flags.get_config_filename(values["config"])
    if not path:
        raise UserError("no --config: give a study's config file, such as --config=configs/study/tiny.py")
    if not Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file; {FILES / 'configs' / 'study'} has some to start from")
    if not isinstance(values.config, ConfigDict):
        kind = type(values.config).__name__
        raise UserError(
            f"--config={path}: its get_config returns a {kind}: return a ConfigDict, as configs/study/tiny.py does"
        )
    settings = values.config.to_dict()
    for change in changes:
        _change(settings, *change.partition("=")[::2])
    return values, settings


def _located(word: str) -> str:
    """A word of the command; if it names a config file that is not here, the package's own file replaces it."""
    flag, _, value = word.partition("=")
    if flag != "--config":
        return word
    file, colon, argument = value.partition(":")
    return f"{flag}={find_file('config', file) or file}{colon}{argument}"


def _change(settings: dict[str, Any], key: str, text: str) -> None:
    """Sets one of the nested settings to a value: a Python literal, or the text itself."""
    keys = flatten(settings)
    if key not in keys:
        raise UserError(f"unknown setting --config.{key}: {nearest(key, list(keys))}")
    *groups, name = key.split(".")
    for group in groups:
        settings = settings[group]
    is_text = isinstance(settings[name], str) and text != "None"
    settings[name] = text if is_text else _literal(text)


def _literal(text: str) -> Any:
    """Parses a number, tuple, bool or None; other text stays as it is."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text
