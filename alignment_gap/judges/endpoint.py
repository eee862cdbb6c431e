"""An OpenAI-compatible endpoint: one POST for each question, with retries, a rate limit, and a key that stays secret.

After a failure that may pass, the client tries again: no connection, no answer in time, a status such as 429 or 503, or
a body that is not a completion. The question waits longer after each failure, and at least as long as the endpoint's
`Retry-After` says. Until the time of a `Retry-After`, no other request of this process starts either. Other questions
do not wait for a failure without one.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from alignment_gap import checks
from alignment_gap.errors import StorageError, UserError

Messages = Sequence[Mapping[str, str]]

# Seconds before the first try again, which double with every further one, and the most of them.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
# The longest Retry-After that is waited for, in seconds; a quota that is renewed tomorrow ends the job.
_LONGEST_PAUSE = 600.0
# Statuses that may pass, beside all from 500 on; and those that refuse a question, not the endpoint's user.
_PASSING, _REFUSING = (408, 409, 425, 429), (400, 413, 422)
# Characters of the endpoint's own message that a line has room for.
_LONGEST_LINE = 200


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """The endpoint of a language model, and how to ask it.

    Attributes:
      url: URL of the endpoint, such as http://localhost:8000/v1; requests go to URL/chat/completions.
      model: name of the model at the endpoint.
      request: further fields of every request, such as {"temperature": 0, "max_tokens": 512}.
      key_variable: the environment variable that holds the key; None for no key.
      timeout: seconds for one request.
      retries: how often a question is asked again after a failure, and how often after an answer without a verdict.
      parallel: requests of a process at a time.
      requests_per_minute: of a process, at most; None for no limit.
    """

    url: str = ""
    model: str = ""
    request: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0}, hash=False)
    key_variable: str | None = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 6
    parallel: int = 16
    requests_per_minute: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is missing or out of its range; never shows a URL that may hold a secret."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            raise UserError("url cannot be read: write http://HOST:PORT/v1 or https://HOST/v1") from None
        if parts.username or parts.password or parts.query:
            raise UserError("url holds a user or a query, where secrets may be: give the key by key_variable alone")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise UserError(f"url is {self.url!r}: write http://HOST:PORT/v1 or https://HOST/v1")
        if not self.model:
            raise UserError("model is not set: give the name that the endpoint knows the model by")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable or "_"):
            raise UserError("key_variable is no name of an environment variable: give the name, never the key itself")
        if reserved := {"model", "messages", "stream", "n"} & {*self.request}:
            raise UserError(f"request has {', '.join(sorted(reserved))}, which the judge sets itself: leave it out")
        checks.at_least(self, 0, "retries")
        checks.at_least(self, 1, "parallel")
        checks.above(self, 0, "timeout", "requests_per_minute")


class Reply(NamedTuple):
    """The endpoint's reply to a question.

    Attributes:
      text: the answer; None if the endpoint refuses this question.
      refusal: the reason of a refusal; None for an answer.
      prompt_tokens, completion_tokens: as the endpoint counts them; 0 if it does not.
      seconds: duration of the request.
      failures: requests that failed before it.
    """

    text: str | None
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    failures: int = 0


class _Passing(Exception):
    """A failure that may pass; `pause` is the wait in seconds that the endpoint asks for, or None."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because a redirect could send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Asks the questions of one process, from any of its threads."""

    def __init__(self, config: EndpointConfig) -> None:
        """Reads the key; raises UserError if a header cannot hold it."""
        self._config, self._key = config, _key_of(config.key_variable)
        self._address = f"{config.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self._open = urllib.request.build_opener(_NoRedirects).open
        self._interval = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._turn, self._lock = 0.0, threading.Lock()

    def ask(self, messages: Messages) -> Reply:
        """The answer to a question, or the reason why the endpoint refuses it.

        Raises:
          UserError: the endpoint refuses the key, or does not know the model.
          StorageError: it failed more often than `retries` allows, or it asks for too long a pause.
        """
        failures = 0
        while True:
            self._wait_for_turn()
            start = time.monotonic()
            try:
                reply = self._reply(*self._send(messages))
                return reply._replace(seconds=time.monotonic() - start, failures=failures)
            except _Passing as failure:
                if failures == self._config.retries or (failure.pause or 0) > _LONGEST_PAUSE:
                    raise StorageError(
                        f"{self._address} does not answer (tries: {failures + 1}, at last {failure}): run the same "
                        "command again when it does; what was answered is not asked again",
                        1,
                    ) from None
                if failure.pause is not None:
                    self._pause(failure.pause)
                # Also with a Retry-After, which may be 0; the next turn then comes after both.
                time.sleep(min(_FIRST_WAIT * 2**failures, _LONGEST_WAIT) * random.uniform(0.5, 1))
                failures += 1

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(self._turn, now)
            self._turn = turn + self._interval
        time.sleep(turn - now)

    def _pause(self, seconds: float) -> None:
        """Delays all requests of this process by so many seconds."""
        with self._lock:
            self._turn = max(self._turn, time.monotonic() + seconds)

    def _send(self, messages: Messages) -> tuple[int, str | None, str]:
        """Status, Retry-After and body; removes the key from the body if the endpoint repeats it."""
        config = self._config
        body = {**config.request, "model": config.model, "messages": list(messages)}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + config.timeout
        try:
            try:
                response = self._open(request, timeout=config.timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                content = b"".join(_parts(response, deadline)).decode(errors="replace")
                return response.status, response.headers.get("Retry-After"), self._without_key(content)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer within {config.timeout:g} s") from None
            raise _Passing(self._without_key(getattr(reason, "strerror", None) or repr(reason))) from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _reply(self, status: int, retry_after: str | None, body: str) -> Reply:
        config, said = self._config, f"status {status}{_message(body)}"
        if status == 200:
            return _completion(body)
        if status in _PASSING or status >= 500:
            raise _Passing(said, _seconds(retry_after))
        if status in _REFUSING:
            return Reply(None, said)
        if status in (401, 403):
            what = f"the key in {config.key_variable}" if self._key else "a request without a key"
            remedy = f"set {config.key_variable or 'key_variable, and the variable that it names,'} to a key of its own"
            raise UserError(f"{self._address} refuses {what} ({said}): {remedy}")
        raise UserError(f"{self._address} cannot be asked for the model {config.model} ({said}): check url and model")


def _key_of(variable: str | None) -> str:
    """The key, or "" if there is none; raises UserError, without the key, if a header cannot hold it."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{variable} holds spaces or characters that no key has: set it to the key alone")
    return key


def _parts(response: Any, deadline: float) -> Iterator[bytes]:
    """Yields the body's parts; raises TimeoutError after the deadline, because a socket's timeout is for each part."""
    while part := response.read1(2**16):
        yield part
        if time.monotonic() > deadline:
            raise TimeoutError


def _completion(body: str) -> Reply:
    try:
        content = json.loads(body)
        text, usage = content["choices"][0]["message"]["content"], content.get("usage") or {}
        tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text if isinstance(text, str) else "", None, *tokens)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _Passing("an answer that is no chat completion") from None


def _message(body: str) -> str:
    """The endpoint's description of an error, as the end of a line."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (LookupError, TypeError, ValueError):
        text = body
    short = " ".join(str(text).split())[:_LONGEST_LINE]
    return f": {short}" if short else ""


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After, which may be a date; None if there is none."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (then - datetime.datetime.now(then.tzinfo)).total_seconds())
