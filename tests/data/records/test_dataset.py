import dataclasses
import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from alignment_gap.data.batches import PreferenceBatch, collate, examples_of
from alignment_gap.data.records import close_dataset, derived, open_dataset, verify_dataset, write_chunk, write_dataset
from alignment_gap.data.records.dataset import part_size
from alignment_gap.data.records.summary import summarise_lengths
from alignment_gap.errors import UserError

ABOUT = {"vocabulary_digest": "abc", "provenance": {"made": "by a test"}}


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_dataset_comes_back_as_it_was_written(tmp_path, make_examples, plain, with_reference):
    examples = make_examples(30, with_reference=with_reference)
    write_dataset(tmp_path, examples, **ABOUT)
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 30
    assert [plain(dataset[i]) for i in range(30)] == [plain(example) for example in examples]
    assert plain(dataset[-1]) == plain(examples[-1])
    assert [plain(e) for e in dataset[4:9:2]] == [plain(e) for e in examples[4:9:2]]
    assert dataset[3].prompt.dtype == np.int32 and dataset[3].scores.dtype == np.float32
    with pytest.raises(IndexError):
        dataset[30]


def test_the_card_says_what_is_in_the_folder(tmp_path, make_examples):
    examples = make_examples(30, responses=3)
    card = write_dataset(tmp_path, examples, **ABOUT)
    on_disk = json.loads((tmp_path / "card.json").read_text())
    assert open_dataset(tmp_path).card == card
    assert on_disk["count"] == 30 and on_disk["responses_per_prompt"] == 3
    assert on_disk["max_prompt_length"] == max(len(e.prompt) for e in examples)
    assert on_disk["max_response_length"] == max(len(r) for e in examples for r in e.responses)
    assert on_disk["vocabulary_digest"] == "abc" and on_disk["provenance"] == {"made": "by a test"}
    assert on_disk["fields"] == ["prompt_id", "prompt", "responses", "scores"]
    assert [file["name"] for file in on_disk["files"]] == ["pairs.array_record"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "pairs.array_record"]


def test_records_are_plain_msgpack(tmp_path, make_examples):
    (example,) = make_examples(1)
    write_dataset(tmp_path, [example], **ABOUT)
    (record,) = ArrayRecordReader(str(tmp_path / "pairs.array_record")).read_all()
    content = msgpack.unpackb(record)
    assert list(content) == ["prompt_id", "prompt", "responses", "scores"]
    assert np.frombuffer(content["responses"][1], "<i4").tolist() == example.responses[1].tolist()


def test_equal_input_gives_equal_bytes(tmp_path, make_examples):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, make_examples(2000), **ABOUT)
    for file in ("card.json", "pairs.array_record"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_chunks_join_in_the_order_of_their_names_and_can_be_written_again(tmp_path, make_examples, plain):
    examples = make_examples(50)
    write_chunk(tmp_path, "step_00020", examples[20:50])
    write_chunk(tmp_path, "step_00000", make_examples(7, seed=9))
    write_chunk(tmp_path, "step_00000", examples[:20])
    card = close_dataset(tmp_path, **ABOUT)
    assert [chunk.count for chunk in card.files] == [20, 30]
    dataset = open_dataset(tmp_path)
    assert dataset.card == card
    assert [plain(e) for e in dataset] == [plain(e) for e in examples]
    verify_dataset(dataset)


def test_one_chunk_closed_equals_one_dataset_written(tmp_path, make_examples):
    write_chunk(tmp_path / "a", "pairs", make_examples(9))
    assert close_dataset(tmp_path / "a", **ABOUT) == write_dataset(tmp_path / "b", make_examples(9), **ABOUT)


def test_a_failure_while_writing_leaves_the_earlier_chunk(tmp_path, make_examples, plain):
    examples = make_examples(5)
    write_chunk(tmp_path, "a", examples)

    def failing():
        yield examples[0]
        raise OSError("from the caller")

    with pytest.raises(OSError, match="from the caller"):
        write_chunk(tmp_path, "a", failing())
    assert [path.name for path in tmp_path.glob("a.*")] == ["a.array_record"]
    close_dataset(tmp_path, **ABOUT)
    assert [plain(e) for e in open_dataset(tmp_path)] == [plain(e) for e in examples]


def test_a_kill_while_writing_leaves_the_earlier_chunk(tmp_path, make_examples, plain):
    examples = make_examples(5)
    write_chunk(tmp_path, "a", examples)
    script = f"""
import os, pickle, signal, sys
from alignment_gap.data.records import write_chunk
examples = pickle.load(sys.stdin.buffer)
write_chunk({str(tmp_path)!r}, "b", examples)
def killed():
    yield from examples
    os.kill(os.getpid(), signal.SIGKILL)
write_chunk({str(tmp_path)!r}, "a", killed())
"""
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(examples[:2]), check=False)
    assert done.returncode == -signal.SIGKILL
    assert "a.partial" in os.listdir(tmp_path)
    with pytest.raises(UserError, match="no finished dataset"):
        open_dataset(tmp_path)
    close_dataset(tmp_path, **ABOUT)
    assert [plain(e) for e in open_dataset(tmp_path)] == [plain(e) for e in examples + examples[:2]]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
def test_a_full_disk_is_one_line_and_leaves_what_was_finished(tmp_path, make_examples, plain):
    examples = make_examples(5)
    write_dataset(tmp_path, examples, **ABOUT)
    message = r"cannot write .*{} \(.*No space left on device.*\): free space .* intact"
    (tmp_path / "pairs.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=message.format("pairs.array_record")):
        write_dataset(tmp_path, make_examples(3), **ABOUT)
    assert [plain(e) for e in open_dataset(tmp_path)] == [plain(e) for e in examples]
    (tmp_path / "card.json.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=message.format("card.json")):
        close_dataset(tmp_path, **ABOUT)
    assert len(open_dataset(tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_examples):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/pairs.array_record \(.*\): give a folder"):
        write_dataset(tmp_path / "file", make_examples(1), **ABOUT)


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(UserError, match="would hold no example"):
        write_dataset(tmp_path, [], **ABOUT)
    with pytest.raises(UserError, match="no dataset can be closed"):
        close_dataset(tmp_path, **ABOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"responses": (np.ones(1, np.int32),)}, "has 1 responses where the first has 2"),
        ({"scores": np.ones(3, np.float32)}, r"scores of shape \(3,\) for 2 responses"),
        ({"prompt": np.ones(0, np.int32)}, "empty prompt or response"),
        ({"responses": (np.ones(0, np.int32), np.ones(2, np.int32))}, "empty prompt or response"),
        ({"reference_log_probs": (np.ones(1, np.float32),) * 2}, "for all or for none"),
    ],
)
def test_an_example_of_another_form_is_named(tmp_path, make_examples, change, message):
    examples = make_examples(3)
    examples[2] = dataclasses.replace(examples[2], **change)
    with pytest.raises(UserError, match=rf"record 2 of .*pairs.array_record \(prompt id 1002\).*{message}"):
        write_dataset(tmp_path, examples, **ABOUT)
    with pytest.raises(UserError, match=rf"example 2 of the batch \(prompt id 1002\).*{message}"):
        collate(examples, 9, 5)


def test_reference_of_other_lengths_is_refused(make_examples):
    (example,) = make_examples(1, with_reference=True)
    wrong = dataclasses.replace(example, reference_log_probs=(np.ones(9, np.float32),) * 2)
    with pytest.raises(UserError, match="one for each token"):
        collate([wrong], 9, 9)


def test_chunks_of_another_form_are_refused(tmp_path, make_examples):
    for folder, settings, message in [
        ("k", {"responses": 3}, "3 responses a prompt"),
        ("r", {"with_reference": True}, "reference_log_probs"),
    ]:
        write_chunk(tmp_path / folder, "a", make_examples(2))
        write_chunk(tmp_path / folder, "b", make_examples(2, **settings))
        with pytest.raises(UserError, match=message):
            close_dataset(tmp_path / folder, **ABOUT)


def test_an_unfinished_or_unknown_dataset_is_refused(tmp_path, make_examples):
    with pytest.raises(UserError, match=r"none is no finished dataset \(card.json: No such file"):
        open_dataset(tmp_path / "none")
    write_dataset(tmp_path, make_examples(2), **ABOUT)
    card = json.loads((tmp_path / "card.json").read_text())
    for content, message in [
        (json.dumps(card | {"format_version": 99}), "of format 99, this version reads 2"),
        ("{", "is not a dataset's card"),
        ("[]", "is not a dataset's card"),
        (json.dumps({"format_version": 2}), "is not a dataset's card"),
        (json.dumps(card | {"provenance": None}), "is not a dataset's card .*its provenance and lengths are tables"),
        (
            json.dumps(card | {"count": 1}),
            "is not a dataset's card .*its counts and lengths are not those of its files",
        ),
        (json.dumps(card | {"max_prompt_length": 1}), "is not a dataset's card .*counts and lengths"),
        (json.dumps(card | {"files": []}), "is not a dataset's card"),
    ]:
        (tmp_path / "card.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path)


def test_a_missing_truncated_or_exchanged_file_is_named(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(2000), **ABOUT)
    path = tmp_path / "pairs.array_record"
    whole = path.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "not a whole record file"),
        (b"", "not a whole record file"),
        (None, "is missing"),
    ]:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=rf"pairs.array_record.*{message}.*prepare the dataset again"):
            open_dataset(tmp_path)
    write_chunk(tmp_path, "pairs", make_examples(1999))
    with pytest.raises(UserError, match=r"has 1999 records in .* its card says 2000"):
        open_dataset(tmp_path)


def test_more_files_than_may_be_open_are_said_to_be_so(tmp_path, make_examples):
    for number in range(30):
        write_chunk(tmp_path, f"part-{number:02d}", make_examples(1))
    close_dataset(tmp_path, **ABOUT)
    limit, used = resource.getrlimit(resource.RLIMIT_NOFILE), set(os.listdir("/proc/self/fd"))
    tenth = [number for number in range(limit[0]) if str(number) not in used][10]
    resource.setrlimit(resource.RLIMIT_NOFILE, (tenth, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot open .*part-\d\d.* \(.*Too many open files.*\): raise the limit"):
            open_dataset(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    # So that a process may have two such datasets open, where it may have 1,024 files.
    for count in (1, 5000, 300_000, 10_000_000, 123_456_789):
        assert -(-count // part_size(count)) <= 400 and part_size(count) >= 5000


def test_a_flipped_bit_is_found(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(2000), **ABOUT)
    path = tmp_path / "pairs.array_record"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        verify_dataset(dataset)
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        list(dataset)
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        close_dataset(tmp_path, **ABOUT)


def test_a_file_that_was_exchanged_for_a_whole_one_is_found(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(40), **ABOUT)
    card = (tmp_path / "card.json").read_bytes()
    old = open_dataset(tmp_path)
    write_dataset(tmp_path, make_examples(40, seed=1), **ABOUT)
    new = open_dataset(tmp_path)
    assert new.card.digest != old.card.digest
    (tmp_path / "card.json").write_bytes(card)
    with pytest.raises(UserError, match=r"pairs.array_record was changed since its card was written"):
        verify_dataset(old)


def test_the_card_has_the_lengths_percentiles(tmp_path, make_examples):
    examples = make_examples(203)
    for start in range(0, 203, 50):
        write_chunk(tmp_path / "a", f"{start:03}", examples[start : start + 50])
    card = close_dataset(tmp_path / "a", **ABOUT)
    lengths = {"prompt": [len(e.prompt) for e in examples], "response": [len(r) for e in examples for r in e.responses]}
    for name, values in lengths.items():
        found = card.lengths[name]
        assert found["mean"] == pytest.approx(np.mean(values), abs=0.005)
        for percent in (50, 90, 99):
            assert found[f"p{percent}"] == np.percentile(values, percent, method="inverted_cdf")
        assert found["bin_width"] == 1
        assert found["histogram"] == np.bincount(values)[1:].tolist()
    assert not (tmp_path / "a" / ".chunks").exists()
    # Closed again without what was kept of the chunks, which are then read.
    assert close_dataset(tmp_path / "a", **ABOUT) == card


def test_a_histogram_has_few_bins_and_all_sequences():
    found = summarise_lengths({1: 3, 16: 1, 17: 2, 500: 4})
    assert found["bin_width"] == 16 and len(found["histogram"]) == 32
    assert (found["histogram"][0], found["histogram"][1], found["histogram"][31]) == (4, 2, 4)
    assert (found["p50"], found["p90"], found["max"]) == (17, 500, 500)


def test_provenance_holds_the_whole_chain(tmp_path, make_examples):
    human = write_dataset(tmp_path / "human", make_examples(5), vocabulary_digest="v", provenance={"source": "pairs"})
    about = derived("relabel", {"pairs": open_dataset(tmp_path / "human")}, judge="golden")
    assert about["made_by"] == "relabel" and about["judge"] == "golden"
    (part,) = about["inputs"]
    assert (part["role"], part["digest"], part["count"]) == ("pairs", human.digest, 5)
    assert part["provenance"] == {"source": "pairs"}


@pytest.mark.parametrize("with_reference", [False, True])
def test_collate_pads_on_the_right(make_examples, with_reference):
    examples = make_examples(4, responses=3, with_reference=with_reference)
    batch = collate(examples, 11, 6)
    assert batch.prompts.shape == (4, 11) and batch.responses.shape == (4, 3, 6) and batch.scores.shape == (4, 3)
    for field in ("prompt_ids", "prompts", "prompt_lengths", "responses", "response_lengths"):
        assert getattr(batch, field).dtype == np.int32
    assert batch.scores.dtype == np.float32
    for b, example in enumerate(examples):
        assert batch.prompts[b].tolist() == example.prompt.tolist() + [0] * (11 - len(example.prompt))
        assert batch.prompt_lengths[b] == len(example.prompt) and batch.prompt_ids[b] == 1000 + b
        for k, response in enumerate(example.responses):
            assert batch.responses[b, k].tolist() == response.tolist() + [0] * (6 - len(response))
            assert batch.response_lengths[b, k] == len(response)
            if with_reference:
                values = example.reference_log_probs[k].tolist()
                assert batch.reference_log_probs[b, k].tolist() == values + [0.0] * (6 - len(response))
    assert (batch.reference_log_probs is not None) == with_reference


@pytest.mark.parametrize("with_reference", [False, True])
def test_examples_of_is_the_inverse_of_collate_also_on_the_device(make_examples, plain, with_reference):
    examples = make_examples(4, with_reference=with_reference)
    batch = collate(examples, 11, 6)
    on_device = PreferenceBatch(**{k: None if v is None else jnp.asarray(v) for k, v in vars(batch).items()})
    for either in (batch, on_device):
        assert [plain(e) for e in examples_of(either)] == [plain(e) for e in examples]


def test_an_example_over_a_limit_is_named_with_the_limit(make_examples):
    examples = make_examples(20)
    longest = max(range(20), key=lambda i: len(examples[i].prompt))
    with pytest.raises(UserError, match=rf"example {longest} .*prompt of 9 tokens, over prompt_length=8: raise"):
        collate(examples, 8, 5)
    with pytest.raises(UserError, match=r"response of 5 tokens, over response_length=4: raise"):
        collate(examples, 9, 4)
    with pytest.raises(UserError, match="needs an example"):
        collate([], 8, 5)
