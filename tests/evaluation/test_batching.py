"""Examples go through jitted functions: each row once, in order, for any batch, bucket and number of processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_examples import make_random_examples

from alignment_gap.data.batches import collate
from alignment_gap.errors import UserError
from alignment_gap.evaluation import batching as module
from alignment_gap.evaluation.batching import Batching
from alignment_gap.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def in_eights(mesh):
    return Batching(mesh, 8, ((6, 4), (9, 5)))


@pytest.mark.parametrize("count", [1, 8, 11, 16])
def test_each_row_comes_back_once(count, in_eights):
    shapes = []

    @jax.jit
    def function(numbers, rows):
        shapes.append(numbers.shape)
        return {"twice": 2 * numbers, "sum": rows.sum(1)}

    numbers, rows = np.arange(count), np.arange(3.0 * count, dtype=np.float32).reshape(count, 3)
    results = in_eights.run(function, (numbers, rows))
    np.testing.assert_array_equal(results["twice"], 2 * numbers)
    np.testing.assert_array_equal(results["sum"], rows.sum(1))
    # One shape means one compilation.
    assert shapes == [(8,)]


def test_a_batch_is_laid_out_over_the_devices_and_its_results_are_on_the_host(in_eights):
    seen = []

    def function(rows):
        seen.append(rows.sharding.shard_shape(rows.shape))
        return rows, rows.sum(1)

    both = in_eights.run(function, (np.ones((8, 2), np.float32),))
    assert seen == [(1, 2)]
    assert all(isinstance(each, np.ndarray) for each in both)


def test_it_runs_where_no_transfer_is_made_unasked(in_eights):
    with jax.transfer_guard("disallow"):
        found = in_eights.run(jax.jit(jnp.negative), (np.arange(9, dtype=np.float32),))
    np.testing.assert_array_equal(found, -np.arange(9))


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_puts_its_own_rows_alone(process, in_eights, monkeypatch):
    """Each of two processes holds half of each batch. The results are gathered from both."""
    held = {0: np.arange(4), 1: np.arange(4, 8)}[process]
    put = []
    monkeypatch.setattr(module, "host_rows", lambda mesh, size: held)
    monkeypatch.setattr(module, "put_batch", lambda arrays, mesh, size: put.append(arrays) or arrays)
    monkeypatch.setattr(module, "to_host", lambda results: np.concatenate([results, results + 100]))
    rows = np.arange(11)
    found = in_eights.run(lambda numbers: numbers, (rows,))
    whole = np.array([*range(11), *range(5)]).reshape(2, 8)
    np.testing.assert_array_equal(np.stack([numbers for (numbers,) in put]), whole[:, held])
    # The gathered results have one entry for each example.
    np.testing.assert_array_equal(found, np.concatenate([np.concatenate([w[held], w[held] + 100]) for w in whole])[:11])


def test_a_batch_that_cannot_be_split_is_refused(mesh):
    with pytest.raises(UserError, match="batch_size is 12: it must be a multiple of data"):
        Batching(mesh, 12, ((4, 4),))
    assert Batching(make_mesh(MeshConfig(), jax.devices()[:1]), 3, ((4, 4),)).batch_size == 3


def test_collate_pads_to_the_largest_shape(in_eights):
    examples = make_random_examples(5)
    batch = in_eights.collate(examples)
    assert batch.prompts.shape == (5, 9) and batch.responses.shape == (5, 2, 5)
    for example, row, length in zip(examples, batch.prompts, batch.prompt_lengths, strict=True):
        np.testing.assert_array_equal(row[:length], example.prompt)
        assert not row[length:].any()
    with pytest.raises(UserError, match="prompt"):
        Batching(in_eights.mesh, 8, ((2, 5),)).collate(examples)


@pytest.mark.parametrize("count", [0, 3, 8, 30])
def test_each_example_gets_its_own_result_in_order(count, in_eights):
    """A batch gives one result for each of its rows, whichever batch an example is in."""
    examples = make_random_examples(count)
    shapes = []

    def function(batch):
        shapes.append((len(batch.prompts), batch.prompts.shape[1], batch.responses.shape[2]))
        return [(int(number), int(row.sum())) for number, row in zip(batch.prompt_ids, batch.prompts, strict=True)]

    pairs = list(in_eights.each(iter(examples), function))
    assert [example.prompt_id for example, _ in pairs] == [example.prompt_id for example in examples]
    for example, (number, total) in pairs:
        assert number == example.prompt_id and total == example.prompt.sum()
    # Each shape is a bucket. No batch is larger than the batch size; at most one is smaller.
    assert {shape[1:] for shape in shapes} <= {(6, 4), (9, 5)}
    assert sum(rows for rows, *_ in shapes) == count
    assert sum(rows < 8 for rows, *_ in shapes) <= 1
    assert count < 30 or len({shape[1:] for shape in shapes}) == 2


def test_a_window_of_examples_is_held_at_a_time(in_eights, monkeypatch):
    """The examples of the second window are not read before the results of the first are taken."""
    monkeypatch.setattr(module, "_WINDOW", 2)
    read, examples = [], make_random_examples(40)

    def reading():
        for example in examples:
            read.append(example.prompt_id)
            yield example

    results = in_eights.each(reading(), lambda batch: batch.prompt_ids.tolist())
    taken = [next(results) for _ in range(16)]
    assert len(read) == 16
    taken += list(results)
    assert [number for _, number in taken] == [example.prompt_id for example in examples]


def test_a_function_that_gives_too_few_results_is_an_error(in_eights):
    with pytest.raises(ValueError, match="zip"):
        list(in_eights.each(make_random_examples(8), lambda batch: batch.prompt_ids[1:]))


def test_the_collated_batch_is_that_of_collate(in_eights):
    examples = make_random_examples(8, with_reference=True)
    expected = collate(examples, 9, 5)
    np.testing.assert_array_equal(in_eights.collate(examples).reference_log_probs, expected.reference_log_probs)
