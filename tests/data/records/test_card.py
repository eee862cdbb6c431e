"""The card of a dataset as text, back to its first sources, and the vocabulary of its tokens."""

import sys

import pytest
from byte_tokenizer import make_tokenizer

from alignment_gap.data.records import derived, open_dataset, write_dataset
from alignment_gap.data.records.card import card_text, find_vocabulary
from alignment_gap.data.text import load_vocabulary
from alignment_gap.errors import UserError


@pytest.fixture
def make(tmp_path, make_examples):
    """Writes a dataset with this provenance, and opens it."""

    def write(name, provenance, digest="v", **settings):
        write_dataset(tmp_path / name, make_examples(4), vocabulary_digest=digest, provenance=provenance, **settings)
        return open_dataset(tmp_path / name)

    return write


def test_the_text_leads_back_to_every_source(make, tmp_path):
    human = make("human", {"task": "human pairs"})
    shuffled = make("shuffled", derived("shuffle", {"pairs": human}, seed=3, window=None))
    mixed = make("mixed", derived("mix", {"pairs 0": shuffled, "pairs 1": human}))
    text = card_text(mixed)
    lines = [line.strip() for line in text[text.index("made by") :].splitlines()]
    assert [line for line in lines if ":" not in line] == ["made by", "mix", "shuffle", "human pairs", "human pairs"]
    assert f"pairs 0: {tmp_path / 'shuffled'}, 4 examples, digest {shuffled.card.digest[:12]}" in lines
    assert "seed: 3" in lines and not any(line.startswith("window") for line in lines)
    assert "4 examples of 2 responses" in text


def test_the_text_says_what_the_scores_are(make):
    assert "\n  scores      probabilities\n" in card_text(make("a", {}))
    assert "\n  scores      rewards\n" in card_text(make("b", {}, scores="rewards"))


def test_the_vocabulary_is_found_through_the_chain_and_must_be_the_same(make, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a b c")
    digest = load_vocabulary(words).digest
    prepared = make("prepared", {"vocabulary": str(words)}, digest)
    shuffled = make("shuffled", derived("shuffle", {"pairs": prepared}), digest)
    assert find_vocabulary(shuffled).digest == digest
    words.write_text("a b c d")
    with pytest.raises(UserError, match=rf"vocabulary {digest[:12]}, .*words.txt is \w+: give the dataset's own"):
        find_vocabulary(shuffled)
    words.unlink()
    with pytest.raises(
        UserError, match=r"shuffled was .*words.txt: cannot read .* if it has moved, give its path with"
    ):
        find_vocabulary(shuffled)


def test_a_vocabulary_that_no_source_states_must_be_given(make):
    dataset = make("a", {}, load_vocabulary("bytes").digest)
    assert find_vocabulary(dataset, "bytes").digest == dataset.card.vocabulary_digest
    with pytest.raises(UserError, match="does not say where its vocabulary is: give --vocabulary"):
        find_vocabulary(dataset)


@pytest.mark.parametrize("provenance", [{"vocabulary": "posts", "made_by": "prepare"}, {"task": "posts"}])
def test_the_posts_bring_their_vocabulary(make, provenance):
    """In two forms of provenance: today's, in which posts are a source, and the older one."""
    digest = load_vocabulary("posts").digest
    posts = make("posts", provenance, digest)
    assert find_vocabulary(posts).digest == digest
    assert find_vocabulary(make("shuffled", derived("shuffle", {"pairs": posts}), digest)).digest == digest


def test_a_library_that_is_not_installed_is_no_vocabulary_that_has_moved(make, tmp_path, monkeypatch):
    make_tokenizer(tmp_path / "tokenizer")
    prepared = make("prepared", {"vocabulary": str(tmp_path / "tokenizer")})
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"with the vocabulary .*: tokenizers is not installed: pip install [^;]*$"):
        find_vocabulary(prepared)
