"""The whole study on the built-in task, at a size that two CPU cores finish in minutes."""

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import PostsConfig, TextSourceConfig, load_vocabulary
from alignment_gap.models import T5Config
from alignment_gap.study.config import ArmsConfig, EvaluationConfig, PreferenceModelConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig


def get_config() -> ConfigDict:
    posts = PostsConfig(pairs=20_000, validation_pairs=1_000)
    study = StudyConfig(
        name="tiny",
        task=PrepareConfig(TextSourceConfig(location="posts", posts=posts)),
        policy=T5Config(
            vocabulary_size=load_vocabulary("posts").size,
            width=64,
            encoder_layers=2,
            decoder_layers=2,
            heads=4,
            head_size=16,
            mlp_width=128,
            scan_unroll=2,
        ),
        sft=SftConfig(steps=1000, batch_size=64, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100)),
        golden=PreferenceModelConfig(steps=1000, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50)),
        proxy=PreferenceModelConfig(steps=400, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50)),
        arms=ArmsConfig(
            losses=("ipo", "best_of_n"),
            # A fifth of the steps, 60, is the early policy of the datasets of figure 5.
            checkpoint_steps=(10, 30, 60, 150, 300),
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=3e-4),
            beta=0.1,
            offline_betas=(0.03, 0.1),
            offline_learning_rates=(3e-4,),
        ),
        evaluation=EvaluationConfig(prompts=512, kl_prompts=256, pairs=256, judges=("rubric",)),
    )
    return ConfigDict(to_dict(study))
