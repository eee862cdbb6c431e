"""Several prompts in one row: which prompts share a row, and that a packed batch has the same texts as a plain one."""

import dataclasses
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from resumption import assert_equal_batches, assert_equal_output_after_restore, assert_union_of_processes

from alignment_gap.data.batches import Examples, collate, offline_source
from alignment_gap.data.batches.packing import Rows
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.records.example import TOKEN_FIELDS
from alignment_gap.errors import UserError

LENGTHS = {"prompt_length": 9, "response_length": 5}
FIELDS = {"with_reference": True, "with_sampler": True}


def texts_of(batch):
    """For each prompt id: the tokens of prompt and responses, the scores, and the log-probs, text by text."""
    found = []
    for row in range(len(batch.prompts)):
        start, starts = 0, [0] * batch.responses.shape[1]
        for slot, length in enumerate(batch.prompt_lengths[row]):
            if not length:
                continue
            answers = []
            for k, size in enumerate(batch.response_lengths[row, slot]):
                part = slice(starts[k], starts[k] + size)
                log_probs = (getattr(batch, name) for name in TOKEN_FIELDS)
                rows = tuple(None if values is None else tuple(values[row, k, part]) for values in log_probs)
                answers.append((tuple(batch.responses[row, k, part]), *rows))
                starts[k] += size
            prompt = tuple(batch.prompts[row, start : start + length])
            start += length
            found.append((int(batch.prompt_ids[row, slot]), prompt, tuple(answers), tuple(batch.scores[row, slot])))
        assert not batch.prompts[row, start:].any()
        for k, end in enumerate(starts):
            assert not batch.responses[row, k, end:].any()
    return found


def texts_in(examples):
    def answer(example, k):
        log_probs = (getattr(example, name) for name in TOKEN_FIELDS)
        return tuple(example.responses[k]), *(None if rows is None else tuple(rows[k]) for rows in log_probs)

    return [
        (e.prompt_id, tuple(e.prompt), tuple(answer(e, k) for k in range(len(e.responses))), tuple(e.scores))
        for e in examples
    ]


def test_rows_by_hand():
    rows = Rows((10, 6), slots=2, multiple=1)
    # The longest example (prompt and responses) comes first. 6 opens a row, 9 opens the next one, 4 joins 6, and 3 and
    # 2 share a third.
    lengths = np.array([[2, 1, 1], [9, 1, 1], [3, 2, 1], [6, 1, 4], [4, 2, 1]])
    np.testing.assert_array_equal(rows.fill(lengths), [2, 1, 2, 0, 0])
    # Of two equally long examples the first comes first, though in floats 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3.
    np.testing.assert_array_equal(Rows((10, 10), 1, 1).fill(np.array([[3, 2, 1], [1, 2, 3]])), [0, 1])
    # A row has two slots.
    np.testing.assert_array_equal(rows.fill(np.ones((3, 3), np.int64)), [0, 0, 1])
    # Responses need room too: two responses of four tokens do not fit into six.
    np.testing.assert_array_equal(rows.fill(np.array([[1, 4, 1], [1, 4, 1]])), [0, 1])
    np.testing.assert_array_equal(rows.fill(np.array([[1, 1, 4], [1, 1, 2]])), [0, 0])


def first_fit(lengths, shape, slots):
    """The rows by first-fit decreasing, example by example, with sizes as exact fractions of a row."""
    room = (shape[0], *[shape[1]] * (lengths.shape[1] - 1))
    sizes = [sum(Fraction(int(part), whole) for part, whole in zip(row, room, strict=True)) for row in lengths]
    rows, members = [0] * len(lengths), []
    for example in sorted(range(len(lengths)), key=lambda i: -sizes[i]):
        fitting = (
            row
            for row, there in enumerate(members)
            if len(there) < slots and (lengths[[*there, example]].sum(axis=0) <= room).all()
        )
        rows[example] = next(fitting, len(members))
        members += [[]] * (rows[example] == len(members))
        members[rows[example]] = [*members[rows[example]], example]
    return rows


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    lengths=strategies.lists(strategies.tuples(*[strategies.integers(1, 7)] * 3), min_size=1, max_size=12),
    shape=strategies.tuples(strategies.integers(7, 15), strategies.integers(7, 15)),
    slots=strategies.integers(1, 5),
)
def test_rows_are_those_of_first_fit_decreasing(lengths, shape, slots):
    lengths = np.array(lengths)
    assert Rows(shape, slots, 1).fill(lengths).tolist() == first_fit(lengths, shape, slots)


def test_the_number_of_rows_is_a_multiple_and_none_is_empty():
    lengths = np.ones((12, 3), np.int64)
    for multiple in (1, 2, 4, 6, 12):
        rows = Rows((6, 6), slots=6, multiple=multiple).fill(lengths)
        assert sorted(set(rows)) == list(range(max(2, multiple)))
    # There are never more rows than prompts.
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
    # No packing needs fewer rows than the tokens of the fullest column need. This one needs at most a fifth and one
    # multiple more.
    assert found.max() + 1 <= 1.2 * lengths.sum(axis=0).max() / 40 + rows.multiple


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("responses", [1, 3])
def test_packing_loses_nothing(make_examples, responses, with_reference, with_sampler):
    examples = make_examples(7, responses=responses, with_reference=with_reference, with_sampler=with_sampler)
    rows = np.array([0, 0, 0, 2, 2, 2, 3])
    packed = Rows((30, 18), 4, 1).pack(collate(examples, 9, 5), rows)
    assert packed.prompts.shape == (4, 30) and packed.responses.shape == (4, responses, 18)
    assert packed.prompt_lengths.shape == (4, 4) and packed.response_lengths.shape == (4, 4, responses)
    assert packed.is_packed and not packed.prompt_lengths[1].any()
    assert texts_of(packed) == texts_in(examples)


def test_packing_keeps_what_a_batch_has_beside_its_pairs(make_examples):
    batch = collate(make_examples(2), 9, 5)
    both = dataclasses.replace(batch, fresh=batch, mismatched=batch)
    packed = Rows((18, 10), 2, 1).pack(both, np.array([0, 0]))
    assert packed.fresh is batch and packed.mismatched is batch and packed.prompts.shape == (1, 18)


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(50, **FIELDS), vocabulary_digest="", provenance={})
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
    plain = offline_source(dataset, **settings | {"packing": None})
    in_memory = offline_source(list(dataset), **settings)
    whole = source()
    for step, batch in enumerate(through):
        assert sorted(texts_of(batch)) == sorted(texts_in([dataset[int(i)] for i in plain.numbers(step)]))
        assert len(batch.prompts) == whole.rows(step) < settings["batch_size"]
        assert not len(batch.prompts) % settings["row_multiple"]
        assert_equal_batches(in_memory(step), batch)


def test_mixtures_are_packed_by_weight(dataset, tmp_path, make_examples):
    write_dataset(tmp_path / "b", make_examples(80, **FIELDS)[50:], vocabulary_digest="", provenance={})
    examples = Examples([dataset, open_dataset(tmp_path / "b")])
    source = offline_source(examples, batch_size=16, seed=3, weights=(1, 3), packing=2, row_multiple=2, **LENGTHS)
    ids = [text[0] - 1000 for step in range(20) for text in texts_of(source(step))]
    assert len(ids) == 320
    # An epoch has 80 places: 20 for the first dataset, 60 for the second.
    assert [sum(i < 50 for i in ids[start : start + 80]) for start in range(0, 320, 80)] == [20, 20, 20, 20]


def test_padding_of_a_large_epoch_is_that_of_a_sample(dataset, monkeypatch):
    """The sample has 20 of 50 examples: the first and the fourth batch."""
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
        ({"row_multiple": 3}, "row_multiple is 3: it must be a divisor of batch_size=8"),
        ({"packing": -1}, "packing is -1: it must be at least 1, or None for one prompt per row"),
        ({"buckets": [(4, 3)]}, r"packing is 1 with buckets=\(\(4, 3\),\): choose one of them"),
        ({"prompt_length": 3}, "example [0-9]+ has a prompt of [4-9] tokens, over prompt_length=3"),
    ],
)
def test_bad_settings(dataset, changes, message):
    with pytest.raises(UserError, match=message):
        offline_source(dataset, **{"batch_size": 8, "seed": 0, "packing": 1} | LENGTHS | changes)
