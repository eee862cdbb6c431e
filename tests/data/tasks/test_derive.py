"""Datasets made from datasets: shuffled, mixed, part by part; and the card as text, back to the source."""

import collections
import dataclasses

import pytest

from alignment_gap.data.records import derived, open_dataset, write_dataset
from alignment_gap.data.records.card import card_text, find_vocabulary
from alignment_gap.data.tasks.derive import distinct_prompts, mix, shuffle, write_derived
from alignment_gap.data.text import load_vocabulary
from alignment_gap.data.text.posts import vocabulary as posts_vocabulary
from alignment_gap.errors import UserError


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path / "pairs", make_examples(40), vocabulary_digest="v", provenance={"task": "human pairs"})
    return open_dataset(tmp_path / "pairs")


def test_shuffled_it_is_the_same_examples_in_another_order(dataset, plain, tmp_path):
    shuffle(dataset, tmp_path / "a", seed=1)
    found, wanted = ([plain(e) for e in some] for some in (open_dataset(tmp_path / "a"), dataset))
    assert found != wanted and sorted(found) == sorted(wanted)
    shuffle(dataset, tmp_path / "b", seed=1)
    assert (tmp_path / "a" / "card.json").read_bytes() == (tmp_path / "b" / "card.json").read_bytes()


def test_a_window_s_examples_stay_in_it(dataset, plain, tmp_path):
    shuffle(dataset, tmp_path / "a", window=8)
    found, wanted = ([plain(e) for e in some] for some in (open_dataset(tmp_path / "a"), dataset))
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        assert found[part] != wanted[part] and sorted(found[part]) == sorted(wanted[part])


def test_a_mixture_has_the_weights_and_is_mixed(dataset, make_examples, tmp_path):
    others = [dataclasses.replace(e, prompt_id=5000 + i) for i, e in enumerate(make_examples(20, seed=3))]
    write_dataset(tmp_path / "others", others, vocabulary_digest="v", provenance={})
    other = open_dataset(tmp_path / "others")
    card = mix([dataset, other], tmp_path / "all", seed=2)
    ids = [e.prompt_id for e in open_dataset(tmp_path / "all")]
    assert sorted(ids) == sorted([*(e.prompt_id for e in dataset), *(e.prompt_id for e in others)])
    assert [part["digest"] for part in card.provenance["inputs"]] == [dataset.card.digest, other.card.digest]
    mix([dataset, other], tmp_path / "half", weights=[1, 1])
    counts = collections.Counter(e.prompt_id for e in open_dataset(tmp_path / "half"))
    of_other = {id_: count for id_, count in counts.items() if id_ >= 5000}
    assert sum(counts.values()) == 60 and sum(of_other.values()) == 30
    assert len(of_other) == 20 and set(of_other.values()) <= {1, 2}
    assert max(count for id_, count in counts.items() if id_ < 5000) == 1


def test_datasets_of_two_vocabularies_are_not_mixed(dataset, make_examples, tmp_path):
    write_dataset(tmp_path / "others", make_examples(5), vocabulary_digest="w", provenance={})
    with pytest.raises(UserError, match=r"others has a vocabulary of digest w, .*pairs v"):
        mix([dataset, open_dataset(tmp_path / "others")], tmp_path / "all")


def test_what_was_damaged_is_made_again_and_nothing_else(dataset, tmp_path):
    made, output = [], tmp_path / "a"

    def run():
        made.clear()

        def make(start, stop):
            made.append(start)
            return dataset[start:stop]

        return write_derived(output, 40, make, made_by="copy", inputs={"pairs": dataset}, facts={}, part=10)

    card, content = run(), (output / "card.json").read_bytes()
    part = output / "part-00002.array_record"
    whole = part.read_bytes()
    assert made == [0, 10, 20, 30] and run() == card and made == []
    for damaged in (whole[:100], bytes([whole[0] ^ 1]) + whole[1:], None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        assert run() == card and made == [20]
        assert part.read_bytes() == whole and (output / "card.json").read_bytes() == content
    (output / "card.json").write_text("{")
    assert run() == card and made == [] and (output / "card.json").read_bytes() == content


def test_finished_parts_are_not_made_again(dataset, plain, tmp_path):
    made = []

    def make(start, stop):
        made.append((start, stop))
        if start == 20 and len(made) == 3:
            raise KeyboardInterrupt
        return dataset[start:stop]

    settings = {"made_by": "copy", "inputs": {"pairs": dataset}, "facts": {"seed": 0}, "part": 10}
    with pytest.raises(KeyboardInterrupt):
        write_derived(tmp_path / "copy", 40, make, **settings)
    card = write_derived(tmp_path / "copy", 40, make, **settings)
    assert made == [(0, 10), (10, 20), (20, 30), (20, 30), (30, 40)]
    assert [plain(e) for e in open_dataset(tmp_path / "copy")] == [plain(e) for e in dataset]
    assert write_derived(tmp_path / "copy", 40, make, **settings) == card and len(made) == 5
    with pytest.raises(UserError, match="seed was 0, now 1"):
        write_derived(tmp_path / "copy", 40, make, **settings | {"facts": {"seed": 1}})


def test_every_prompt_once(make_examples, tmp_path):
    examples = make_examples(6)
    write_dataset(tmp_path, [*examples, *examples[:3], examples[0]], vocabulary_digest="v", provenance={})
    distinct = len({e.prompt.tobytes() for e in examples})
    assert distinct_prompts(open_dataset(tmp_path)).tolist() == list(range(distinct))


def test_the_card_s_text_leads_back_to_the_source(dataset, tmp_path):
    shuffle(dataset, tmp_path / "a")
    mix([open_dataset(tmp_path / "a"), dataset], tmp_path / "b")
    text = card_text(open_dataset(tmp_path / "b"))
    lines = [line.strip() for line in text[text.index("made by") :].splitlines()]
    steps = [line for line in lines if ":" not in line]
    assert steps == ["made by", "mix", "shuffle", "human pairs", "human pairs"]
    assert f"pairs 0: {tmp_path / 'a'}, 40 examples, digest" in text
    assert "80 examples of 2 responses" in text


def test_the_vocabulary_is_found_through_the_chain_and_must_be_the_same(make_examples, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a b c")
    digest = load_vocabulary(words).digest
    write_dataset(tmp_path / "p", make_examples(3), vocabulary_digest=digest, provenance={"vocabulary": str(words)})
    shuffle(open_dataset(tmp_path / "p"), tmp_path / "s")
    shuffled = open_dataset(tmp_path / "s")
    assert find_vocabulary(shuffled).digest == digest
    words.write_text("a b c d")
    with pytest.raises(UserError, match=rf"vocabulary {digest[:12]}, .*words.txt is \w+: give the dataset's own"):
        find_vocabulary(shuffled)
    words.unlink()
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*words.txt"):
        find_vocabulary(shuffled)
    about = derived("x", {}) | {"task": "posts"}
    write_dataset(tmp_path / "q", make_examples(3), vocabulary_digest=posts_vocabulary().digest, provenance=about)
    assert find_vocabulary(open_dataset(tmp_path / "q")).digest == posts_vocabulary().digest
    write_dataset(tmp_path / "r", make_examples(3), vocabulary_digest="?", provenance={})
    with pytest.raises(UserError, match="does not say where its vocabulary is: give --vocabulary"):
        find_vocabulary(open_dataset(tmp_path / "r"))
