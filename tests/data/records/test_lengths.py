"""The lengths of a dataset's examples, and the file that stores them."""

import os
import stat

import numpy as np
import pytest

from alignment_gap.data.records import lengths_of, open_dataset, write_dataset


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path / "pairs", make_examples(30, responses=3), vocabulary_digest="", provenance={})
    return open_dataset(tmp_path / "pairs")


def kept(dataset):
    return list(dataset.folder.glob("lengths-*"))


def test_lengths_are_those_of_the_examples_on_disk_and_in_memory(dataset, make_examples):
    examples = make_examples(30, responses=3)
    expected = [[len(e.prompt), *(len(response) for response in e.responses)] for e in examples]
    for some in (examples, dataset, dataset):
        lengths = lengths_of(some)
        assert lengths.tolist() == expected and lengths.dtype == np.int32


def test_they_are_read_once_and_kept_under_the_digest(dataset, monkeypatch):
    first = lengths_of(dataset)
    assert [path.name for path in kept(dataset)] == [f"lengths-{dataset.card.digest[:16]}.npy"]
    monkeypatch.setattr(type(dataset), "records", None)
    np.testing.assert_array_equal(lengths_of(dataset), first)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_file_has_the_mode_that_the_umask_gives(dataset, mask, mode):
    before = os.umask(mask)
    try:
        lengths_of(dataset)
    finally:
        os.umask(before)
    (path,) = kept(dataset)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_of_something_else_is_written_again(dataset):
    expected = lengths_of(dataset)
    (path,) = kept(dataset)
    for content in (b"", b"not numpy", None):
        path.unlink() if content is None else path.write_bytes(content)
        np.testing.assert_array_equal(lengths_of(dataset), expected)
        np.testing.assert_array_equal(np.load(path), expected)
    np.save(path, expected[1:])
    np.testing.assert_array_equal(lengths_of(dataset), expected)


def test_a_failed_write_leaves_nothing_and_lengths_are_given_all_the_same(dataset, make_examples, monkeypatch):
    def full(file, array):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert lengths_of(dataset)[0, 0] == len(make_examples(1, responses=3)[0].prompt)
    assert kept(dataset) == []


def test_lengths_of_a_changed_dataset_are_read_anew(tmp_path, make_examples):
    for seed in (0, 1):
        examples = make_examples(30, seed=seed)
        write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
        assert lengths_of(open_dataset(tmp_path)).tolist() == lengths_of(examples).tolist()
