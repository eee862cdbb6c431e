import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from alignment_gap.data.batches import offline_source
from alignment_gap.data.records import write_dataset
from alignment_gap.data.tasks.task import (
    HumanPairsTaskConfig,
    PostsTaskConfig,
    human_pairs_task,
    posts_task,
    rubric_preference,
)
from alignment_gap.data.text import TextSourceConfig, posts
from alignment_gap.errors import UserError

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
SMALL = PostsTaskConfig(pairs=300, validation_pairs=50)


@pytest.fixture(scope="module")
def task():
    return posts_task(SMALL)


def test_posts_task_has_one_labelled_pair_a_prompt(task):
    assert len(task.pairs) == 300 and len(task.validation) == 50
    assert [example.prompt_id for example in task.pairs] == list(range(300))
    for example in task.pairs:
        assert sorted(example.scores.tolist()) == [0.0, 1.0]
        assert all(response[-1] == task.vocabulary.eos_id for response in example.responses)
        assert len(example.prompt) <= task.prompt_length
        assert max(map(len, example.responses)) <= task.response_length
        assert example.prompt.min() >= 2 and example.prompt.max() < task.vocabulary.size - task.vocabulary.extra_ids


def test_posts_task_validation_shares_no_prompt(task):
    assert not {e.prompt_id for e in task.pairs} & {e.prompt_id for e in task.validation}
    more = posts_task(dataclasses.replace(SMALL, pairs=310))
    assert [e.prompt.tolist() for e in more.validation] == [e.prompt.tolist() for e in task.validation]


def test_posts_task_follows_from_its_seed(task, plain):
    again, other = posts_task(SMALL), posts_task(dataclasses.replace(SMALL, seed=1))
    assert [plain(e) for e in again.pairs] == [plain(e) for e in task.pairs]
    assert [plain(e) for e in other.pairs] != [plain(e) for e in task.pairs]


def test_posts_task_rubric_is_that_of_the_posts(task):
    pairs = [posts.pair(0, number) for number in range(20)]
    prompts = [example.prompt for example in task.pairs[:20]]
    for k in range(2):
        scores = task.rubric(prompts, [example.responses[k] for example in task.pairs[:20]])
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, [pair.rubric[k] for pair in pairs], rtol=1e-6)


def test_rubric_preference_is_noiseless_and_knows_ties(task):
    preference = rubric_preference(task.rubric, task.pairs)
    expected = [posts.pair(0, number).rubric for number in range(300)]
    assert preference.tolist() == [float(a > b) for a, b in expected]
    assert 0.8 < np.mean(preference == [e.scores[0] for e in task.pairs]) < 0.95
    tie = dataclasses.replace(task.pairs[0], responses=(task.pairs[0].responses[0],) * 2)
    assert rubric_preference(task.rubric, [tie]).tolist() == [0.5]


def test_the_default_task_has_the_documented_size():
    config = PostsTaskConfig()
    config.validate()
    assert (config.pairs, config.validation_pairs) == (20_000, 1_000)
    assert 100 <= len(posts.vocabulary().words) <= 300


def test_provenance_goes_into_a_card(task, tmp_path):
    write_dataset(tmp_path, task.pairs, vocabulary_digest=task.vocabulary.digest, provenance=dict(task.provenance))
    stored = json.loads((tmp_path / "card.json").read_text())["provenance"]
    assert stored["task"] == "posts" and stored["config"]["settings"]["order_weight"] == 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": 0}, "pairs=0 is out of range: choose from 1 to"),
        ({"validation_pairs": 0}, "validation_pairs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"prompt_length": 20}, "prompt_length=20 is out of range: choose 41 or more"),
        ({"response_length": 11}, "response_length=11 is out of range: choose 12 or more"),
        ({"settings": posts.PostsSettings(rater_temperature=0.0)}, "rater_temperature=0.0"),
    ],
)
def test_posts_settings_out_of_range_are_named(change, message):
    with pytest.raises(UserError, match=message):
        posts_task(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": TextSourceConfig()}, "source.location is not set"),
        ({"vocabulary_path": ""}, "vocabulary_path is not set"),
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"limit": 1}, "limit=1 is out of range: choose 2 or more"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"source": TextSourceConfig("none.jsonl", bad_pairs="keep")}, "source.bad_pairs='keep' is unknown"),
        ({"long_prompts": "cut"}, "long_prompts='cut' is unknown"),
        ({"extra_ids": -1}, "extra_ids=-1"),
        ({"vocabulary_path": "none.model"}, "cannot read the vocabulary none.model"),
    ],
)
def test_human_pairs_settings_out_of_range_are_named(change, message):
    config = HumanPairsTaskConfig(source=TextSourceConfig("none.jsonl"), vocabulary_path="none.model")
    with pytest.raises(UserError, match=message):
        human_pairs_task(dataclasses.replace(config, **change))


@pytest.fixture(scope="module")
def human_config():
    path, vocabulary = SHARED / "hh/helpful-base.test.jsonl.gz", SHARED / "vocab/t5.spiece.model"
    if not (path.exists() and vocabulary.exists()):
        pytest.skip(f"{path} and {vocabulary} are not here: human pairs are not shipped with the project")
    return HumanPairsTaskConfig(
        source=TextSourceConfig(str(path), bad_pairs="drop"), vocabulary_path=str(vocabulary), validation_fraction=0.1
    )


def test_real_human_pairs_become_a_task(human_config):
    task = human_pairs_task(human_config)
    sides = [{tuple(e.prompt.tolist()) for e in side} for side in (task.pairs, task.validation)]
    assert not sides[0] & sides[1]
    assert 0.05 < len(task.validation) / (len(task.pairs) + len(task.validation)) < 0.15
    # 2,354 lines: what is not in the task is counted.
    assert len(task.pairs) + len(task.validation) + sum(task.provenance["dropped"].values()) == 2354
    assert task.rubric is None
    assert max(len(e.prompt) for e in task.pairs) <= 128
    assert max(len(r) for e in task.pairs for r in e.responses) <= 64
    batch = offline_source(task.pairs, batch_size=8, seed=0, prompt_length=128, response_length=64)(0)
    assert batch.prompts.shape == (8, 128)


def test_real_human_pairs_with_a_side_left_empty_are_refused(human_config):
    with pytest.raises(UserError, match=r"leaves 4 training and 0 validation pairs|leaves 0 training"):
        human_pairs_task(dataclasses.replace(human_config, limit=4, validation_fraction=1e-9))


def test_text_records_and_batches_never_import_tensorflow():
    script = (
        "import sys, alignment_gap.data.batches, alignment_gap.data.records, alignment_gap.data.text\n"
        "assert not {'grain', 'tensorflow', 'seqio', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
