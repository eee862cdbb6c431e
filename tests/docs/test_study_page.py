"""The commands of docs/study.md list their jobs, its arm is in the graph, and its tables match the code."""

import contextlib
import gzip
import io
import json
import math
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest
from built_in import write_posts

from alignment_gap.checkpoints.layout import CHECKPOINTS, PARAMS
from alignment_gap.cli.main import main
from alignment_gap.data.text.vocabulary_training import train_vocabulary
from alignment_gap.study.analysis import COLUMNS, METRICS, CheckpointResult
from alignment_gap.study.arms import ARMS, SHAPES, Branch, arms_of
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.report import CLAIM_COLUMNS, JudgeFacts, ReportContext, write_report

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]
ARM, PRETRAINED = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
HASH = re.compile(r"-[0-9a-f]{12}\b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files and folders that the commands name exist here."""
    folder = tmp_path_factory.mktemp("study_page")
    for name in ("prepared/train", "prepared/validation", "helpful/train"):
        write_posts(folder / "runs" / name, 4)
    (folder / "runs" / "imported" / CHECKPOINTS / "1" / PARAMS).mkdir(parents=True)
    train_vocabulary(["a bad cab fed a bee", "a big bag", "bed and bead"] * 9, folder / "pairs.model", 275)
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "a bee", "chosen": "a bed", "rejected": "a cab"}) + "\n")
    (folder / "my_arms.py").write_text(ARM)
    (folder / "configs" / "study").mkdir(parents=True)
    for path in (ROOT / "configs" / "study").glob("*.py"):
        (folder / "configs" / "study" / path.name).symlink_to(path)
    (folder / "configs" / "study" / "pretrained.py").write_text(PRETRAINED)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a command in the folder; returns its exit status and its output."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def run_command(words):
        monkeypatch.setattr(sys, "argv", [word for word in words if not word.startswith("PYTHONPATH=")])
        said, failed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed), pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, said.getvalue() + failed.getvalue()

    return run_command


def is_whole(words):
    return "study" in words and not any(word.startswith("--job=") for word in words)


@pytest.mark.parametrize("words", filter(is_whole, COMMANDS), ids=" ".join)
def test_the_jobs_of_every_study_are_listed(words, run):
    status, said = run([*words, "--list"])
    assert status == 0, said
    assert re.search(r"^seed\d-sft: (ready|waiting)$", said, flags=re.MULTILINE)


def test_the_listing_is_that_of_the_page(run):
    (shown,) = re.findall(r"```text\n(.*?)\.\.\.\n```", TEXT, flags=re.DOTALL)
    listed = next(words for words in COMMANDS if "--list" in words)
    assert HASH.sub("", run(listed)[1]).startswith(HASH.sub("", shown.rstrip()))


def test_a_report_waits_for_the_jobs(run):
    (words,) = (words for words in COMMANDS if "--job=report" in words)
    status, said = run(words)
    assert status == 2 and "jobs are not done" in said


def test_studies_of_the_page_are_put_side_by_side(run, folder, monkeypatch):
    monkeypatch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: b"")
    words, _ = (words for words in COMMANDS if "report" in words)
    folders = next(word.removeprefix("--runs=") for word in words if word.startswith("--runs=")).split(",")
    assert {f"--workdir={each}" for each in folders} <= {word for words in COMMANDS for word in words}
    for each in folders:
        (folder / each).mkdir(parents=True, exist_ok=True)
        (folder / each / "claims.csv").write_text(",".join(CLAIM_COLUMNS) + "\n")
        (folder / each / "results.csv").write_text(",".join(COLUMNS) + "\n")
    assert run(words) == (0, "report: runs/compared/report.html\n")


@pytest.mark.slow
def test_the_pieces_of_the_page_are_pooled(run, folder, monkeypatch):
    monkeypatch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: b"")
    _, words = (words for words in COMMANDS if "report" in words)
    pieces = next(word.removeprefix("--runs=") for word in words if word.startswith("--runs=")).split(",")
    for seed, piece in enumerate(pieces):
        assert ["--config.seeds=1", f"--workdir={piece}"] == [*COMMANDS[_of(f"--workdir={piece}")][-2:]]
        settings = math.nan, math.nan, seed, 0
        results = [CheckpointResult("sft", "sft", *settings, {"kl": np.zeros(4), "win_rate": np.full(4, 0.5)})]
        judges = [JudgeFacts(seed, "golden, held-out human labels", {"the labels": 0.8})]
        write_report(folder / piece, results, ReportContext(StudyConfig(seed=seed), judges=judges))
    assert run(words) == (0, "report: runs/paper/report.html\n")
    assert "seeds 0, 1, 2 checkpoints" in (folder / "runs" / "paper" / "report.html").read_text()


def _of(word):
    """The number of the command that contains a word."""
    return next(number for number, words in enumerate(COMMANDS) if word in words)


def test_a_job_runs_by_its_name(run, folder):
    (words,) = (words for words in COMMANDS if "--job=seed0-data" in words)
    posts = "--config.task.source.posts"
    status, said = run([*words, f"{posts}.pairs=8", f"{posts}.validation_pairs=4", "--config.task.workers=1"])
    assert status == 0, said
    assert [path.name for path in (folder / "runs" / "study" / "jobs").glob("seed0-data-*/*/card.json")]


def test_the_arm_is_semi_online(run, folder):
    lagging = next(words for words in COMMANDS if "my_arms" in " ".join(words))
    status, said = run(lagging)
    assert status == 0, said
    (command,) = (line for line in said.splitlines() if "alignment-gap train " in line and "seed0-lagging-ipo" in line)
    assert "--gin.OnlineConfig.refresh_every=16" in command
    (arm,) = arms_of(("my_arms:LAGGING",))
    assert arm.contrasts[0].other == "online" and {"golden", "proxy", "sft"} <= set(Branch.__dataclass_fields__)


def test_the_shapes_are_those_of_the_code():
    sentence = re.search(r"`shape` is ((?:`[\w-]+`(?:,\s+| or )?)+)\.", TEXT)[1]
    assert tuple(re.findall(r"`([\w-]+)`", sentence)) == SHAPES


def test_the_tables_are_those_of_the_code():
    arms = TEXT[TEXT.index("| arm | its pairs |") : TEXT.index("Two policies are not arms")]
    assert re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", arms, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", arms, flags=re.MULTILINE))) == [
        arm.name for arm in ARMS
    ]
    columns = TEXT[TEXT.index("| column |") : TEXT.index("The prompts are the first")]
    named = re.findall(r"`(\w+)` \*", columns)
    assert named == list(METRICS)
    assert {f"{name}_low" for name in named} <= set(COLUMNS)
