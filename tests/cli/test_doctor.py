"""The doctor names what is missing and for which command; a device that cannot be opened is one line."""

import re
import subprocess
import sys

import pytest

from alignment_gap.cli import doctor
from alignment_gap.cli.main import COMMANDS, main
from alignment_gap.installation import Package

CORE = [Package("jax", ">=0.10.2", "0.10.3"), Package("flax", ">=0.12", "0.12")]


@pytest.fixture
def examine(monkeypatch, capsys, tmp_path):
    """The exit status, and the rows by title, for the given packages and devices."""
    monkeypatch.chdir(tmp_path)

    def run(core=CORE, extras=(), devices='print(\'["tpu", ["4 x TPU v5e"]]\')'):
        monkeypatch.setattr(doctor, "needed", lambda extra="": [*extras] if extra else core)
        monkeypatch.setattr(doctor, "DEVICES", devices)
        monkeypatch.setattr(sys, "argv", ["alignment-gap", "doctor"])
        with pytest.raises(SystemExit) as ended:
            main()
        sections = [section.splitlines() for section in capsys.readouterr().out.strip().split("\n\n")]
        return ended.value.code, {
            title: [re.split(r"\s{2,}", row.strip()) for row in rows] for title, *rows in sections
        }

    return run


def test_all_that_is_needed_is_there(examine):
    status, found = examine()
    assert status == 0
    assert [*found] == ["software", "packages", "devices", "this folder", "commands"]
    assert found["packages"] == [["jax", "0.10.3"], ["flax", "0.12"]]
    assert found["devices"] == [["backend", "tpu"], ["4 x TPU v5e"]]
    assert found["commands"][0] == ["every command", "ready"]
    assert ["compilation cache", ".cache/jax, empty"] in found["this folder"]


def test_a_missing_extra_says_what_to_install_and_is_no_failure(examine):
    status, found = examine(extras=[Package("altair", ">=5.5", None), Package("jinja2", ">=3", "3.1")])
    assert status == 0
    assert ["jinja2", "3.1"] in found["packages"]
    assert ["study", 'all of it: lacks altair: pip install "alignment-gap[study]"'] in found["commands"]


def test_what_every_command_needs_is_a_failure_where_it_will_not_do(examine):
    status, found = examine(core=[Package("jax", ">=0.10.2", "0.9"), Package("flax", ">=0.12", None)])
    assert status == 1
    assert ["jax", '0.9 older than 0.10.2: pip install "jax>=0.10.2"'] in found["packages"]
    remedy = 'lacks jax>=0.10.2, flax: pip install "jax>=0.10.2" "flax>=0.12"'
    assert found["commands"][0] == ["every command", remedy]


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ("raise RuntimeError('the TPU is in use')", "cannot be opened: RuntimeError: the TPU is in use"),
        ("import os; os._exit(134)", "cannot be opened: exit status 134"),
        ("import time; time.sleep(60)", "jax opened no device in 1 s: another process may hold them"),
    ],
)
def test_a_device_that_cannot_be_opened_is_one_line(devices, says, examine, monkeypatch):
    monkeypatch.setattr(doctor, "LONGEST", 1)
    status, found = examine(devices=devices)
    assert (status, found["devices"]) == (0, [["backend", says]])


def test_programs_of_engines_are_looked_for(examine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/sbatch" if name == "sbatch" else None)
    _, found = examine()
    assert ["launch", "--engine=slurm: ready"] in found["commands"]
    assert ["launch", "--engine=jobset: this machine has no kubectl"] in found["commands"]


def test_its_rows_are_of_commands():
    assert {command.split()[0] for command, _, _ in doctor.EXTRAS} <= {*COMMANDS}


def test_it_needs_the_standard_library_alone():
    """So the doctor can report that jax or absl is missing."""
    program = "import sys, alignment_gap.cli.doctor\nprint({'jax', 'absl', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_devices_of_this_machine():
    done = subprocess.run([sys.executable, "-c", doctor.DEVICES], capture_output=True, text=True, check=True)
    assert done.stdout == '["cpu", ["8 x cpu, not in the table of chips: metrics have no MFU"]]\n'
