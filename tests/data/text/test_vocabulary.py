import pathlib
import warnings

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies

from alignment_gap.data.text import SentencePieceVocabulary, WordVocabulary, extra_id, load_vocabulary, prompt_ids
from alignment_gap.errors import UserError

SENTENCES = ["the cat sat on the mat", "a dog ran to the park", "my cat and my dog ran home", "the mat is at home"]


def train_model(folder: pathlib.Path, **special) -> pathlib.Path:
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | special
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(folder / "small"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return folder / "small.model"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> pathlib.Path:
    return train_model(tmp_path_factory.mktemp("vocabulary"))


def test_words_have_ids_from_two_in_their_order():
    vocabulary = WordVocabulary(["red", "green", "blue"], extra_ids=4)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.size) == (0, 1, 9)
    assert vocabulary.encode("blue red  blue") == [4, 2, 4]


def test_words_decode_up_to_the_end_with_sentinels_and_padding_shown():
    vocabulary = WordVocabulary(["red", "green", "blue"], extra_ids=4)
    assert vocabulary.decode([2, 8, 0, 5, 1, 3, 3]) == "red <extra_id_0> <pad> <extra_id_3>"
    assert extra_id(vocabulary, 0) == 8 and extra_id(vocabulary, 3) == 5


def test_unknown_word_is_named():
    with pytest.raises(UserError, match=r"word 'purple' is not among the 2 words.*use its words"):
        WordVocabulary(["red", "green"]).encode("red purple")


@pytest.mark.parametrize(
    "words, message", [(["a", "a"], "'a' comes twice"), (["a b"], "not a word"), ([""], "not a word")]
)
def test_unusable_word_list_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        WordVocabulary(words)


def test_missing_sentinel_is_refused():
    with pytest.raises(UserError, match="sentinel 8 is not among the vocabulary's 8"):
        extra_id(WordVocabulary(["a"]), 8)


def test_an_id_that_only_the_model_has_is_shown_as_no_token():
    assert WordVocabulary(["a"]).decode([2, 99]) == "a <no_token_99>"
    assert WordVocabulary(["a"]).decode([2, 1, 2, 1], past_ends=True) == "a <eos> a"


def test_digest_changes_with_content_only():
    digests = {WordVocabulary(w, extra_ids=e).digest for w, e in [(["a", "b"], 8), (["b", "a"], 8), (["a", "b"], 4)]}
    assert len(digests) == 3
    assert WordVocabulary(["a", "b"]).digest == WordVocabulary(("a", "b")).digest


def test_sentencepiece_round_trip_and_special_ids(model_path):
    vocabulary = SentencePieceVocabulary(model_path, extra_ids=10)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path)).vocab_size()
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.size) == (0, 1, pieces + 10)
    ids = vocabulary.encode(SENTENCES[0])
    assert vocabulary.eos_id not in ids
    assert vocabulary.decode([*ids, 1, *ids]) == SENTENCES[0]
    assert vocabulary.decode([*ids, pieces + 9, *ids]) == f"{SENTENCES[0]} <extra_id_0> {SENTENCES[0]}"


def test_sentencepiece_refuses_text_that_it_cannot_express(model_path):
    vocabulary = SentencePieceVocabulary(model_path)
    with pytest.raises(UserError, match=r"has no piece for any of '日本'.*made for this language"):
        vocabulary.encode("日本")
    assert vocabulary.unk_id in vocabulary.encode("the 日本 cat")
    assert vocabulary.encode("") == []


@pytest.mark.parametrize("name", ["pad", "eos"])
def test_sentencepiece_without_a_needed_id_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"has no {name} id: train it with"):
        SentencePieceVocabulary(train_model(tmp_path, **{f"{name}_id": -1}))


def test_sentencepiece_missing_junk_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*none\.model \(No such file"):
        SentencePieceVocabulary(tmp_path / "none.model")
    for content in (b"", b"junk" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model: give one"):
            SentencePieceVocabulary(tmp_path / "bad.model")


def test_load_vocabulary_goes_by_the_name(tmp_path, model_path):
    assert isinstance(load_vocabulary(model_path), SentencePieceVocabulary)
    (tmp_path / "words.txt").write_text("red\ngreen\n")
    assert load_vocabulary(tmp_path / "words.txt").encode("green") == [3]
    with pytest.raises(UserError, match=r"words\.csv is not a known kind of vocabulary"):
        load_vocabulary(tmp_path / "words.csv")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        load_vocabulary(tmp_path / "latin.txt")


def test_a_begin_id_of_the_model_is_kept_and_no_sentinels_are_added(tmp_path):
    # Gemma's special ids.
    vocabulary = SentencePieceVocabulary(train_model(tmp_path, pad_id=0, eos_id=1, bos_id=2, unk_id=3))
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (0, 1, 2, 3)
    assert vocabulary.extra_ids == 0 and vocabulary.bos_id not in vocabulary.encode("the cat")
    assert not vocabulary.ends_prompts
    assert SentencePieceVocabulary(vocabulary.path, extra_ids=8).size == vocabulary.size + 8


def test_bytes_are_byt5s():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import seqio
    theirs, ours = seqio.ByteVocabulary(extra_ids=125), load_vocabulary("bytes")
    assert (ours.pad_id, ours.eos_id, ours.unk_id, ours.size) == (0, theirs.eos_id, theirs.unk_id, theirs.vocab_size)
    assert (ours.extra_ids, ours.bos_id) == (theirs.extra_ids, None) and ours.ends_prompts
    for text in ("", "hello\n", "日本 é"):
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode([*ours.encode(text), 1, 50]) == text
    assert (
        ours.decode([75, extra_id(ours, 0), 0, 2, 259, 400, 203])
        == "H<extra_id_0><pad><unk><extra_id_124><no_token_400>\ufffd"
    )


def test_t5_vocabulary_has_t5s_ids():
    path = pathlib.Path(__file__).parents[4] / "shared/data/vocab/t5.spiece.model"
    if not path.exists():
        pytest.skip(f"{path} is not here: T5's vocabulary is not shipped with the project")
    vocabulary = SentencePieceVocabulary(path)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.size) == (0, 1, 2, 32100)
    assert extra_id(vocabulary, 0) == 32099 and vocabulary.decode([32099, 32000]) == "<extra_id_0> <extra_id_99>"
    # The example of Hugging Face's T5 documentation.
    assert vocabulary.encode("Hello, my dog is cute") == [8774, 6, 82, 1782, 19, 5295]
    assert prompt_ids("Hello, my dog is cute", vocabulary) == [8774, 6, 82, 1782, 19, 5295, 1]
    # docs/data.md says that these pieces lose them.
    assert vocabulary.encode("a\nb\n\n c") == vocabulary.encode("a b c")
    for sign in "{}<~^\\`\t日":
        assert (vocabulary.unk_id in vocabulary.encode(f"a{sign}b")) == (sign != "\t"), sign


# Complete characters only, without halves of surrogate pairs.
TEXTS = strategies.text(strategies.characters(exclude_categories=("Cs",)), max_size=30)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(text=TEXTS, behind=strategies.lists(strategies.integers(0, 500), max_size=4))
def test_bytes_express_every_text(text, behind):
    """Ids may also be an array, and anything may follow the end."""
    vocabulary = load_vocabulary("bytes")
    ids = vocabulary.encode(text)
    assert len(ids) == len(text.encode()) and not {0, 1, 2} & set(ids) and max(ids, default=3) < 259
    for either in ([*ids, 1, *behind], np.array([*ids, 1, *behind], np.int32), iter(ids)):
        assert vocabulary.decode(either) == text


WORD_LISTS = strategies.lists(
    strategies.text(strategies.characters(exclude_categories=("Cs", "Z", "C")), min_size=1, max_size=5),
    min_size=1,
    max_size=6,
    unique=True,
).filter(lambda words: all(word.split() == [word] for word in words))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(words=WORD_LISTS, picks=strategies.lists(strategies.integers(0, 99), max_size=8))
def test_words_come_back_from_their_ids(words, picks):
    vocabulary = WordVocabulary(words)
    chosen = [words[pick % len(words)] for pick in picks]
    ids = vocabulary.encode("  ".join(chosen))
    assert ids == [2 + words.index(word) for word in chosen]
    assert vocabulary.decode([*ids, vocabulary.eos_id, 0]) == " ".join(chosen)
    assert vocabulary.decode(np.array(ids, np.int64)) == " ".join(chosen)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(ids=strategies.lists(strategies.integers(0, 80), max_size=8))
def test_every_id_is_written_whatever_a_model_makes(model_path, ids):
    """Ids of all kinds in any order. Ids after the first end are not shown."""
    for vocabulary in (WordVocabulary(["a", "b"], extra_ids=3), load_vocabulary("bytes"), load_vocabulary(model_path)):
        shown = vocabulary.decode(ids)
        end = ids.index(1) if 1 in ids else len(ids)
        assert shown == vocabulary.decode(ids[:end])
        for index in ids[:end]:
            if index >= vocabulary.size:
                assert f"<no_token_{index}>" in shown
            elif index >= vocabulary.size - vocabulary.extra_ids:
                assert f"<extra_id_{vocabulary.size - 1 - index}>" in shown
