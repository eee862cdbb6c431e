"""A job is a folder, made once. A stopped job continues from what its folder holds.

Beside its results, a folder holds:

- `job.json`: the kind of job, its settings, and facts about its inputs; written first.
- `failed.json`: why the last attempt failed, and the settings that may change for the next attempt.
- `stopped.json`: the seconds of the attempts that failed or were stopped. A killed process leaves none.
- `done.json`: the settings again, and the seconds of all attempts; written last.
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
from alignment_gap.errors import Interrupted, StorageError, UserError
from alignment_gap.folders import JOB, AnyPath, check_settings, discard_last, locked, read_json, write_json, write_last
from alignment_gap.jobs.words import flag_words
from alignment_gap.progress import OpenBar, progress_bar
from alignment_gap.sharding import MeshConfig, first_says, is_first_process, on_first_process

DONE, FAILED, STOPPED = "done.json", "failed.json", "stopped.json"
# Settings of the mesh. They may change when a begun folder continues.
MESH = tuple(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig))


class Opened(NamedTuple):
    """A job whose inputs are found and checked; nothing is written yet.

    Attributes:
      facts: facts about the inputs, such as digests, as JSON values. They show when an input has changed but kept its
        name.
      run: `(folder, open_bar) -> None` fills the folder; it continues from what the folder holds.
      read_first: reads what the run starts from, before anything is written to the folder.
    """

    facts: Mapping[str, Any]
    run: Callable[[AnyPath, OpenBar], None]
    read_first: Callable[[AnyPath], None] = lambda folder: None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of job; each kind is one command.

    Attributes:
      name: name of the kind in job.json.
      command: the command's words after "alignment-gap".
      config: dataclass of the settings.
      open: finds and checks the inputs; raises UserError before anything is written.
      summary: describes a finished folder, for the terminal.
      output: name of the flag for the folder.
      short: shorter flags for some settings; see `words.flag_name`.
      words: converts a config to command-line words; None to use one flag per setting.
      may_change: the settings that may change when a begun folder of this kind continues.
      without_effect: settings that do not change the result.
      repairs: whether running the command again checks and repairs a finished folder.
      is_whole: whether the files of a finished folder can be read; damaged files are made again.
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
      name: the job's name, unique in its graph.
      kind: kind of the job.
      config: its settings; they contain the paths of other jobs' folders.
      folder: its folder.
      needs: jobs that must be done before it.
    """

    name: str
    kind: Kind
    config: Any
    folder: AnyPath
    needs: tuple[Job, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the folder is complete, according to done.json."""
        return finished_with(self.folder) is not None

    @property
    def state(self) -> str:
        """The state according to the folders: "done", "begun", "ready", or "waiting" for a job that it needs."""
        if self.is_done:
            return "done"
        if not all(job.is_done for job in self.needs):
            return "waiting"
        return "begun" if (self.folder / JOB).exists() else "ready"

    @property
    def words(self) -> tuple[str, ...]:
        """The words after "alignment-gap" in the command that runs only this job."""
        kind = self.kind
        words = kind.words(self.config) if kind.words else flag_words(self.config, kind.short)
        return (*kind.command.split(), *words, f"--{kind.output}={self.folder}")

    @property
    def command(self) -> str:
        """The command that runs only this job."""
        return shlex.join(["alignment-gap", *self.words])


def make(kind: Kind, config: Any, folder: AnyPath, open_bar: OpenBar | None = None) -> bool:
    """Runs a job in its folder, or continues it; returns whether there was anything to do.

    Args:
      kind: kind of the job.
      config: its settings.
      folder: its folder.
      open_bar: opens its progress bar; by default only the first process shows one.

    Raises:
      UserError: a setting or an input cannot be used, or the folder belongs to another job or is in use.
    """
    opened = kind.open(config)
    opened.read_first(folder)
    settings = settings_of(kind, config) | json.loads(json.dumps(dict(opened.facts)))
    # A folder of an earlier version lacks newer settings; their defaults apply.
    unset = json.loads(json.dumps(flatten(defaults(config))))
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(_owned(folder, settings, kind, unset)))
        finished = bool(first_says(lambda: _is_finished(folder, settings, unset) and kind.is_whole(folder)))
        if finished and not kind.repairs:
            return False
        seconds = _clock(folder)
        if not finished:
            on_first_process(lambda: discard_last(folder / DONE))
        with _failure_kept(folder, seconds):
            opened.run(folder, open_bar or functools.partial(progress_bar, silent=not is_first_process()))
        if not finished:
            on_first_process(lambda: _complete(folder, settings, seconds()))
    return not finished


def _clock(folder: AnyPath) -> Callable[[], float]:
    """Returns the seconds since now, plus those of the earlier attempts that the folder tells of."""
    start, earlier = time.monotonic(), 0.0
    for path in (folder / STOPPED, folder / DONE) if is_first_process() else ():
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            earlier = max(earlier, json.loads(path.read_text())["seconds"])  # The later one includes the other.
    return lambda: round(earlier + time.monotonic() - start, 1)


def _complete(folder: AnyPath, settings: Mapping[str, Any], seconds: float) -> None:
    write_last(folder / DONE, {"settings": settings, "seconds": seconds, "version": __version__})
    (folder / STOPPED).unlink(missing_ok=True)


@contextlib.contextmanager
def _failure_kept(folder: AnyPath, seconds: Callable[[], float]) -> Iterator[None]:
    """If the job ends early, keeps its seconds, and its error line, which the state of a graph of jobs shows."""
    if is_first_process():
        (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if is_first_process():
            with contextlib.suppress(OSError, StorageError):  # If the disk is full, the error raised below says so.
                write_json(folder / STOPPED, {"seconds": seconds()})
                if not isinstance(error, Interrupted | KeyboardInterrupt):
                    line = (str(error).strip() or type(error).__name__).splitlines()[0]
                    write_json(folder / FAILED, {"line": line, "may_change": getattr(error, "may_change", ())})
        raise


def _is_finished(folder: AnyPath, settings: Mapping[str, Any], unset: Mapping[str, Any]) -> bool:
    found = finished_with(folder)
    return found is not None and {**unset, **found} == settings


def settings_of(kind: Kind, config: Any) -> dict[str, Any]:
    """A job's settings with dotted keys, as its folder has them beside facts about its inputs."""
    settings: dict[str, Any] = json.loads(json.dumps({"kind": kind.name} | flatten(to_dict(config))))
    return settings


def finished_with(folder: AnyPath) -> Any:
    """The settings in a folder's done.json; None if the file is absent or damaged."""
    try:
        return json.loads((folder / DONE).read_text())["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _remedies(folder: AnyPath) -> list[str]:
    """The settings that may change according to the last failure in a folder."""
    path = folder / FAILED
    return read_json(path, remedy="remove it")["may_change"] if path.exists() else []


@contextlib.contextmanager
def _owned(folder: AnyPath, settings: Mapping[str, Any], kind: Kind, unset: Mapping[str, Any]) -> Iterator[None]:
    with locked(folder):
        path = folder / JOB
        found = read_json(path, remedy="give another folder, restore it, or remove it") if path.exists() else {}
        # A kind may clear what it began in the folder, so it is asked only about its own folders.
        is_own = found.get("kind", settings["kind"]) == settings["kind"]
        if not is_own:
            kinds = f"kind was {found['kind']}, now {settings['kind']}"
            raise UserError(f"{folder} holds another kind of job ({kinds}): give another folder")
        may_change = {*kind.may_change(folder), *_remedies(folder)}
        remedy = "give another folder, or these settings"
        check_settings(path, settings, remedy=remedy, may_change=may_change, defaults=unset)
        write_json(path, settings)
        yield
