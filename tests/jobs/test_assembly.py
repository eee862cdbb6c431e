"""Runs in one process share traced and compiled functions if their settings agree, and only then."""

import dataclasses

import jax
import pytest

from alignment_gap.data.text.vocabulary import WordVocabulary
from alignment_gap.errors import UserError
from alignment_gap.jobs.assembly import gives_rewards, trained_network
from alignment_gap.jobs.config import DatasetConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import RewardHead
from alignment_gap.training import GuardConfig, OptimizerConfig


def update_step(config):
    assembly, *_ = TRAIN.open(config).run.args
    return assembly.update_step


@pytest.mark.parametrize(
    ("settings", "rewards"),
    [
        ({}, False),
        ({"samples": 4}, True),
        ({"judge": JudgeConfig("rubric", labels="rewards")}, True),
        # The chances of two responses to beat a third one do not say which of the two is better.
        ({"against": "mixture", "mixture": 0.5}, True),
        ({"against": "mixture", "mixture": 0.5, "samples": 4, "keep": "best_and_worst"}, True),
        ({"against": "mixture", "mixture": 0.5, "samples": 1}, False),
    ],
)
def test_scores_that_only_compare(settings, rewards):
    online = {"prompts": DatasetConfig("pairs"), "samples": 2, "judge": JudgeConfig("rubric"), **settings}
    assert gives_rewards(OnlineConfig(**online)) == rewards


@pytest.fixture
def ipo(sft, sft_config):
    return dataclasses.replace(sft_config, model=None, start=str(sft), loss=LossConfig("ipo", {"beta": 0.1}))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"steps": 9, "checkpoint_every": 5}, {"seed": 7}])
def test_what_alters_no_step_shares_it(ipo, settings):
    """The seed of a policy's job changes only its initial parameters and its batches."""
    assert update_step(dataclasses.replace(ipo, **settings)) is update_step(ipo)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": LossConfig("ipo", {"beta": 0.2})},
        {"loss": LossConfig("dpo", {"beta": 0.1})},
        {"optimizer": OptimizerConfig(learning_rate=2e-2)},
        {"guard": GuardConfig(spike=10.0)},
        {"microbatches": 2},
    ],
)
def test_what_alters_a_step_has_its_own(ipo, settings):
    settings = dict(settings)
    if "microbatches" in settings:
        settings["source"] = dataclasses.replace(ipo.source, batch_size=16)
    assert update_step(dataclasses.replace(ipo, **settings)) is not update_step(ipo)


def test_the_number_of_microbatches_is_fixed_where_the_gradient_depends_on_it(ipo):
    """A loss that compares prompts compares those of a microbatch."""
    parts = dataclasses.replace(ipo, source=dataclasses.replace(ipo.source, batch_size=16), microbatches=2)
    facts = [TRAIN.open(dataclasses.replace(parts, loss=LossConfig(name))).facts for name in ("ipo", "aot_unpaired")]
    assert [each.get("loss.microbatches") for each in facts] == [None, 2]


def test_the_seed_of_a_preference_model_orders_its_pairs(ipo):
    model = dataclasses.replace(ipo, kind="pairwise", loss=LossConfig("sft"))
    assert update_step(model) is update_step(dataclasses.replace(model, steps=9))
    assert update_step(model) is not update_step(dataclasses.replace(model, seed=7))


def test_a_preference_model_needs_the_sentinels_that_it_marks_texts_with(sft_config):
    config = dataclasses.replace(sft_config, kind="bradley_terry", start=None)
    network = trained_network(config, "digest", "words", WordVocabulary(["a"], extra_ids=5))
    assert network.markers == (7, 6, 5, 4, 3)
    config = dataclasses.replace(config, kind="pairwise")
    with pytest.raises(
        UserError, match=r"'pairwise', which marks texts with 5 sentinels, .* words has 4: set the kind"
    ):
        trained_network(config, "digest", "words", WordVocabulary(["a"], extra_ids=4))


def test_without_sentinels_a_bradley_terry_model_has_a_head_of_its_own(sft_config):
    config = dataclasses.replace(sft_config, kind="bradley_terry", start=None)
    network = trained_network(config, "digest", "words", WordVocabulary(["a"], extra_ids=4))
    assert network.head == RewardHead(pad_id=0) and not network.markers
    assert "output_embedder" not in jax.eval_shape(network.init, jax.random.key(0))
