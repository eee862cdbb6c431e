"""The smallest runs that other jobs start from, ask or measure."""

import dataclasses
import functools
import pathlib
import sys

import pytest

# Makes job_runs importable from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from built_in import write_posts
from job_runs import MODEL, run_job

from alignment_gap.jobs import assembly
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.judges import JudgeConfig
from alignment_gap.training import OptimizerConfig

# The package caches few update steps, enough for a study. These tests switch between more settings.
assembly._traced_once = functools.lru_cache(maxsize=32)(assembly._traced_once.__wrapped__)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """The folder of 48 pairs of the built-in task."""
    folder = tmp_path_factory.mktemp("jobs") / "pairs"
    write_posts(folder, 48)
    return folder


@pytest.fixture(scope="session")
def sft_config(pairs):
    return JobConfig(
        model=MODEL,
        loss=LossConfig("sft"),
        source=DatasetConfig(str(pairs), batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=6,
        checkpoint_every=2,
        log_every=1,
    )


@pytest.fixture(scope="session")
def sft(sft_config, tmp_path_factory):
    """The folder of a finished supervised run."""
    return run_job(sft_config, tmp_path_factory.mktemp("jobs") / "sft")


@pytest.fixture(scope="session")
def judge(sft, sft_config, tmp_path_factory):
    """The folder of a pairwise preference model."""
    config = dataclasses.replace(sft_config, kind="pairwise", start=str(sft), steps=4)
    return run_job(config, tmp_path_factory.mktemp("jobs") / "judge")


@pytest.fixture(scope="session")
def prompts(pairs):
    return DatasetConfig(str(pairs), batch_size=8)


@pytest.fixture(scope="session")
def online(sft, judge, prompts):
    """Online IPO against the judge."""
    return JobConfig(
        loss=LossConfig("ipo", {"beta": 0.1}),
        source=OnlineConfig(prompts, judge=JudgeConfig(str(judge))),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        start=str(sft),
        steps=6,
        checkpoint_every=2,
        log_every=1,
        seed=5,
    )


@pytest.fixture(scope="session")
def reward_model(sft, sft_config, tmp_path_factory):
    """The folder of a Bradley-Terry model."""
    config = dataclasses.replace(sft_config, kind="bradley_terry", start=str(sft), steps=4)
    return run_job(config, tmp_path_factory.mktemp("jobs") / "rewards")
