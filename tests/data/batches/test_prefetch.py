import threading

import pytest

from alignment_gap.data.batches import Prefetched
from alignment_gap.errors import UserError


class Counting:
    """A source that records the steps that are read. Step 5 fails."""

    def __init__(self):
        self.read = []

    def __call__(self, step):
        self.read.append(step)
        if step == 5:
            raise UserError("record 5 is damaged")
        return step * step


def test_reads_ahead_and_each_step_once():
    source = Counting()
    with Prefetched(source, 2, threads=2) as batches:
        assert [batches(step) for step in range(3)] == [0, 1, 4]
    assert sorted(source.read) == list(range(len(source.read)))
    assert set(range(3)) <= set(source.read) <= set(range(5))


def test_the_next_batches_are_made_while_nobody_asks():
    source, made = Counting(), threading.Event()

    def watched(step):
        if step == 2:
            made.set()
        return source(step)

    with Prefetched(watched, 2) as batches:
        batches(0)
        assert made.wait(10)


def test_any_step_may_be_asked_for():
    with Prefetched(Counting(), 3) as batches:
        assert [batches(step) for step in (0, 1, 9, 10, 2, 2, 3)] == [0, 1, 81, 100, 4, 4, 9]


def test_an_error_is_raised_where_its_step_is_asked_for_and_not_before():
    with Prefetched(Counting(), 4) as batches:
        assert [batches(step) for step in range(1, 5)] == [1, 4, 9, 16]
        with pytest.raises(UserError, match="record 5 is damaged"):
            batches(5)
        assert batches(6) == 36


def test_nothing_is_read_beyond_the_last_step():
    source = Counting()
    with Prefetched(source, 3, last=4) as batches:
        assert [batches(step) for step in range(4)] == [0, 1, 4, 9]
    assert source.read == [0, 1, 2, 3]


def test_stops_with_what_is_being_read_and_reads_no_more():
    opened, source = threading.Event(), Counting()

    def slow(step):
        assert step == 0 or opened.wait(10)
        return source(step)

    with Prefetched(slow, 50) as batches:
        assert batches(0) == 0
        threading.Timer(0.1, opened.set).start()
    assert source.read in ([0], [0, 1])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_in_the_block_ends_the_threads():
    with pytest.raises(KeyboardInterrupt), Prefetched(Counting(), 3) as batches:
        batches(0)
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_nothing_ahead_reads_when_asked():
    source = Counting()
    with Prefetched(source, 0) as batches:
        assert [batches(3), batches(4)] == [9, 16]
    assert source.read == [3, 4]
    with pytest.raises(UserError, match="prefetch is -1: it must be at least 0"):
        Prefetched(source, -1)
