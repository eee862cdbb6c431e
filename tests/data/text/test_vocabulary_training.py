import itertools
import json
import pathlib
import random

import pytest

from alignment_gap.data.text import TextSourceConfig, load_vocabulary
from alignment_gap.data.text.vocabulary_training import source_texts, train_vocabulary
from alignment_gap.errors import UserError

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
WORDS = [a + b for a in ("ka", "lo", "mi", "ne", "ru") for b in ("bel", "dor", "fin", "gam")]


def texts(count: int = 300) -> list[str]:
    rng = random.Random(0)
    return [f"\n\nHuman: {' '.join(rng.choices(WORDS, k=6))}?\n\nAssistant: yes" for _ in range(count)]


def test_a_vocabulary_of_ones_own_has_t5s_ids_and_expresses_every_text(tmp_path):
    vocabulary = train_vocabulary(texts(), tmp_path / "own.model", 300)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, None)
    assert vocabulary.size == 300 + 100
    for text in ["\n\nHuman: kabel  lodor?\n\nAssistant:", " 日本 é\ttab ", "１"]:
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.unk_id not in vocabulary.encode(text)
    # The pieces are syllables of the texts; other characters become bytes.
    assert len(vocabulary.encode(" kabel")) < 6 and len(vocabulary.encode("é")) == 3
    assert load_vocabulary(tmp_path / "own.model").digest == vocabulary.digest


def test_real_pairs_come_back_with_their_line_ends_and_rare_signs(tmp_path):
    """T5's own vocabulary loses the line ends of these texts."""
    path, t5 = SHARED / "hh/helpful-base.test.jsonl.gz", SHARED / "vocab/t5.spiece.model"
    if not (path.exists() and t5.exists()):
        pytest.skip(f"{path} and {t5} are not here: human pairs are not shipped with the project")
    found = list(itertools.islice(source_texts(TextSourceConfig(str(path), bad_pairs="drop")), 1500))
    vocabulary, theirs = train_vocabulary(found[:600], tmp_path / "own.model", 2000), load_vocabulary(t5)
    lost = [text for text in found if vocabulary.decode(vocabulary.encode(text)) != text]
    assert not lost, f"{len(lost)} of {len(found)} texts were lost"  # A failure does not print the texts.
    lines = [text for text in found if "\n" in text]
    assert len(lines) > 500 and not any("\n" in theirs.decode(theirs.encode(text)) for text in lines[:50])
    # Other texts, with characters that no training text had.
    for text in ["def f(x):\n\treturn {x: ~x}\n", "日本語 😀 ½\r\n", "\n\n\n", "a  b   c "]:
        ids = vocabulary.encode(text)
        assert vocabulary.unk_id not in ids
        assert vocabulary.decode(ids) == text


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_equal_texts_give_equal_bytes(tmp_path, model):
    for name in ("a", "b"):
        train_vocabulary(texts(), tmp_path / f"{name}.model", 300, model=model)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_the_texts_of_a_source_are_its_prompts_and_responses(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(source_texts(TextSourceConfig(str(path), bad_pairs="drop"))) == ["p", "a", "b"]
    with pytest.raises(UserError, match=r"a\.jsonl:2: identical pair"):
        train_vocabulary(source_texts(TextSourceConfig(str(path))), tmp_path / "own.model", 300)


@pytest.mark.parametrize(
    "name, size, settings, message",
    [
        ("own.model", 5000, {}, "size is 5000, which does not suit these texts .*: choose another size"),
        ("own.model", 10, {}, "size is 10, which does not suit these texts .*: choose another size"),
        ("own.model", 5000, {}, r"\(they need at most \d+ pieces\): choose another size, at most \d+$"),
        ("own.model", 10, {}, r"\(they need at least \d+ pieces\): choose another size, at least \d+$"),
        ("own.spm", 330, {}, r"own\.spm is not a name for a SentencePiece model: let it end in \.model"),
        ("own.model", 330, {"model": "word"}, "model is 'word': choose one of unigram, bpe"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, name, size, settings, message):
    with pytest.raises(UserError, match=message) as error:
        train_vocabulary(texts(), tmp_path / name, size, **settings)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no text to train a vocabulary on"):
        train_vocabulary([], tmp_path / "own.model", 330)
