"""One record: its bytes, and the form that all records share."""

import dataclasses

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from alignment_gap.data.batches import collate
from alignment_gap.data.records import Example, write_dataset
from alignment_gap.data.records.example import check_form, decode, encode
from alignment_gap.errors import UserError

ABOUT = {"vocabulary_digest": "abc", "provenance": {}}


def test_records_are_plain_msgpack(tmp_path, make_examples):
    (example,) = make_examples(1)
    write_dataset(tmp_path, [example], **ABOUT)
    (record,) = ArrayRecordReader(str(tmp_path / "pairs.array_record")).read_all()
    content = msgpack.unpackb(record)
    assert list(content) == ["prompt_id", "prompt", "responses", "scores"]
    assert np.frombuffer(content["responses"][1], "<i4").tolist() == example.responses[1].tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"responses": (np.ones(1, np.int32),)}, "has 1 responses, but the first has 2"),
        ({"scores": np.ones(3, np.float32)}, r"scores of shape \(3,\) for 2 responses"),
        ({"prompt": np.ones(0, np.int32)}, "empty prompt or response"),
        ({"responses": (np.ones(0, np.int32), np.ones(2, np.int32))}, "empty prompt or response"),
        ({"reference_log_probs": (np.ones(1, np.float32),) * 2}, "it has reference_log_probs: give them for all or"),
        (
            {"sampler_log_probs": (np.ones(1, np.float32),) * 2},
            "it has sampler_log_probs: give them for all or for none",
        ),
    ],
)
def test_an_example_of_another_form_is_named(tmp_path, make_examples, change, message):
    examples = make_examples(3)
    examples[2] = dataclasses.replace(examples[2], **change)
    with pytest.raises(UserError, match=rf"record 2 of .*pairs.array_record \(prompt id 1002\).*{message}"):
        write_dataset(tmp_path, examples, **ABOUT)
    with pytest.raises(UserError, match=rf"example 2 of the batch \(prompt id 1002\).*{message}"):
        collate(examples, 9, 5)


def test_the_bytes_of_a_record_by_hand():
    answers = (np.array([7], np.int32), np.array([8, 9], np.int32))
    sampled = (np.array([-0.5], np.float32), np.array([-0.25, -2.0], np.float32))
    example = Example(5, np.array([3, 4], np.int32), answers, np.array([1, 0], np.float32), sampler_log_probs=sampled)
    record = {
        "prompt_id": 5,
        "prompt": bytes([3, 0, 0, 0, 4, 0, 0, 0]),
        "responses": [bytes([7, 0, 0, 0]), bytes([8, 0, 0, 0, 9, 0, 0, 0])],
        "scores": bytes([0, 0, 128, 63, 0, 0, 0, 0]),
        # -0.5, -0.25 and -2 as IEEE 754.
        "sampler_log_probs": [bytes([0, 0, 0, 191]), bytes([0, 0, 128, 190, 0, 0, 0, 192])],
    }
    assert msgpack.unpackb(encode(example)) == record
    again = decode(msgpack.packb(record))
    assert again.reference_log_probs is None
    assert [row.tolist() for row in again.sampler_log_probs] == [[-0.5], [-0.25, -2.0]]
    assert {row.dtype for row in again.sampler_log_probs} == {np.dtype(np.float32)}


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_decoding_is_the_inverse_of_encoding(make_examples, plain, with_reference, with_sampler):
    for example in make_examples(5, responses=3, with_reference=with_reference, with_sampler=with_sampler):
        assert plain(decode(encode(example))) == plain(example)


@pytest.mark.parametrize("field", ["reference_log_probs", "sampler_log_probs"])
def test_log_probs_of_other_lengths_are_refused(make_examples, field):
    (example,) = make_examples(1, with_reference=True, with_sampler=True)
    wrong = dataclasses.replace(example, **{field: (np.ones(9, np.float32),) * 2})
    with pytest.raises(UserError, match=rf"\(prompt id 1000\) has {field} whose lengths are not those .* one for each"):
        check_form(wrong, wrong, "it")


@pytest.mark.parametrize("field", ["reference_log_probs", "sampler_log_probs"])
def test_log_probs_of_some_examples_alone_are_refused(make_examples, field):
    first, second = make_examples(2, with_reference=True, with_sampler=True)
    without = dataclasses.replace(second, **{field: None})
    for one, other in ((first, without), (without, first)):
        with pytest.raises(UserError, match=f"differs from the first in whether it has {field}"):
            check_form(other, one, "it")
