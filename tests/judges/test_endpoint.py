"""An endpoint that fails: which requests are retried and when, which errors end the job, and that no key is printed."""

import datetime
import email.utils
import json
import time
import types

import numpy as np
import pytest
from judge_server import MODEL

from alignment_gap.errors import StorageError, UserError
from alignment_gap.judges import endpoint
from alignment_gap.judges.endpoint import Endpoint, EndpointConfig

SECRET = "sk-no-one-may-read-this"
QUESTION = [{"role": "user", "content": "[PROMPT]\np\n[END OF PROMPT] [RESPONSE A]\na b\n[END OF RESPONSE A] "
             "[RESPONSE B]\na\n[END OF RESPONSE B]"}]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def opened(server):
    """The endpoint with some other settings."""
    return lambda **settings: Endpoint(EndpointConfig(**{"url": server.url, "model": MODEL} | settings))


def test_a_question_is_one_post_with_the_key_and_the_fields_of_the_settings(server, opened):
    reply = opened(request={"temperature": 0.3, "seed": 4}).ask(QUESTION)
    assert server.asked == [{"model": MODEL, "messages": QUESTION, "temperature": 0.3, "seed": 4}]
    assert server.keys == [f"Bearer {SECRET}"]
    assert (reply.text, reply.refusal, reply.failures) == ("I counted.\nB", None, 0)
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 7) and reply.seconds > 0


@pytest.mark.parametrize("settings", [{"key_variable": None}, {"key_variable": "NO_SUCH_KEY"}])
def test_without_a_key_none_is_sent(server, opened, settings):
    opened(**settings).ask(QUESTION)
    assert server.keys == [None]


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, "oops"),
        (503, {}, ""),
        (429, {}, "{}"),
        (200, {}, "<html>no JSON</html>"),
        (200, {}, '{"choices": []}'),
        (200, {}, "[]"),
        (200, {"Content-Length": 9999}, '{"cut'),
        2.0,
    ],
    ids=["500", "503", "429", "html", "no choice", "a list", "cut short", "stalls"],
)
def test_what_may_pass_is_tried_again(fault, server, opened):
    server.faults = [fault, fault]
    reply = opened(timeout=0.3).ask(QUESTION)
    assert (reply.text, reply.failures, len(server.asked)) == ("I counted.\nB", 2, 3)


def test_an_answer_that_drips_does_not_hold_the_job_for_ever():
    class Dripping:
        def read1(self, size):
            time.sleep(0.01)
            return b" "

    with pytest.raises(TimeoutError):
        list(endpoint._parts(Dripping(), time.monotonic() + 0.1))


@pytest.mark.parametrize("as_date", [False, True])
def test_everyone_waits_for_what_the_endpoint_says(server, opened, as_date):
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    server.faults = [(429, {"Retry-After": email.utils.format_datetime(later) if as_date else "1"}, "slow down")]
    asked = opened()
    asked.ask(QUESTION)
    asked.ask(QUESTION)
    # A date has a resolution of a second.
    assert server.times[1] - server.times[0] >= 0.99 and len(server.asked) == 3


def test_waits_double_up_to_the_longest(server, opened, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    server.faults = [(500, {}, "")] * 8
    assert opened(retries=8).ask(QUESTION).failures == 8
    assert [wait for wait in waits if wait >= 1] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize(("said", "expected"), [("0", [1, 2, 4]), ("3", [3, 3, 4])])
def test_the_wait_is_the_longer_of_our_own_and_what_the_endpoint_says(said, expected, server, opened, monkeypatch):
    """By a clock that only sleep moves."""
    now = [0.0]
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda wait: now.__setitem__(0, now[0] + wait))
    monkeypatch.setattr(endpoint, "time", clock)
    asked, times = opened(), []
    send = asked._send
    monkeypatch.setattr(asked, "_send", lambda messages: times.append(now[0]) or send(messages))
    server.faults = [(429, {"Retry-After": said}, "slow down")] * 3
    assert asked.ask(QUESTION).failures == 3
    assert np.diff(times).tolist() == expected


def test_what_does_not_pass_ends_with_one_line_that_another_attempt_may_not_meet(server, opened):
    server.faults = [(502, {}, json.dumps({"error": {"message": f"bad\ngateway for {SECRET}"}}))] * 9
    with pytest.raises(StorageError, match=r"tries: 3, at last status 502: bad gateway for \*\*\*\): run") as e:
        opened(retries=2).ask(QUESTION)
    assert e.value.status == 1 and "\n" not in str(e.value) and len(server.asked) == 3


def test_a_pause_until_tomorrow_is_not_waited_for(server, opened):
    server.faults = [(429, {"Retry-After": "86400"}, "quota")]
    with pytest.raises(StorageError, match=r"tries: 1, at last status 429: quota\)"):
        opened().ask(QUESTION)


def test_nobody_there(opened):
    with pytest.raises(StorageError, match=r"at last Connection refused\): run the same command again"):
        opened(url="http://127.0.0.1:9/v1", retries=1).ask(QUESTION)
    with pytest.raises(StorageError, match=r"nowhere.invalid/v1/chat/completions does not answer"):
        opened(url="http://nowhere.invalid/v1", retries=0).ask(QUESTION)


def test_a_key_that_is_refused_is_not_told(server, opened):
    server.key = "another"
    with pytest.raises(UserError, match=r"refuses the key in OPENAI_API_KEY \(status 401: .*\*\*\*\): set OPENAI") as e:
        opened().ask(QUESTION)
    assert SECRET not in str(e.value) and len(server.asked) == 1
    with pytest.raises(UserError, match=r"refuses a request without a key .* set NO_SUCH_KEY to a key"):
        opened(key_variable="NO_SUCH_KEY").ask(QUESTION)


def test_a_model_or_a_page_that_is_not_there(server, opened):
    with pytest.raises(UserError, match=r"the model gpt \(status 404: The model `gpt` does not exist.\): check url"):
        opened(model="gpt").ask(QUESTION)
    with pytest.raises(UserError, match="cannot be asked"):
        opened(url=server.url + "/v2").ask(QUESTION)


def test_a_redirect_is_not_followed_with_the_key(server, opened):
    server.faults = [(307, {"Location": server.url + "/elsewhere"}, "moved")]
    with pytest.raises(UserError, match="status 307: moved"):
        opened().ask(QUESTION)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_is_no_failure_of_the_others(status, server, opened):
    server.faults = [(status, {}, '{"error": {"message": "too long"}}')]
    reply = opened().ask(QUESTION)
    assert (reply.text, reply.refusal, len(server.asked)) == (None, f"status {status}: too long", 1)


def test_the_rate_is_kept(server, opened):
    asked = opened(requests_per_minute=600.0)
    for _ in range(4):
        asked.ask(QUESTION)
    assert server.times[-1] - server.times[0] >= 0.29


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": ""}, "url is ''"),
        ({"url": "localhost:8000"}, "url is 'localhost:8000': write http://HOST:PORT/v1"),
        ({"url": "http://[::1"}, "url cannot be read"),
        ({"model": ""}, "model is not set"),
        ({"request": {"messages": []}}, "request has messages"),
        ({"retries": -1}, "retries is -1"),
        ({"parallel": 0}, "parallel is 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"requests_per_minute": 0.0}, "requests_per_minute is 0.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message) as error:
        EndpointConfig(**{"url": "http://localhost/v1", "model": "m"} | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": f"https://me:{SECRET}@host/v1"}, "url holds a user or a query"),
        ({"url": f"https://host/v1?key={SECRET}"}, "url holds a user or a query"),
        ({"key_variable": SECRET}, "key_variable is no name of an environment variable"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_told(settings, message):
    with pytest.raises(UserError, match=message) as error:
        EndpointConfig(**{"url": "http://localhost/v1", "model": "m"} | settings)
    assert SECRET not in str(error.value)


def test_a_key_that_no_header_can_hold_is_not_told(opened, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX-Other: 1")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds spaces") as error:
        opened()
    assert SECRET not in str(error.value)
