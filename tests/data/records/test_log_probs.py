"""Log-probs stored with a dataset: their layout, what a kill loses, how they are found, and what is refused."""

import hashlib
import json

import numpy as np
import pytest

from alignment_gap.data.records import Example, log_probs, open_dataset, write_dataset
from alignment_gap.data.records.log_probs import ReferenceWriter, open_reference, reference_folder
from alignment_gap.errors import UserError

# Lengths of the two responses of each example.
LENGTHS = [(2, 1), (1, 3), (2, 2), (1, 1), (3, 1)]


@pytest.fixture
def dataset(tmp_path):
    def make(number, lengths):
        answers = tuple(np.arange(2, 2 + length, dtype=np.int32) for length in lengths)
        return Example(number, np.array([7], np.int32), answers, np.array([1, 0], np.float32))

    examples = [make(number, lengths) for number, lengths in enumerate(LENGTHS)]
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    return open_dataset(tmp_path)


def identity_of(dataset, **changes):
    return {"dataset": dataset.card.digest, "checkpoint": "c", "lengths": [[4, 3]], **changes}


def value(number, response, token):
    """A log-prob that identifies its example, response and token."""
    return -(100 * number + 10 * response + token + 0.5)


def batch_of(numbers, width=3):
    """An array [n, K, R] with the values of `value`; padding holds garbage."""
    rows = np.full((len(numbers), 2, width), np.float32(9.0))
    for place, number in enumerate(numbers):
        for response, length in enumerate(LENGTHS[number]):
            rows[place, response, :length] = [value(number, response, token) for token in range(length)]
    return rows


def store(dataset, batches=((3, 0), (4, 1), (2,)), **changes):
    writer = ReferenceWriter(dataset, identity_of(dataset, **changes), 2)
    for numbers in batches[writer.done :]:
        writer.write(np.array(numbers), batch_of(numbers))
    writer.close()
    return writer


def test_values_lie_one_example_after_another_whatever_the_order_of_the_batches(dataset):
    store(dataset)
    folder = reference_folder(dataset, identity_of(dataset))
    values = np.load(folder / "log_probs.npy")
    expected = [
        value(number, response, token)
        for number, lengths in enumerate(LENGTHS)
        for response, length in enumerate(lengths)
        for token in range(length)
    ]
    assert values.dtype == np.float32 and values.tolist() == expected
    assert sorted(path.name for path in folder.iterdir()) == ["log_probs.npy", "reference.json"]
    card = json.loads((folder / "reference.json").read_text())
    digest = hashlib.sha256((folder / "log_probs.npy").read_bytes()).hexdigest()
    assert card == {"of": identity_of(dataset), "sha256": digest}


def test_any_examples_are_read_in_any_width_with_zeros_at_padding(dataset):
    store(dataset)
    stored = open_reference(dataset, identity_of(dataset))
    for numbers, width in (([1], 3), ([4, 0, 4], 5), ([2, 3, 1, 0], 3)):
        found, expected = stored(np.array(numbers), width), batch_of(numbers, width)
        expected[expected > 0] = 0
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_the_folder_is_named_by_the_digest_of_what_they_are_of(dataset):
    identity = identity_of(dataset)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    assert reference_folder(dataset, identity) == dataset.folder / "reference" / digest[:16]
    assert reference_folder(dataset, dict(reversed(identity.items()))) == reference_folder(dataset, identity)


def test_nothing_is_found_before_it_is_complete_or_under_another_identity(dataset):
    identity = identity_of(dataset)
    assert open_reference(dataset, identity) is None
    writer = ReferenceWriter(dataset, identity, 2)
    writer.write(np.array([0, 1]), batch_of([0, 1]))
    assert open_reference(dataset, identity) is None
    store(dataset, checkpoint="other")
    assert open_reference(dataset, identity) is None
    assert open_reference(dataset, identity_of(dataset, checkpoint="other")) is not None


def test_a_kill_costs_what_was_not_saved(dataset, monkeypatch):
    identity = identity_of(dataset)
    writer = ReferenceWriter(dataset, identity, 2)
    writer.write(np.array([3, 0]), batch_of([3, 0]))
    # In the first minute nothing is saved.
    assert ReferenceWriter(dataset, identity, 2).done == 0
    monkeypatch.setattr(log_probs, "SAVE_EVERY", 0.0)
    writer = ReferenceWriter(dataset, identity, 2)
    writer.write(np.array([3, 0]), batch_of([3, 0]))
    writer.write(np.array([4, 1]), batch_of([4, 1]))
    assert ReferenceWriter(dataset, identity, 2).done == 2
    # A batch of another size holds other examples.
    assert ReferenceWriter(dataset, identity, 3).done == 0


def test_a_writer_goes_on_from_the_saved_batches(dataset, monkeypatch):
    monkeypatch.setattr(log_probs, "SAVE_EVERY", 0.0)
    store(dataset, checkpoint="whole")
    whole = reference_folder(dataset, identity_of(dataset, checkpoint="whole")) / "log_probs.npy"
    ReferenceWriter(dataset, identity_of(dataset), 2).write(np.array([3, 0]), batch_of([3, 0]))
    assert store(dataset).done == 3
    folder = reference_folder(dataset, identity_of(dataset))
    assert (folder / "log_probs.npy").read_bytes() == whole.read_bytes()


def change_values(folder):
    content = bytearray((folder / "log_probs.npy").read_bytes())
    content[-1] ^= 1
    (folder / "log_probs.npy").write_bytes(content)


def remove_values(folder):
    (folder / "log_probs.npy").unlink()


def change_card(folder):
    card = json.loads((folder / "reference.json").read_text())
    card["of"]["checkpoint"] = "another"
    (folder / "reference.json").write_text(json.dumps(card))


def cut_card(folder):
    (folder / "reference.json").write_text("{")


@pytest.mark.parametrize(
    "change, message",
    [
        (change_values, "log_probs.npy was changed after it was stored: remove .* to compute it again"),
        (remove_values, "log_probs.npy was changed after it was stored: remove"),
        (change_card, "has log-probs whose checkpoint does not match its name: remove it"),
        (cut_card, "reference.json cannot be read"),
    ],
)
def test_what_was_changed_is_refused_in_one_line(dataset, change, message):
    store(dataset)
    change(reference_folder(dataset, identity_of(dataset)))
    with pytest.raises(UserError, match=message) as error:
        open_reference(dataset, identity_of(dataset))
    assert "\n" not in str(error.value)


def test_those_of_another_version_of_the_dataset_are_refused(dataset):
    store(dataset)
    write_dataset(dataset.folder, list(dataset)[:4], vocabulary_digest="", provenance={})
    changed = open_dataset(dataset.folder)
    with pytest.raises(
        UserError, match=rf"another version of .* \(digest {dataset.card.digest[:12]}, now .*: remove it"
    ):
        open_reference(changed, identity_of(changed))
