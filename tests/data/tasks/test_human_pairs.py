import collections
import dataclasses
import gzip
import json
import pathlib

import pytest

from alignment_gap.data.tasks.human_pairs import read_human_pairs, split_by_prompt
from alignment_gap.data.text import Dropped, Limits, TextSourceConfig, WordVocabulary, open_source
from alignment_gap.errors import UserError

WORDS = WordVocabulary(
    ["Human:", "Assistant:", "hello", "again", "what", "now", "yes", "no", "maybe", "one", "two", "three"]
)
GOOD = {"chosen": "\n\nHuman: hello\n\nAssistant: yes one", "rejected": "\n\nHuman: hello\n\nAssistant: no"}
SHARED = pathlib.Path(__file__).parents[4] / "shared/data"


LIMITS = [field.name for field in dataclasses.fields(Limits)]


def dialogue(human: str, answer: str) -> str:
    return f"\n\nHuman: {human}\n\nAssistant: {answer}"


def pair(human: str, chosen: str, rejected: str) -> dict:
    return {"chosen": dialogue(human, chosen), "rejected": dialogue(human, rejected)}


def write_lines(path: pathlib.Path, *lines) -> pathlib.Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def read(path, **settings):
    limits = {name: settings.pop(name) for name in LIMITS if name in settings}
    limit = settings.pop("limit", None)
    config = TextSourceConfig(str(path), **({"task": "dialogues", "duplicates": "keep"} | settings))
    return read_human_pairs(
        config, WORDS, Limits(**({"prompt_length": 12, "response_length": 6} | limits)), limit=limit
    )


def test_pairs_are_split_at_the_last_assistant_turn(tmp_path):
    turns = "hello\n\nAssistant: yes\n\nHuman: what now"
    path = write_lines(tmp_path / "a.jsonl", GOOD, pair(turns, "maybe", "no no"))
    first, second = read(path).examples
    assert WORDS.decode(first.prompt) == "Human: hello Assistant:"
    assert [WORDS.decode(response) for response in first.responses] == ["yes one", "no"]
    assert first.responses[0].tolist() == [*WORDS.encode("yes one"), WORDS.eos_id]
    assert first.scores.tolist() == [1, 0] and first.prompt_id == 0
    assert WORDS.decode(second.prompt) == "Human: hello Assistant: yes Human: what now Assistant:"
    assert second.prompt_id == 1


def test_equal_prompts_share_their_number(tmp_path):
    lines = [pair("hello", "yes", "no"), pair("what", "yes", "no"), pair("hello  ", "one", "two")]
    assert [e.prompt_id for e in read(write_lines(tmp_path / "a.jsonl", *lines)).examples] == [0, 1, 0]


def test_gzip_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + json.dumps(GOOD).encode()))
    assert [pair.where for pair in open_source(TextSourceConfig(str(path))).read()] == [f"{path}:1", f"{path}:3"]
    assert len(read(path).examples) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oops", r"not JSON .*: write one JSON object on each line"),
        (b"[" * 100_000, "not JSON"),
        (b'{"chosen": "caf\xe9"}', "not UTF-8 at byte 15 of the line: save the file as UTF-8"),
        (b"[1, 2]", "a JSON list, not an object"),
        ({"chosen": "x"}, "lacks the field 'rejected': write"),
        (GOOD | {"chosen": None}, "the field 'chosen' is null, not a text"),
        (GOOD | {"rejected": 3}, "the field 'rejected' is int, not a text"),
        (GOOD | {"rejected": "\ud800"}, "the field 'rejected' holds half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("bad_pairs", ["refuse", "drop"])
def test_a_malformed_line_is_always_refused_with_file_and_line(tmp_path, line, message, bad_pairs):
    path = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, line)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}") as error:
        read(path, bad_pairs=bad_pairs)
    assert "\n" not in str(error.value)


BOTH = "fields 'chosen' and 'rejected'"
BAD_PAIRS = [
    (pair("hello", "yes", " yes "), "identical pair", BOTH),
    (pair("hello", "yes  no", "yes no"), "identical pair", BOTH),
    (pair(" ", "yes", "no"), "empty prompt", "field 'chosen'"),
    (pair("hello", "yes", " "), "empty response", "field 'rejected'"),
    (pair("hello", "", "no"), "empty response", "field 'chosen'"),
    ({"chosen": dialogue("hello", "yes"), "rejected": dialogue("what", "no")}, "prompts differ", BOTH),
    (
        {"chosen": dialogue("hello", "yes"), "rejected": dialogue("hello", "no\n\nAssistant: no")},
        "prompts differ",
        BOTH,
    ),
    ({"chosen": dialogue("hello", "yes"), "rejected": "no"}, "no prompt", "field 'rejected'"),
    (pair("hello", "yes", "purple"), "text that the vocabulary cannot express", "field 'rejected'"),
    (pair("purple", "yes", "no"), "text that the vocabulary cannot express", "field 'chosen'"),
]


@pytest.mark.parametrize("line, reason, fields", BAD_PAIRS)
def test_a_bad_pair_is_refused_or_dropped_and_counted(tmp_path, line, reason, fields):
    path = write_lines(tmp_path / "a.jsonl", GOOD, line, line, GOOD)
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {reason} \({fields}\): .*, or set --bad_pairs=drop$") as error:
        read(path)
    assert "\n" not in str(error.value)
    result = read(path, bad_pairs="drop")
    assert len(result.examples) == 2 and result.dropped == {reason: 2}


def test_long_pairs_are_dropped_and_counted_or_refused_never_cut(tmp_path):
    long_prompt, long_response = pair("hello " * 11, "yes", "no"), pair("hello", "yes", "no " * 6)
    exact = pair("hello " * 10, "yes", "no " * 5)
    path = write_lines(tmp_path / "a.jsonl", exact, long_prompt, long_response, long_response)
    result = read(path)
    assert result.dropped == {"long prompt": 1, "long response": 2}
    (example,) = result.examples
    assert len(example.prompt) == 12 and len(example.responses[1]) == 6
    with pytest.raises(UserError, match=r":2: long prompt \(13 tokens in the field 'chosen', over .*=12\): raise"):
        read(path, long_prompts="refuse")
    with pytest.raises(
        UserError, match=r":3: long response \(7 tokens in the field 'rejected', .*or set --long_res.*=drop"
    ):
        read(path, long_responses="refuse", prompt_length=13)


def test_limit_keeps_the_first_pairs_and_reads_no_further(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GOOD, pair("what", "no", "yes"), b"not JSON")
    assert len(read(path, limit=2).examples) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "is empty: give a file"),
        ("a.jsonl.gz", gzip.compress(b""), "is empty: give a file"),
        ("a.jsonl", b"\n\n", "holds no record: give a file"),
        ("a.jsonl.gz", b"plain text", "damaged gzip data after line 0"),
        ("a.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 50)[:-12], "damaged gzip data"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl \(No such file.*give the path"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no data files: give a"):
        read(tmp_path)


def test_a_file_of_which_nothing_is_left_says_why(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", pair("hello", "yes", "yes"), pair("hello " * 20, "yes", "no"))
    with pytest.raises(UserError, match=r"none of 2 pairs is left \(1 identical pair, 1 long prompt\)"):
        read(path, bad_pairs="drop")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bad_pairs": "keep"}, "bad_pairs='keep' is unknown: choose one of refuse, drop"),
        ({"long_prompts": "cut"}, "long_prompts='cut' is unknown: choose one of refuse, drop, keep_end"),
        ({"long_responses": "keep_end"}, "long_responses='keep_end' is unknown: choose one of refuse, drop"),
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"response_length": 0}, "response_length=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read(write_lines(tmp_path / "a.jsonl", GOOD), **change)


def test_split_never_shares_a_prompt_and_depends_on_the_prompt_alone(make_examples):
    examples = make_examples(600) * 2
    training, validation = split_by_prompt(examples, 0.25, seed=1)
    sides = [{tuple(e.prompt.tolist()) for e in side} for side in (training, validation)]
    assert not sides[0] & sides[1] and len(training) + len(validation) == 1200
    assert 0.2 < len(validation) / 1200 < 0.3
    _, fewer = split_by_prompt(examples[100:300], 0.25, seed=1)
    assert {id(e) for e in fewer} == {id(e) for e in validation} & {id(e) for e in examples[100:300]}
    assert split_by_prompt(examples, 0.25, seed=2)[1] != validation


@pytest.mark.parametrize("name, count", [("harmless-base.train", 39_877), ("helpful-base.test", 2_354)])
def test_real_pairs_are_all_accounted_for(name, count):
    path = SHARED / "hh" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here: human pairs are not shipped with the project")
    seen = collections.Counter()
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for number, item in enumerate(open_source(TextSourceConfig(str(path), bad_pairs="drop")).read()):
        if isinstance(item, Dropped):
            seen[item.reason] += 1
            continue
        seen["good"] += 1
        # Put together again, nothing but blanks around the responses is lost; texts are kept out of the output.
        whole = [item.prompt + response for response in item.responses]
        if ["".join(x.split()) for x in whole] != [
            "".join(lines[number][name].split()) for name in ("chosen", "rejected")
        ]:
            pytest.fail(f"line {number + 1} was not split without loss")
    assert sum(seen.values()) == count and seen["good"] > 0.99 * count
    assert set(seen) <= {"good", "identical pair", "empty response", "prompts differ"}
