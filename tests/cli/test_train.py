"""`alignment-gap train`: gin files in T5X's conventions, and one job that they configure."""

import dataclasses
import pathlib

import pytest
from built_in import write_posts

from alignment_gap import losses
from alignment_gap.cli import train
from alignment_gap.cli.gin_files import read_config
from alignment_gap.cli.main import guarded
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import DecoderConfig, T5Config, make_policy
from alignment_gap.sampling import SamplerConfig

GIN = pathlib.Path(__file__).parents[2] / "gin"
IPO = str(GIN / "runs" / "offline_ipo.gin")
SET = ["DATASET=pairs", "START=runs/sft"]
TINY = ["VOCABULARY_SIZE=136", "T5Config.width=16", "T5Config.encoder_layers=1", "T5Config.decoder_layers=1"]


def test_offline_ipo_builds_the_job():
    config = read_config([IPO], [*SET, "TRAIN_STEPS=7", "BETA=0.5", "OptimizerConfig.clip_norm=2"])
    assert config.loss == LossConfig("ipo", {"beta": 0.5})
    assert (config.steps, config.start, config.source.folder) == (7, "runs/sft", "pairs")
    assert config.optimizer.clip_norm == 2.0
    assert config.model is None
    assert type(read_config([str(GIN / "runs" / "sft.gin")], SET[:1]).model) is T5Config


def test_a_folder_of_runs_beside_it_is_not_taken_for_a_package_of_gin_files(tmp_path, monkeypatch):
    (tmp_path / "runs" / "study").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_config([IPO], SET).source.folder == "pairs"


@pytest.mark.parametrize("file", sorted((GIN / "models").glob("*.gin")), ids=lambda path: path.stem)
def test_every_model_file_is_a_policy(file):
    config = read_config([IPO, str(file)], [*SET, "VOCABULARY_SIZE=77"])
    assert config.model.vocabulary_size == 77
    assert type(config.model) is (T5Config if file.stem.startswith("t5") else DecoderConfig)
    make_policy(config.model)


@pytest.mark.parametrize("file", sorted((GIN / "losses").glob("*.gin")), ids=lambda path: path.stem)
def test_every_loss_file_is_a_loss(file):
    loss = read_config([str(GIN / "runs" / "sft.gin"), str(file)], SET[:1]).loss
    assert loss.name == file.stem
    losses.get(loss.name, **loss.settings)


def test_files_are_found_in_search_paths_and_in_ours(tmp_path):
    (tmp_path / "mine.gin").write_text("include 'runs/sft.gin'\nTRAIN_STEPS = 3\n")
    assert read_config(["mine.gin"], SET[:1], [str(tmp_path)]).steps == 3
    assert read_config(["runs/sft.gin"], SET[:1]).loss.name == "sft"


def test_a_macro_that_files_use_may_be_set():
    config = read_config(["runs/offline.gin"], [*SET, "MODEL=@DecoderConfig()", "DatasetConfig.order=recorded"])
    assert type(config.model) is DecoderConfig
    assert config.source.order == "recorded"


def test_dynamic_registration_as_in_t5x(tmp_path):
    (tmp_path / "model.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from alignment_gap import models\n"
        "MODEL = @models.T5Config()\n"
        "models.T5Config.width = 8\n"
    )
    assert read_config([IPO, str(tmp_path / "model.gin")], SET).model.width == 8


BAD = {
    "no file": ([], [], "no --gin_file"),
    "missing file": (["nowhere.gin"], [], "--gin_file=nowhere.gin: there is no such file"),
    "macro": ([IPO], [*SET, "TRAIN_STEP=3"], "--gin.TRAIN_STEP: .* did you mean TRAIN_STEPS?"),
    "macro that nothing reads": (
        [IPO],
        [*SET, "BETA=0.3", "LossConfig.settings={}"],
        "--gin.BETA: the other overrides replace every setting that reads BETA: leave it out",
    ),
    "macro unlike any": ([IPO], [*SET, "QQ=3"], "--gin.QQ: no macro .* choose one of (?!.*gin).*TRAIN_STEPS"),
    "required": ([IPO], SET[1:], "DATASET is not set: add --gin.DATASET=value"),
    "configurable": ([IPO], [*SET, "Optimizer.clip_norm=1"], "No configurable matching 'Optimizer'"),
    "field": (
        [IPO],
        [*SET, "T5Config.widht=1"],
        "T5Config.widht: T5Config has no setting of this name: did you mean width?",
    ),
    "type": ([IPO], [*SET, "TRAIN_STEPS=many"], "JobConfig.steps is 'many': it must be a number"),
    "value of a field": (
        [IPO],
        [*SET, "OptimizerConfig.name=adam"],
        "OptimizerConfig.name is 'adam': did you mean adamw",
    ),
    "reference": ([IPO], [*SET, "MODEL=@T5()"], "No configurable matching reference '@T5"),
    "macro in a value": ([IPO], [*SET, "TRAIN_STEPS=%NOWHERE"], "macro NOWHERE is not set"),
    "unset macro": (
        ["runs/offline.gin"],
        [*SET, "JobConfig.loss=%LOSS"],
        "macro LOSS is not set: add --gin.LOSS=value",
    ),
    "no value": ([IPO], ["DATASET"], "write --gin.NAME=value"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    files, overrides, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read_config(files, overrides)
    assert "\n" not in str(error.value)


def test_bad_files_name_the_place(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text("include 'runs/nowhere.gin'\n")
    with pytest.raises(UserError, match=r"nowhere.gin.*--gin_search_paths"):
        read_config([str(file)], [])
    file.write_text("MODEL = @T5Config(\n")
    with pytest.raises(UserError, match="ends inside a statement"):
        read_config([str(file)], [])
    file.write_text("TRAIN_STEPS = 3\nnothing.width = 3\n")
    with pytest.raises(UserError, match=r"No configurable matching 'nothing'.*line 2"):
        read_config([str(file)], [])


ONLINE = ["PROMPTS=pairs", "START=runs/sft", "JUDGE=runs/proxy"]
RUNS = {
    "online_ipo": (ONLINE, OnlineConfig(judge=JudgeConfig("runs/proxy"))),
    "online_grpo": (ONLINE, OnlineConfig(judge=JudgeConfig("runs/proxy", labels="rewards"), samples=8)),
    "ipo_md": (ONLINE, OnlineConfig(judge=JudgeConfig("runs/proxy", labels="soft"), mixture=0.125)),
    "nash_md": (ONLINE, OnlineConfig(judge=JudgeConfig("runs/proxy", labels="soft"), against="mixture", mixture=0.125)),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'include "broken.gin"', "a gin file includes itself"),
        (b"\xff\xfe", "broken.gin: a gin file is not UTF-8"),
    ],
)
def test_a_gin_file_that_cannot_be_read_is_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gin").write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        read_config(["broken.gin"], [])
    assert message in str(caught.value)


def test_every_part_of_a_job_has_its_fields_in_gin():
    overrides = ["KeepConfig.last=2", "GuardConfig.spike=4.0", "OptimizerConfig.clip_norm=None"]
    config = read_config(["runs/sft.gin"], ["DATASET=a", *overrides])
    assert (config.keep.last, config.guard.spike, config.optimizer.clip_norm) == (2, 4.0, None)


def test_fine_tuning_needs_a_start_and_takes_its_model():
    with pytest.raises(UserError, match=r"START is not set: add --gin\.START=value"):
        read_config(["runs/fine_tune.gin"], ["DATASET=a"])
    config = read_config(["runs/fine_tune.gin"], ["DATASET=a", "START=runs/imported"])
    assert (config.model, config.start, config.loss.name) == (None, "runs/imported", "sft")
    assert config.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_every_online_run_is_a_source(name):
    overrides, expected = RUNS[name]
    config = read_config([f"runs/{name}.gin"], overrides)
    assert config.source == dataclasses.replace(expected, prompts=DatasetConfig("pairs"))
    assert (config.start, config.loss.name) == ("runs/sft", name.removeprefix("online_"))


def test_macros_of_an_online_run_are_the_settings_of_its_source():
    macros = ["SAMPLES=8", "KEEP=best_and_worst", "REFRESH_EVERY=16", "TEMPERATURE=0.7", "TOP_K=5", "RECORD=False"]
    source = read_config(["runs/online_ipo.gin"], [*ONLINE, *macros, "RESPONSE_LENGTH=9", "EPOCHS=2"]).source
    assert source == OnlineConfig(
        DatasetConfig("pairs", epochs=2),
        judge=JudgeConfig("runs/proxy"),
        sampler=SamplerConfig(0.7, top_k=5),
        samples=8,
        keep="best_and_worst",
        response_length=9,
        refresh_every=16,
        record=False,
    )


def test_a_second_source_has_prompts_of_its_own():
    config = read_config(["runs/hypo.gin"], [*SET, "PROMPTS=others", "BATCH_SIZE=8"])
    assert config.source == DatasetConfig("pairs", batch_size=8)
    assert config.fresh == OnlineConfig(DatasetConfig("others", batch_size=8), samples=1)
    assert read_config(["runs/hypo.gin"], SET).fresh.prompts.folder == "pairs"


def test_a_preference_model_starts_from_a_run_or_fresh():
    config = read_config(["runs/preference_model.gin"], [*SET, "KIND=bradley_terry"])
    assert (config.kind, config.start, config.model) == ("bradley_terry", "runs/sft", None)
    fresh = read_config(["runs/preference_model.gin", "models/t5_tiny.gin"], [SET[0], "START=None"])
    assert fresh.start is None and type(fresh.model) is T5Config


def test_a_macro_that_nothing_sets_has_the_default_of_its_field():
    config, default = read_config(["runs/sft.gin"], SET[:1]), JobConfig()
    assert (
        config.checkpoint_every == default.checkpoint_every and config.source.batch_size == DatasetConfig().batch_size
    )


@pytest.mark.slow
def test_the_command_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_posts(tmp_path / "pairs", 16)
    flags = [f"--gin.{setting}" for setting in ("DATASET=pairs", "TRAIN_STEPS=2", "BATCH_SIZE=8", *TINY)]
    command = ["train", "--gin_file=runs/sft.gin", *flags, "--workdir=run", "--compilation_cache="]
    train.main(command)
    train.main(command)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert "run/checkpoints" in capsys.readouterr().out


def test_bad_flags_end_in_one_line(capsys):
    assert guarded(lambda: train.main(["train", "--gin_fil=x"])) == 2
    assert guarded(lambda: train.main(["train", "runs/sft.gin"])) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2
    assert "runs/sft.gin" in error


def test_help_names_the_flags(capsys):
    train.main(["train", "--help"])
    assert "--gin_search_paths" in capsys.readouterr().out
