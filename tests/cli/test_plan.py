"""The plan command as a user types it."""

import dataclasses
import json
import sys

import pytest

from alignment_gap.cli import plan as command
from alignment_gap.cli.main import main
from alignment_gap.models import DecoderConfig, sizes
from alignment_gap.plan import programs

TINY = DecoderConfig(vocabulary_size=256, layers=1)
FLAGS = ["--topology=cpu:8", "--batch=8", "--prompt_length=16", "--response_length=8"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "plan", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, capsys.readouterr()


def test_a_plan_on_virtual_devices(monkeypatch, capsys, tmp_path):
    path, picture = tmp_path / "new" / "plan.json", tmp_path / "plan.png"
    flags = ["--model=tiny", *FLAGS, "--nosearch", f"--json={path}", f"--picture={picture}"]
    status, said = run(monkeypatch, capsys, *flags)
    assert status == 0
    assert "fits:" in said.out
    values = json.loads(path.read_text())
    assert values["fits"]
    assert values["config"]["lengths"] == {"batch": 8, "prompt": 16, "samples": 2, "response": 8}
    assert values["config"]["model"]["dtype"] == "bfloat16"
    assert [part["name"] for part in values["programs"]] == ["update", "sampling", "labels"]
    assert picture.stat().st_size > 1000


def test_what_does_not_fit_is_exit_status_1_without_a_traceback(monkeypatch, capsys):
    huge = programs.Compiled(parameters=1, state=3, exceeded=2**45)
    monkeypatch.setattr("alignment_gap.plan.plan.compile_program", lambda request: huge)
    monkeypatch.setattr("alignment_gap.plan.plan.make_plan.__defaults__", (lambda request: huge, print))
    status, said = run(monkeypatch, capsys, "--model=tiny", *FLAGS, "--nosearch", "--noevaluate", "--topology=v5e:2x4")
    assert status == 1
    assert "does not fit: 32752.25 GiB a device too many" in said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "no --model"),
        (["--model=tiny"], "no --topology"),
        (["--model=t5_xxxl", "--topology=v5e:16x16"], "'t5_xxxl' is unknown: did you mean t5_x"),
        (["--model=tiny", "--topology=v5f:16x16"], "did you mean v5"),
        (["--model=tiny", "--topology=v5e:16x16", "--layout=fsdb"], "'fsdb' is unknown: did you mean fsdp?"),
        (["--model=tiny", "--topology=v5e:16x16", "--batch=100"], "multiple of"),
        (["--model=tiny", "--topology=v5e:16x16", "--loss=ipa"], "ipo"),
        (["--model=tiny", "--topology=v5e:16x16", "--optimizer=adam"], "adamw"),
        (["--model=tiny", "--topology=v5e:16x16", "--remat=ful"], "full"),
        (["--model=tiny", "--topology=v5e:16x16", "--online", "--proxy=t5_larg"], "did you mean t5_large"),
        (["--model=tiny", "--topology=v5e:16x16", "--picture=plan.pdf"], "ends in .png or .svg"),
        (["--model=tiny", "--topology=v5e:16x16", "more"], "unexpected argument 'more'"),
    ],
)
def test_wrong_flags_are_one_line_and_compile_nothing(monkeypatch, capsys, flags, says):
    monkeypatch.setattr(programs.subprocess, "run", None)
    status, said = run(monkeypatch, capsys, *flags)
    assert status == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1


def test_online_flags(monkeypatch):
    values = command.make_flags()
    values(["plan", "--model=t5_xl", "--topology=v5p:4x4x4", "--online", "--slices=2", "--model_axis=4"])
    config = command.read_config(values)
    assert (config.golden, config.proxy) == tuple(
        dataclasses.replace(sizes.get(name), dtype="bfloat16") for name in ("t5_xxl", "t5_large")
    )
    assert config.topology.devices == 128
    assert config.mesh.slices == 2
