"""The paper's own settings, for TPU pods: T5 Large, XL and XXL on one of its four tasks. Nobody has run it.

The paths are yours to give: the task, prepared with T5's vocabulary, and T5 checkpoints, imported.

alignment-gap study --config=configs/study/pod.py:summarization --workdir=runs/pod --list
alignment-gap plan --config=configs/study/pod.py:summarization --topology=v5e:16x16 --kept=runs/plans \\
    --prompt_length=1024 --response_length=128 --examples=90000
"""

import dataclasses

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.models import sizes
from alignment_gap.sharding import MeshConfig
from alignment_gap.study.config import (
    ArmsConfig,
    BaseConfig,
    EvaluationConfig,
    PreferenceModelConfig,
    SftConfig,
    StudyConfig,
)
from alignment_gap.training import OptimizerConfig

TASKS = ("summarization", "helpful", "harmless", "chat_arena")
SIZES = ("t5_large", "t5_xl", "t5_xxl")


def get_config(task: str = "summarization") -> ConfigDict:
    if task not in TASKS:
        raise ValueError(f"the task is {task!r}: choose one of {', '.join(TASKS)}")
    # The settings of `alignment-gap plan` for a size alone.
    memory = {"dtype": "bfloat16", "remat": "full"}
    judge = OptimizerConfig(name="adafactor", learning_rate=1e-4, warmup_steps=1000)
    # The paper pools its tasks here.
    sft = SftConfig(
        start="imported/t5_large",
        also=tuple(f"prepared/{other}/train" for other in TASKS if other != task),
        steps=4000,
        batch_size=128,
        optimizer=OptimizerConfig(name="adafactor", learning_rate=3e-5),
    )
    study = StudyConfig(
        name=f"pod {task}",
        prepared=f"prepared/{task}",
        policy=sizes.get("t5_large", **memory),
        sizes=SIZES,
        by_size=(
            "arms.batch_size=32,16,8",
            "sft.steps=4000,8000,8000",
            "sft.batch_size=128,16,8",
            "sft.optimizer.learning_rate=3e-5,1e-5,1e-5",
        ),
        base=BaseConfig(sizes.get("t5_large", **memory), sft, batch_size=32),
        sft=dataclasses.replace(sft, start="imported/{size}"),
        # The paper trains judges until their validation accuracy is flat, and does not say how long that is.
        golden=PreferenceModelConfig(
            model=sizes.get("t5_xxl", **memory), start="imported/t5_xxl", steps=10_000, batch_size=16, optimizer=judge
        ),
        proxy=PreferenceModelConfig(steps=10_000, batch_size=32, optimizer=judge),
        arms=ArmsConfig(
            names=("online", "shuffled", "offline"),
            further=(
                *("replayed", "small_windows", "large_windows"),
                *("final_vs_final", "sft_vs_early", "early_vs_final"),
            ),
            losses=("ipo", "best_of_n"),
            checkpoint_steps=(400, 800, 1600, 2400, 3200, 4000),
            optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-5),
            beta=0.1,
            offline_betas=(0.1, 0.5, 1.0),
            offline_learning_rates=(3e-6, 1e-5, 3e-5),
            offline_steps=(1, 5),
            # Otherwise the study takes 1.16 to 1.19 times the chip-hours: see benchmarks/results/pod_study.md.
            stored_reference=True,
        ),
        evaluation=EvaluationConfig(
            prompts=2048, kl_prompts=256, pairs=256, classified=("heldout", "stream", "own"), batch_size=256
        ),
        # The smallest batch of the study has 8 prompts, so the batch is split into at most 8 parts.
        mesh=MeshConfig(layout="fsdp_tensor", fsdp=8, model=-1),
    )
    return ConfigDict(to_dict(study))
