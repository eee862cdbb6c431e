"""A study with every job, at the smallest size; also a config file for the command."""

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import PostsConfig, TextSourceConfig, load_vocabulary
from alignment_gap.models import DecoderConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.study.config import ArmsConfig, EvaluationConfig, PreferenceModelConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig


def nano_study() -> StudyConfig:
    """One arm of each kind. The eight devices split parameters over fsdp and model, and the batch over data."""
    return StudyConfig(
        name="nano",
        task=PrepareConfig(
            TextSourceConfig(location="posts", posts=PostsConfig(pairs=64, validation_pairs=16)), workers=1
        ),
        policy=DecoderConfig(
            vocabulary_size=load_vocabulary("posts").size + 2, width=16, layers=1, heads=2, head_size=8, mlp_width=16
        ),
        sft=SftConfig(steps=4, batch_size=8),
        golden=PreferenceModelConfig(steps=4, batch_size=8),
        proxy=PreferenceModelConfig(steps=4, batch_size=8),
        arms=ArmsConfig(
            losses=("ipo",),
            checkpoint_steps=(2, 4),
            batch_size=8,
            optimizer=OptimizerConfig(learning_rate=1e-2),
            offline_betas=(0.1,),
            offline_learning_rates=(1e-2,),
        ),
        evaluation=EvaluationConfig(prompts=16, kl_prompts=8, pairs=8, judges=("rubric",), batch_size=8, shown=2),
        checkpoint_every=2,
        mesh=MeshConfig(data=-1, fsdp=2, model=2),
    )


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(nano_study()))
