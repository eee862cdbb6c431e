import numpy as np
import pytest
from resumption import assert_equal_batches, assert_equal_output_after_restore, assert_union_of_processes

from alignment_gap.data.batches import Examples, collate, offline_source
from alignment_gap.data.batches.packing import Rows
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.errors import UserError

LENGTHS = {"prompt_length": 9, "response_length": 5}


def texts_of(batch):
    """Each prompt id with the tokens of prompt and responses, scores and reference log-probs, one by one."""
    found = []
    for row in range(len(batch.prompts)):
        start, starts = 0, [0] * batch.responses.shape[1]
        for slot, length in enumerate(batch.prompt_lengths[row]):
            if not length:
                continue
            answers = []
            for k, size in enumerate(batch.response_lengths[row, slot]):
                part = slice(starts[k], starts[k] + size)
                log_probs = () if batch.reference_log_probs is None else batch.reference_log_probs[row, k, part]
                answers.append((tuple(batch.responses[row, k, part]), tuple(log_probs)))
                starts[k] += size
            prompt = tuple(batch.prompts[row, start : start + length])
            start += length
            found.append((int(batch.prompt_ids[row, slot]), prompt, tuple(answers), tuple(batch.scores[row, slot])))
        assert not batch.prompts[row, start:].any()
        for k, end in enumerate(starts):
            assert not batch.responses[row, k, end:].any()
    return found


def texts_in(examples):
    return [
        (
            example.prompt_id,
            tuple(example.prompt),
            tuple(
                (tuple(tokens), () if example.reference_log_probs is None else tuple(example.reference_log_probs[k]))
                for k, tokens in enumerate(example.responses)
            ),
            tuple(example.scores),
        )
        for example in examples
    ]


def test_rows_by_hand():
    rows = Rows((10, 6), slots=2, multiple=1)
    # The longest first, prompt and responses together: 6 opens a row, 9 the next; 4 goes to 6, 3 and 2 to a third.
    lengths = np.array([[2, 1, 1], [9, 1, 1], [3, 2, 1], [6, 1, 4], [4, 2, 1]])
    np.testing.assert_array_equal(rows.fill(lengths), [2, 1, 2, 0, 0])
    # Of two that are as long the first comes first, though 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3.
    np.testing.assert_array_equal(Rows((10, 10), 1, 1).fill(np.array([[3, 2, 1], [1, 2, 3]])), [0, 1])
    # Two slots a row.
    np.testing.assert_array_equal(rows.fill(np.ones((3, 3), np.int64)), [0, 0, 1])
    # Responses take room of their own: two of four tokens do not go into six.
    np.testing.assert_array_equal(rows.fill(np.array([[1, 4, 1], [1, 4, 1]])), [0, 1])
    np.testing.assert_array_equal(rows.fill(np.array([[1, 1, 4], [1, 1, 2]])), [0, 0])


def test_the_number_of_rows_is_a_multiple_and_none_is_empty():
    lengths = np.ones((12, 3), np.int64)
    for multiple in (1, 2, 4, 6, 12):
        rows = Rows((6, 6), slots=6, multiple=multiple).fill(lengths)
        assert sorted(set(rows)) == list(range(max(2, multiple)))
    # Never more rows than prompts.
    assert set(Rows((6, 6), slots=1, multiple=8).fill(lengths)) == set(range(12))


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_what_they_can_and_little_room_is_left(seed):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.1, (200, 3)), 40)
    rows = Rows.for_lengths(lengths, 200, (40, 40), 1)
    found = rows.fill(lengths)
    totals = np.stack([lengths[found == row].sum(axis=0) for row in range(found.max() + 1)])
    assert totals.max() <= 40 and totals.min() > 0
    assert np.bincount(found).max() <= rows.slots
    # No packing needs fewer rows than its fullest column has tokens; this one is within a fifth and one step of it.
    assert found.max() + 1 <= 1.2 * lengths.sum(axis=0).max() / 40 + rows.multiple


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("responses", [1, 3])
def test_packing_loses_nothing(make_examples, responses, with_reference):
    examples = make_examples(7, responses=responses, with_reference=with_reference)
    rows = np.array([0, 0, 0, 2, 2, 2, 3])
    packed = Rows((30, 18), 4, 1).pack(collate(examples, 9, 5), rows)
    assert packed.prompts.shape == (4, 30) and packed.responses.shape == (4, responses, 18)
    assert packed.prompt_lengths.shape == (4, 4) and packed.response_lengths.shape == (4, 4, responses)
    assert packed.is_packed and not packed.prompt_lengths[1].any()
    assert texts_of(packed) == texts_in(examples)


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(50, with_reference=True), vocabulary_digest="", provenance={})
    return open_dataset(tmp_path)


SOURCES = {
    "shuffle": {},
    "recorded": {"order": "recorded"},
    "longer rows": {"packing": 4},
    "large batch": {"batch_size": 64, "row_multiple": 8},
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_packed_source_has_the_prompts_of_the_plain_one_and_resumes_anywhere(dataset, name):
    settings = {"batch_size": 16, "seed": 3, "packing": 2, "row_multiple": 4} | LENGTHS | SOURCES[name]

    def source(host_rows=None):
        return offline_source(dataset, host_rows=host_rows, **settings)

    through = assert_equal_output_after_restore(source, 5)
    assert_union_of_processes(source, 5)
    plain = offline_source(dataset, **settings | {"packing": 0})
    in_memory = offline_source(list(dataset), **settings)
    whole = source()
    for step, batch in enumerate(through):
        assert sorted(texts_of(batch)) == sorted(texts_in([dataset[int(i)] for i in plain.numbers(step)]))
        assert len(batch.prompts) == whole.rows(step) < settings["batch_size"]
        assert not len(batch.prompts) % settings["row_multiple"]
        assert_equal_batches(in_memory(step), batch)


def test_mixtures_are_packed_by_weight(dataset, tmp_path, make_examples):
    write_dataset(tmp_path / "b", make_examples(80, with_reference=True)[50:], vocabulary_digest="", provenance={})
    examples = Examples([dataset, open_dataset(tmp_path / "b")])
    source = offline_source(examples, batch_size=16, seed=3, weights=(1, 3), packing=2, row_multiple=2, **LENGTHS)
    ids = [text[0] - 1000 for step in range(20) for text in texts_of(source(step))]
    assert len(ids) == 320
    # Epochs of 80 places: 20 of the first dataset, 60 of the second.
    assert [sum(i < 50 for i in ids[start : start + 80]) for start in range(0, 320, 80)] == [20, 20, 20, 20]


def test_padding_of_a_large_epoch_is_that_of_a_sample(dataset, monkeypatch):
    """Of 20 examples of 50: the first and the fourth batch."""
    monkeypatch.setattr("alignment_gap.data.batches.offline._SAMPLED", 20)
    source = offline_source(dataset, batch_size=10, seed=3, packing=4, **LENGTHS)
    assert source.padding().slots == sum(batch.prompts.size + batch.responses.size for batch in map(source, (0, 3)))


def test_padding_is_that_of_the_batches(dataset):
    source = offline_source(dataset, batch_size=10, seed=3, packing=4, **LENGTHS)
    batches = [source(step) for step in range(5)]
    padding = source.padding()
    assert padding.slots == sum(batch.prompts.size + batch.responses.size for batch in batches)
    assert padding.tokens == sum(int(batch.prompt_lengths.sum() + batch.response_lengths.sum()) for batch in batches)
    plain = offline_source(dataset, batch_size=10, seed=3, **LENGTHS).padding()
    assert padding.tokens == plain.tokens and padding.slots < plain.slots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_multiple": 3}, "row_multiple=3 is out of range: set a divisor of batch_size=8"),
        ({"packing": -1}, "packing=-1 is out of range: set 1 or more longest prompts a row, or 0 for none"),
        ({"buckets": [(4, 3)]}, r"packing=1 does not go with buckets=\(\(4, 3\),\): choose one of them"),
        ({"prompt_length": 3}, "example [0-9]+ has a prompt of [4-9] tokens, over prompt_length=3"),
    ],
)
def test_bad_settings(dataset, changes, message):
    with pytest.raises(UserError, match=message):
        offline_source(dataset, **{"batch_size": 8, "seed": 0, "packing": 1} | LENGTHS | changes)
