"""Judges on the host: the inputs of a callable and of the rubric, and how their answers become scores."""

import json

import jax
import numpy as np
import pytest
from byte_tokenizer import CHATML, make_tokenizer
from own_judges import numbered

from alignment_gap.data.batches import collate
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.data.text import Limits, TextSourceConfig
from alignment_gap.errors import StorageError, UserError
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.judges import JudgeConfig, by_itself, open_judge
from alignment_gap.sharding import batch_sharding

RUBRIC = "rubric"


@pytest.fixture(scope="module")
def plain(texts_on, mesh):
    """Prompts with three responses each, as lists of token ids without padding, and the arrays that hold them."""
    arrays = texts_on(mesh, samples=3)
    prompts, prompt_lengths, responses, lengths = (np.asarray(array) for array in arrays)
    ids = [row[:length].tolist() for row, length in zip(prompts, prompt_lengths, strict=True)]
    answers = [[responses[b, k, : lengths[b, k]].tolist() for k in range(3)] for b in range(8)]
    return ids, answers, arrays


@pytest.fixture(scope="module")
def ask(posts, mesh, plain):
    def scores(name, labels):
        judge = open_judge(JudgeConfig(name, labels=labels), posts, mesh)
        return np.asarray(judge.scores(*plain[-1])), judge.kind

    return scores


def test_a_callable_over_ids_is_given_every_text_without_padding(ask, plain):
    ids, answers, _ = plain
    scores, kind = ask("own_judges:shortness", "rewards")
    np.testing.assert_array_equal(scores, [[-len(answer) for answer in each] for each in answers])
    assert kind == "rewards" and scores.dtype == np.float32
    scores, _ = ask("own_judges:numbers", "rewards")
    expected = [[numbered(prompt + each) for each in row] for prompt, row in zip(ids, answers, strict=True)]
    np.testing.assert_array_equal(scores, expected)
    # The scores differ, so swapped rows would show.
    assert len(np.unique(scores)) > 12


def test_a_callable_over_texts_is_given_the_decoded_texts(ask, plain, vocabulary):
    ids, answers, _ = plain
    scores, kind = ask("own_judges:brevity", "rewards")
    words = [[len(vocabulary.decode(answer).split()) for answer in each] for each in answers]
    np.testing.assert_array_equal(scores, -np.array(words))
    assert kind == "rewards"
    scores, _ = ask("own_judges:overlap", "rewards")
    for prompt, each, row in zip(ids, answers, scores, strict=True):
        inside = set(vocabulary.decode(prompt).split())
        shares = [np.mean([word in inside for word in vocabulary.decode(answer).split()]) for answer in each]
        np.testing.assert_allclose(row, shares, rtol=1e-6)


def test_a_callable_over_texts_is_given_a_whole_chat(mesh, tmp_path):
    """The template ends every turn with the tokenizer's end token; the word is in the user's turn, the second."""
    tokenizer, end = tmp_path / "tokenizer", "<|im_end|>"
    make_tokenizer(tokenizer, tokens=("<|im_start|>", end), chat_template=CHATML, eos_token=end)
    rows = [
        {
            "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"say word{i} now"}],
            "chosen": [{"role": "assistant", "content": f"word{i}"}],
            "rejected": [{"role": "assistant", "content": "other"}],
        }
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSourceConfig(str(tmp_path / "pairs.jsonl"), template=str(tokenizer))
    limits = Limits(prompt_length=160, response_length=24)
    make(PREPARE, PrepareConfig(source, str(tokenizer), limits, validation=0.0, workers=1), tmp_path / "data")
    chats = open_dataset(tmp_path / "data" / "train")
    batch = collate(chats[:], limits.prompt_length, limits.response_length)
    arrays = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
    judge = open_judge(JudgeConfig("own_judges:overlap", labels="rewards"), chats, mesh)
    scores = judge.scores(*(jax.device_put(array, batch_sharding(mesh)) for array in arrays))
    np.testing.assert_array_equal(scores, [[1, 0]] * 8)


def test_the_rubric_is_the_true_quality(ask, plain, posts):
    ids, answers, _ = plain
    scores, kind = ask(RUBRIC, "rewards")
    for k in range(3):
        np.testing.assert_array_equal(scores[:, k], rubric_of(posts)(ids, [each[k] for each in answers]))
    assert kind == "rewards" and (scores[:, 0] != scores[:, 1]).any()


@pytest.mark.parametrize("name", ["own_judges:shortness", "own_judges:brevity", RUBRIC])
def test_hard_labels_are_shares_of_wins_of_the_rewards(name, ask):
    rewards, _ = ask(name, "rewards")
    shares, kind = ask(name, "hard")
    for row, found in zip(rewards, shares, strict=True):
        for k, reward in enumerate(row):
            others = np.delete(row, k)
            np.testing.assert_allclose(found[k], np.mean((others < reward) + 0.5 * (others == reward)))
    assert kind == "probabilities"
    np.testing.assert_allclose(shares.sum(axis=1), 1.5)


@pytest.mark.parametrize("name", ["own_judges:numbers", "own_judges:overlap", RUBRIC])
def test_one_device_gets_the_answer_of_eight(name, ask, posts, texts_on, alone):
    """Bit for bit: computation on the host does not depend on the layout of the rows."""
    judge = open_judge(JudgeConfig(name), posts, alone)
    np.testing.assert_array_equal(judge.scores(*texts_on(alone, samples=3)), ask(name, "hard")[0])


def test_scores_are_laid_out_as_batches_are(posts, texts_on, mesh):
    texts = texts_on(mesh)
    for labels in ("hard", "rewards"):
        scores = open_judge(JudgeConfig(RUBRIC, labels=labels), posts, mesh).scores(*texts)
        assert scores.sharding.is_equivalent_to(texts[-1].sharding, 2)


def test_they_are_asked_where_no_transfer_is_made_unasked(posts, texts_on, mesh):
    """The training loop forbids implicit transfers too, and it calls an online source."""
    texts, judge = texts_on(mesh), open_judge(JudgeConfig(RUBRIC, labels="hard"), posts, mesh)
    with jax.transfer_guard("disallow"):
        scores = judge.scores(*texts)
    assert np.isfinite(np.asarray(scores)).all()


def test_a_single_response_has_a_reward_and_no_preference(posts, texts_on, mesh):
    texts = texts_on(mesh, samples=1)
    rewards = open_judge(JudgeConfig(RUBRIC, labels="rewards"), posts, mesh).scores(*texts)
    assert rewards.shape == (8, 1)
    with pytest.raises(UserError, match="1 response a prompt: a preference needs 2 or more"):
        open_judge(JudgeConfig(RUBRIC), posts, mesh).scores(*texts)


@pytest.mark.parametrize(
    ("name", "kind", "status", "line"),
    [
        ("raising", UserError, 2, r"AttributeError\(.*lenght.*\) \(.*own_judges.py, line \d+\): mend it$"),
        (
            "unanswered",
            StorageError,
            1,
            r"ConnectionError\('no\\nanswer'\) .*: mend it, or run the same command again$",
        ),
    ],
)
def test_a_judge_that_raises_is_one_line_with_its_exception_as_cause(name, kind, status, line, posts, texts_on, mesh):
    judge = open_judge(JudgeConfig(f"own_judges:{name}"), posts, mesh)
    with pytest.raises(kind, match=f"^the judge own_judges:{name} raises {line}") as error:
        judge.scores(*texts_on(mesh))
    assert error.value.status == status and "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, AttributeError | ConnectionError)


@pytest.mark.parametrize("name", ["own_judges:brevity", RUBRIC])
def test_by_itself_it_gives_rewards(name, posts, mesh):
    judge = open_judge(by_itself(name), posts, mesh)
    assert judge.kind == "rewards" and judge.facts == {"judge": name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_judges:brievity", "judge 'own_judges:brievity': own_judges has no 'brievity': did you mean brevity"),
        ("no_such_module:judge", "cannot import no_such_module"),
        ("own_judges:strange", r"own_judges:strange takes \(question, answer\): let it take \(prompts, responses\)"),
        ("own_judges:a_number", r"own_judges:a_number takes \(\): let it take"),
    ],
)
def test_a_name_that_is_no_judge_is_told_before_it_is_asked(name, message, posts, mesh):
    with pytest.raises(UserError, match=message) as error:
        open_judge(JudgeConfig(name), posts, mesh)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_judges:flat",
            r"gave rewards of shape \(8,\) for 8 prompts with 2 responses each: .* one number for each",
        ),
        ("own_judges:nowhere", "own_judges:nowhere gave nan: rewards must be finite"),
    ],
)
def test_an_answer_that_is_no_reward_for_each_response_is_refused(name, message, posts, texts_on, mesh):
    judge = open_judge(JudgeConfig(name), posts, mesh)
    with pytest.raises(UserError, match=message):
        judge.scores(*texts_on(mesh))


@pytest.mark.parametrize("name", ["own_judges:brevity", RUBRIC])
def test_rewards_have_no_soft_labels(name, posts, mesh):
    with pytest.raises(UserError, match=f"labels is 'soft', but {name} gives rewards: choose hard or rewards"):
        open_judge(JudgeConfig(name, labels="soft"), posts, mesh)


def test_only_the_built_in_task_has_a_rubric(posts, mesh, tmp_path):
    write_dataset(tmp_path, posts[:8], vocabulary_digest=posts.card.vocabulary_digest, provenance={})
    others = open_dataset(tmp_path)
    with pytest.raises(UserError, match="does not come from the built-in task, which alone has a rubric"):
        open_judge(JudgeConfig(RUBRIC), others, mesh)
    # The dataset does not name its vocabulary either: a judge of texts cannot decode it, a judge of ids can work.
    with pytest.raises(UserError, match="does not say where its vocabulary is"):
        open_judge(JudgeConfig("own_judges:brevity"), others, mesh)
    assert open_judge(JudgeConfig("own_judges:shortness"), others, mesh).kind == "probabilities"
