"""A pair as text. Records map to it by the roles of their fields; other records are refused, with a reason."""

import hypothesis
import pytest
from hypothesis import strategies

from alignment_gap.data.text.pair import Fields, Malformed, TextPair, as_text, named


def test_equal_pairs_have_equal_keys_in_either_order_of_the_responses():
    pair = TextPair("p", ("a", "b"), (1.0, 0.0), where="x:1", split="train")
    assert pair.key == TextPair("p", ("b", "a"), (0.0, 1.0), where="y:9").key and len(pair.key) == 16
    others = [
        TextPair("p", ("a", "b"), (0.0, 1.0)),
        TextPair("q", ("a", "b"), (1.0, 0.0)),
        TextPair("p", ("a", "c"), (1.0, 0.0)),
        TextPair("p", ("a", "b"), (0.5, 0.5)),
        TextPair("p", ("a",), (1.0,)),
        TextPair("pa", ("", "b"), (1.0, 0.0)),
    ]
    assert len({pair.key, *(other.key for other in others)}) == 7


LABELLED = strategies.lists(
    strategies.tuples(strategies.text("ab", max_size=2), strategies.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=3,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(one=LABELLED, other=LABELLED, prompts=strategies.tuples(*[strategies.sampled_from(["", "a"])] * 2))
def test_keys_are_equal_where_prompts_and_labelled_responses_are_in_any_order(one, other, prompts):
    first, second = (
        TextPair(prompt, *zip(*each, strict=True)) for prompt, each in zip(prompts, (one, other), strict=True)
    )
    assert (first.key == second.key) == (prompts[0] == prompts[1] and sorted(one) == sorted(other))
    backwards = TextPair(prompts[0], *zip(*reversed(one), strict=True))
    assert backwards.key == first.key


def test_a_key_exists_for_half_a_surrogate_pair_too():
    assert len(TextPair("\ud800", ("a", "b"), (1.0, 0.0)).key) == 16


def test_what_the_file_calls_its_fields_is_no_part_of_a_pair():
    one = TextPair("p", ("a", "b"), (1.0, 0.0), fields=("question", "good", "bad"))
    assert one == TextPair("p", ("a", "b"), (1.0, 0.0)) and one.fields[0] == "question"


FIELDS = Fields(
    {
        "q": "why?",
        "number": 3,
        "none": None,
        "nested": {"text": "inner"},
        "list": [{"a": 1}, {"a": 2}],
        "columns": {"a": [1, 2], "b": ["x", "y"]},
        "mixed": [{"a": 1}, "b"],
    },
    {"prompt": "q"},
)


def test_fields_are_read_by_their_role():
    assert "prompt" in FIELDS and "chosen" not in FIELDS and "q" in FIELDS
    assert (FIELDS.name("prompt"), FIELDS.name("chosen")) == ("q", "chosen")
    assert FIELDS.text("prompt") == "why?" and FIELDS.value("number") == 3
    assert FIELDS.value("none", null="blank") == "blank"
    assert FIELDS.group("nested").text("text") == "inner"


def test_a_list_of_objects_may_have_become_an_object_of_lists():
    assert FIELDS.rows("list") == [{"a": 1}, {"a": 2}]
    assert FIELDS.rows("columns") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize(
    "read, problem",
    [
        (lambda: FIELDS.value("chosen"), "lacks the field 'chosen'"),
        (lambda: FIELDS.value("none"), "the field 'none' is null, not a text"),
        (lambda: Fields({"label": None}).value("label"), "the field 'label' is null, not a label"),
        (lambda: Fields({"preferred": None}).value("preferred"), "the field 'preferred' is null, not a label"),
        (lambda: FIELDS.text("number"), "the field 'number' is int, not a text"),
        (lambda: FIELDS.group("prompt"), "the field 'q' is str, not an object"),
        (lambda: FIELDS.rows("prompt"), "the field 'q' is str, not a list"),
        (lambda: FIELDS.rows("number"), "the field 'number' is int, not a list"),
        (lambda: FIELDS.rows("mixed"), "the field 'mixed' holds str, not objects"),
        (lambda: as_text(None, "the role"), "the role is null, not a text"),
        (lambda: as_text("a\udfffb", "the role"), "the role holds half a surrogate pair"),
    ],
)
def test_a_field_of_another_kind_is_named_as_the_file_has_it(read, problem):
    with pytest.raises(Malformed) as error:
        read()
    assert error.value.args[0] == problem


def test_fields_are_named_once_each():
    assert named(["chosen"]) == "(field 'chosen')"
    assert named(["chosen", "chosen", "rejected"]) == "(fields 'chosen' and 'rejected')"
