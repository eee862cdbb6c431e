"""The study command: its help, and one line for every wrong input."""

import pathlib
import subprocess
import sys

import pytest

from alignment_gap.cli import study
from alignment_gap.cli.main import main
from alignment_gap.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
TINY, HH = (f"--config={ROOT / 'configs' / 'study' / name}" for name in ("tiny.py", "hh.py"))


def test_help_tells_what_there_is():
    run = [sys.executable, "-c", "from alignment_gap.cli.main import main; main()"]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "study" in done.stdout and "losses" in done.stdout
    done = subprocess.run([*run, "study", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--config" in done.stdout and "--workdir" in done.stdout


def test_settings_change_by_their_key():
    values, settings = study.parse(["study", TINY, "--config.seeds=3", "--config.arms.beta=0.5", "--workdir=x"])
    assert (settings["seeds"], settings["arms"]["beta"], values.workdir) == (3, 0.5, "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config"),
        (["--config=nowhere.py"], "nowhere.py: there is no such file"),
        ([TINY, "--config.arms.bta=1"], "unknown setting --config.arms.bta: did you mean --config.arms.beta?"),
        ([TINY, "--config.seeds=many"], "--config.seeds=many: invalid literal"),
        ([TINY, "--confg=3"], "Unknown command line flag 'confg'"),
        ([TINY, "extra"], "unexpected argument 'extra'"),
    ],
)
def test_a_wrong_flag_or_setting_is_one_line(arguments, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        study.parse(["alignment-gap study", *arguments])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdy"], "unknown command 'stdy': did you mean study?"),
        (["study", TINY, "--config.arms.losses=('dpoo',)"], "did you mean 'dpo'"),
        (["study", HH], "task.source.location is not set"),
        (["study", TINY, "--config.mesh.model=3", "--config.mesh.data=1"], "mesh data=1, fsdp=1, model=3 takes"),
        (["study", TINY, "--config.policy.dtype=int8"], "dtype is 'int8': choose one of float32, bfloat16"),
    ],
)
def test_the_command_ends_with_status_2_and_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *arguments, *([f"--workdir={tmp_path}"] * (len(arguments) > 1))])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
