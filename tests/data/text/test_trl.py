import json

import pytest

from alignment_gap.data.text import Dropped, TextPair, TextSourceConfig, open_source
from alignment_gap.errors import UserError

SKY = [{"role": "user", "content": "What color is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": f"It is {color}."}] for color in ("blue", "green"))
ASKED = "\n\nHuman: What color is the sky?\n\nAssistant:"


def read(location, **settings) -> list[TextPair | Dropped]:
    return list(open_source(TextSourceConfig(str(location), **settings)).read())


def parts(pair: TextPair) -> tuple:
    return pair.prompt, pair.responses, pair.scores


# The examples on TRL's page about dataset formats, and the texts that its trainers make of them.
FORMS = {
    "explicit, standard": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ("The sky is", (" blue.", " green."), (1.0, 0.0)),
    ),
    "implicit, standard": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ("The sky is", (" blue.", " green."), (1.0, 0.0)),
    ),
    "explicit, conversational": (
        {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
        (ASKED, ("It is blue.", "It is green."), (1.0, 0.0)),
    ),
    "implicit, conversational": (
        {"chosen": SKY + BLUE, "rejected": SKY + GREEN},
        (ASKED, ("It is blue.", "It is green."), (1.0, 0.0)),
    ),
    "prompt beside whole conversations": (
        {"prompt": "What color is the sky?", "chosen": SKY + BLUE, "rejected": SKY + GREEN},
        (ASKED, ("It is blue.", "It is green."), (1.0, 0.0)),
    ),
    "unpaired, standard": (
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        ("The sky is", (" blue.",), (1.0,)),
    ),
    "unpaired, conversational": (
        {"prompt": SKY, "completion": GREEN, "label": False},
        (ASKED, ("It is green.",), (0.0,)),
    ),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hugging_face"])
@pytest.mark.parametrize("name", FORMS)
def test_trls_forms_are_read_as_they_are(write, tmp_path, form, name):
    row, expected = FORMS[name]
    (pair,) = read(write(tmp_path, form, [row]))
    assert parts(pair) == expected


def test_fields_rename_columns_and_name_the_users_own_in_errors(write, tmp_path):
    row = {"question": "q?", "good": "yes", "bad": "no", "prompt": "another"}
    location = write(tmp_path, "jsonl", [row, row | {"good": None}])
    fields = "prompt=question,chosen=good,rejected=bad"
    source = open_source(TextSourceConfig(location, fields=fields))
    assert parts(next(source.read())) == ("q?", ("yes", "no"), (1.0, 0.0))
    with pytest.raises(UserError, match=r"a\.jsonl:2: the field 'good' is null, not a text: write .*with --fields"):
        list(source.read())
    with pytest.raises(UserError, match=r"a\.jsonl:1: .* the field 'worse', .* has only 'question', 'good', 'bad', 'p"):
        read(location, fields="prompt=question,chosen=good,rejected=worse")
    with pytest.raises(UserError, match=r"a\.jsonl:1: --fields names the field 'ask', but the record has only"):
        read(location, fields="prompt=ask,chosen=good,rejected=bad")


POSTS = {"prompt": "post", "reference": "human's", "model": "machine's"}
JUDGED = "prompt=prompt,first=model,second=reference,label=preferred"


def test_a_label_says_which_of_two_columns_is_better(write, tmp_path):
    rows = [POSTS | {"preferred": label} for label in ("ours", "reference", "both", "", "ours")]
    location = write(tmp_path, "jsonl", rows)
    first, second, tie, blank, _ = read(location, fields=JUDGED, labels="ours=1,reference=0,both=0.5,=drop")
    assert parts(first) == ("post", ("machine's", "human's"), (1.0, 0.0)) and second.scores == (0.0, 1.0)
    assert (tie.reason, blank.reason) == ("tie", "label dropped")
    null = write(tmp_path, "parquet", [rows[0], POSTS | {"preferred": None}])
    assert read(null, fields=JUDGED, labels="ours=1,=drop")[1].reason == "label dropped"
    with pytest.raises(UserError, match=r":1: the field 'preferred' is 'ours', out of its range: use a number from 0"):
        read(location, fields=JUDGED)


def test_labels_without_a_label_are_refused(write, tmp_path):
    location = write(tmp_path, "jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"labels is 'ours=1', but .*:1 has no label: leave it out"):
        read(location, labels="ours=1")


@pytest.mark.parametrize(
    "label, score", [(1, 1.0), (0, 0.0), (0.25, 0.25), ("first", 1.0), ("second", 0.0), ("tie", 0.5), ("win", 0.75)]
)
def test_a_label_is_a_probability_or_a_name(write, tmp_path, label, score):
    row = {"prompt": "p", "first": "a", "second": "b", "label": label}
    (pair,) = read(write(tmp_path, "jsonl", [row]), ties="keep", labels="win=0.75")
    assert pair.scores == (score, 1 - score)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("labels", ["0=1,1=0", "0.0=1,1.0=0"])
@pytest.mark.parametrize("values", [(1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0")])
def test_a_number_names_equal_numbers_of_any_type(write, tmp_path, form, labels, values):
    location = write(tmp_path, form, [{"prompt": "p", "first": "a", "second": "b", "label": each} for each in values])
    texts_differ = isinstance(values[0], str) and f"{values[0]}=0" not in labels.split(",")
    if texts_differ:
        with pytest.raises(UserError, match="out of its range"):
            read(location, labels=labels)
    else:
        assert [pair.scores for pair in read(location, labels=labels)] == [(0.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize("labels", ["1=0", "2=1", "-1=drop", "ours=1,0.5=drop"])
def test_a_number_that_the_labels_of_numbers_do_not_name_is_refused(write, tmp_path, labels):
    location = write(tmp_path, "jsonl", [{"prompt": "p", "first": "a", "second": "b", "label": 0.25}])
    with pytest.raises(UserError, match=r"give the meaning of 0.25 with --labels too, such as 0.25=drop"):
        read(location, labels=labels)


def test_the_names_of_a_completions_labels_are_no_numbers(write, tmp_path):
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False, 1, 0.0)]
    pairs = read(write(tmp_path, "jsonl", rows), labels="true=1")
    assert [pair.scores for pair in pairs] == [(1.0,), (0.0,), (1.0,), (0.0,)]


GOOD = {
    "completion": {"completion": "a"},
    "first": {"first": "a", "second": "b"},
    "chosen": {"chosen": "pa", "rejected": "pb"},
}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "first": "a", "second": "b", "label": 1.5}, "the field 'label' is 1.5, out of its range"),
        ({"prompt": "p", "first": "a", "second": "b", "label": -1}, "the field 'label' is -1, out of its range"),
        ({"prompt": "p", "first": "a", "second": "b", "label": True}, "the field 'label' is True, out of its range"),
        ({"prompt": "p", "first": "a", "second": "b", "label": [1]}, "the field 'label' is \\[1\\], out of its range"),
        ({"prompt": "p", "first": "a", "second": "b", "label": None}, "the field 'label' is null, not a label"),
        (
            {"prompt": "p", "completion": "a", "label": 0.5},
            "the field 'label' is 0.5, out of its range: use true or false",
        ),
        ({"prompt": "p", "completion": "a", "label": "maybe"}, "the field 'label' is 'maybe', out of its range"),
        ({"prompt": "p", "completion": "a"}, "lacks the field 'label'"),
        ({"completion": "a", "label": True}, "lacks the field 'prompt'"),
        ({"prompt": "p", "chosen": "a"}, "lacks the field 'rejected', which the first record has"),
        # The first record has an explicit prompt, so these records are refused.
        ({"chosen": "pc", "rejected": "pd"}, "lacks the field 'prompt', which the first record has"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "preference": 1}, "has the field 'preference', which the fir"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "the field 'chosen' is int, not a text"),
        ({"prompt": "p", "chosen": BLUE, "rejected": "b"}, "holds a text and a conversation side by side"),
        ({"prompt": SKY, "chosen": "a", "rejected": "b"}, "holds a conversation as its prompt and texts as"),
        ({"prompt": SKY, "chosen": [{"role": "assistant"}], "rejected": GREEN}, "the text of message 1 of the field"),
        ({"prompt": SKY, "chosen": ["a"], "rejected": ["b"]}, "the field 'chosen' holds str, not objects"),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "the field 'chosen' holds half a surrogate pair"),
    ],
)
def test_a_malformed_record_names_its_field(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    form = next(form for form in GOOD if form in row)
    path.write_text(json.dumps({"prompt": "p", "label": 1} | GOOD[form]) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}") as error:
        read(path, bad_pairs="drop")
    assert "\n" not in str(error.value)


def test_a_file_holds_one_form_of_records(write, tmp_path):
    rows = [{"prompt": "p", **GOOD["chosen"]}, {"prompt": "p", "label": True, **GOOD["completion"]}]
    for first, second, role in ((*rows, "chosen"), (*rows[::-1], "completion")):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: lacks the field '{role}', which the first record has"):
            read(write(tmp_path, "jsonl", [first, second]))


def test_completions_without_labels_are_told_how_to_get_them(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "completion": "a"}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: lacks the field 'label': add \"label\": true, for a good"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": "Blue it is", "rejected": "Green"}, "empty prompt"),
        ({"chosen": BLUE, "rejected": GREEN}, "no prompt"),
        ({"chosen": "The sky", "rejected": "The sky is green"}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": "a\n"}, "identical pair"),
        ({"prompt": [{"role": "robot", "content": "x"}], "chosen": BLUE, "rejected": GREEN}, "unknown role 'robot'"),
    ],
)
def test_a_pair_that_holds_no_preference_is_refused_or_counted(write, tmp_path, row, reason):
    location = write(tmp_path, "jsonl", [row])
    with pytest.raises(UserError, match=rf"a\.jsonl:1: {reason}.*: .*, or set --bad_pairs=drop$"):
        read(location)
    assert read(location, bad_pairs="drop") == [Dropped(reason, f"{location}:1")]
