"""A language model as a judge: its questions, how its answers become scores, and that no question is asked twice."""

import json
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from judge_server import MODEL, SECRET, parts, shorter

from alignment_gap.errors import StorageError, UserError
from alignment_gap.judges import JudgeConfig, by_itself, check_judge, is_model, language_model, open_judge
from alignment_gap.judges.language_model import mean_preferences, verdict
from alignment_gap.sharding import batch_sharding

pytestmark = pytest.mark.usefixtures("quick_endpoint")


@pytest.fixture
def settings(server, tmp_path):
    """Writes a file with settings, and returns its name."""

    def write(**values):
        path = tmp_path / "judge.json"
        path.write_text(json.dumps({"url": server.url, "model": MODEL} | values))
        return str(path)

    return write


@pytest.fixture
def ask(posts, mesh, texts_on):
    """Opens a judge and asks it about responses to eight prompts; returns scores and counts."""

    def scores(name, labels="hard", samples=2, on=None):
        judge = open_judge(JudgeConfig(name, labels=labels), posts, on or mesh)
        found = np.asarray(judge.scores(*texts_on(on or mesh, samples=samples)))
        return found, judge.counts()

    return scores


@pytest.fixture(scope="module")
def words(texts_on, mesh, vocabulary):
    """The number of words in each of three responses to eight prompts."""
    _, _, responses, lengths = (np.asarray(array) for array in texts_on(mesh, samples=3))
    return np.array(
        [[len(vocabulary.decode(responses[b, k, : lengths[b, k]]).split()) for k in range(3)] for b in range(8)]
    )


def brevity(words):
    """The fraction of the other responses that have more words; an equal number counts one half."""
    wins = (np.sign(words[:, None, :] - words[:, :, None]) + 1) / 2
    return (wins.sum(axis=2) - 0.5) / (words.shape[1] - 1)


@pytest.mark.parametrize("samples", [2, 3])
def test_every_pair_is_asked_in_both_orders(samples, server, ask, words, posts, vocabulary):
    scores, counts = ask(server.name, samples=samples)
    np.testing.assert_allclose(scores, brevity(words[:, :samples]), rtol=1e-6)
    assert scores.dtype == np.float32 and len({*scores[:, 0].tolist()}) > 1
    asked = [parts(body["messages"]) for body in server.asked[1:]]
    assert len(asked) == len({*asked}) == 8 * samples * (samples - 1) == counts["judge_questions"]
    assert {(prompt, second, first) for prompt, first, second in asked} == {*asked}
    texts = {vocabulary.decode(posts[i].prompt) for i in range(8)}
    assert {prompt for prompt, *_ in asked} == texts


@pytest.mark.parametrize(
    ("answer", "preference"),
    [(lambda messages: "A", 0.5), (lambda messages: "B\n", 0.5), (lambda messages: "A\nA\nA\ntie", 0.5)],
)
def test_one_that_repeats_itself_prefers_neither(answer, preference, server, ask):
    """A judge that always names the same place says nothing about the responses."""
    server.answer = answer
    scores, counts = ask(server.name, "soft")
    np.testing.assert_array_equal(scores, np.full((8, 2), preference))
    assert counts["judge_given_up"] == counts["judge_retried"] == 0


def test_soft_labels_are_the_mean_of_both_orders_and_hard_ones_whom_it_favours(server, ask, words):
    def hesitant(messages):
        """Answers like `shorter` if the shorter response comes first, and with a tie if it comes second."""
        return "A" if shorter(messages).endswith("A") else "tie"

    server.answer = hesitant
    longer = np.sign(words[:, 1] - words[:, 0])
    soft, _ = ask(server.name, "soft")
    np.testing.assert_array_equal(soft[:, 0], 0.5 + longer / 4)
    asked = len(server.asked)
    hard, _ = ask(server.name, "hard")
    np.testing.assert_array_equal(hard[:, 0], 0.5 + longer / 2)
    assert len(server.asked) == asked and (longer != 0).any()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        ("Because.\n\nB", 0.0),
        ("because\r\n tie \n\n", 0.5),
        ("a", None),
        ("A.", None),
        ("**A**", None),
        ('"A"', None),
        ("The better one is A", None),
        ("A\nI am sure.", None),
        ("Tie", None),
        ("", None),
        ("\n", None),
    ],
)
def test_only_an_exact_last_line_is_a_verdict(text, value):
    assert verdict(text) == value


def test_equal_responses_are_a_tie_without_a_question(server, posts, mesh, texts_on):
    prompts, prompt_lengths, responses, lengths = (np.asarray(array) for array in texts_on(mesh))
    texts = (prompts, prompt_lengths, responses[:, [0, 0]], lengths[:, [0, 0]])
    judge = open_judge(JudgeConfig(server.name), posts, mesh)
    scores = judge.scores(*(jax.device_put(array, batch_sharding(mesh)) for array in texts))
    np.testing.assert_array_equal(scores, np.full((8, 2), 0.5))
    assert server.questions == []


def test_nonsense_is_asked_again_with_what_it_lacked_and_then_given_up(server, ask, settings, words):
    refused = []

    def stubborn(messages):
        """Never gives a verdict on the first question that it meets; on others it does after a reminder."""
        with server.lock:
            refused.extend([parts(messages)] if not refused and "two plus two" not in messages[0]["content"] else [])
        if parts(messages) == refused[:1][0] if refused else False:
            return "They are both nice."
        return shorter(messages) if len(messages) == 3 else "Hm, A I suppose."

    server.answer = stubborn
    scores, counts = ask(settings(retries=2))
    unanswered = np.isnan(scores).any(axis=1)
    assert unanswered.sum() == 1 and np.isnan(scores[unanswered]).all()
    np.testing.assert_allclose(scores[~unanswered], brevity(words[:, :2])[~unanswered])
    assert {name: counts[f"judge_{name}"] for name in ("questions", "answered", "given_up", "requests", "retried")} == {
        "questions": 16,
        "answered": 15,
        "given_up": 1,
        "requests": 15 * 2 + 3,
        "retried": 15 + 2,
    }
    assert (counts["judge_prompt_tokens"], counts["judge_completion_tokens"]) == (3300, 231)
    again = [body["messages"] for body in server.asked if len(body["messages"]) == 3]
    assert {each[1]["content"] for each in again} == {"Hm, A I suppose.", "They are both nice."}
    assert all('exactly "A", "B" or "tie"' in each[2]["content"] for each in again)
    # Questions without a verdict are asked again only if more retries are allowed; then only these are asked.
    asked, server.answer = len(server.asked), shorter
    np.testing.assert_array_equal(ask(settings(retries=2))[0], scores)
    assert len(server.asked) == asked
    found, counts = ask(settings(retries=3))
    np.testing.assert_allclose(found, brevity(words[:, :2]))
    assert len(server.asked) == asked + 1 and counts["judge_given_up"] == 0


def test_a_question_that_the_endpoint_refuses_is_given_up_at_once(server, ask):
    open_faults = [(200, {}, json.dumps({"choices": [{"message": {"content": "A"}}]}))]
    server.faults = [*open_faults, (400, {}, '{"error": {"message": "too long"}}')]
    scores, counts = ask(server.name)
    assert np.isnan(scores).any(axis=1).sum() == 1
    assert (counts["judge_given_up"], counts["judge_requests"]) == (1, 16)
    ask(server.name)
    assert len(server.asked) == 17


def test_a_second_judge_asks_nothing_twice_and_counts_the_same(server, ask):
    server.faults = [(500, {}, "")] * 3
    first, counts = ask(server.name)
    assert len(server.asked) == 1 + 16 + 3
    second, found = ask(server.name)
    np.testing.assert_array_equal(first, second)
    assert len(server.asked) == 20 and counts == found
    # At least one of the failures hit the trial question.
    assert counts["judge_requests"] <= 18 and counts["judge_requests"] == 16 + counts["judge_retried"]


@pytest.mark.parametrize("change", [{"template": "{prompt} {first} {second}"}, {"request": {"temperature": 1}}])
def test_another_question_has_another_answer(change, server, ask, settings, posts, mesh):
    ask(settings())
    asked, server.answer = len(server.asked), lambda messages: "tie"
    ask(settings(**change))
    assert len(server.asked) == 2 * asked
    facts = [open_judge(JudgeConfig(settings(**each)), posts, mesh).facts for each in ({}, {"retries": 1}, change)]
    assert facts[0] == facts[1] != facts[2] and facts[0]["judge"] == server.name


def test_texts_do_not_fill_in_the_template(server, settings, posts, mesh, monkeypatch):
    template = "{prompt}|{first}|{second}"
    asked = language_model._Asked(language_model._settings(settings(template=template)))
    server.answer = lambda messages: "A"
    asked.record(language_model._Question("{second}", "{prompt} \\1", "{first}"))
    assert server.asked[0]["messages"][0]["content"] == "{second}|{prompt} \\1|{first}"


def test_many_are_asked_at_a_time_and_no_more(server, ask, settings):
    server.seconds = 0.02
    ask(settings(parallel=4))
    assert 2 <= server.busiest <= 4


def test_what_was_answered_stays_where_one_fails(server, ask, settings):
    name = settings(parallel=1, retries=0)
    ok = (200, {}, json.dumps({"choices": [{"message": {"content": "A"}}]}))
    server.faults = [*[ok] * 6, (500, {}, "")]
    with pytest.raises(StorageError, match=r"tries: 1, at last status 500\): run the same command again"):
        ask(name)
    assert len(server.asked) == 7
    ask(name)
    assert len(server.asked) == 7 + 16 - 5


def test_killed_with_signal_9_it_has_what_was_answered(server, settings):
    """A process asks one question after another, and is killed while it waits for an answer."""
    name, waits = settings(parallel=1), threading.Event()

    def answer(messages):
        if len(server.asked) > 4:
            waits.set()
            threading.Event().wait(1)
        return "A"

    server.answer = answer
    code = (
        "import sys\nfrom alignment_gap.judges import language_model as judge\n"
        "asked = judge._Asked(judge._settings(sys.argv[1]))\n"
        "asked.preferences(['one', 'two', 'three', 'four'], [['x', 'y']] * 4)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, name], cwd=pathlib.Path(__file__).parents[2]) as process:
        assert waits.wait(60)
        process.kill()
    server.answer = lambda messages: "A"
    before = len(server.asked)
    asked = language_model._Asked(language_model._settings(name))
    preferences, counts = asked.preferences(["one", "two", "three", "four"], [["x", "y"]] * 4)
    assert (preferences[:, 0, 1] == 0.5).all() and counts["questions"] == 8
    assert (before, len(server.asked)) == (5, 5 + 4)


def test_a_record_that_a_power_cut_left_empty_is_asked_anew(server, ask, tmp_path):
    first, _ = ask(server.name)
    asked, victim = len(server.asked), next((tmp_path / "cache").rglob("*.json"))
    victim.write_text("")
    np.testing.assert_array_equal(ask(server.name)[0], first)
    assert len(server.asked) == asked + 1


def test_no_key_in_any_file(server, ask, settings, tmp_path):
    server.answer = lambda messages: f"You sent {SECRET}.\ntie"
    ask(settings(cache=str(tmp_path / "answers")))
    files = [path.read_text() for path in (tmp_path / "answers").rglob("*") if path.is_file()]
    assert len(files) == 17 and all("You sent ***." in text for text in files)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert server.keys == [f"Bearer {SECRET}"] * 17


def test_one_device_gets_the_answer_of_eight(server, ask, alone):
    np.testing.assert_array_equal(ask(server.name)[0], ask(server.name, on=alone)[0])


def test_it_is_asked_where_no_transfer_is_made_unasked(server, posts, texts_on, mesh):
    texts, judge = texts_on(mesh), open_judge(JudgeConfig(server.name), posts, mesh)
    with jax.transfer_guard("disallow"):
        scores = judge.begin(*texts)()
    assert scores.sharding.is_equivalent_to(texts[-1].sharding, 2) and np.isfinite(np.asarray(scores)).all()


def test_dollars_follow_from_tokens(server, ask, settings):
    _, counts = ask(settings(prices=[2.5, 10.0]))
    assert counts["judge_dollars"] == pytest.approx(16 * (100 * 2.5 + 7 * 10) / 1e6)
    assert "judge_dollars" not in ask(settings())[1]


def test_a_prompt_with_a_pair_that_has_no_preference_has_no_scores():
    preferences = np.full((2, 3, 3), 0.5)
    preferences[0, 0, 1], preferences[0, 1, 0] = 1, 0
    preferences[1, 0, 1] = preferences[1, 1, 0] = np.nan
    np.testing.assert_array_equal(mean_preferences(preferences), [[0.75, 0.25, 0.5], [np.nan] * 3])
    with pytest.raises(UserError, match="1 response a prompt: a preference needs 2 or more"):
        mean_preferences(np.full((2, 1, 1), 0.5))


def test_by_itself_it_gives_hard_preferences_and_is_no_network(server):
    assert by_itself(server.name) == JudgeConfig(server.name, labels="hard")
    assert not is_model(server.name) and not is_model("judge.json")
    check_judge(server.name)
    assert server.asked == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "x"}, "unknown key .*judge.json.modle: did you mean model"),
        ({"retries": "many"}, "judge.json.retries is 'many': it must be of type int"),
        ({"retries": -1}, "judge.json.retries is -1"),
        ({"template": "{prompt}: {first}"}, "judge.json.template has no {second}"),
        ({"prices": [1.0]}, r"judge.json.prices is \(1.0,\): give two"),
        ({"api_key": SECRET}, "unknown key .*judge.json.api_key"),
        ({"url": f"http://me:{SECRET}@host/v1"}, "judge.json.url holds a user or a query"),
    ],
)
def test_settings_that_cannot_be_are_told_without_a_question(values, message, settings, posts, mesh, server):
    name = settings(**values)
    for check in (lambda: open_judge(JudgeConfig(name), posts, mesh), lambda: check_judge(name)):
        with pytest.raises(UserError, match=message) as error:
            check()
        assert "\n" not in str(error.value) and SECRET not in str(error.value) and server.asked == []


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("{url}", "hard", "model is not set"),
        ("{url}#llama", "rewards", "labels is 'rewards', but http.*#llama compares pairs: choose hard or soft"),
        ("nowhere.json", "hard", "nowhere.json is not there: give a JSON file with url and model, or a URL#MODEL"),
        ("{url}#gpt", "hard", "cannot be asked for the model gpt"),
    ],
)
def test_a_name_that_is_no_judge_is_told_before_it_is_asked(name, labels, message, server, posts, mesh):
    with pytest.raises(UserError, match=message) as error:
        open_judge(JudgeConfig(name.format(url=server.url), labels=labels), posts, mesh)
    assert "\n" not in str(error.value) and server.questions == []


def test_files_that_hold_no_settings(tmp_path, posts, mesh):
    for content, message in (("[1]", "holds no settings"), ("{", "is not JSON")):
        (tmp_path / "judge.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_judge(JudgeConfig(str(tmp_path / "judge.json")), posts, mesh)


def test_one_that_never_gives_a_verdict_is_told_by_the_trial(server, posts, mesh, settings):
    server.answer = lambda messages: "As a language model\nI like both."
    with pytest.raises(UserError, match=r"gives no verdict .*'As a language model I like both.' to a trial") as error:
        open_judge(JudgeConfig(settings(retries=1)), posts, mesh)
    assert "\n" not in str(error.value) and len(server.asked) == 2


def test_fields_that_the_endpoint_refuses_are_told_by_the_trial(server, posts, mesh, settings):
    server.faults = [(400, {}, '{"error": {"message": "max_tokens is too large"}}')]
    with pytest.raises(UserError, match=r"gives no verdict \(status 400: max_tokens is too large\)"):
        open_judge(JudgeConfig(settings(request={"max_tokens": 10**9})), posts, mesh)


def test_a_cache_that_cannot_be_written(settings, tmp_path, posts, mesh):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep answers in .*file/below .*: set cache to another"):
        open_judge(JudgeConfig(settings(cache=str(tmp_path / "file" / "below"))), posts, mesh)
