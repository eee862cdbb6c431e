"""A language model as a judge: asks it over HTTP for the better of two responses, in both orders.

Its name is the URL of an OpenAI-compatible endpoint with the model, `http://localhost:8000/v1#MODEL`, or a JSON file
with the settings of `LanguageModelConfig`.

A folder keeps the answers, one file for each question. An answered question is never asked again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urldefrag

import numpy as np
from jaxtyping import Array, Float

from alignment_gap.configuration import from_dict
from alignment_gap.data.records import Dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, read_json
from alignment_gap.judges.contract import PROBABILITIES, REWARDS, Judge, JudgeConfig, over_the_others
from alignment_gap.judges.endpoint import Endpoint, EndpointConfig, Messages
from alignment_gap.judges.host import decoded, own_texts
from alignment_gap.sharding import LogicalMesh, on_every_process, put_batch, to_host
from alignment_gap.storage import Url, cache_folder

Item = TypeVar("Item")
Result = TypeVar("Result")

TEMPLATE = """\
Which of two responses answers the prompt better?

[PROMPT]
{prompt}
[END OF PROMPT]

[RESPONSE A]
{first}
[END OF RESPONSE A]

[RESPONSE B]
{second}
[END OF RESPONSE B]

Judge by how correct, helpful and clear each response is. Their order and their lengths do not matter. Give your \
reason in at most two sentences. Then end with a line that is exactly "A", "B" or "tie"."""
_REMINDER = 'The last line of your answer has to be exactly "A", "B" or "tie". Answer with this line alone.'
# The preference for the first response, by the last line of an answer.
_VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}
# A question that tests an endpoint, its key and the template.
_TRIAL = ("How much is two plus two?", "Four.", "Five.")
# The counts of a batch's questions; see `_counts`.
_COUNTS = ("questions", "given_up", "answers", "failures", "prompt_tokens", "completion_tokens", "seconds")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(EndpointConfig):
    """A language model that judges, with its endpoint.

    Attributes:
      template: text of the question, with {prompt}, {first} and {second}; the last line of an answer must be A, B or
        tie.
      cache: folder of the answers; None for `judges` in this machine's cache folder.
      prices: dollars per million tokens of prompts and of completions; None leaves dollars out of the metrics.
    """

    template: str = TEMPLATE
    cache: str | None = None
    prices: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is missing or out of its range."""
        super().__post_init__()
        if missing := [name for name in ("{prompt}", "{first}", "{second}") if name not in self.template]:
            raise UserError(f"template has no {' and no '.join(missing)}: the question needs all three texts")
        if self.prices is not None and len(self.prices) != 2:
            raise UserError(f"prices is {self.prices}: give two, those of a million prompt and completion tokens")

    @property
    def digest(self) -> str:
        """SHA-256 of the settings that determine the answers."""
        return _sha256([self.url, self.model, dict(self.request), self.template])


class _Question(NamedTuple):
    """A prompt and two responses, in the order in which the model reads them."""

    prompt: str
    first: str
    second: str


def accepts(name: str) -> bool:
    """Whether this module opens the judge of this name: a URL, or a JSON file."""
    return name.startswith(("http://", "https://")) or name.endswith(".json")


def own_labels(name: str) -> str:
    """The labels that this judge gives by itself: hard preferences."""
    return "hard"


def check(name: str) -> None:
    """Raises UserError if the settings of this judge are not usable; asks nothing."""
    Endpoint(_settings(name))


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh) -> Judge:
    """Opens the judge of a URL or of a settings file; each process asks about its own rows, many requests at a time.

    First it asks a trial question, to test the endpoint. The cache keeps that answer too.

    Raises:
      UserError: the config asks for rewards, a setting is not usable, the endpoint refuses the key or the question, or
        its answer has no verdict.
      StorageError: the endpoint does not answer.
    """
    settings = on_every_process(lambda: _settings(str(config.judge)))
    if config.labels == REWARDS:
        raise UserError(f"labels is 'rewards', but {config.judge} compares pairs: choose hard or soft")
    vocabulary = find_vocabulary(dataset)
    asked = on_every_process(lambda: _open(settings))
    counted: collections.Counter[str] = collections.Counter()

    def begin(*texts: Array) -> Callable[[], Float[Array, "B K"]]:
        found = in_background(lambda: asked.preferences(*decoded(vocabulary, *own_texts(*texts))))

        def wait() -> Float[Array, "B K"]:
            preferences, took = found.result()
            counted.update(took)
            if config.labels == "hard":
                preferences = (np.sign(preferences - 0.5) + 1) / 2
            return put_batch(mean_preferences(preferences), mesh, len(texts[0]))

        return wait

    def counts() -> dict[str, float]:
        totals = to_host(np.array([[counted[each] for each in _COUNTS]], np.float32)).sum(axis=0).tolist()
        counted.clear()
        return _told(dict(zip(_COUNTS, totals, strict=True)), settings.prices)

    facts = {"judge": f"{settings.url}#{settings.model}", "judge.digest": settings.digest}
    return Judge(lambda *texts: begin(*texts)(), PROBABILITIES, facts, begin, counts)


def mean_preferences(preferences: Float[np.ndarray, "N K K"]) -> Float[np.ndarray, "N K"]:
    """`over_the_others` in float32; nan for all responses to a prompt if one of its pairs has no preference."""
    means = over_the_others(preferences)
    means[np.isnan(means).any(axis=1)] = np.nan
    return means.astype(np.float32)


def verdict(text: str) -> float | None:
    """An answer's preference for the first response: 1, 0, or 0.5 for a tie; None if its last line is not a verdict."""
    return _VERDICTS.get(text.strip().rpartition("\n")[2].strip())


def _settings(name: str) -> LanguageModelConfig:
    if name.endswith(".json"):
        path = at(name)
        if not path.exists():
            raise UserError(f"the judge {name} is not there: give a JSON file with url and model, or a URL#MODEL")
        values = read_json(path, remedy="write settings such as url and model")
        if not isinstance(values, dict):
            raise UserError(f"the judge {name} holds no settings: write an object with url and model")
        return from_dict(LanguageModelConfig, values, name)
    url, model = urldefrag(name)
    return LanguageModelConfig(url, model)


def _open(settings: LanguageModelConfig) -> _Asked:
    """Opens the cache and the endpoint, and asks the trial question."""
    asked = _Asked(settings)
    record = asked.record(_Question(*_TRIAL))
    if _verdict(record) is None:
        last = record["answers"][-1]
        said = last["refusal"] or f"it answers {' '.join(last['text'].split())[-80:]!r} to a trial question"
        remedy = "its last line has to be A, B or tie: change template, request or model"
        raise UserError(f"{settings.url} with the model {settings.model} gives no verdict ({said}): {remedy}")
    return asked


class _Asked:
    """A language model's answers: reads them from the cache, or asks for them."""

    def __init__(self, settings: LanguageModelConfig) -> None:
        """Reads the key from the environment; raises UserError if the key or the cache folder is not usable."""
        self._settings, self._endpoint = settings, Endpoint(settings)
        self._cache = at(settings.cache) if settings.cache else cache_folder() / "judges"
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep answers in {self._cache} ({error.strerror}): set cache to another") from None

    def preferences(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]]
    ) -> tuple[Float[np.ndarray, "N K K"], dict[str, float]]:
        """The preference for each response over each other one, as the mean of both orders; and the counts of that.

        Equal responses tie without a question. A pair is nan if one of its orders has no verdict.
        """
        asked = [
            (row, i, j, _Question(prompt, each[i], each[j]))
            for row, (prompt, each) in enumerate(zip(prompts, responses, strict=True))
            for i, j in itertools.permutations(range(len(each)), 2)
            if each[i] != each[j]
        ]
        distinct = list(dict.fromkeys(question for *_, question in asked))
        records = dict(zip(distinct, in_threads(self.record, distinct, self._settings.parallel), strict=True))
        found = np.full((len(prompts), len(responses[0]), len(responses[0])), 0.5)
        for row, i, j, question in asked:
            value = _verdict(records[question])
            found[row, i, j] = np.nan if value is None else value
        return (found + 1 - found.swapaxes(1, 2)) / 2, _counts(records.values())

    def record(self, question: _Question) -> dict[str, Any]:
        """The answers to a question, up to the first verdict or refusal; at most `retries` more than one."""
        settings, parts = self._settings, question._asdict()
        text = re.sub(r"\{(prompt|first|second)\}", lambda name: parts[name[1]], settings.template)
        messages = [{"role": "user", "content": text}]
        path = self._path(_sha256([settings.url, settings.model, dict(settings.request), messages]))
        record = _read(path) or {"url": settings.url, "model": settings.model, "messages": messages, "answers": []}
        answers = record["answers"]
        while not _is_settled(record) and len(answers) <= settings.retries:
            reply = self._endpoint.ask([*messages, *_reminder(answers)])
            answers.append(reply._asdict())
            _write(path, record)
        return record

    def _path(self, key: str) -> AnyPath:
        return self._cache / key[:2] / f"{key}.json"


def _reminder(answers: Sequence[Mapping[str, Any]]) -> Messages:
    """The messages after a repeated question: the last answer, if there was one, and what it lacked."""
    if not answers or not answers[-1]["text"].strip():
        return []
    return [{"role": "assistant", "content": answers[-1]["text"]}, {"role": "user", "content": _REMINDER}]


def _verdict(record: Mapping[str, Any]) -> float | None:
    answers = record["answers"]
    return verdict(answers[-1]["text"]) if answers and answers[-1]["text"] is not None else None


def _is_settled(record: Mapping[str, Any]) -> bool:
    """Whether a question needs no further answer: it has a verdict or a refusal."""
    answers = record["answers"]
    return bool(answers) and (answers[-1]["text"] is None or _verdict(record) is not None)


def _read(path: AnyPath) -> dict[str, Any] | None:
    """The record of a question; None if there is none, or if a power cut damaged it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "answers" in record else None


def _write(path: AnyPath, record: Mapping[str, Any]) -> None:
    """Writes a record under a temporary name, then renames it; another process may write the same record."""
    content = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    path.parent.mkdir(exist_ok=True)
    if isinstance(path, Url):
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _counts(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The counts of some questions, whenever they were asked: a resumed run gets the same counts."""
    counts = dict.fromkeys(_COUNTS, 0.0)
    for record in records:
        answers = record["answers"]
        counts["questions"] += 1
        counts["given_up"] += _verdict(record) is None
        counts["answers"] += len(answers)
        for name in _COUNTS[3:]:
            counts[name] += sum(answer[name] for answer in answers)
    return counts


def _told(counts: Mapping[str, float], prices: Sequence[float] | None) -> dict[str, float]:
    """The counts by the names of metrics, with the mean latency of an answer and, if prices are known, dollars."""
    questions, requests = counts["questions"], counts["answers"] + counts["failures"]
    told = {
        "judge_questions": questions,
        "judge_answered": questions - counts["given_up"],
        "judge_given_up": counts["given_up"],
        "judge_requests": requests,
        "judge_retried": requests - questions,
        "judge_prompt_tokens": counts["prompt_tokens"],
        "judge_completion_tokens": counts["completion_tokens"],
        "seconds_judge_answer": counts["seconds"] / max(counts["answers"], 1),
    }
    if prices is not None:
        spent = zip(prices, (counts["prompt_tokens"], counts["completion_tokens"]), strict=True)
        told["judge_dollars"] = sum(price * tokens for price, tokens in spent) / 1e6
    return told


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def in_background(function: Callable[[], Result]) -> Future[Result]:
    """Calls the function in a daemon thread; the future waits for its result. A process that ends does not wait."""
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """The function's results for all items, in so many threads; after an error no further item starts."""
    results: list[Any] = [None] * len(items)
    errors: list[BaseException] = []
    numbers = iter(range(len(items)))  # `next` of it is atomic.

    def work() -> None:
        while not errors and (number := next(numbers, None)) is not None:
            try:
                results[number] = function(items[number])
            except BaseException as error:
                errors.append(error)

    workers = [in_background(work) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.result()
    if errors:
        raise errors[0]
    return results
