import hashlib
import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from alignment_gap.data.records import close_dataset, derived, open_dataset, verify_dataset, write_chunk, write_dataset
from alignment_gap.data.records.dataset import GrowingChunk, discard_chunks, discard_damaged, part_size
from alignment_gap.data.records.summary import summarise_lengths
from alignment_gap.errors import UserError

ABOUT = {"vocabulary_digest": "abc", "provenance": {"made": "by a test"}}


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_a_dataset_comes_back_as_it_was_written(tmp_path, make_examples, plain, with_reference, with_sampler):
    examples = make_examples(30, with_reference=with_reference, with_sampler=with_sampler)
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
    assert on_disk["scores"] == "probabilities"
    assert [file["name"] for file in on_disk["files"]] == ["pairs.array_record"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "pairs.array_record"]


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_card_lists_the_fields_that_examples_have(tmp_path, make_examples, with_reference, with_sampler):
    examples = make_examples(4, with_reference=with_reference, with_sampler=with_sampler)
    card = write_dataset(tmp_path, examples, **ABOUT)
    optional = ["reference_log_probs"] * with_reference + ["sampler_log_probs"] * with_sampler
    assert list(card.fields) == ["prompt_id", "prompt", "responses", "scores", *optional]
    (chunk,) = card.files
    assert (chunk.reference_log_probs, chunk.sampler_log_probs) == (with_reference, with_sampler)
    assert list(chunk.token_fields) == optional


def test_the_card_says_what_the_scores_are(tmp_path, make_examples):
    rewards = write_dataset(tmp_path / "a", make_examples(4), **ABOUT, scores="rewards")
    plain = write_dataset(tmp_path / "b", make_examples(4), **ABOUT)
    assert (rewards.scores, plain.scores) == ("rewards", "probabilities")
    assert open_dataset(tmp_path / "a").card == rewards
    # Training reads the same records in another way.
    assert rewards.digest != plain.digest and rewards.files == plain.files
    assert close_dataset(tmp_path / "b", **ABOUT, scores="rewards") == rewards
    with pytest.raises(UserError, match="scores is 'logits': choose one of probabilities, rewards"):
        write_dataset(tmp_path / "c", make_examples(4), **ABOUT, scores="logits")


def test_a_dataset_from_before_the_newer_fields_is_read_and_keeps_its_digest(tmp_path, make_examples, plain):
    """The old card lacks "scores". Its files, and the summaries of open chunks, lack "sampler_log_probs"."""
    examples = make_examples(6, with_reference=True)
    card = write_dataset(tmp_path, examples, **ABOUT)
    written = json.loads((tmp_path / "card.json").read_text())
    del written["scores"], written["files"][0]["sampler_log_probs"]
    (tmp_path / "card.json").write_text(json.dumps(written))
    old = open_dataset(tmp_path)
    assert old.card == card and [plain(e) for e in old] == [plain(e) for e in examples]
    # By hand: SHA-256 of the vocabulary's digest and the digests of the files.
    content = json.dumps(["abc", [written["files"][0]["sha256"]]]).encode()
    assert old.card.digest == hashlib.sha256(content).hexdigest()
    write_chunk(tmp_path, "more", examples)
    kept = tmp_path / ".chunks" / "more.json"
    chunk, *lengths = json.loads(kept.read_text())
    del chunk["sampler_log_probs"]
    kept.write_text(json.dumps([chunk, *lengths]))
    assert close_dataset(tmp_path, **ABOUT).count == 12


@pytest.mark.slow
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


def test_a_chunk_that_grew_equals_one_written_at_once(tmp_path, make_examples):
    examples, growing = make_examples(9), GrowingChunk("a")
    growing.extend(examples[:4])
    assert growing.write(tmp_path / "a", "pairs").count == 4
    growing.extend(examples[4:])
    assert growing.write(tmp_path / "a", "pairs") == write_chunk(tmp_path / "b", "pairs", examples)
    assert close_dataset(tmp_path / "a", **ABOUT) == close_dataset(tmp_path / "b", **ABOUT)


def test_a_chunk_that_grows_keeps_its_form(make_examples):
    growing = GrowingChunk("the record")
    growing.extend(make_examples(2))
    with pytest.raises(UserError, match=r"record 2 of the record .* has 3 responses, but the first has 2"):
        growing.extend(make_examples(1, responses=3))


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
    with pytest.raises(UserError, match="not a finished dataset"):
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


def test_chunks_of_another_form_are_refused(tmp_path, make_examples):
    for folder, settings, message in [
        ("k", {"responses": 3}, "3 responses a prompt"),
        ("r", {"with_reference": True}, "has reference_log_probs: give them for all or for none"),
        ("s", {"with_sampler": True}, "has sampler_log_probs: give them for all or for none"),
    ]:
        write_chunk(tmp_path / folder, "a", make_examples(2))
        write_chunk(tmp_path / folder, "b", make_examples(2, **settings))
        with pytest.raises(UserError, match=message):
            close_dataset(tmp_path / folder, **ABOUT)


def test_an_unfinished_or_unknown_dataset_is_refused(tmp_path, make_examples, unchecked):
    with pytest.raises(UserError, match=r"none is not a finished dataset \(card.json: No such file"):
        open_dataset(tmp_path / "none")
    write_dataset(tmp_path, make_examples(2), **ABOUT)
    card = json.loads((tmp_path / "card.json").read_text())
    for content, message in [
        (json.dumps(card | {"format_version": 99}), "it has format 99, but this version reads 2"),
        ("{", "is not a dataset's card"),
        ("[]", "is not a dataset's card"),
        (json.dumps({"format_version": 2}), "is not a dataset's card"),
        (
            json.dumps(card | {"provenance": None}),
            "is not a dataset's card .*provenance and lengths must be tables",
        ),
        (
            json.dumps(card | {"count": 1}),
            "is not a dataset's card .*its counts and lengths do not match its files",
        ),
        (json.dumps(card | {"max_prompt_length": 1}), "is not a dataset's card .*counts and lengths"),
        (json.dumps(card | {"files": []}), "is not a dataset's card"),
        (json.dumps(card | {"scores": "reward"}), r"card\.json: scores is 'reward': did you mean rewards\?"),
    ]:
        (tmp_path / "card.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path)


@pytest.mark.slow
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
    # A process that may have 1,024 open files can then open two such datasets.
    for count in (1, 5000, 300_000, 10_000_000, 123_456_789):
        assert -(-count // part_size(count)) <= 400 and part_size(count) >= 5000


def test_a_flipped_bit_is_found(tmp_path, make_examples, unchecked):
    """Type checks are off: they look into a sequence, and may find the damage first."""
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
    with pytest.raises(UserError, match=r"pairs.array_record was changed after its card was written"):
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
    # Closes it again, without the summaries of the chunks; so the chunks are read.
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


def test_a_chain_of_datasets_is_kept_though_their_folders_move(tmp_path, make_examples):
    """Inputs keep their order. Later changes to one dataset do not change the provenance of another."""
    for name in ("a", "b"):
        write_dataset(tmp_path / name, make_examples(3), vocabulary_digest="v", provenance={"source": name})
    first, second = (open_dataset(tmp_path / name) for name in ("a", "b"))
    mixed = derived("mix", {"pairs 1": second, "pairs 0": first}, weights=[1, 2])
    write_dataset(tmp_path / "mixed", make_examples(4), vocabulary_digest="v", provenance=mixed)
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    about = derived("shuffle", {"pairs": open_dataset(tmp_path / "mixed")}, seed=3)
    assert (about["made_by"], about["seed"]) == ("shuffle", 3)
    (part,) = about["inputs"]
    assert part["provenance"] == json.loads(json.dumps(mixed)) and part["count"] == 4
    assert [one["role"] for one in part["provenance"]["inputs"]] == ["pairs 1", "pairs 0"]
    assert [one["provenance"]["source"] for one in part["provenance"]["inputs"]] == ["b", "a"]
    assert derived("generate", {}) == {"made_by": "generate", "inputs": []}


def test_files_that_are_not_what_the_card_says_are_removed_and_named(tmp_path, make_examples, plain):
    examples = make_examples(9)
    for name in range(3):
        write_chunk(tmp_path, f"part-{name}", examples[3 * name : 3 * name + 3])
    card = close_dataset(tmp_path, **ABOUT)
    assert discard_damaged(tmp_path) == []
    (tmp_path / "part-0.array_record").unlink()
    path = tmp_path / "part-2.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    assert discard_damaged(tmp_path) == ["part-0.array_record", "part-2.array_record"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "part-1.array_record"]
    # The removed files are made again, and the dataset is the same.
    for name in (0, 2):
        write_chunk(tmp_path, f"part-{name}", examples[3 * name : 3 * name + 3])
    assert close_dataset(tmp_path, **ABOUT) == card
    # An unreadable card says nothing about its files, so they stay.
    (tmp_path / "card.json").write_text("{")
    assert discard_damaged(tmp_path) == ["card.json"]
    assert close_dataset(tmp_path, **ABOUT) == card
    assert [plain(e) for e in open_dataset(tmp_path)] == [plain(e) for e in examples]


def test_unwanted_chunks_go_with_the_card_that_names_them(tmp_path, make_examples):
    for name in ("a", "b", "c"):
        write_chunk(tmp_path, name, make_examples(2))
    card = close_dataset(tmp_path, **ABOUT)
    discard_chunks(tmp_path, lambda name: name == "d")
    assert open_dataset(tmp_path).card == card
    discard_chunks(tmp_path, lambda name: name > "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]
    with pytest.raises(UserError, match="not a finished dataset"):
        open_dataset(tmp_path)
