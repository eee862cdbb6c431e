import collections
import itertools

import grain
import numpy as np
import pytest
from resumption import assert_equal_batches, assert_equal_output_after_restore, assert_union_of_processes

from alignment_gap.data.batches import Prefetched, offline_source
from alignment_gap.data.batches.collation import Examples
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.errors import UserError

LENGTHS = {"prompt_length": 9, "response_length": 5}
BUCKETS = {"buckets": [(4, 3), (6, 5)]}


def ids(source, steps) -> list[int]:
    return [int(i) - 1000 for step in steps for i in source(step).prompt_ids]


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(50), vocabulary_digest="", provenance={})
    return open_dataset(tmp_path)


@pytest.fixture
def mixture(dataset, tmp_path, make_examples):
    """Three datasets of 50, 7 and 20 examples. Their numbers are 0 to 49, 100 to 106 and 200 to 219."""
    datasets = [dataset]
    for start, count in ((100, 7), (200, 20)):
        write_dataset(tmp_path / str(start), make_examples(start + count)[start:], vocabulary_digest="", provenance={})
        datasets.append(open_dataset(tmp_path / str(start)))
    return Examples(datasets)


def test_recorded_order_is_the_records_in_order_then_again(dataset):
    source = offline_source(dataset, batch_size=8, seed=3, order="recorded", **LENGTHS)
    for step in range(14):
        assert ids(source, [step]) == [i % 50 for i in range(step * 8, step * 8 + 8)]


@pytest.mark.parametrize("buckets", [{}, BUCKETS])
def test_shuffle_gives_every_example_once_an_epoch_each_epoch_anew(dataset, buckets):
    source = offline_source(dataset, batch_size=10, seed=3, **LENGTHS, **buckets)
    epochs = [ids(source, range(5 * epoch, 5 * epoch + 5)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


@pytest.mark.parametrize("buckets", [{}, BUCKETS])
@pytest.mark.parametrize("batch_size", [8, 48, 50, 64])
def test_batches_reach_over_the_end_of_an_epoch_without_loss(dataset, batch_size, buckets):
    source = offline_source(dataset, batch_size=batch_size, seed=3, **LENGTHS, **buckets)
    seen = collections.Counter(ids(source, range(50)))
    assert set(seen) == set(range(50)) and set(seen.values()) == {batch_size}
    # Batches that cover one epoch have every example; repeats come only from the start of the next epoch.
    seen = collections.Counter(ids(source, range(-(-50 // batch_size))))
    assert set(seen) == set(range(50)) and max(seen.values()) <= 1 + -(-batch_size // 50)


SOURCES = {
    "shuffle": {},
    "recorded": {"order": "recorded"},
    "window": {"order": "window", "window": 2},
    "buckets": BUCKETS,
    "recorded in buckets": {"order": "recorded", **BUCKETS},
    "large batch": {"batch_size": 64},
}


@pytest.mark.parametrize("name", SOURCES)
def test_resumes_at_every_step_on_any_number_of_processes(dataset, name):
    settings = {"batch_size": 8, "seed": 3} | LENGTHS | SOURCES[name]

    def source(host_rows=None):
        return offline_source(dataset, host_rows=host_rows, **settings)

    through = assert_equal_output_after_restore(source, 9)
    assert_union_of_processes(source, 9)
    in_memory = offline_source(list(dataset), **settings)
    for step, batch in enumerate(through):
        assert_equal_batches(in_memory(step), batch)


@pytest.mark.parametrize("weights", [None, (1, 2, 3)])
@pytest.mark.parametrize("buckets", [{}, BUCKETS])
def test_a_mixture_resumes_at_every_step_on_any_number_of_processes(mixture, weights, buckets):
    def source(host_rows=None):
        return offline_source(mixture, batch_size=8, seed=3, weights=weights, host_rows=host_rows, **LENGTHS, **buckets)

    assert_equal_output_after_restore(source, 12)
    assert_union_of_processes(source, 12)


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetched_resumes_at_every_step(dataset, threads):
    whole = offline_source(dataset, batch_size=8, seed=3, **LENGTHS, **BUCKETS)
    opened = []

    def source():
        opened.append(Prefetched(whole, 3, threads=threads))
        return opened[-1]

    through = assert_equal_output_after_restore(source, 9)
    for step, batch in enumerate(through):
        assert_equal_batches(whole(step), batch)
    for prefetched in opened:
        prefetched.__exit__(None, None, None)


def test_grain_reads_the_source_and_restores_it(dataset):
    """Grain's own check of checkpoints runs on a grain pipeline over our batches."""
    source = offline_source(dataset, batch_size=8, seed=3, **LENGTHS, **BUCKETS)
    pipeline = grain.MapDataset.range(9).map(lambda step: source(step).prompt_ids).to_iter_dataset()
    grain.experimental.assert_equal_output_after_checkpoint(pipeline)


def test_seeds_give_other_orders(dataset):
    orders = [ids(offline_source(dataset, batch_size=10, seed=s, **LENGTHS), range(5)) for s in range(5)]
    assert len({tuple(order) for order in orders}) == 5


def chi_squared(first, cells):
    counts = np.bincount(first, minlength=cells)
    return ((counts - len(first) / cells) ** 2 / (len(first) / cells)).sum()


@pytest.mark.slow
def test_shuffle_is_near_uniform(make_examples):
    """Each of 8 examples comes first about equally often, over seeds and over epochs."""
    examples = make_examples(8)
    sources = [offline_source(examples, batch_size=1, seed=seed, **LENGTHS) for seed in range(400)]
    # Chi-squared with 7 degrees of freedom, p about 1e-4.
    assert chi_squared([source.numbers(0)[0] for source in sources], 8) < 30
    assert chi_squared([sources[0].numbers(8 * epoch)[0] for epoch in range(400)], 8) < 30


def test_window_shuffles_within_windows_only_and_anew_in_each_epoch(dataset):
    source = offline_source(dataset, batch_size=5, seed=3, order="window", window=3, **LENGTHS)
    epochs = [ids(source, range(10 * epoch, 10 * epoch + 10)) for epoch in range(3)]
    for order in epochs:
        for start in range(0, 50, 15):
            assert sorted(order[start : start + 15]) == list(range(start, min(start + 15, 50)))
    within = {tuple(i - start for i in order[start : start + 15]) for order in epochs for start in range(0, 45, 15)}
    assert len(within) == 9


def test_window_is_uniform_within_a_window(make_examples):
    examples = make_examples(16)
    settings = dict(batch_size=4, order="window", window=2, **LENGTHS)
    first = [offline_source(examples, seed=seed, **settings).numbers(2)[0] - 8 for seed in range(400)]
    assert chi_squared(first, 8) < 30


def test_each_batch_is_of_one_bucket_and_of_few_shapes(dataset):
    """An example stands in a larger bucket than its own only to complete a batch."""
    source = offline_source(dataset, batch_size=8, seed=3, **LENGTHS, **BUCKETS)
    shapes = [(4, 3), (6, 5), (9, 5)]
    moved = 0
    for step in range(6):
        batch = source(step)
        shape = batch.prompts.shape[1], batch.responses.shape[2]
        longest = zip(batch.prompt_lengths.tolist(), batch.response_lengths.max(axis=1).tolist(), strict=True)
        own = [next(s for s in shapes if p <= s[0] and r <= s[1]) for p, r in longest]
        assert shape == max(own)
        moved += sum(o != shape for o in own)
    assert moved <= 2 * 8


def test_batches_of_all_buckets_are_mixed(make_examples):
    source = offline_source(make_examples(400), batch_size=8, seed=3, **LENGTHS, **BUCKETS)
    lengths = [source(step).prompts.shape[1] for step in range(50)]
    changes = sum(a != b for a, b in itertools.pairwise(lengths))
    assert set(lengths) == {4, 6, 9} and changes > 15


def test_padding_is_counted_with_and_without_buckets(make_examples):
    examples = make_examples(40)
    shares = {}
    for name, buckets in (("without", {}), ("with", BUCKETS)):
        source = offline_source(examples, batch_size=8, seed=3, **LENGTHS, **buckets)
        batches = [source(step) for step in range(5)]
        slots = sum(batch.prompts.size + batch.responses.size for batch in batches)
        tokens = sum(int(batch.prompt_lengths.sum() + batch.response_lengths.sum()) for batch in batches)
        padding = source.padding()
        assert (padding.slots, padding.tokens) == (slots, tokens)
        shares[name] = padding.share
        assert padding.share == pytest.approx(1 - tokens / slots)
        of_prompts = source.padding(prompts_only=True)
        assert of_prompts.slots == sum(batch.prompts.size for batch in batches)
        assert of_prompts.tokens == sum(int(batch.prompt_lengths.sum()) for batch in batches)
    assert shares["with"] < shares["without"]


def test_a_mixture_has_its_weights_in_every_epoch_and_loses_nothing(mixture):
    """Weights 1, 2, 3 give 12.8, 25.7 and 38.5 of 77 places. Largest remainders make them 13, 26 and 38."""
    source = offline_source(mixture, batch_size=7, seed=3, weights=(1, 2, 3), **LENGTHS)
    seen = collections.Counter()
    for epoch in range(4):
        drawn = ids(source, range(11 * epoch, 11 * epoch + 11))
        assert [sum(low <= i < low + 100 for i in drawn) for low in (0, 100, 200)] == [13, 26, 38]
        seen.update(drawn)
    # Each dataset repeats in turn: in its 52, 104 or 152 draws all its examples come equally often, give or take one.
    for first, size, draws in ((0, 50, 52), (100, 7, 104), (200, 20, 152)):
        counts = {seen[i] for i in range(first, first + size)}
        assert (
            counts <= {draws // size, draws // size + 1} and sum(seen[i] for i in range(first, first + size)) == draws
        )


def test_a_mixture_without_weights_has_every_example_once_an_epoch(mixture):
    source = offline_source(mixture, batch_size=7, seed=3, **LENGTHS)
    assert sorted(ids(source, range(11))) == [*range(50), *range(100, 107), *range(200, 220)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": "random"}, "kind is 'random': choose one of shuffle, recorded, window"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"window": 4}, "window is 200 with the order 'shuffle': set it for the order 'window', and only"),
        ({"order": "window"}, "window is None with the order 'window'"),
        ({"order": "window", "window": 0}, "window is 0: it must be at least 1"),
        ({"prompt_length": 8}, "over prompt_length=8"),
        ({"prompt_length": 8, "buckets": [(4, 4)]}, "over prompt_length=8"),
        ({"response_length": 4, "buckets": [(4, 4)]}, "has a response of 5 tokens, over response_length=4"),
        ({"buckets": [(4, 4), (5, 3)]}, r"bucket \(5, 3\) does not hold bucket \(4, 4\)"),
        ({"buckets": [(10, 4)]}, r"bucket \(9, 5\) does not hold bucket \(10, 4\)"),
        ({"buckets": [(0, 4)]}, r"buckets is \(\(0, 4\), \(9, 5\)\): give at least one shape"),
        ({"weights": (1.0, 2.0)}, r"weights is \(1.0, 2.0\), but there are 1 datasets: give one"),
        ({"weights": ()}, r"weights is \(\), but there are 1 datasets"),
        ({"weights": (0.0,)}, r"weights is \(0.0,\): each must be above 0"),
        ({"weights": (1.0,), "order": "recorded"}, r"weights is \(1.0,\) with the order 'recorded': leave weights out"),
    ],
)
def test_settings_out_of_range_are_named(dataset, change, message):
    with pytest.raises(UserError, match=message):
        source = offline_source(dataset, **({"batch_size": 50, "seed": 0} | LENGTHS | change))
        source(0)


def test_no_example_or_step_is_refused(dataset):
    with pytest.raises(UserError, match="empty"):
        offline_source([], batch_size=4, seed=0, **LENGTHS)
    with pytest.raises(UserError, match="step=-1"):
        offline_source(dataset, batch_size=4, seed=0, **LENGTHS)(-1)


def test_a_weight_that_gives_nothing_is_refused(mixture):
    with pytest.raises(UserError, match="weight 1 gives dataset 1 none of the 77 examples"):
        offline_source(mixture, batch_size=4, seed=0, weights=(1000, 1, 1000), **LENGTHS)


def test_datasets_that_do_not_go_together_are_named(dataset, tmp_path, make_examples):
    for name, examples, digest, message in (
        ("vocabulary", make_examples(3), "other", "has a vocabulary of digest other"),
        ("responses", make_examples(3, responses=3), "", "has responses a prompt: 3"),
        ("reference", make_examples(3, with_reference=True), "", "has the fields .*, reference_log_probs, "),
        ("sampler", make_examples(3, with_sampler=True), "", "has the fields .*, sampler_log_probs, "),
    ):
        write_dataset(tmp_path / name, examples, vocabulary_digest=digest, provenance={})
        with pytest.raises(UserError, match=message):
            Examples([dataset, open_dataset(tmp_path / name)])
    write_dataset(tmp_path / "rewards", make_examples(3), vocabulary_digest="", provenance={}, scores="rewards")
    with pytest.raises(UserError, match=r"rewards has scores that are rewards, .* probabilities: use datasets that"):
        Examples([dataset, open_dataset(tmp_path / "rewards")])
