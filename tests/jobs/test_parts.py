"""Datasets that are made from others in parts: what a kill or damage costs, and what the card records."""

import pytest
from job_runs import Bar, Stopped
from random_examples import make_random_examples

from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.jobs.parts import dataset_summary, write_parts


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "pairs", make_random_examples(40), vocabulary_digest="v", provenance={})
    return open_dataset(tmp_path / "pairs")


def copy(dataset, folder, made, bar=None):
    """A copy in parts of 10; `made` collects the parts that are made."""
    folder.mkdir(exist_ok=True)

    def make(start, stop):
        made.append(start)
        return dataset[start:stop]

    return write_parts(
        folder, 40, make, made_by="copy", inputs={"pairs": dataset}, facts={"seed": 3}, open_bar=bar or Bar(), part=10
    )


def test_what_was_damaged_is_made_again_and_nothing_else(dataset, tmp_path):
    output = tmp_path / "a"
    card, content = copy(dataset, output, made := []), (output / "card.json").read_bytes()
    part = output / "part-00002.array_record"
    whole = part.read_bytes()
    assert made == [0, 10, 20, 30]
    assert copy(dataset, output, made := []) == card and made == []
    for damaged in (whole[:100], bytes([whole[0] ^ 1]) + whole[1:], None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        assert copy(dataset, output, made := []) == card and made == [20]
        assert part.read_bytes() == whole and (output / "card.json").read_bytes() == content
    (output / "card.json").write_text("{")
    assert copy(dataset, output, made := []) == card and made == []
    assert (output / "card.json").read_bytes() == content


def test_finished_parts_are_not_made_again(dataset, tmp_path):
    with pytest.raises(Stopped):
        copy(dataset, tmp_path / "copy", made := [], Bar(stop_at=20))
    assert made == [0, 10, 20] and not (tmp_path / "copy" / "card.json").exists()
    copy(dataset, tmp_path / "copy", made := [])
    assert made == [30]
    for ours, theirs in zip(open_dataset(tmp_path / "copy"), dataset, strict=True):
        assert ours.prompt.tolist() == theirs.prompt.tolist() and ours.scores.tolist() == theirs.scores.tolist()
        assert [r.tolist() for r in ours.responses] == [r.tolist() for r in theirs.responses]


def test_the_card_names_the_maker_and_the_inputs(dataset, tmp_path):
    card = copy(dataset, tmp_path / "a", [])
    assert (card.scores, card.vocabulary_digest, len(card.files)) == ("probabilities", "v", 4)
    assert (card.provenance["made_by"], card.provenance["seed"]) == ("copy", 3)
    (part,) = card.provenance["inputs"]
    assert (part["role"], part["digest"]) == ("pairs", dataset.card.digest)
    assert dataset_summary(tmp_path / "a") == f"{tmp_path / 'a'}: 40 examples, digest {card.digest[:12]}"
