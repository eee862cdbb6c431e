"""`alignment-gap study --config=configs/study/tiny.py --config.seeds=3 --workdir=runs/study`."""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from alignment_gap.configuration import from_dict
from alignment_gap.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A study's config file; --config.KEY=VALUE changes a setting.", flag_values=FLAGS
)
flags.DEFINE_string("workdir", "runs/study", "Folder of the study; a study that was stopped goes on there.", flag_values=FLAGS)
flags.DEFINE_boolean(
    "update", False, "Allow a folder that holds the study of another config; redo what the change affects.", flag_values=FLAGS
)
flags.DEFINE_string(
    "compilation_cache", ".cache/jax", "Folder where compiled functions are kept; empty for none.", flag_values=FLAGS
)


def main(arguments: list[str]) -> None:
    """Runs the study; raises UserError for flags or settings that cannot be used."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, FLAGS.get_help(), sep="\n")
        return
    try:
        rest = FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --flag=value")
    if CONFIG.value is None:
        raise UserError("no --config: give a study's config file, such as --config=configs/study/tiny.py")

    import jax

    from alignment_gap.study.config import StudyConfig
    from alignment_gap.study.run import run_study

    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    config = from_dict(StudyConfig, CONFIG.value.to_dict())
    run_study(config, Path(FLAGS.workdir), update=FLAGS.update)
