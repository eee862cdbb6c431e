"""From the text of a dialogue to token ids: prompt and responses, refused and dropped pairs, lengths."""

import collections
import gzip
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from alignment_gap.data.text import (
    Dropped,
    Encoded,
    Limits,
    TextPair,
    TextSourceConfig,
    WordVocabulary,
    encode_pair,
    held_out,
    load_vocabulary,
    open_source,
)
from alignment_gap.errors import UserError

WORDS = WordVocabulary(
    ["Human:", "Assistant:", "hello", "again", "what", "now", "yes", "no", "maybe", "one", "two", "three"]
)
GOOD = {"chosen": "\n\nHuman: hello\n\nAssistant: yes one", "rejected": "\n\nHuman: hello\n\nAssistant: no"}
SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
LIMITS = {"prompt_length": 12, "response_length": 6}


def talk(human: str, answer: str) -> str:
    return f"\n\nHuman: {human}\n\nAssistant: {answer}"


def pair(human: str, chosen: str, rejected: str) -> dict:
    return {"chosen": talk(human, chosen), "rejected": talk(human, rejected)}


def write_lines(path: pathlib.Path, *lines) -> pathlib.Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def read(path, bad_pairs: str = "refuse", **limits) -> tuple[list[Encoded], dict[str, int]]:
    """The pairs of a file as ids, and the counts of dropped pairs."""
    source = open_source(TextSourceConfig(str(path), task="dialogues", bad_pairs=bad_pairs))
    settings = Limits(**LIMITS | limits)
    items = [
        item if isinstance(item, Dropped) else encode_pair(item, WORDS, settings, bad_pairs=bad_pairs)
        for item in source.read()
    ]
    dropped = collections.Counter(item.reason for item in items if isinstance(item, Dropped))
    return [item for item in items if isinstance(item, Encoded)], dict(dropped)


def test_pairs_are_split_at_the_last_assistant_turn(tmp_path):
    turns = "hello\n\nAssistant: yes\n\nHuman: what now"
    (first, second), dropped = read(write_lines(tmp_path / "a.jsonl", GOOD, pair(turns, "maybe", "no no")))
    assert WORDS.decode(first.prompt) == "Human: hello Assistant:" and not dropped
    assert [WORDS.decode(response) for response in first.responses] == ["yes one", "no"]
    assert first.responses[0].tolist() == [*WORDS.encode("yes one"), WORDS.eos_id]
    assert first.scores.tolist() == [1, 0] and not first.prompt_was_cut
    assert WORDS.decode(second.prompt) == "Human: hello Assistant: yes Human: what now Assistant:"


class Marked(WordVocabulary):
    """Words in which "</s>" is the end mark and "~" is no token at all."""

    def encode(self, text):
        words = [word for word in text.split() if word != "~"]
        return [self.eos_id if word == "</s>" else super(Marked, self).encode(word)[0] for word in words]


MARKED = Marked(WORDS.words)


def ids_of(text: str, prompt: str = "hello") -> tuple[int, ...]:
    texts = TextPair(prompt, (text, "maybe"), (1.0, 0.0), "here:1")
    return tuple(encode_pair(texts, MARKED, Limits()).responses[0].tolist())


def test_a_response_ends_with_one_end_id_however_many_marks_it_has():
    for text in ("yes", "yes </s>", "yes </s> </s>"):
        assert ids_of(text) == (*WORDS.encode("yes"), WORDS.eos_id)


@pytest.mark.parametrize("text", ["yes </s> no", "yes </s> </s> no", "</s> yes", "</s> </s> yes", "yes </s> no </s>"])
def test_text_behind_an_end_mark_is_never_cut(text):
    with pytest.raises(UserError, match=r"here:1: end mark within a response \(field 'chosen'\): remove the mark"):
        ids_of(text)


@pytest.mark.parametrize("text", ["</s>", "</s> </s>", "~", ""])
def test_texts_without_a_token_are_bad_pairs(text):
    with pytest.raises(UserError, match=r"here:1: empty response \(field 'chosen'\): remove the pair"):
        ids_of(text)
    for ends in (False, True):
        texts = TextPair(text, ("yes", "no"), (1.0, 0.0), "here:1")
        dropped = encode_pair(texts, MARKED, Limits(), bad_pairs="drop", end_prompts=ends)
        assert dropped == Dropped("empty prompt", "here:1")


def test_gzip_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + json.dumps(GOOD).encode()))
    assert [pair.where for pair in open_source(TextSourceConfig(str(path))).read()] == [f"{path}:1", f"{path}:3"]
    assert len(read(path)[0]) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oops", r"not JSON .*: write one JSON object on each line"),
        (b"[" * 100_000, "not JSON"),
        (b'{"chosen": "caf\xe9"}', "not UTF-8 at byte 15 of the line: save the file as UTF-8"),
        (b"[1, 2]", "this is a JSON list, not an object"),
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
        read(path, bad_pairs)
    assert "\n" not in str(error.value)


BOTH = "fields 'chosen' and 'rejected'"
BAD_PAIRS = [
    (pair("hello", "yes", " yes "), "identical pair", BOTH),
    (pair("hello", "yes  no", "yes no"), "identical pair", BOTH),
    (pair(" ", "yes", "no"), "empty prompt", "field 'chosen'"),
    (pair("hello", "yes", " "), "empty response", "field 'rejected'"),
    (pair("hello", "", "no"), "empty response", "field 'chosen'"),
    ({"chosen": talk("hello", "yes"), "rejected": talk("what", "no")}, "prompts differ", BOTH),
    ({"chosen": talk("hello", "yes"), "rejected": talk("hello", "no\n\nAssistant: no")}, "prompts differ", BOTH),
    ({"chosen": talk("hello", "yes"), "rejected": "no"}, "no prompt", "field 'rejected'"),
    (pair("hello", "yes", "purple"), "text that the vocabulary cannot express", "field 'rejected'"),
    (pair("purple", "yes", "no"), "text that the vocabulary cannot express", "field 'chosen'"),
]


@pytest.mark.parametrize("line, reason, fields", BAD_PAIRS)
def test_a_bad_pair_is_refused_or_dropped_and_counted(tmp_path, line, reason, fields):
    path = write_lines(tmp_path / "a.jsonl", GOOD, line, line, GOOD)
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {reason} \({fields}\): .*, or set --bad_pairs=drop$") as error:
        read(path)
    assert "\n" not in str(error.value)
    encoded, dropped = read(path, "drop")
    assert len(encoded) == 2 and dropped == {reason: 2}


def test_long_pairs_are_dropped_and_counted_or_refused_and_only_prompts_are_cut(tmp_path):
    long_prompt, long_response = pair("hello " * 11, "yes", "no"), pair("hello", "yes", "no " * 6)
    exact = pair("hello " * 10, "yes", "no " * 5)
    path = write_lines(tmp_path / "a.jsonl", exact, long_prompt, long_response, long_response)
    (example,), dropped = read(path)
    assert dropped == {"long prompt": 1, "long response": 2}
    assert len(example.prompt) == 12 and len(example.responses[1]) == 6
    with pytest.raises(UserError, match=r":2: long prompt \(13 tokens in the field 'chosen', over .*=12\): raise"):
        read(path, long_prompts="refuse")
    with pytest.raises(
        UserError, match=r":3: long response \(7 tokens in the field 'rejected', .*or set --long_res.*=drop"
    ):
        read(path, long_responses="refuse", prompt_length=13)
    (_, cut), dropped = read(path, long_prompts="keep_end")
    assert cut.prompt_was_cut and dropped == {"long response": 2}
    assert cut.prompt.tolist() == WORDS.encode("hello " * 11 + "Assistant:")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "is empty: give a file"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty: give a file"),
        ("a.jsonl", b"\n\n", "holds no record: give a file"),
        ("a.jsonl.gz", b"plain text", "damaged gzip data after line 0"),
        ("a.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 50, mtime=0)[:-12], "damaged gzip data"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl \(No such file.*give the path"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no data files: give a"):
        read(tmp_path)


def test_what_is_held_out_depends_on_the_prompt_and_the_seed_alone():
    prompts = [f"prompt {number}".encode() for number in range(2000)]
    first, again, other = ([held_out(prompt, 0.25, seed) for prompt in prompts] for seed in (1, 1, 2))
    assert first == again != other
    # Binomial with a standard deviation of 0.0097.
    assert 0.21 < sum(first) / 2000 < 0.29 and 0.21 < sum(other) / 2000 < 0.29
    # A larger fraction holds out the same prompts and more.
    assert all(held_out(prompt, 0.5, 1) for prompt, held in zip(prompts, first, strict=True) if held)
    assert not any(held_out(prompt, 0.0, 1) for prompt in prompts)


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
        # The split loses only blanks around the responses. A failure does not print the texts.
        whole = [item.prompt + response for response in item.responses]
        if ["".join(x.split()) for x in whole] != [
            "".join(lines[number][name].split()) for name in ("chosen", "rejected")
        ]:
            pytest.fail(f"line {number + 1} was not split without loss")
    assert sum(seen.values()) == count and seen["good"] > 0.99 * count
    assert set(seen) <= {"good", "identical pair", "empty response", "prompts differ"}


def by_hand(pair, limits, ends):
    """What to expect of a pair of texts in bytes: why it is dropped, or its ids and whether the prompt is cut."""
    prompt = [byte + 3 for byte in pair.prompt.encode()] + [1] * ends
    responses = [[byte + 3 for byte in text.encode()] + [1] for text in pair.responses]
    if responses[0] == responses[1]:
        return "identical pair"
    cut = len(prompt) > limits.prompt_length
    if cut and limits.long_prompts == "drop":
        return "long prompt"
    if max(map(len, responses)) > limits.response_length:
        return "long response"
    return prompt[-limits.prompt_length :], responses, cut


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    texts=strategies.tuples(*[strategies.text("aé ", min_size=1, max_size=6)] * 3),
    lengths=strategies.tuples(strategies.integers(1, 8), strategies.integers(1, 8)),
    long_prompts=strategies.sampled_from(["drop", "keep_end"]),
    end_prompts=strategies.sampled_from([None, True, False]),
)
def test_what_becomes_of_any_pair_within_any_limits(texts, lengths, long_prompts, end_prompts):
    """By default prompts of ByT5 end with the end id."""
    limits, pair = Limits(*lengths, long_prompts=long_prompts), TextPair(texts[0], texts[1:], (0.25, 0.75), where="a:1")
    expected = by_hand(pair, limits, end_prompts is not False)
    found = encode_pair(pair, load_vocabulary("bytes"), limits, bad_pairs="drop", end_prompts=end_prompts)
    if isinstance(expected, str):
        assert found == Dropped(expected, "a:1")
        return
    assert (found.prompt.tolist(), [response.tolist() for response in found.responses]) == expected[:2]
    assert found.prompt_was_cut == expected[2] and found.scores.tolist() == [0.25, 0.75]
    assert {array.dtype for array in (found.prompt, *found.responses)} == {np.dtype(np.int32)}
