"""A job is a folder: complete or absent, made once by whoever comes first, and gone on with where it was stopped.

FOLDER/
  job.json     the kind of job, its settings, and what its inputs were; written first
  failed.json  why the last attempt ended, where it failed, and the settings that may be changed to go on
  done.json    the settings again, and the seconds that it took; written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from alignment_gap import __version__
from alignment_gap.configuration import defaults, flatten, to_dict
from alignment_gap.errors import Interrupted, StorageError
from alignment_gap.folders import AnyPath, claim, discard_last, locked, read_json, write_json, write_last
from alignment_gap.jobs.words import flag_words
from alignment_gap.progress import OpenBar, progress_bar
from alignment_gap.sharding import MeshConfig, first_says, is_first_process, on_first_process

JOB, DONE, FAILED = "job.json", "done.json", "failed.json"
# Settings of the mesh, which a folder that was begun may change.
MESH = tuple(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig))


class Opened(NamedTuple):
    """A job whose inputs were found and checked, before anything is written.

    Attributes:
      facts: what the inputs are, beside their names, as JSON values; another folder of the same name is told by them.
      run: `(folder, open_bar) -> None` fills the folder, going on with what it finds there.
      read_first: reads what a run in this folder begins with, before anything is written there.
    """

    facts: Mapping[str, Any]
    run: Callable[[AnyPath, OpenBar], None]
    read_first: Callable[[AnyPath], None] = lambda folder: None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of job, which is a command.

    Attributes:
      name: of the kind, in job.json.
      command: words of the command line.
      config: the dataclass of its settings.
      open: finds and checks the inputs; raises UserError before anything is written.
      summary: what a finished folder holds, for the terminal.
      output: the flag of the folder.
      short: shorter flags of some settings; see `words.flag_name`.
      words: the words that give a config; None for a flag for each setting.
      may_change: the settings that may differ when a folder that was begun goes on.
      without_effect: settings that change nothing in the result.
      repairs: whether a finished folder is looked through when its command is run again.
      is_whole: whether the files of a finished folder can be read; the damaged ones are made again.
    """

    name: str
    command: str
    config: type
    open: Callable[[Any], Opened]
    summary: Callable[[AnyPath], str]
    output: str = "output"
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: Callable[[Any], list[str]] | None = None
    may_change: Callable[[AnyPath], Collection[str]] = lambda folder: ()
    without_effect: Collection[str] = ()
    repairs: bool = False
    is_whole: Callable[[AnyPath], bool] = lambda folder: True


@dataclasses.dataclass(frozen=True)
class Job:
    """One job of a graph.

    Attributes:
      name: unique in its graph.
      kind: what it does.
      config: with what; names the folders of other jobs by their paths.
      folder: where.
      needs: jobs that come before it.
    """

    name: str
    kind: Kind
    config: Any
    folder: AnyPath
    needs: tuple[Job, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the folder is complete, as far as its files say."""
        return finished_with(self.folder) is not None

    @property
    def state(self) -> str:
        """What is known from the folders: "done", "begun", "ready", or "waiting" for jobs that it needs."""
        if self.is_done:
            return "done"
        if not all(job.is_done for job in self.needs):
            return "waiting"
        return "begun" if (self.folder / JOB).exists() else "ready"

    @property
    def words(self) -> tuple[str, ...]:
        """The words after "alignment-gap" of the command that runs it alone."""
        kind = self.kind
        words = kind.words(self.config) if kind.words else flag_words(self.config, kind.short)
        return (*kind.command.split(), *words, f"--{kind.output}={self.folder}")

    @property
    def command(self) -> str:
        """The command that runs it alone."""
        return shlex.join(["alignment-gap", *self.words])


def make(kind: Kind, config: Any, folder: AnyPath, open_bar: OpenBar | None = None) -> bool:
    """Runs a job in its folder, from where it was stopped; returns whether there was anything to do.

    Args:
      kind: of the job.
      config: its settings.
      folder: of the job.
      open_bar: opens its progress bar; by default one that only the first process shows.

    Raises:
      UserError: where a setting or an input cannot be used, or the folder is another job's or in use.
    """
    opened = kind.open(config)
    opened.read_first(folder)
    settings = json.loads(json.dumps({"kind": kind.name} | flatten(to_dict(config)) | dict(opened.facts)))
    # A folder of an earlier version, which did not know a setting, has its default.
    unset = json.loads(json.dumps(flatten(defaults(config))))
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(_owned(folder, settings, kind, unset)))
        finished = bool(first_says(lambda: _is_finished(folder, settings, unset) and kind.is_whole(folder)))
        if finished and not kind.repairs:
            return False
        if not finished:
            on_first_process(lambda: discard_last(folder / DONE))
        start = time.time()
        with _failure_kept(folder):
            opened.run(folder, open_bar or functools.partial(progress_bar, silent=not is_first_process()))
        seconds = round(time.time() - start, 1)
        if not finished:
            done = {"settings": settings, "seconds": seconds, "version": __version__}
            on_first_process(lambda: write_last(folder / DONE, done))
    return not finished


@contextlib.contextmanager
def _failure_kept(folder: AnyPath) -> Iterator[None]:
    """Leaves the line of what went wrong in the folder, for whoever looks at a graph of jobs."""
    if is_first_process():
        (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        if is_first_process():
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            with contextlib.suppress(OSError, StorageError):  # A full disk is told by what met it.
                write_json(folder / FAILED, {"line": line, "may_change": getattr(error, "may_change", ())})
        raise


def _is_finished(folder: AnyPath, settings: Mapping[str, Any], unset: Mapping[str, Any]) -> bool:
    found = finished_with(folder)
    return found is not None and {**unset, **found} == settings


def finished_with(folder: AnyPath) -> Any:
    """The settings that a folder was completed with; None where it is not complete, or no longer says so."""
    try:
        return json.loads((folder / DONE).read_text())["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _remedies(folder: AnyPath) -> list[str]:
    """The settings that the last failure in a folder asked to change."""
    path = folder / FAILED
    return read_json(path, remedy="remove it")["may_change"] if path.exists() else []


@contextlib.contextmanager
def _owned(folder: AnyPath, settings: Mapping[str, Any], kind: Kind, unset: Mapping[str, Any]) -> Iterator[None]:
    with locked(folder):
        may_change = {*kind.may_change(folder), *_remedies(folder)}
        remedy = "give another folder, or these settings"
        claim(folder / JOB, settings, remedy=remedy, may_change=may_change, defaults=unset)
        yield
