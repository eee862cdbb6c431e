"""Settings become the words of a command, and the command line reads them back as the same settings."""

import shlex

import pytest
from absl import flags

from alignment_gap.cli.flags import define_config, parse, read_config
from alignment_gap.cli.gin_files import read_config as read_gin
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, PostsConfig, TextSourceConfig
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.generate import GENERATE, GenerateConfig
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.words import flag_name, flag_words, gin_words, is_notation
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import OptimizerConfig

POSTS = TextSourceConfig("posts", posts=PostsConfig(40, 10))
FLAGS = [
    (LABEL, LabelConfig()),
    (
        LABEL,
        LabelConfig(
            "a b", JudgeConfig("runs/golden", 800, labels="rewards"), 2, mesh=MeshConfig(layout="tensor", fsdp=2)
        ),
    ),
    (LABEL, LabelConfig("a", mesh=MeshConfig(rules={"mlp": None, "heads": ("fsdp", "model")}))),
    (COMPOSE, ComposeConfig(("a", "b"), weights=(0.25, 1e-7), limit=3)),
    (GENERATE, GenerateConfig("p", ("a", "b"), JudgeConfig("rubric"), sampler=SamplerConfig(0.7, top_k=5), seed=3)),
    (EVALUATE, EvaluateConfig("r", (1, 2), "d", ("golden=runs/a", "m:f"), ("it's=runs/b",), pairs=0)),
    (PREPARE, PrepareConfig(POSTS, limits=Limits(8, 6, long_prompts="keep_end"), validation=0.0, workers=2)),
]


@pytest.mark.parametrize(("kind", "config"), FLAGS, ids=lambda value: getattr(value, "name", ""))
def test_flags_are_read_back(kind, config):
    words = flag_words(config, kind.short)
    values, _ = parse(["command", *shlex.split(shlex.join(words))], lambda v: define(v, kind), None)
    assert read_config(values, kind.config, kind.short) == config


def define(values: flags.FlagValues, kind):
    define_config(values, kind.config, kind.short)


def test_defaults_are_no_words_and_others_have_short_names():
    assert flag_words(LabelConfig(), LABEL.short) == []
    config = LabelConfig("pairs", JudgeConfig("rubric", labels="soft"), mesh=MeshConfig(fsdp=2))
    assert flag_words(config, LABEL.short) == [
        "--dataset=pairs",
        "--judge=rubric",
        "--judge.labels=soft",
        "--mesh.fsdp=2",
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("a", "a"), ("source.location", "source"), ("source.task", "task"), ("source.posts.seed", "world.seed")],
)
def test_the_longest_group_names_a_flag(path, name):
    assert flag_name(path, {"source.location": "source", "source.": "", "source.posts.": "world."}) == name


T5 = T5Config(vocabulary_size=136, width=16, dtype="bfloat16")
ONLINE = OnlineConfig(
    DatasetConfig("prompts", batch_size=8, epochs=2),
    judge=JudgeConfig("runs/golden", labels="soft"),
    sampler=SamplerConfig(top_p=0.9),
    samples=4,
    keep="best_and_worst",
)
GIN = [
    JobConfig(model=T5, source=DatasetConfig("a,b", weights=(1.0, 2.0), order="shuffle"), steps=3),
    JobConfig(model=DecoderConfig(vocabulary_size=9), loss=LossConfig("dpo", {"beta": 0.1, "label_smoothing": 0.2})),
    JobConfig(source=ONLINE, start="it's here", start_step=800, checkpoint_steps=(1, 2), seed=7),
    JobConfig(source=DatasetConfig("pairs", batch_size=8), fresh=ONLINE, mesh=MeshConfig(layout="fsdp", model=2)),
    JobConfig(loss=LossConfig("job_runs:shifted_hinge", {"shift": -1.5, "kind": "b"}), start="@not_a_reference"),
    JobConfig(loss=LossConfig("sft"), optimizer=OptimizerConfig(clip_norm=None, learning_rate=3e-4), start="3"),
]


@pytest.mark.parametrize("config", GIN, ids=range(len(GIN)))
def test_gin_bindings_are_read_back(config):
    words = [word.removeprefix("--gin.") for word in shlex.split(shlex.join(gin_words(config)))]
    assert read_gin([], words) == config


@pytest.mark.parametrize("text", ["@a", "%a", "[1]", "(1,)", "{}", "'a'", '"a"', "3", " 1e3", "None", "True"])
def test_texts_that_gin_would_take_for_values(text):
    assert is_notation(text)


@pytest.mark.parametrize("text", ["a", "runs/sft", "a,b", "it's", "adamw", "1a", ""])
def test_texts_that_stay_texts(text):
    assert not is_notation(text)
