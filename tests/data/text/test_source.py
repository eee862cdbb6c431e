"""A source: its settings, its digest, its ranges, and the records that it refuses, drops or keeps."""

import dataclasses
import hashlib
import json
import pickle

import pytest

from alignment_gap.data.text import Dropped, TextPair, TextSourceConfig, open_source, source_digest
from alignment_gap.errors import UserError

ROWS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(6)]


def test_the_defaults_refuse_bad_pairs_and_set_nothing_else():
    config = TextSourceConfig()
    assert (config.location, config.fields, config.labels, config.duplicates) == (None, None, None, None)
    assert (config.task, config.template, config.ties, config.bad_pairs) == ("auto", None, "drop", "refuse")


def test_the_digest_is_of_the_bytes_of_the_files_in_their_order(tmp_path):
    contents = [b'{"prompt": "p"}\n', b'{"prompt": "q"}\n']
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    by_hand = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    assert source_digest(TextSourceConfig(f"{a},{b}")) == source_digest(TextSourceConfig(str(tmp_path))) == by_hand
    assert source_digest(TextSourceConfig(f"{b},{a}")) != by_hand
    assert source_digest(TextSourceConfig(f"{a},{b}", ties="keep")) == by_hand
    with pytest.raises(UserError, match="there is no source"):
        source_digest(TextSourceConfig())


def test_ranges_and_other_processes_read_the_same(write, tmp_path):
    source = open_source(TextSourceConfig(write(tmp_path, "jsonl", ROWS)))
    whole = list(source.read())
    assert [pair.prompt for pair in whole] == [f"p{i}" for i in range(6)] and len(source) == 6
    again = pickle.loads(pickle.dumps(source))
    assert [*again.read(0, 2), *again.read(2, 5), *again.read(5)] == whole
    assert [pair.where for pair in whole[:2]] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    assert [file.name for file in source.files] == ["a.jsonl"]


@pytest.mark.parametrize("duplicates, dropped", [(None, True), ("drop", True), ("keep", False)])
def test_duplicates_follow_the_task_unless_they_are_set(write, tmp_path, comparison, duplicates, dropped):
    own = TextSourceConfig(write(tmp_path, "jsonl", ROWS), duplicates=duplicates)
    assert open_source(own).drops_duplicates == dropped
    summaries = dataclasses.replace(own, location=write(tmp_path, "jsonl.gz", [comparison("a", "b", 1)]))
    assert open_source(summaries).drops_duplicates == (duplicates == "drop")


def test_ties_are_dropped_or_kept(write, tmp_path):
    rows = [row | {"preference": preference} for row, preference in zip(ROWS, (0.5, 0.75), strict=False)]
    location = write(tmp_path, "jsonl", rows)
    dropped, _ = open_source(TextSourceConfig(location)).read()
    assert dropped == Dropped("tie", f"{location}:1")
    kept, other = open_source(TextSourceConfig(location, ties="keep")).read()
    assert kept.scores == (0.5, 0.5) and other.scores == (0.75, 0.25)


def test_a_named_field_that_is_not_there_is_refused_before_anything_is_read(write, tmp_path):
    location = write(tmp_path, "jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: --fields names the field 'question', but the record has only 'prompt'"
    ):
        open_source(TextSourceConfig(location, fields="prompt=question"))


def test_named_fields_make_a_source_one_of_own_pairs(write, tmp_path, dialogue):
    """Its records look like dialogues, but the names override this."""
    location = write(tmp_path, "jsonl", [dialogue("hi", "yes", "no")])
    assert open_source(TextSourceConfig(location)).config.task == "dialogues"
    source = open_source(TextSourceConfig(location, fields="chosen=chosen,rejected=rejected"))
    assert source.config.task == "pairs"
    (pair,) = source.read()
    assert pair.responses == (" yes", " no")


@pytest.mark.parametrize(
    "row, reason, remedy",
    [
        ({"chosen": "b"}, "identical pair", "fields 'chosen' and 'rejected'"),
        ({"prompt": " "}, "empty prompt", "field 'prompt'"),
        ({"prompt": "\n\nHuman: \n\nAssistant:"}, "empty prompt", "field 'prompt'"),
        ({"rejected": "  "}, "empty response", "field 'rejected'"),
    ],
)
def test_a_pair_that_states_no_preference_is_refused_or_dropped(write, tmp_path, row, reason, remedy):
    location = write(tmp_path, "jsonl", [ROWS[0], ROWS[1] | row])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {reason} \({remedy}\): .*, or set --bad_pairs=drop$"):
        list(open_source(TextSourceConfig(location)).read())
    first, second = open_source(TextSourceConfig(location, bad_pairs="drop")).read()
    assert isinstance(first, TextPair) and second == Dropped(reason, f"{location}:2")


def test_a_record_of_another_form_is_refused_though_bad_pairs_are_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [ROWS[0], {"prompt": "p", "chosen": "a"}]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: lacks the field 'rejected'.*: write \{"):
        list(open_source(TextSourceConfig(str(path), bad_pairs="drop")).read())
