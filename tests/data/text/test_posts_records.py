"""The built-in posts as a source: numbered records, two splits, a form, a vocabulary, a digest."""

import dataclasses
import json
import pickle

import pytest

from alignment_gap.data.text import (
    Limits,
    PostsConfig,
    PostsSettings,
    TextSourceConfig,
    encode_pair,
    load_vocabulary,
    open_source,
    posts,
    source_digest,
)
from alignment_gap.data.text.pair import Record
from alignment_gap.data.text.posts_records import PostsRecords
from alignment_gap.errors import UserError

SMALL = PostsConfig(pairs=5, validation_pairs=3, seed=2)
CONFIG = TextSourceConfig("posts", posts=SMALL)


def test_a_record_by_hand():
    """Post 1 of world 0; test_posts has the same post."""
    (record,) = PostsRecords(PostsConfig(pairs=2)).read(1, 2)
    assert record == Record(
        "posts:train:2",
        {
            "post": "the rain was grey . in march my father was at the library and broke the guitar . summary:",
            "first": "father broke guitar at library in march",
            "second": " ".join(posts.pair(0, 1).responses[1]),
            "preferred": posts.pair(0, 1).preferred,
        },
        "train",
    )


def test_training_pairs_come_first_then_validation_pairs_of_far_numbers():
    records = list(PostsRecords(SMALL).read())
    numbers = [*range(5), *range(1_000_000_000, 1_000_000_003)]
    assert len(PostsRecords(SMALL)) == len(records) == 8
    assert [record.values["post"] for record in records] == [" ".join(posts.prompt(2, n).words) for n in numbers]
    assert [record.where for record in records[4:6]] == ["posts:train:5", "posts:validation:1"]
    assert [record.split for record in records] == ["train"] * 5 + ["validation"] * 3


def test_every_range_is_that_part_of_the_whole_in_another_process_too():
    whole = list(PostsRecords(SMALL).read())
    again = pickle.loads(pickle.dumps(PostsRecords(SMALL)))
    for start in range(9):
        for stop in (None, *range(start, 12)):
            assert list(again.read(start, stop)) == whole[start:stop]


def test_more_training_pairs_change_no_other_pair():
    more = [*PostsRecords(dataclasses.replace(SMALL, pairs=7)).read()]
    assert [r.values for r in PostsRecords(SMALL).read()] == [r.values for r in more[:5] + more[7:]]


def test_a_pair_has_the_responses_as_generated_and_the_rater_s_label():
    source = open_source(CONFIG)
    assert source.config.task == "posts" and len(source) == 8 and not source.drops_duplicates and source.files == ()
    pairs = list(source.read())
    for number, pair in enumerate(pairs[:5]):
        generated = posts.pair(2, number)
        assert pair.prompt == " ".join(generated.post.words)
        assert pair.responses == tuple(" ".join(words) for words in generated.responses)
        assert pair.scores == ((1.0, 0.0), (0.0, 1.0))[generated.preferred]
    assert {pair.scores for pair in pairs} == {(1.0, 0.0), (0.0, 1.0)}
    assert [pair.split for pair in pairs] == ["train"] * 5 + ["validation"] * 3


def test_the_vocabulary_by_name_expresses_every_pair_and_default_limits_fit():
    vocabulary = load_vocabulary("posts")
    assert vocabulary.digest == posts.vocabulary().digest
    for pair in open_source(TextSourceConfig("posts", posts=PostsConfig(pairs=50))).read(0, 50):
        encoded = encode_pair(pair, vocabulary, Limits())
        assert vocabulary.decode(encoded.prompt) == pair.prompt
        assert [vocabulary.decode(response) for response in encoded.responses] == list(pair.responses)
        assert all(response[-1] == vocabulary.eos_id for response in encoded.responses)
    assert posts.longest_prompt() <= Limits().prompt_length


def test_the_digest_is_of_all_settings():
    changes = [{"pairs": 6}, {"validation_pairs": 4}, {"seed": 3}, {"settings": PostsSettings(order_weight=0.2)}]
    configs = [CONFIG, *(dataclasses.replace(CONFIG, posts=dataclasses.replace(SMALL, **change)) for change in changes)]
    assert len({source_digest(config) for config in configs}) == 5
    assert source_digest(CONFIG) == source_digest(dataclasses.replace(CONFIG))


def test_the_name_is_the_task_s_even_where_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posts").mkdir()
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "posts" / "own.jsonl").write_text(json.dumps(row))
    assert open_source(CONFIG).config.task == "posts"
    assert open_source(TextSourceConfig("./posts")).config.task == "pairs"


def test_records_in_a_file_are_read_as_the_generated_ones(write, tmp_path):
    location = write(tmp_path, "jsonl", [dict(record.values) for record in PostsRecords(SMALL).read()])
    source = open_source(TextSourceConfig(location))
    assert source.config.task == "posts"
    for one, other in zip(source.read(), open_source(CONFIG).read(), strict=True):
        assert (one.prompt, one.responses, one.scores) == (other.prompt, other.responses, other.scores)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preferred": 2}, "the field 'preferred' is 2, out of its range: use 0 or 1"),
        ({"preferred": True}, "the field 'preferred' is True, out of its range"),
        ({"preferred": None}, "the field 'preferred' is null, not a label: write {\"post\""),
        ({"second": 3}, "the field 'second' is int, not a text"),
    ],
)
def test_a_malformed_record_in_a_file_is_refused(write, tmp_path, change, message):
    (record, *_) = PostsRecords(SMALL).read()
    location = write(tmp_path, "jsonl", [dict(record.values), record.values | change])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
        list(open_source(TextSourceConfig(location)).read())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": 0}, "pairs is 0: it must be from 1 to 1000000000"),
        ({"pairs": 1_000_000_001}, "pairs is 1000000001"),
        ({"validation_pairs": 0}, "validation_pairs is 0"),
        ({"seed": -1}, "seed is -1: it must be from 0"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(UserError, match=message):
        PostsConfig(**change)


def test_settings_of_the_posts_go_with_no_other_location():
    for location in (None, "own.jsonl", "posts,own.jsonl"):
        with pytest.raises(
            UserError, match=r"posts is set with the location .*: set it only with the location 'posts'"
        ):
            TextSourceConfig(location, posts=SMALL)


def test_the_default_has_the_documented_size():
    assert (PostsConfig().pairs, PostsConfig().validation_pairs) == (20_000, 1_000)
    assert 100 <= len(load_vocabulary("posts").words) <= 300
