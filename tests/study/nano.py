"""The whole study at the smallest size that runs every stage; a config file for the command, too."""

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.tasks.task import PostsTaskConfig
from alignment_gap.data.text.posts import vocabulary
from alignment_gap.models import T5Config
from alignment_gap.sharding import MeshConfig
from alignment_gap.study.config import ArmsConfig, EvaluationConfig, JudgeConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig


def nano_study() -> StudyConfig:
    """One arm of each kind, on the eight devices of the tests: parameters over fsdp and model, the batch over data."""
    model = T5Config(
        vocabulary_size=vocabulary().size + 2,
        width=16,
        encoder_layers=1,
        decoder_layers=1,
        heads=2,
        head_size=8,
        mlp_width=16,
    )
    return StudyConfig(
        name="nano",
        task=PostsTaskConfig(pairs=64, validation_pairs=16),
        policy=model,
        sft=SftConfig(steps=4, batch_size=8),
        golden=JudgeConfig(model, steps=4, batch_size=8),
        proxy=JudgeConfig(model, steps=4, batch_size=8),
        arms=ArmsConfig(
            losses=("ipo",),
            checkpoint_steps=(2, 4),
            batch_size=8,
            optimizer=OptimizerConfig(learning_rate=1e-2),
            offline_betas=(0.1,),
            offline_learning_rates=(1e-2,),
        ),
        evaluation=EvaluationConfig(prompts=16, kl_prompts=8, pairs=8, batch_size=8, shown=2),
        checkpoint_every=2,
        mesh=MeshConfig(data=-1, fsdp=2, model=2),
    )


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(nano_study()))
