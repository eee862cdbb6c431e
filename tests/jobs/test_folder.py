"""The folder of a job: complete or absent, one owner at a time, and continued only with the same settings."""

import contextlib
import dataclasses
import errno
import itertools
import json
import pathlib
import shlex
import subprocess
import sys
import types

import pytest
from job_runs import Bar

from alignment_gap.cli.main import guarded
from alignment_gap.errors import Interrupted, UserError
from alignment_gap.folders import JOB
from alignment_gap.jobs.folder import DONE, FAILED, STOPPED, Job, Kind, Opened, finished_with, make
from alignment_gap.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a job that writes a file."""

    text: str = "a"
    limit: int | None = None
    speed: int = 1
    mesh: MeshConfig = MeshConfig()


def kind_of(run, facts=None, **changes):
    """A kind of job that calls `run`."""
    return Kind(
        **{
            "name": "write",
            "command": "data write",
            "config": Config,
            "open": lambda config: Opened(facts or {"input": "digest"}, lambda folder, bar: run(config, folder)),
            "summary": str,
            "may_change": lambda folder: ("speed",),
        }
        | changes
    )


def write(config, folder):
    (folder / "out.txt").write_text(config.text)


def test_a_job_is_made_once_and_says_what_it_was_made_from(tmp_path):
    ran = []
    kind, folder = kind_of(lambda config, folder: ran.append(config) or write(config, folder)), tmp_path / "a" / "job"
    assert make(kind, Config("b"), folder, Bar())
    settings = json.loads((folder / JOB).read_text())
    assert (settings["kind"], settings["text"], settings["limit"], settings["input"]) == ("write", "b", None, "digest")
    assert settings["mesh.layout"] == "data"
    done = json.loads((folder / DONE).read_text())
    assert done["settings"] == settings == finished_with(folder) and done["seconds"] >= 0
    assert not make(kind, Config("b"), folder, Bar())
    assert ran == [Config("b")]


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        (Config("c"), None, r"text was a, now c"),
        (Config(limit=3), None, r"limit was None, now 3"),
        (Config(), {"input": "other"}, r"input was digest, now other"),
    ],
)
def test_other_settings_or_inputs_are_refused(config, facts, message, tmp_path):
    make(kind_of(write), Config(), tmp_path, Bar())
    with pytest.raises(UserError, match=message):
        make(kind_of(write, facts), config, tmp_path, Bar())
    assert (tmp_path / "out.txt").read_text() == "a"


def test_a_folder_of_an_earlier_version_goes_on_with_the_defaults_of_settings_that_it_did_not_know(tmp_path):
    ran = []
    kind = kind_of(lambda config, folder: ran.append(config))
    make(kind, Config("b"), tmp_path, Bar())
    for name in (JOB, DONE):
        content = json.loads((tmp_path / name).read_text())
        for setting in ("limit", "mesh.layout"):
            content.get("settings", content).pop(setting)
        (tmp_path / name).write_text(json.dumps(content))
    assert not make(kind, Config("b"), tmp_path, Bar()) and len(ran) == 1
    with pytest.raises(UserError, match="limit was None, now 3"):
        make(kind, Config("b", limit=3), tmp_path, Bar())
    # A value that is not in the config, such as the digest of an input, has no default. So it may not be missing.
    with pytest.raises(UserError, match="other was absent, now digest"):
        make(kind_of(write, {"input": "digest", "other": "digest"}), Config("b"), tmp_path, Bar())


def test_another_kind_of_job_is_refused(tmp_path):
    make(kind_of(write), Config(), tmp_path, Bar())
    line = r"holds another kind of job \(kind was write, now read\): give another folder$"
    with pytest.raises(UserError, match=line):
        make(kind_of(write, name="read"), Config(), tmp_path, Bar())


def test_what_may_change_runs_again_and_is_then_what_it_was_made_with(tmp_path):
    ran = []
    kind = kind_of(lambda config, folder: ran.append(config.speed))
    make(kind, Config(), tmp_path, Bar())
    assert make(kind, Config(speed=2), tmp_path, Bar())
    assert ran == [1, 2] and finished_with(tmp_path)["speed"] == 2


def test_a_job_that_fails_is_not_done_and_goes_on_with_what_it_had(tmp_path):
    seen = []

    def run(config, folder):
        seen.append(sorted(path.name for path in folder.iterdir() if path.name != ".lock"))
        (folder / "half").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make(kind_of(run), Config(), tmp_path, Bar())
    assert finished_with(tmp_path) is None
    make(kind_of(run), Config(), tmp_path, Bar())
    assert seen == [[JOB], ["half", JOB, STOPPED]]
    assert finished_with(tmp_path) is not None and not (tmp_path / STOPPED).exists()


@pytest.mark.parametrize("stop", [RuntimeError("failed"), Interrupted("saved"), KeyboardInterrupt()])
def test_the_seconds_of_a_job_are_those_of_all_its_attempts(stop, tmp_path, monkeypatch):
    """Each attempt takes ten seconds here. More steps of a finished job count too."""
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr("alignment_gap.jobs.folder.time", clock)
    stops = [stop, stop]

    def run(config, folder):
        if stops:
            raise stops.pop()

    def attempt(**changes):
        with contextlib.suppress(type(stop)):
            make(kind_of(run), Config(**changes), tmp_path, Bar())

    def seconds(name):
        return json.loads((tmp_path / name).read_text())["seconds"]

    attempt()
    assert seconds(STOPPED) == 10
    attempt()
    assert seconds(STOPPED) == 20
    attempt()
    assert seconds(DONE) == 30
    attempt()
    assert seconds(DONE) == 30
    stops.append(stop)
    attempt(speed=2)
    assert seconds(STOPPED) == 40
    attempt(speed=2)
    assert seconds(DONE) == 50


def test_the_last_failure_is_kept_until_the_next_attempt(tmp_path):
    """The failure names the settings that its remedy changes. The next attempt may change only these."""
    lines = ["too fast: lower speed", "a bug\nin two lines"]

    def run(config, folder):
        if not lines:
            return
        line = lines.pop(0)
        raise UserError(line, may_change=("speed",)) if "speed" in line else RuntimeError(line)

    kind = kind_of(run)
    with pytest.raises(UserError, match="too fast"):
        make(kind, Config(speed=9), tmp_path, Bar())
    assert json.loads((tmp_path / FAILED).read_text()) == {"line": "too fast: lower speed", "may_change": ["speed"]}
    with pytest.raises(UserError, match="text was a, now b"):
        make(kind, Config("b", speed=8), tmp_path, Bar())
    with pytest.raises(RuntimeError, match="a bug"):
        make(kind, Config(speed=8), tmp_path, Bar())
    assert json.loads((tmp_path / FAILED).read_text()) == {"line": "a bug", "may_change": []}
    assert make(kind, Config(speed=8), tmp_path, Bar())
    assert not (tmp_path / FAILED).exists()


def test_a_folder_that_no_longer_says_that_it_is_done_is_made_again(tmp_path):
    ran = []
    kind = kind_of(lambda config, folder: ran.append(config))
    make(kind, Config(), tmp_path, Bar())
    (tmp_path / DONE).write_text("{")
    assert not Job("job", kind, Config(), tmp_path).is_done
    assert make(kind, Config(), tmp_path, Bar()) and len(ran) == 2
    damaged = dataclasses.replace(kind, is_whole=lambda folder: False)
    assert make(damaged, Config(), tmp_path, Bar()) and len(ran) == 3


def test_what_cannot_be_opened_leaves_no_folder(tmp_path):
    def refuse(config):
        raise UserError("no such input")

    with pytest.raises(UserError, match="no such input"):
        make(kind_of(write, open=refuse), Config(), tmp_path / "job", Bar())
    assert not (tmp_path / "job").exists()


def test_a_kind_that_repairs_looks_through_a_finished_folder(tmp_path):
    ran = []
    kind = kind_of(lambda config, folder: ran.append(1) or write(config, folder), repairs=True)
    assert make(kind, Config(), tmp_path, Bar())
    done = (tmp_path / DONE).read_bytes()
    (tmp_path / "out.txt").unlink()
    assert not make(kind, Config(), tmp_path, Bar())
    assert len(ran) == 2 and (tmp_path / "out.txt").exists() and (tmp_path / DONE).read_bytes() == done


HOLD = """
import pathlib, sys
from alignment_gap.folders import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_owner_ends(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use"):
            make(kind_of(write), Config(), tmp_path, Bar())
        owner.kill()
    # A killed owner holds no lock.
    assert make(kind_of(write), Config(), tmp_path, Bar())


def test_the_state_of_a_job_is_read_from_the_folders(tmp_path):
    first = Job("first", kind_of(write), Config(), tmp_path / "first")
    second = Job("second", kind_of(write), Config("b"), tmp_path / "second", (first,))
    assert (first.state, second.state) == ("ready", "waiting")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / JOB).write_text("{}")
    assert first.state == "begun"
    (tmp_path / "first" / JOB).unlink()
    make(first.kind, first.config, first.folder, Bar())
    assert (first.state, second.state, first.is_done, second.is_done) == ("done", "ready", True, False)


def test_the_command_of_a_job_holds_what_is_not_the_default(tmp_path):
    config = Config("it's b", mesh=MeshConfig(layout="fsdp"))
    job = Job("a", kind_of(write, output="workdir", short={"text": "t"}), config, tmp_path / "a b")
    words = shlex.split(job.command)
    assert words[:3] == ["alignment-gap", "data", "write"]
    assert words[3:] == ["--t=it's b", "--mesh.layout=fsdp", f"--workdir={tmp_path / 'a b'}"]


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, capsys):
    make(kind_of(write), Config(), tmp_path / "done", Bar())

    def full(config, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "params"))

    assert guarded(lambda: make(kind_of(full), Config(), tmp_path / "b", Bar()) and None) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the disk is full") and message.count("\n") == 1
    assert finished_with(tmp_path / "done") and finished_with(tmp_path / "b") is None


def test_a_full_disk_reported_in_another_library_s_words_is_recognised(capsys):
    def full():
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    assert guarded(full) == 2
    assert "free some space" in capsys.readouterr().err


def test_any_other_failure_keeps_its_traceback():
    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        guarded(bug)
