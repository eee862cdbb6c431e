"""The study on human pairs in Anthropic HH's format, with the harmless pairs' own vocabulary of 4,096 pieces.

- harmless: the 40,000 harmless pairs; the policies read no other text.
- helpful: the 2,354 pairs of the helpful test split, which are too few to learn a language from. Its SFT starts from
  the first SFT policy of the harmless study, as the paper's starts from a pre-trained T5.

alignment-gap data vocabulary --source=harmless-base.train.jsonl.gz --bad_pairs=drop --size=4096 --output=hh.model
alignment-gap study --config=configs/study/hh.py --workdir=runs/hh --config.task.vocabulary=hh.model \
    --config.task.source.location=harmless-base.train.jsonl.gz
alignment-gap study --config=configs/study/hh.py:helpful --workdir=runs/hh_helpful --config.task.vocabulary=hh.model \
    --config.task.source.location=helpful-base.test.jsonl.gz --config.sft.start=$(echo runs/hh/jobs/seed0-sft-*)
"""

import dataclasses

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, TextSourceConfig
from alignment_gap.models import T5Config
from alignment_gap.study.config import ArmsConfig, EvaluationConfig, PreferenceModelConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig


def get_config(pairs: str = "harmless") -> ConfigDict:
    studies = {"harmless": harmless, "helpful": helpful}
    if pairs not in studies:
        raise ValueError(f"the pairs are {pairs!r}: choose one of {', '.join(studies)}")
    return ConfigDict(to_dict(studies[pairs]()))


def harmless() -> StudyConfig:
    # The settings with which a trial's golden model reached what a regression on n-grams reaches.
    judge = PreferenceModelConfig(
        kind="bradley_terry",
        steps=660,
        batch_size=64,
        buckets=3,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=50, schedule="linear", weight_decay=0.1),
    )
    return StudyConfig(
        name="hh",
        # HH has a few pairs with an empty or a repeated response. A long prompt keeps its last turns.
        task=PrepareConfig(
            TextSourceConfig(bad_pairs="drop"),
            limits=Limits(prompt_length=128, response_length=96, long_prompts="keep_end"),
            validation=0.1,
        ),
        policy=T5Config(
            # 4,096 pieces and 100 sentinels, in tiles of 128.
            vocabulary_size=4224,
            width=128,
            encoder_layers=2,
            decoder_layers=2,
            heads=4,
            head_size=32,
            mlp_width=256,
            tied_embeddings=True,
            scan_unroll=2,
        ),
        # Three epochs: the judges and the policies learn the language here.
        sft=SftConfig(
            steps=1316,
            batch_size=64,
            buckets=3,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, schedule="linear"),
        ),
        golden=judge,
        proxy=judge,
        arms=ArmsConfig(
            losses=("ipo", "best_of_n"),
            further=("replayed", "small_windows", "large_windows"),
            swept=("offline", "shuffled"),
            checkpoint_steps=(10, 30, 60, 150, 300),
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=3e-4),
            beta=0.1,
            offline_betas=(0.01, 0.03, 0.1),
            offline_learning_rates=(3e-4,),
        ),
        evaluation=EvaluationConfig(
            prompts=512, kl_prompts=256, pairs=256, classified=("heldout", "stream", "own"), baselines=True
        ),
    )


def helpful() -> StudyConfig:
    base = harmless()
    # Three epochs of the pairs, for SFT and for the judges.
    steps, optimizer = 80, dataclasses.replace(base.golden.optimizer, warmup_steps=10)
    judge = dataclasses.replace(base.golden, steps=steps, optimizer=optimizer)
    start = "runs/hh/jobs/seed0-sft"
    return dataclasses.replace(
        base,
        name="hh helpful",
        seeds=3,
        # Helpful responses are longer.
        task=dataclasses.replace(base.task, limits=dataclasses.replace(base.task.limits, response_length=128)),
        policy=None,
        sft=dataclasses.replace(
            base.sft, start=start, steps=steps, optimizer=dataclasses.replace(optimizer, weight_decay=0.0)
        ),
        golden=judge,
        proxy=judge,
        arms=dataclasses.replace(
            base.arms, losses=("ipo",), further=(), checkpoint_steps=(10, 30, 60, 150), offline_betas=(0.01, 0.1)
        ),
    )
