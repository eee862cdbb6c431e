"""`alignment-gap launch --sweep` runs one training job for each value, once, and writes a page that compares them."""

import json
import shlex

import pytest
from built_in import write_posts

from alignment_gap.cli import launch
from alignment_gap.errors import UserError

TINY = {"VOCABULARY_SIZE": 136, "T5Config.width": 16, "T5Config.encoder_layers": 1, "T5Config.decoder_layers": 1}
SMALL = TINY | {"T5Config.heads": 2, "T5Config.head_size": 8, "T5Config.mlp_width": 16, "BATCH_SIZE": 8}


@pytest.fixture
def words(tmp_path):
    """A training job of two steps."""
    write_posts(tmp_path / "pairs", 16)
    settings = SMALL | {"DATASET": tmp_path / "pairs", "TRAIN_STEPS": 2}
    gin = [f"--gin.{name}={value}" for name, value in settings.items()]
    return ["train", "--gin_file=runs/sft.gin", *gin, f"--workdir={tmp_path / 'sweep'}", "--compilation_cache="]


def run(*words):
    launch.main(["alignment-gap launch", *words])


@pytest.mark.slow
def test_a_job_for_each_value_is_run_once_and_compared(words, tmp_path, capsys):
    run("--sweep=LEARNING_RATE=1e-3,3e-2", *words)
    folders = [tmp_path / "sweep" / name for name in ("lr0.001", "lr0.03")]
    for folder, rate in zip(folders, (1e-3, 3e-2), strict=True):
        settings = json.loads((folder / "done.json").read_text())["settings"]
        assert settings["optimizer.learning_rate"] == rate and settings["steps"] == 2
    page = (tmp_path / "sweep" / "compared" / "report.html").read_text()
    assert "lr0.001" in page and "lr0.03" in page
    before = [(folder / "done.json").stat().st_mtime_ns for folder in folders]
    capsys.readouterr()
    run("--sweep=LEARNING_RATE=1e-3,3e-2", *words)
    said = capsys.readouterr().out
    assert "report: done" in said and "lr0" not in said
    assert [(folder / "done.json").stat().st_mtime_ns for folder in folders] == before
    run("--sweep=LEARNING_RATE=1e-3,3e-2,0.1", "--status", *words)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["lr0.001", "done"],
        ["lr0.03", "done"],
        ["lr0.1", "ready"],
        ["report", "waiting", "for", "lr0.1"],
    ]
    # With other settings no job is done; more steps continue it.
    more = [word.replace("TRAIN_STEPS=2", "TRAIN_STEPS=3") for word in words]
    run("--sweep=LEARNING_RATE=1e-3,3e-2", "--status", *more)
    assert capsys.readouterr().out.count("done with other settings") == 2
    run("--sweep=LEARNING_RATE=1e-3,3e-2", *more)
    for folder in folders:
        assert json.loads((folder / "done.json").read_text())["settings"]["steps"] == 3


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_any_engine_is_given_the_commands_with_each_value_and_its_folder(engine, words, tmp_path, capsys):
    run(f"--engine={engine}", "--dry_run", "--sweep=OptimizerConfig.clip_norm=0.5,None", *words)
    said = capsys.readouterr().out
    for name, value in (("clip_norm0.5", "0.5"), ("clip_normNone", "None")):
        expected = [f"--gin.OptimizerConfig.clip_norm={value}", f"--workdir={tmp_path / 'sweep' / name}"]
        assert any(set(expected) <= {*shlex.split(line)} for line in said.splitlines() if "--gin." in line), said
    assert f"--workdir={tmp_path / 'sweep'} " not in said
    assert "report" in said and not (tmp_path / "sweep").exists()
    apart = [part for word in words for part in (word.split("=", 1) if word.startswith("--workdir=") else [word])]
    run(f"--engine={engine}", "--dry_run", "--sweep=OptimizerConfig.clip_norm=0.5,None", *apart)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("LEARNING_RATE", "write NAME=VALUE,VALUE, such as LEARNING_RATE="),
        ("LEARNING_RATE=1e-3,,1e-4", "write NAME=VALUE,VALUE"),
        ("LEARNING_RATE=1e-3,0.001", "0.001 comes twice"),
        ("LEARNING_RATE=1e-3,fast", "learning_rate"),
        ("BATCH_SIZE=8,16", "the command fixes the setting by --gin.BATCH_SIZE=8: leave one of them out"),
        ("LEARNING_RAT=1e-3,1e-4", "did you mean LEARNING_RATE"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_runs(sweep, message, words, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        run(f"--sweep={sweep}", *words)
    assert "\n" not in str(error.value) and not (tmp_path / "sweep").exists()


def test_gin_files_may_be_on_the_cluster_alone(tmp_path, capsys):
    words = ["train", "--gin_file=on_the_cluster.gin", f"--workdir={tmp_path / 'run'}"]
    run("--engine=slurm", "--dry_run", *words)
    assert "--gin_file=on_the_cluster.gin" in capsys.readouterr().out


def test_settings_of_an_engine_that_is_not_used_are_refused(words, tmp_path):
    for engine in ("here", "local"):
        with pytest.raises(
            UserError, match=f"--slurm. settings are given, but the engine is {engine}: add --engine=slurm"
        ):
            run(f"--engine={engine}", "--slurm.partition=gpu", "--dry_run", *words)


def test_a_study_sweeps_by_its_config():
    with pytest.raises(UserError, match="--sweep needs the command train, not study"):
        run("--sweep=LEARNING_RATE=1e-3,1e-4", "study", "--config=configs/study/tiny.py")
