"""A study runs to its report, goes on after a kill with the same numbers, and redoes only what a change affects."""

import csv
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import card_text, find_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import locked
from alignment_gap.study import artefacts
from alignment_gap.study.config import validate
from alignment_gap.study.run import run_study

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("nano", HERE / "nano.py")
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)

COLUMNS = ["arm", "loss", "beta", "learning_rate", "seed", "step", "kl", "win_rate", "win_rate_low", "win_rate_high"]
COLUMNS += ["win_rate_sft", "proxy_win_rate", "rubric", "accuracy", "chosen_log_ratio", "rejected_log_ratio", "length"]


def quiet(line):
    del line


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished nano study."""
    folder = tmp_path_factory.mktemp("study")
    run_study(nano.nano_study(), folder, say=quiet)
    return folder


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_report_and_a_row_for_every_checkpoint_of_every_arm_are_there(finished):
    found = rows(finished)
    assert [column for column in COLUMNS if column not in found[0]] == []
    arms = [(row["arm"], row["step"]) for row in found]
    assert sorted(arms) == sorted(
        [("sft", "0"), *((arm, step) for arm in ("golden", "online", "shuffled", "offline") for step in ("2", "4"))]
    )
    page = (finished / "report.html").read_text()
    assert "http-equiv" in page and "<script src" not in page
    assert len(list((finished / "figures").glob("*.png"))) >= 4
    assert all(
        0 <= float(row["win_rate_low"]) <= float(row["win_rate"]) <= float(row["win_rate_high"]) for row in found
    )


def test_the_origin_has_no_divergence_and_classifies_nothing(finished):
    (origin,) = (row for row in rows(finished) if row["arm"] == "sft")
    assert float(origin["kl"]) == 0
    assert float(origin["accuracy"]) == 0.5
    assert float(origin["chosen_log_ratio"]) == float(origin["rejected_log_ratio"]) == 0


def test_a_finished_study_runs_no_stage_again(finished):
    lines = []
    before = {path: path.stat().st_mtime_ns for path in (finished / "artefacts").rglob("*") if path.is_file()}
    run_study(nano.nano_study(), finished, say=lines.append)
    stages = [line for line in lines if line.startswith("[")]
    assert stages and all("finished before" in line for line in stages)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "artefacts").rglob("*") if path.is_file()}


def test_the_datasets_of_a_study_lead_back_to_the_human_pairs(finished):
    (record,) = (finished / "artefacts").glob("seed0-online-*/record")
    text = card_text(open_dataset(record))
    steps = [line.strip() for line in text.splitlines() if line.strip() in ("online", "relabel", "posts")]
    assert steps == ["online", "relabel", "posts"]
    (golden,) = (path.name for path in (finished / "artefacts").glob("seed0-golden-????????????"))
    assert f"preference_model: {golden}" in text
    assert find_vocabulary(open_dataset(record)).digest == open_dataset(record).card.vocabulary_digest


class Killed(BaseException):
    """Stands for a kill: no handler of the study's catches it."""


@pytest.mark.parametrize("after", [4, 20])
def test_a_study_stopped_in_the_middle_of_a_stage_ends_with_the_same_numbers(finished, tmp_path, monkeypatch, after):
    make, units = artefacts.make, 0

    def stopping(stage, root, progress):
        def counted(newly):
            nonlocal units
            units += newly
            progress(newly)
            if units >= after:
                raise Killed

        return make(stage, root, counted)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(artefacts, "make", stopping)
        run_study(nano.nano_study(), tmp_path, say=quiet)
    assert not (tmp_path / "results.csv").exists()
    assert list((tmp_path / "artefacts").glob("*.partial"))
    run_study(nano.nano_study(), tmp_path, say=quiet)
    assert (tmp_path / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


def test_the_command_killed_with_signal_9_goes_on_to_the_same_numbers(finished, tmp_path, without_tensorflow):
    """Also: all of the study runs in a process that cannot import TensorFlow."""
    command = [sys.executable, "-c", "from alignment_gap.cli.main import main; main()", "study"]
    command += [f"--config={HERE / 'nano.py'}", f"--workdir={tmp_path}"]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax-tests")
    command.append(f"--compilation_cache={cache}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=without_tensorflow)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "artefacts").glob("seed0-online-*.partial/checkpoints/2")):
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline, "the online arm did not reach its first checkpoint"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not list((tmp_path / "artefacts").glob("seed0-shuffled-*"))
    done = subprocess.run(command, capture_output=True, text=True, env=without_tensorflow)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'report.html'}" in done.stdout
    assert (tmp_path / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


def test_another_config_in_the_folder_is_refused_and_update_redoes_only_what_depends_on_it(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    config = nano.nano_study()
    changed = dataclasses.replace(config, proxy=dataclasses.replace(config.proxy, steps=5))
    with pytest.raises(UserError, match=r"proxy\.steps was 4, now 5.*--workdir, or --update"):
        run_study(changed, folder, say=quiet)
    before = {path.name for path in (folder / "artefacts").iterdir()}
    run_study(changed, folder, update=True, say=quiet)
    new = {path.name.rpartition("-")[0] for path in (folder / "artefacts").iterdir() if path.name not in before}
    arm = "ipo-beta0.1-lr0.01"
    assert new == {
        "seed0-proxy",
        f"seed0-online-{arm}",
        f"seed0-shuffled-{arm}",
        "seed0-evaluation-sft",
        *(f"seed0-evaluation-{name}-{arm}" for name in ("golden", "online", "shuffled", "offline")),
    }


def test_two_runs_in_one_folder_are_refused(finished):
    with locked(finished), pytest.raises(UserError, match="is in use by another run"):
        run_study(nano.nano_study(), finished, say=quiet)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seeds", 0, "seeds is 0: it must be at least 1"),
        ("arms.losses", ("ippo",), "did you mean 'ipo'"),
        ("arms.checkpoint_steps", (4, 2), "must be increasing"),
        ("arms.beta", 0.0, "all must be above 0"),
        ("arms.batch_size", 6, "arms.batch_size is 6: it must be a multiple of data . fsdp = 4"),
        ("golden.kind", "triple", "golden.kind is 'triple': choose one of pairwise, bradley_terry"),
        ("proxy.initialisation", "base", "proxy.initialisation is 'base': choose one of sft, random"),
        ("evaluation.kl_prompts", 17, "over evaluation.prompts=16"),
        ("mesh.model", 3, "mesh data=-1, fsdp=2, model=3 takes a multiple of 6 devices but 8 are present"),
        ("task.pairs", 0, "task.pairs=0 is out of range"),
        ("golden.model.width", 32, "golden.model differs from the policy"),
    ],
)
def test_a_setting_that_cannot_run_is_named_before_any_work(path, value, message):
    def replaced(config, keys):
        inner = replaced(getattr(config, keys[0]), keys[1:]) if keys[1:] else value
        return dataclasses.replace(config, **{keys[0]: inner})

    with pytest.raises(UserError, match=message):
        validate(replaced(nano.nano_study(), path.split(".")), devices=8)


def test_a_vocabulary_that_does_not_fit_the_model_is_named_before_any_work(tmp_path):
    config = nano.nano_study()
    small = dataclasses.replace(config.policy, vocabulary_size=50)
    judge = dataclasses.replace(config.golden, model=small)
    config = dataclasses.replace(config, policy=small, golden=judge, proxy=judge)
    with pytest.raises(UserError, match="vocabulary_size=50 but the task's vocabulary has"):
        run_study(config, tmp_path, say=quiet)
    assert not (tmp_path / "artefacts").exists()
