import pytest

from alignment_gap.data.text import TASKS, Dropped, PostsConfig, TextPair, TextSourceConfig, open_source
from alignment_gap.errors import UserError

FORMS = ["jsonl.gz", "parquet", "hugging_face"]


def read(location: str, **settings) -> list[TextPair | Dropped]:
    return list(open_source(TextSourceConfig(location, **settings)).read())


def parts(pair: TextPair) -> tuple:
    return pair.prompt, pair.responses, pair.scores


@pytest.mark.parametrize("form", FORMS)
def test_summaries_from_every_container(write, tmp_path, comparison, form):
    rows = [comparison(" long cat", " ill cat? ", 1), comparison("a", "b", 0, split="valid2")]
    source = open_source(TextSourceConfig(write(tmp_path, form, rows)))
    assert source.config.task == "summarization"
    first, second = source.read()
    prompt = "SUBREDDIT: r/pets\n\nTITLE: Cat sleeps\n\nPOST: My cat sleeps all day. Is it ill?\n\nTL;DR:"
    assert parts(first) == (prompt, ("long cat", "ill cat?"), (0.0, 1.0)) and first.split == "train"
    assert parts(second) == (prompt, ("a", "b"), (1.0, 0.0)) and second.split == "validation"


def test_summaries_of_articles_are_left_out_and_repeated_judgements_kept(write, tmp_path, comparison):
    article = {"id": "x", "article": "News.", "site": "cnn", "post": None, "title": None, "subreddit": None}
    rows = [comparison("a", "b", 1), comparison("a", "b", 1), comparison("a", "b", 0, info=article)]
    source = open_source(TextSourceConfig(write(tmp_path, "jsonl", rows)))
    *pairs, last = source.read()
    assert last == Dropped("news article", f"{tmp_path}/a.jsonl:3")
    assert pairs[0].key == pairs[1].key and not source.drops_duplicates
    assert open_source(TextSourceConfig(source.config.location, duplicates="drop")).drops_duplicates


@pytest.mark.parametrize("form", FORMS)
def test_dialogues_from_every_container(write, tmp_path, dialogue, form):
    location = write(tmp_path, form, [dialogue("hi\n\nAssistant: ho\n\nHuman: now?", "yes ", "no")])
    assert open_source(TextSourceConfig(location)).config.task == "dialogues"
    for task in ("auto", "dialogues", "helpfulness", "harmlessness"):
        (pair,) = read(location, task=task)
        prompt = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: now?\n\nAssistant:"
        assert parts(pair) == (prompt, ("yes", "no"), (1.0, 0.0))


@pytest.mark.parametrize("form", FORMS)
def test_battles_from_every_container(write, tmp_path, battle, form):
    rows = [
        battle("1 + 1?", "two", "three", "model_a"),
        battle("1 + 2?", "two", "three ", "model_b"),
        battle("1 + 3?", "four", "4", "tie"),
        battle("1 + 4?", "four", "6", "tie (bothbad)"),
        battle("and?", "x", "y", "model_a", (("hi", "ho"), ("hi", "hey"))),
        battle("and?", "x", "y", "model_a", (("hi", "ho"), ("hi", "ho"))),
    ]
    location = write(tmp_path, form, rows)
    first, second, tie, both_bad, other, turns = read(location)
    assert parts(first) == ("\n\nHuman: 1 + 1?\n\nAssistant:", ("two", "three"), (1.0, 0.0))
    assert second.responses == ("two", "three") and second.scores == (0.0, 1.0)
    assert [item.reason for item in (tie, both_bad, other)] == ["tie", "tie", "several turns"]
    assert turns.prompt == "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: and?\n\nAssistant:"
    kept = read(location, ties="keep")
    assert [item.scores for item in kept[2:4]] == [(0.5, 0.5), (0.5, 0.5)]


def test_a_battle_after_several_equal_turns_of_the_user_alone_is_left_out(write, tmp_path, battle):
    rows = [battle("and?", "x", "y", "model_a", ((f"hi {i}", "ho"), ("hi", "ho"))) for i in range(2)]
    assert [item.reason for item in read(write(tmp_path, "jsonl", rows))] == ["several turns"] * 2


def test_equal_keys_are_the_same_pair_in_either_order(write, tmp_path, battle):
    rows = [battle("q", "x", "y", "model_a"), battle("q", "y", "x", "model_b"), battle("q", "x", "y", "model_b")]
    keys = [pair.key for pair in read(write(tmp_path, "jsonl", rows))]
    assert keys[0] == keys[1] != keys[2] and len(keys[0]) == 16


def without(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


def test_a_malformed_record_of_a_task_is_refused_with_field_and_form(write, tmp_path, comparison, battle):
    good, fight = comparison("a", "b", 1), battle("q", "x", "y", "model_a")
    cases = [
        ("summarization", comparison("a", "b", 2), "the field 'choice' is 2, out of its range: use 0 or 1"),
        ("summarization", comparison("a", "b", True), "the field 'choice' is True, out of its range"),
        ("summarization", comparison("a", "b", None), "the field 'choice' is null, not a label: write"),
        ("summarization", without(good, "summaries"), "lacks the field 'summaries': write {\"info\""),
        (
            "summarization",
            good | {"summaries": good["summaries"][:1]},
            "the field 'summaries' holds 1 summaries, not 2",
        ),
        ("summarization", good | {"summaries": "ab"}, "the field 'summaries' is str, not a list"),
        ("summarization", good | {"summaries": ["a", "b"]}, "the field 'summaries' holds str, not objects"),
        ("summarization", good | {"info": "post"}, "the field 'info' is str, not an object"),
        ("summarization", good | {"info": {"post": "x"}}, "lacks the field 'subreddit'"),
        ("chat_arena", fight | {"winner": "model_c"}, "the field 'winner' is 'model_c', out of its range: use model_a"),
        ("chat_arena", fight | {"winner": None}, "the field 'winner' is null, not a label"),
        ("chat_arena", fight | {"conversation_b": []}, "the field 'conversation_b' holds no message"),
        (
            "chat_arena",
            fight | {"conversation_a": [{"role": "user"}]},
            "the text of message 1 of .*'conversation_a' is null",
        ),
    ]
    for task, row, message in cases:
        location = write(tmp_path, "jsonl", [good if task == "summarization" else fight, row])
        with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}") as error:
            read(location, task=task, bad_pairs="drop")
        assert "\n" not in str(error.value)


def test_bad_pairs_of_a_task_are_refused_or_counted(write, tmp_path, comparison, battle):
    cases = [
        ([comparison("a", " a ", 1)], "identical pair"),
        ([comparison("a", " ", 1)], "empty response"),
        ([battle(" ", "x", "y", "model_a")], "empty prompt"),
        ([battle("q", "x", "x", "model_a")], "identical pair"),
        ([battle("q", "x", "y", "model_a") | {"conversation_a": [{"role": "user", "content": "q"}]}], "no answer"),
    ]
    for rows, reason in cases:
        location = write(tmp_path, "jsonl", rows)
        with pytest.raises(UserError, match=rf"a\.jsonl:1: {reason} \(fields? '.*'\): .*, or set --bad_pairs=drop$"):
            read(location)
        assert read(location, bad_pairs="drop") == [Dropped(reason, f"{location}:1")]


def test_every_task_has_a_form_that_its_remedy_shows():
    assert set(TASKS) == {"summarization", "helpfulness", "harmlessness", "chat_arena", "dialogues", "posts", "pairs"}
    for task in TASKS.values():
        assert task.form.startswith("write {")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "summarisation"}, r"task is 'summarisation': did you mean summarization\?"),
        ({"task": "x"}, "task is 'x': choose one of auto, summarization"),
        ({"ties": "half"}, "ties is 'half': choose one of drop, keep"),
        ({"duplicates": ""}, "duplicates is '': choose one of drop, keep"),
        ({"bad_pairs": "keep"}, "bad_pairs is 'keep': choose one of refuse, drop"),
        ({"fields": "promt=a"}, "fields names 'promt': choose among prompt, chosen"),
        ({"fields": "prompt"}, "fields is 'prompt', which cannot be read at 'prompt'"),
        ({"fields": ""}, "fields is '', which cannot be read at ''"),
        ({"labels": "a=2"}, "labels gives 'a' the meaning '2': give a number from 0 to 1"),
        ({"labels": "a=good"}, "labels gives 'a' the meaning 'good'"),
        (
            {"posts": PostsConfig(pairs=3)},
            "posts is set with the location 'a.jsonl': set it only with the location 'posts'",
        ),
    ],
)
def test_unknown_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        TextSourceConfig("a.jsonl", **change)
