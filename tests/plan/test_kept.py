"""Programs are compiled once, and a folder keeps the compiler's figures."""

import dataclasses

import pytest
from made_up import POLICY, compile_, online_config, update_config
from planning import program_of, replaced

from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, LossConfig, OnlineConfig
from alignment_gap.plan import kept as module
from alignment_gap.plan.kept import kept, program_key
from alignment_gap.plan.roofline import Moved
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding.chips import parse_topology
from alignment_gap.training import GuardConfig, OptimizerConfig

MOVED = (Moved("all-gather", "fsdp", 8, 3, 2**20, 0.25), Moved("all-reduce", "model", 2, 1, 2**10, 0.5))


def with_collectives(config, program):
    return dataclasses.replace(compile_(config, program), collectives=MOVED)


def never(config, program):
    raise AssertionError("compiled")


def say_nothing(line):
    """The plan has nobody to tell."""


def keys(**settings):
    config = update_config(**settings)
    return program_key(config, config.programs[0])


def test_a_stopped_plan_continues_from_its_folder(tmp_path):
    config, said = online_config(), []
    first = [kept(tmp_path / "kept", said.append, with_collectives)(config, each) for each in config.programs]
    assert said[0] == "compiling update for 8 devices of v5e:2x4, batch 64, width 64"
    assert len(said) == len(config.programs) and len([*(tmp_path / "kept").iterdir()]) == len(config.programs)
    again = [kept(tmp_path / "kept", said.append, never)(config, each) for each in config.programs]
    assert again == first and first[0].collectives == MOVED
    assert len(said) == len(config.programs)


def test_other_sources_compile_again(tmp_path, monkeypatch):
    config = update_config()
    kept(tmp_path, say_nothing, compile_)(config, config.programs[0])
    monkeypatch.setattr(module, "_sources_digest", lambda: "other")
    with pytest.raises(AssertionError, match="compiled"):
        kept(tmp_path, say_nothing, never)(config, config.programs[0])


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file.kept \(Not a directory\): give a folder"):
        kept(tmp_path / "file" / "kept", say_nothing, never)


def test_a_damaged_file_is_named(tmp_path):
    config = update_config()
    kept(tmp_path, say_nothing, compile_)(config, config.programs[0])
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=f"{path.name} is not JSON .*: remove it"):
        kept(tmp_path, say_nothing, never)(config, config.programs[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3, "steps": 7, "log_every": 5, "checkpoint_steps": (3,)},
        {"optimizer": OptimizerConfig(learning_rate=3e-4, warmup_steps=10)},
        {"loss": LossConfig("ipo", {"beta": 0.5})},
        {"source": DatasetConfig("elsewhere", order="recorded", prefetch=5)},
        {"model": POLICY},
        {"reference_log_probs": "stored"},  # The update takes them from its batch wherever they come from.
    ],
)
def test_numbers_and_folders_change_no_program(settings):
    assert keys(**settings) == keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": OptimizerConfig(name="adafactor")},
        {"optimizer": OptimizerConfig(moment_dtype="bfloat16")},
        {"optimizer": OptimizerConfig(clip_norm=None)},
        {"loss": LossConfig("dpo")},
        {"loss": LossConfig("ipo", {"over_tokens": "mean"})},
        {"source": OnlineConfig()},
        {"source": OnlineConfig(refresh_every=4)},
        {"layout": "tensor"},
        {"microbatches": 2},
        {"guard": GuardConfig(spike=3.0)},
        {"reference_every": 4},
        {"batch": 128},
        {"topology": parse_topology("v5e:4x4")},
        {"topology": parse_topology("v5e:2x4", 2)},
        {"model": dataclasses.replace(POLICY, remat="none")},
    ],
    ids=repr,
)
def test_what_changes_an_update_is_another_program(settings):
    if "layout" in settings or "model" in settings:
        model, layout = settings.get("model", POLICY), settings.get("layout", "fsdp")
        config = update_config(model=model)
        job = dataclasses.replace(config.job, mesh=dataclasses.replace(config.job.mesh, layout=layout))
        assert program_key(dataclasses.replace(config, job=job), config.programs[0]) != keys()
    else:
        assert keys(**settings) != keys()


def test_a_judge_does_not_depend_on_the_job_that_asks_it():
    online, offline = online_config(), update_config()
    judge = replaced(program_of("judge"), batch=64)
    held = dataclasses.replace(judge, name="judge golden", holds=True, calls=7)
    assert program_key(online, judge) == program_key(offline, held)
    assert program_key(online, judge) != program_key(online, dataclasses.replace(judge, labels="soft"))


@pytest.mark.parametrize("source", ["source", "fresh"])
@pytest.mark.parametrize(
    "drawn",
    [
        {"sampler": SamplerConfig(top_k=1)},
        {"sampler": SamplerConfig(top_p=0.9)},
        {"sampler": SamplerConfig(weights_dtype="int8")},
        {"mixture": 0.5},
        {"samples": 4},
    ],
    ids=repr,
)
def test_samplers_differ_by_how_tokens_are_drawn(source, drawn):
    sample = replaced(program_of("sample", POLICY), batch=64)

    def key(**settings):
        loss = {"loss": LossConfig("hypo")} if source == "fresh" else {}
        return program_key(update_config(**{source: OnlineConfig(**settings)}, **loss), sample)

    assert key(**drawn) != key()
    assert key(steps_per_draw=1, refresh_every=4) == key()
