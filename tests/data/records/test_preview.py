"""The preview of prepared data: text with its boundaries, and the histograms."""

import numpy as np
import pytest

from alignment_gap.data.records import Example, open_dataset, write_dataset
from alignment_gap.data.records.preview import lengths_picture, preview, visible_text
from alignment_gap.data.records.summary import summarise_lengths
from alignment_gap.data.text import WordVocabulary, load_vocabulary
from alignment_gap.errors import UserError

WORDS = WordVocabulary(["the", "cat", "sleeps", "runs"], extra_ids=2)


def example(number, prompt, *answers):
    encoded = [np.array([*WORDS.encode(text), WORDS.eos_id], np.int32) for text in answers]
    return Example(number, np.array(WORDS.encode(prompt), np.int32), tuple(encoded), np.array([1, 0.25], np.float32))


@pytest.fixture
def dataset(tmp_path):
    examples = [example(70 + i, "the cat " * (i + 1), "sleeps", "runs the cat") for i in range(9)]
    write_dataset(tmp_path, examples, vocabulary_digest=WORDS.digest, provenance={})
    return open_dataset(tmp_path)


def test_an_example_by_hand(dataset):
    """Shows only the first of nine: ids and text of the prompt and of each response; the score precedes a response."""
    assert preview(dataset, WORDS, 1) == (
        "example 0 of 9 (prompt id 70)\n"
        "  prompt, 2 tokens: 2 3\n"
        "    | the cat\n"
        "  response, score 1, 2 tokens: 4 1\n"
        "    | sleeps <eos:1>\n"
        "  response, score 0.25, 4 tokens: 5 2 3 1\n"
        "    | runs the cat <eos:1>\n"
    )


def test_examples_are_from_all_over_and_long_ones_show_their_ends(dataset):
    text = preview(dataset, WORDS, 3)
    assert [line[:14] for line in text.splitlines() if line.startswith("example")] == [
        "example 0 of 9",
        "example 4 of 9",
        "example 8 of 9",
    ]
    assert "  prompt, 18 tokens: 2 3 2 3 ... 2 3 2 3\n" in text
    assert preview(dataset, WORDS, 100).count("example ") == 9


def test_special_ids_are_written_out():
    assert visible_text([0, 2, 7, 6, 1, 1, 3, 9], WORDS) == (
        "<pad:0> the <extra_id_0:7> <extra_id_1:6> <eos:1> <eos:1> cat <no_token_9:9>"
    )
    assert visible_text([], WORDS) == ""


def test_lines_of_a_text_stay_lines(tmp_path):
    vocabulary = load_vocabulary("bytes")
    prompt = np.array(vocabulary.encode("a\nb"), np.int32)
    answers = tuple(np.array([*vocabulary.encode(text), 1], np.int32) for text in ("c", "d"))
    write_dataset(tmp_path, [Example(1, prompt, answers, np.ones(2))], vocabulary_digest="", provenance={})
    assert "    | a\n    | b\n" in preview(open_dataset(tmp_path), vocabulary, 1)


def test_the_begin_id_is_named():
    class Beginning(WordVocabulary):
        bos_id = 2

    assert visible_text([2, 3, 4, 1], Beginning(["<s>", "the", "cat"])) == "<bos:2> the cat <eos:1>"


def test_the_picture_is_a_png_or_says_what_is_missing(monkeypatch):
    lengths = {name: summarise_lengths({1: 3, 4: 2, 90: 1}) for name in ("prompt", "response")}
    assert lengths_picture(lengths).startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"vl_convert draws the histogram and is not installed: pip install"):
        lengths_picture(lengths)
