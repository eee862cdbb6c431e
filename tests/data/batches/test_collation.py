import dataclasses

import numpy as np
import pytest
from resumption import assert_equal_batches

from alignment_gap.data.batches import Examples, collate
from alignment_gap.data.batches.collation import collate_records
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.errors import UserError


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("responses", [1, 2, 3])
def test_records_become_the_batch_that_their_examples_become(tmp_path, make_examples, responses, with_reference):
    examples = make_examples(20, responses=responses, with_reference=with_reference)
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    on_disk = Examples([open_dataset(tmp_path)])
    numbers = np.array([7, 0, 19, 7])
    batch = on_disk.collate(numbers, on_disk.read(numbers), (9, 6))
    assert_equal_batches(batch, collate([examples[i] for i in (7, 0, 19, 7)], 9, 6))


def test_what_collate_refuses_is_refused_in_its_words(tmp_path, make_examples):
    long = dataclasses.replace(make_examples(1)[0], prompt_id=77, prompt=np.arange(12, dtype=np.int32))
    write_dataset(tmp_path, [*make_examples(3), long], vocabulary_digest="", provenance={})
    on_disk = Examples([open_dataset(tmp_path)])
    with pytest.raises(UserError, match=r"example 1 of the batch \(prompt id 77\) has a prompt of 12 tokens"):
        on_disk.collate(np.array([1, 3]), on_disk.read(np.array([1, 3])), (9, 6))
    with pytest.raises(UserError, match="a batch needs an example"):
        collate_records([], 9, 6)


def test_a_damaged_record_is_named(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(200), vocabulary_digest="", provenance={})
    path = tmp_path / "pairs.array_record"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    examples = Examples([open_dataset(tmp_path)])
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        examples.read(np.arange(200))
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        examples.lengths()
