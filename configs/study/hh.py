"""The same study on human pairs in Anthropic HH's format, at a micro size; the user gives the two paths.

alignment-gap study --config=configs/study/hh.py --workdir=runs/hh \
    --config.task.source.location=harmless-base.train.jsonl.gz --config.task.vocabulary=t5.spiece.model
"""

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, TextSourceConfig
from alignment_gap.models import T5Config
from alignment_gap.study.config import ArmsConfig, EvaluationConfig, PreferenceModelConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig


def get_config() -> ConfigDict:
    study = StudyConfig(
        name="hh",
        # HH has a few pairs with an empty or a repeated response, and many that are too long for a micro size.
        task=PrepareConfig(
            TextSourceConfig(bad_pairs="drop"), limits=Limits(prompt_length=64, response_length=24), validation=0.05
        ),
        policy=T5Config(
            vocabulary_size=32_128,
            width=64,
            encoder_layers=2,
            decoder_layers=2,
            heads=2,
            head_size=32,
            mlp_width=128,
            tied_embeddings=True,
            scan_unroll=2,
        ),
        sft=SftConfig(steps=500, batch_size=32, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50)),
        golden=PreferenceModelConfig(
            steps=300, batch_size=32, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
        ),
        proxy=PreferenceModelConfig(
            steps=200, batch_size=32, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
        ),
        arms=ArmsConfig(
            losses=("ipo", "best_of_n"),
            checkpoint_steps=(20, 50, 100),
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            beta=0.1,
            offline_betas=(0.1, 0.3),
            offline_learning_rates=(1e-3,),
        ),
        evaluation=EvaluationConfig(prompts=192, kl_prompts=128, pairs=256, baselines=True, batch_size=64),
    )
    return ConfigDict(to_dict(study))
