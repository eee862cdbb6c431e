"""The study command: settings and their types, its list, one job of it, and one line for every wrong input."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from alignment_gap.cli import study
from alignment_gap.cli.main import main
from alignment_gap.configuration import from_dict
from alignment_gap.errors import UserError
from alignment_gap.study.config import StudyConfig

ROOT = pathlib.Path(__file__).parents[2]
TINY, HH, SCALING = (f"--config={ROOT / 'configs' / 'study' / name}.py" for name in ("tiny", "hh", "scaling"))
CACHE = f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"


def settings_of(*words):
    _, settings = study.read(["alignment-gap study", *words], lambda values: None, "")
    return settings


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns the exit status and the output."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return run


def test_help_tells_what_there_is():
    run = [sys.executable, "-c", "from alignment_gap.cli.main import main; main()"]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "study" in done.stdout and "losses" in done.stdout
    done = subprocess.run([*run, "study", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"--{flag}" in done.stdout for flag in ("config", "workdir", "[no]list", "job", "[no]update"))


# Settings.


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("seeds=3", 3),
        ("arms.beta=0.5", 0.5),
        ("arms.beta=1", 1),
        ("arms.losses=('dpo',)", ("dpo",)),
        ("arms.checkpoint_steps=(5, 10)", (5, 10)),
        ("policy.tied_embeddings=true", True),
        ("policy.tied_embeddings=False", False),
        # Strings, whatever they look like, and values whose default is None.
        ("name=2024", "2024"),
        ("name=", ""),
        ("prepared=runs/hh", "runs/hh"),
        ("prepared=a=b", "a=b"),
        ("sft.weights=(2, 1)", (2, 1)),
        ("golden.start=None", None),
        ("golden.start=runs/t5", "runs/t5"),
    ],
)
def test_a_setting_is_changed_by_its_key(word, value):
    *groups, name = word.partition("=")[0].split(".")
    settings = settings_of(TINY, f"--config.{word}")
    for group in groups:
        settings = settings[group]
    assert settings[name] == value and type(settings[name]) is type(value)


def test_the_last_of_a_settings_values_counts_and_the_others_stay():
    given = from_dict(StudyConfig, settings_of(TINY, "--config.seeds=3", "--config.arms.beta=1", "--config.seeds=2"))
    plain = from_dict(StudyConfig, settings_of(TINY))
    assert (given.seeds, given.arms.beta, plain.seeds) == (2, 1.0, 1)
    assert given.sft == plain.sft and given.policy == plain.policy


def test_a_config_file_may_take_an_argument(tmp_path):
    file = tmp_path / "named.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config(name): return ConfigDict({'name': name})\n")
    assert settings_of(f"--config={file}:mine") == {"name": "mine"}
    assert settings_of(f"--config={file}:mine", "--config.name=other") == {"name": "other"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config"),
        (["--config=nowhere.py"], "nowhere.py: there is no such file"),
        ([TINY, "--config.arms.bta=1"], "unknown setting --config.arms.bta: did you mean arms.beta?"),
        ([TINY, "--config.arms=1"], "unknown setting --config.arms: did you mean"),
        ([TINY, "--confg=3"], "Unknown command line flag 'confg'"),
        ([TINY, "extra"], "unexpected argument 'extra'"),
        ([TINY, "--config.seeds", "3"], "unexpected argument '3'"),
    ],
)
def test_a_wrong_flag_or_setting_is_one_line(arguments, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        settings_of(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 +", "the config file raises SyntaxError: "),
        ("import nowhere_at_all", "raises ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def get_config(): return {}['a']", "the config file raises KeyError: 'a'"),
        ("def get_config(): raise ValueError('no such kind: choose one')", "ValueError: no such kind: choose one"),
        ("def get_config(): return {'a': 1}", "get_config returns a dict: return a ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_one_line(body, message, tmp_path):
    (tmp_path / "broken.py").write_text(body)
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        settings_of(f"--config={tmp_path / 'broken.py'}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdy"], "unknown command 'stdy': did you mean study?"),
        (["study", TINY, "--config.seeds=many"], "config.seeds is 'many': it must be of type int"),
        (["study", TINY, "--config.arms.losses=ipo"], "config.arms.losses is 'ipo': it must be a tuple"),
        (["study", TINY, "--config.arms.losses=('dpoo',)"], "did you mean 'dpo'"),
        (["study", TINY, "--config.arms.names=('onlin',)"], "'onlin', which is not an arm: did you mean online?"),
        (["study", HH], "there is no source: give the path of a file or folder, or posts for the built-in task"),
        (["study", HH, "--config.task.source.location=nowhere.jsonl"], "nowhere.jsonl"),
        (["study", TINY, "--config.task.source.location=README.md"], "README.md"),
        (["study", TINY, "--config.prepared=nowhere"], "nowhere/train"),
        (["study", TINY, "--config.mesh.model=3", "--config.mesh.data=1"], "mesh data=1, fsdp=1, model=3 takes"),
        (["study", TINY, "--config.policy.dtype=int8"], "dtype is 'int8': choose one of float32, bfloat16"),
        (["study", TINY, "--job=seed0-stf"], "the study has no job 'seed0-stf': did you mean seed0-sft?"),
        (["study", TINY, "--job=report"], "jobs are not done, such as seed0-data: run the study, or these jobs"),
        (["study", SCALING, "--job=seed0-data"], """such as --config.sizes="('t5_30k',)\""""),
        (["study", TINY, "--process=2"], "without a coordinator: give the HOST:PORT"),
    ],
)
def test_the_command_ends_with_status_2_and_one_line(arguments, message, command, tmp_path):
    status, printed = command(*arguments, *[CACHE] * (len(arguments) > 1))
    assert status == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert not list(tmp_path.iterdir())


# The list.


def test_the_list_gives_every_job_with_its_command_and_writes_nothing(command, tmp_path):
    words = ["study", TINY, "--config.seeds=2", "--workdir=a study", CACHE]
    status, printed = command(*words, "--list")
    assert status == 0 and not list(tmp_path.iterdir())
    lines = printed.out.splitlines()
    names = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    per_seed = (len(names) - 1) // 2
    assert names[:2] == ["seed0-data", "seed0-sft"] and names[per_seed] == "seed1-data" and names[-1] == "report"
    assert [name.replace("seed1", "seed0") for name in names[per_seed:-1]] == names[:per_seed]
    assert lines[:3] == ["seed0-data: ready", lines[1], "  needs   nothing"]
    assert lines[1].startswith("  folder  a study/jobs/seed0-data-")
    commands = [shlex.split(line) for line in lines if line.startswith("  alignment-gap ")]
    assert len(commands) == len(names)
    assert {words[1] for words in commands} == {"data", "train", "evaluate", "study"}
    assert commands[-1] == ["alignment-gap", *words, "--job=report"]


def test_the_list_of_sizes_is_one_after_the_other(command):
    status, printed = command(
        "study", SCALING, "--config.sizes=('palm_30k', 'palm_300k')", "--config.seeds=1", CACHE, "--list"
    )
    assert status == 0
    commands = [shlex.split(line) for line in printed.out.splitlines() if line.startswith("  alignment-gap study")]
    assert [words[-2:] for words in commands] == [
        *([f"--config.sizes=('{size}',)", "--job=report"] for size in ("palm_30k", "palm_300k")),
        [CACHE, "--job=report"],
    ]


def test_the_report_over_sizes_is_a_job_and_the_last_that_is_launched(command):
    words = ["study", SCALING, "--config.sizes=('palm_30k', 'palm_300k')", "--config.seeds=1", CACHE]
    status, printed = command(*words, "--job=report")
    assert status == 2 and "jobs are not done" in printed.err
    status, printed = command("launch", "--engine=slurm", "--dry_run", *words)
    assert status == 0
    last = printed.out.rpartition("# sbatch")[2]
    # The order of these two is not defined.
    assert "--dependency=afterok:<palm_300k-report>:<palm_30k-report>\n" in last
    assert last.splitlines()[2] == "#SBATCH --job-name=report"
    assert f"study {shlex.quote(SCALING)}" in last and "--job=report" in last


def test_a_job_beside_the_list_is_refused(command):
    status, printed = command("study", TINY, CACHE, "--list", "--job=nope")
    assert status == 2 and "--list prints all jobs, but --job=nope names one: leave one of them out" in printed.err


def test_a_folder_of_another_config_is_refused(command, tmp_path):
    """Before any job runs. Otherwise one report would mix two configs."""
    folder = tmp_path / "runs" / "study"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text('{"seeds": 5}')
    for launch in ([], ["launch", "--engine=slurm"]):
        status, printed = command(*launch, "study", TINY, CACHE)
        assert status == 2 and "--update" in printed.err and printed.err.count("\n") == 1
        assert "was made with other settings" in printed.err and not printed.out
    assert {path.name for path in folder.iterdir()} <= {"study.json", ".lock"}
