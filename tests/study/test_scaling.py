"""A scaling study: what its sizes share, and that each is a study of its own."""

import dataclasses
import importlib.util
import pathlib

import jax
import pytest

from alignment_gap.cli.study import parse
from alignment_gap.configuration import from_dict
from alignment_gap.errors import UserError
from alignment_gap.models import sizes
from alignment_gap.sharding import make_mesh
from alignment_gap.study import run
from alignment_gap.study.config import StudyConfig, validate
from alignment_gap.study.stages import seed_stages

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("nano", pathlib.Path(__file__).with_name("nano.py"))
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)


def _scaling(**judge):
    study = nano.nano_study()
    judges = {name: dataclasses.replace(getattr(study, name), **judge) for name in ("golden", "proxy")}
    return dataclasses.replace(study, sizes=("palm_10m", "t5_small"), **judges)


def test_data_and_judges_are_shared_and_nothing_else(tmp_path):
    config = _scaling(initialisation="random")
    mesh = make_mesh(config.mesh)
    first, second = (
        {
            stage.name: stage.folder(tmp_path)
            for stage in seed_stages(run.of_size(config, name), 0, mesh, tmp_path).in_order()
        }
        for name in config.sizes
    )
    assert first.keys() == second.keys()
    shared = {name for name in first if first[name] == second[name]}
    assert shared == {f"seed0-{name}" for name in ("data", "golden", "relabelled", "proxy")}


def test_a_size_keeps_vocabulary_and_computation_of_the_policy():
    config = _scaling()
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, dtype="bfloat16", remat="full"))
    policy = run.of_size(config, "palm_10m").policy
    vocabulary_size = config.policy.vocabulary_size
    assert policy == sizes.get("palm_10m", vocabulary_size=vocabulary_size, dtype="bfloat16", remat="full")


def test_each_size_is_run_in_its_folder_over_the_same_artefacts(tmp_path, monkeypatch):
    calls = []

    def run_study(config, workdir, *, artefacts_folder, update, say):
        del update, say
        calls.append((config.name, workdir, artefacts_folder))

    monkeypatch.setattr(run, "run_study", run_study)
    run.run_sizes(_scaling(initialisation="random"), tmp_path, say=lambda line: None)
    names = ("palm_10m", "t5_small")
    assert calls == [(f"nano {name}", tmp_path / name, tmp_path / "artefacts") for name in names]


def test_judges_that_start_from_the_policy_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"golden\.model differs from the policy.*set golden\.initialisation to random"):
        run.run_sizes(_scaling(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_size_that_there_is_not_is_named(tmp_path):
    with pytest.raises(UserError, match="model size 'palm_10' is unknown: did you mean palm_10m"):
        run.run_sizes(dataclasses.replace(_scaling(), sizes=("palm_10",)), tmp_path)


def test_the_config_file_is_a_scaling_study():
    path = ROOT / "configs" / "study" / "scaling.py"
    _, settings = parse(["study", f"--config={path}", "--config.sizes=('palm_30m',)"])
    study = from_dict(StudyConfig, settings)
    assert study.sizes == ("palm_30m",)
    validate(run.of_size(study, "palm_30m"), jax.device_count())
