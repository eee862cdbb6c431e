"""A command in place of a job: it succeeds, fails, dies or saves when told to, and leaves the files of a job."""

import pathlib
import sys

import pytest

# Makes slurm_cluster importable from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from alignment_gap.launch import local, slurm
from alignment_gap.launch.tasks import Task

PROGRAM = """
import os, pathlib, signal, sys, time
behaviour, folder = sys.argv[1], pathlib.Path(sys.argv[2])
numbered = [word for word in sys.argv if word.startswith("--process=")]
number = int(numbered[0].partition("=")[2]) if numbered else int(os.environ.get("SLURM_PROCID", 0))
folder.mkdir(parents=True, exist_ok=True)
attempt = len(list(folder.glob(f"attempt-{number}-*")))
(folder / f"attempt-{number}-{attempt}").touch()
with (folder.parent / "order.txt").open("a") as order:
    order.write(f"{folder.name}\\n")

def save(*_):
    (folder / f"saved-{number}").touch()
    os._exit(75)

if behaviour == "fails":
    print("error: it fails: mend it")
    sys.exit(2)
if behaviour == "dies" and attempt == 0 and number == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "dies" and attempt == 0:
    time.sleep(600)
if behaviour == "dies-with-a-line" and attempt == 0:
    time.sleep(1 + number)
    os.kill(os.getpid(), signal.SIGKILL) if number == 0 else sys.exit(2)
if behaviour == "saves" and attempt == 0:
    signal.signal(signal.SIGTERM, save)
    (folder / "job.json").write_text("{}")
    time.sleep(600)
if number == 0:
    (folder / "done.json").write_text('{"settings": {}}')
"""


@pytest.fixture
def task_of(tmp_path, monkeypatch):
    """Makes tasks of the command above: `task_of(name, behaviour, *needs)`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for engine in (local, slurm):
        monkeypatch.setattr(engine, "COMMAND", (sys.executable, str(program)))

    def make(name, behaviour="ends", *needs, **settings):
        folder = tmp_path / "jobs" / name
        return Task(name, (behaviour, str(folder)), folder, needs, **settings)

    return make


@pytest.fixture
def attempts(tmp_path):
    """The number of attempts at each job; the order is that of the first attempts."""

    def count():
        names = (tmp_path / "jobs" / "order.txt").read_text().split()
        return {name: names.count(name) for name in names}

    return count
