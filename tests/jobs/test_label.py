"""A judge labels a dataset: every example gets its own label, for any judge and any batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built_in import write_posts
from job_runs import Bar, Stopped
from random_examples import plain

from alignment_gap.data.records import Example, open_dataset, write_dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.errors import UserError
from alignment_gap.evaluation import batching
from alignment_gap.evaluation.batching import Batching
from alignment_gap.jobs import parts
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.label import LABEL, LabelConfig, label
from alignment_gap.judges import Judge, JudgeConfig


def random_pairs(count):
    rng = np.random.default_rng(0)

    def tokens(longest):
        return rng.integers(2, 9, rng.integers(1, longest + 1)).astype(np.int32)

    return [Example(i, tokens(6), (tokens(4), tokens(4)), np.zeros(2, np.float32)) for i in range(count)]


@jax.jit
def checksum(prompts, prompt_lengths, responses, lengths):
    """Scores that identify an example: its lengths, and a sum that padding would change."""
    inside = jnp.arange(responses.shape[-1]) < lengths[..., None]
    return (lengths * 1000 + jnp.where(inside, responses, 0).sum(-1) + prompts.sum(-1)[:, None]).astype(jnp.float32)


SHAPES = [((6, 4),), ((2, 2), (4, 3), (6, 4))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("batch_size", [8, 32])
def test_every_example_has_the_label_of_its_own(mesh, batch_size, shapes, monkeypatch):
    """Even if the examples end within a window."""
    monkeypatch.setattr(batching, "_WINDOW", 2)
    examples, judge = random_pairs(19), Judge(checksum, "rewards", {})
    labelled = list(label(iter(examples), judge, Batching(mesh, batch_size, shapes)))
    assert [e.prompt_id for e in labelled] == list(range(19))
    for before, after in zip(examples, labelled, strict=True):
        wanted = [len(r) * 1000 + int(r.sum()) + int(before.prompt.sum()) for r in before.responses]
        assert after.scores.tolist() == wanted and after.scores.dtype == np.float32
        assert after.prompt is before.prompt and after.responses is before.responses


def test_a_batch_has_the_smallest_shape_that_holds_it(mesh):
    """There are 40 examples.

    A shape gets all that fit and do not fill batches of a smaller shape; the last one gets the rest.
    """
    examples, seen = random_pairs(40), []

    def scores(prompts, prompt_lengths, responses, lengths):
        seen.append((prompts.shape[1], responses.shape[2]))
        assert prompt_lengths.max() <= prompts.shape[1] and lengths.max() <= responses.shape[2]
        return checksum(prompts, prompt_lengths, responses, lengths)

    list(label(examples, Judge(scores, "rewards", {}), Batching(mesh, 8, SHAPES[1])))
    small = sum(len(e.prompt) <= 2 and max(map(len, e.responses)) <= 2 for e in examples)
    middle = sum(len(e.prompt) <= 4 and max(map(len, e.responses)) <= 3 for e in examples)
    assert small >= 1 and middle >= 8
    assert seen == small // 8 * [(2, 2)] + (middle // 8 - small // 8) * [(4, 3)] + (5 - middle // 8) * [(6, 4)]


def labelled(config, folder, bar=None):
    make(LABEL, config, folder, bar or Bar())
    return open_dataset(folder)


def test_the_rubric_labels_what_it_prefers(pairs, tmp_path):
    found = labelled(LabelConfig(str(pairs), JudgeConfig("rubric"), batch_size=16), tmp_path / "hard")
    before, rubric = open_dataset(pairs), rubric_of(open_dataset(pairs))
    decided = 0
    for example, labels in zip(before, found, strict=True):
        first, second = rubric([example.prompt] * 2, example.responses)
        assert labels.scores[0] == (0.5 if first == second else float(first > second))
        assert labels.scores.sum() == 1
        decided += first != second
    assert decided > 10
    made = found.card.provenance
    assert (made["made_by"], made["judge"], made["labels"]) == ("label", "rubric", "hard")
    assert [each["digest"] for each in made["inputs"]] == [before.card.digest]
    rewards = JudgeConfig("rubric", labels="rewards")
    graded = labelled(LabelConfig(str(pairs), rewards, batch_size=16), tmp_path / "rewards")
    assert graded.card.scores == "rewards" and found.card.scores == "probabilities"
    assert len({score for example in graded for score in example.scores.tolist()}) > 3


def test_a_preference_model_labels_alike_in_any_batches(pairs, judge, tmp_path):
    config = LabelConfig(str(pairs), JudgeConfig(str(judge), labels="soft"), buckets=1, batch_size=8)
    one = labelled(config, tmp_path / "one")
    other = labelled(dataclasses.replace(config, batch_size=32, buckets=4), tmp_path / "other")
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
        np.testing.assert_allclose(ours.scores.sum(), 1, atol=1e-6)
    assert any(0 < example.scores[0] < 1 for example in one)


def test_killed_half_way_it_goes_on_and_ends_the_same(pairs, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "part_size", lambda count: 16)
    config = LabelConfig(str(pairs), JudgeConfig(str(judge)), batch_size=8)
    with pytest.raises(Stopped):
        labelled(config, tmp_path / "killed", Bar(stop_at=20))
    assert not (tmp_path / "killed" / "card.json").exists()
    again = Bar()
    found = labelled(config, tmp_path / "killed", again)
    assert [*map(plain, found)] == [*map(plain, labelled(config, tmp_path / "whole"))]
    assert (tmp_path / "killed" / "card.json").read_bytes() == (tmp_path / "whole" / "card.json").read_bytes()
    assert sum(again.updates) == 48


def test_a_record_file_that_was_damaged_is_made_again(pairs, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "part_size", lambda count: 16)
    config = LabelConfig(str(pairs), JudgeConfig(str(judge)), batch_size=8)
    wanted = [*map(plain, labelled(config, tmp_path / "out"))]
    victim = sorted((tmp_path / "out").glob("*.array_record"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert [*map(plain, labelled(config, tmp_path / "out"))] == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, "dataset is not set"),
        ({"dataset": "nowhere"}, "nowhere is not a finished dataset"),
        ({"judge": JudgeConfig()}, "judge"),
        ({"judge": JudgeConfig("nowhere")}, "nowhere"),
        ({"judge": JudgeConfig("no.module:judge")}, "no.module"),
        ({"batch_size": 9}, "batch_size is 9"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(changes, message, pairs, tmp_path):
    config = dataclasses.replace(LabelConfig(str(pairs), JudgeConfig("rubric")), **changes)
    with pytest.raises(UserError, match=message) as error:
        labelled(config, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_judge_in_the_same_folder(pairs, tmp_path):
    labelled(LabelConfig(str(pairs), JudgeConfig("rubric")), tmp_path / "out")
    with pytest.raises(UserError, match=r"judge.labels was hard, now rewards"):
        labelled(LabelConfig(str(pairs), JudgeConfig("rubric", labels="rewards")), tmp_path / "out")


def test_a_dataset_that_was_prepared_anew_is_another_input(pairs, tmp_path):
    write_posts(tmp_path / "pairs", 16)
    config = LabelConfig(str(tmp_path / "pairs"), JudgeConfig("rubric"))
    labelled(config, tmp_path / "out")
    write_posts(tmp_path / "pairs", 24)
    with pytest.raises(UserError, match=r"dataset.digest was \w+, now \w+"):
        labelled(config, tmp_path / "out")


def test_a_token_id_that_the_judge_lacks_is_told(pairs, judge, tmp_path):
    """Without the check the devices take the last row of the embedding, here for the id 200 of 136."""
    examples, card = open_dataset(pairs)[:16], open_dataset(pairs).card
    strange = (np.array([5, 200, 1], np.int32), examples[9].responses[1])
    examples[9] = dataclasses.replace(examples[9], responses=strange)
    write_dataset(
        tmp_path / "pairs", examples, vocabulary_digest=card.vocabulary_digest, provenance=dict(card.provenance)
    )
    with pytest.raises(UserError, match=rf"has the token id 200, but the judge {judge} has vocabulary_size=136: use a"):
        labelled(LabelConfig(str(tmp_path / "pairs"), JudgeConfig(str(judge)), batch_size=8), tmp_path / "out")
    labelled(
        LabelConfig(str(tmp_path / "pairs"), JudgeConfig("judge_functions:brevity"), batch_size=8), tmp_path / "own"
    )
