"""The pooled report of a study's pieces equals that of the whole; anything else is refused in one line."""

import dataclasses
import datetime
import math
import sys

import numpy as np
import pytest

from alignment_gap.cli.main import main
from alignment_gap.errors import UserError
from alignment_gap.folders import at
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.config import ArmsConfig, StudyConfig
from alignment_gap.study.outcomes import OUTCOMES, read_outcomes, write_outcomes
from alignment_gap.study.pool import write_pooled
from alignment_gap.study.report import FACTS, JudgeFacts, ReportContext, write_report

CONFIG = StudyConfig(arms=ArmsConfig(names=("online", "offline"), losses=("ipo",)))
TABLES = ("results.csv", "claims.csv", "outcomes.npz", "facts.json")


def results(seed):
    """Online is better. The metrics have different numbers of examples, and the proxy has only one metric."""
    rng = np.random.default_rng(seed)
    found = []
    for arm, kl, rate in (("sft", 0.0, 0.3), *((arm, k, rate) for k in (1.0, 3.0) for arm, rate in ARMS)):
        outcomes = {
            "win_rate": rng.choice([0.0, 0.5, 1.0], size=40, p=[0.9 - rate, 0.1, rate]),
            "kl": np.full(8, kl),
            "rubric": rng.random(40),
        }
        setting = ("sft", math.nan, math.nan) if arm == "sft" else ("ipo", 0.1, 1e-3)
        found.append(CheckpointResult(arm, *setting, seed, int(kl), outcomes))
    proxy = ("proxy", "preference", math.nan, math.nan)
    return [*found, CheckpointResult(*proxy, seed, 5, {"heldout_accuracy": rng.choice([0.0, 1.0], size=12)})]


ARMS = (("online", 0.7), ("offline", 0.4))


def context(*seeds, **changes):
    return ReportContext(
        config=dataclasses.replace(CONFIG, seed=seeds[0], seeds=len(seeds), **changes),
        versions={"jax": "0.10.2"},
        judges=[JudgeFacts(seed, "golden, held-out human labels", {"the labels": 0.8}) for seed in seeds],
        wall_time={f"seed{seed}-sft": datetime.timedelta(seconds=60 + seed) for seed in seeds},
    )


def piece(folder, *seeds, **changes):
    write_report(folder, [each for seed in seeds for each in results(seed)], context(*seeds, **changes))
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    root = at(tmp_path_factory.mktemp("pieces"))
    return piece(root / "first", 0, 1), piece(root / "second", 2)


def test_outcomes_are_kept_exactly(tmp_path):
    written = results(3)
    # float32 holds the first array exactly, but not the second.
    written[1].outcomes["kl"] = np.float32([0.1, 2.5, 3.7]).astype(np.float64)
    written[2].outcomes["kl"] = np.array([0.1, math.pi])
    write_outcomes(at(tmp_path), written)
    for result, again in zip(written, read_outcomes(at(tmp_path)), strict=True):
        assert repr(dataclasses.replace(again, outcomes={})) == repr(dataclasses.replace(result, outcomes={}))
        assert set(again.outcomes) == set(result.outcomes)
        for metric, values in result.outcomes.items():
            np.testing.assert_array_equal(again.outcomes[metric].astype(np.float64), values)


@pytest.mark.slow
def test_the_pooled_report_is_that_of_one_study(pieces, tmp_path):
    whole = piece(at(tmp_path / "whole"), 0, 1, 2)
    pooled = write_pooled(pieces[::-1], at(tmp_path / "pooled")).parent
    for name in TABLES:
        assert (pooled / name).read_bytes() == (whole / name).read_bytes()
    assert "agrees" in (pooled / "claims.csv").read_text()


@pytest.mark.slow
def test_pools_can_be_pooled(pieces, tmp_path):
    pooled = write_pooled(pieces, at(tmp_path / "pooled")).parent
    more = write_pooled([pooled, piece(at(tmp_path / "more"), 3)], at(tmp_path / "all")).parent
    assert sorted({result.seed for result in read_outcomes(more)}) == [0, 1, 2, 3]


@pytest.mark.slow
def test_what_is_no_piece_is_refused(pieces, tmp_path):
    other = piece(at(tmp_path / "other"), 4, microbatches=2)
    doubled = piece(at(tmp_path / "doubled"), 2)
    (tmp_path / "none").mkdir()

    def damaged(name, file, change):
        folder = piece(at(tmp_path / name), 9)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        return folder

    for folders, line in (
        ([*pieces, other], "microbatches is 1 and 2; leave out --pool"),
        ([*pieces, doubled], "both have seed 2: give each seed once"),
        (pieces[:1], "only one folder in --runs: give all pieces"),
        ([*pieces, at(tmp_path / "none")], "has no facts.json: write its report again"),
        ([*pieces, damaged("cut", OUTCOMES, lambda content: content[:-100])], "cut/outcomes.npz is damaged: write"),
        ([*pieces, damaged("other_file", OUTCOMES, lambda content: b"text")], "other_file/outcomes.npz is damaged"),
        ([*pieces, damaged("lacking", FACTS, lambda content: b"{}")], "lacking/facts.json lacks facts of a report"),
        ([*pieces, damaged("no_json", FACTS, lambda content: content[:9])], "no_json/facts.json"),
    ):
        with pytest.raises(UserError, match=line):
            write_pooled(folders, at(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (pieces[0] / OUTCOMES).rename(tmp_path / OUTCOMES)
    with pytest.raises(UserError, match=f"has no {OUTCOMES}"):
        write_pooled(pieces, at(tmp_path / "out"))
    (tmp_path / OUTCOMES).rename(pieces[0] / OUTCOMES)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    with pytest.raises(UserError, match="holds a study, and this would replace its report"):
        write_pooled(pieces, at(tmp_path / "study"))


@pytest.mark.slow
def test_from_the_command_line(pieces, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "pooled"
    words = ["report", f"--runs={','.join(map(str, pieces))}", "--pool", f"--workdir={folder}"]
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert "seeds 0, 1, 2, 18 checkpoints" in (folder / "report.html").read_text()
