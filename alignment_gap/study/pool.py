"""One report over studies that differ only in their seeds: the pieces of a long study, each from its own machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from alignment_gap.configuration import flatten, to_dict
from alignment_gap.errors import UserError
from alignment_gap.folders import STUDY, AnyPath, locked
from alignment_gap.study.analysis import seeds_of
from alignment_gap.study.diagrams import diagram_figures
from alignment_gap.study.graph import JOBS, study_graph
from alignment_gap.study.outcomes import read_outcomes
from alignment_gap.study.report import ReportContext, read_facts, write_report
from alignment_gap.study.results import notes_on
from alignment_gap.study.run import of_size

# Settings in which the pieces of one study may differ; implementations of attention compute the same.
_OF_A_PIECE = ("name", "seed", "seeds", "policy.attention")


def write_pooled(folders: Sequence[AnyPath], workdir: AnyPath) -> AnyPath:
    """Writes the report over all seeds of several studies to `workdir`, from the files of their reports.

    Claims, figures, peaks and judges are those of a single study with all these seeds. Samples and training curves are
    only in the reports of the pieces.

    Returns:
      The path of the page.

    Raises:
      UserError: a folder has no report, two folders share a seed or differ in settings, or `workdir` holds a study.
    """
    if (workdir / STUDY).exists():
        raise UserError(f"{workdir} holds a study, and this would replace its report: give another --workdir")
    pieces = [(folder, read_facts(folder), read_outcomes(folder)) for folder in folders]
    if len(pieces) < 2:
        raise UserError("--pool has only one folder in --runs: give all pieces of a study, separated by commas")
    of_seed: dict[int, AnyPath] = {}
    for folder, facts, results in pieces:
        _check_settings(folders[0], pieces[0][1], folder, facts)
        for seed in seeds_of(results):
            if seed in of_seed:
                raise UserError(f"{of_seed[seed]} and {folder} both have seed {seed}: give each seed once")
            of_seed[seed] = folder
    pieces.sort(key=lambda piece: seeds_of(piece[2])[0])
    contexts = [facts for _, facts, _ in pieces]
    with locked(workdir):
        return write_report(workdir, [each for _, _, results in pieces for each in results], _pooled(contexts, of_seed))


def _check_settings(first: AnyPath, facts: ReportContext, other: AnyPath, others: ReportContext) -> None:
    """Raises UserError for the first setting in which two pieces must not differ but do."""
    one, two = (flatten(to_dict(each.config)) for each in (facts, others))
    for key in (key for key in dict.fromkeys((*one, *two)) if key not in _OF_A_PIECE):
        if one.get(key) != two.get(key):
            raise UserError(
                f"{first} and {other} are not pieces of one study: {key} is {one.get(key)} and {two.get(key)}; leave "
                "out --pool to compare them side by side"
            )


def _pooled(contexts: Sequence[ReportContext], seeds: dict[int, AnyPath]) -> ReportContext:
    """The report's facts over all pieces."""
    config = dataclasses.replace(contexts[0].config, seed=min(seeds), seeds=len(seeds))
    own = of_size(config, config.sizes[0]) if config.sizes else config
    judges = [judge for context in contexts for judge in context.judges]
    names = dict.fromkeys(name for context in contexts for name in context.versions)
    versions = {name: ", ".join(dict.fromkeys(c.versions.get(name, "unknown") for c in contexts)) for name in names}
    return ReportContext(
        config=config,
        versions=versions,
        judges=judges,
        wall_time={job: time for context in contexts for job, time in context.wall_time.items()},
        notes=notes_on(config, judges),
        diagrams=diagram_figures(study_graph(own, seeds[min(seeds)] / JOBS), own.arms.losses[0]),
    )
