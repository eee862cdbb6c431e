"""Responses of a checkpoint to prompts from a dataset, a file or the keyboard, as text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alignment_gap import checks
from alignment_gap.checkpoints import Network, find_checkpoint, tokenizer_of
from alignment_gap.data.batches.order import SEED_LIMIT
from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.records.dataset import CARD
from alignment_gap.data.tasks.prepare import prompt_id
from alignment_gap.data.text import EncodingError, Vocabulary, load_vocabulary, prompt_ids
from alignment_gap.data.text.chat import (
    DATE,
    PLAIN,
    Messages,
    Template,
    check_date,
    folder_template,
    load_template,
    messages_of,
)
from alignment_gap.data.text.pair import BadPair, Malformed
from alignment_gap.errors import UserError
from alignment_gap.evaluation.batching import Batching
from alignment_gap.folders import AnyPath, at
from alignment_gap.jobs.generate import drawing, policy_ends, policy_network
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig, first_says, is_first_process, make_mesh, on_every_process
from alignment_gap.training import load_policy

FORMATS = ("text", "jsonl")
# The value of `template` for prompts that no template writes.
AS_THEY_ARE = "none"
# Bytes of a prompt that is typed.
_LONGEST = 2**16
# Maps a prompt and its place to token ids.
Encode = Callable[[str | Messages, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Responses to sample.

    Attributes:
      run: folder of a policy's run or checkpoint.
      step: which of its checkpoints; None for the last.
      prompts: a dataset, a .jsonl file whose records have a field "prompt", or a text file with a prompt on each line;
        None for the keyboard.
      template: the chat template that writes prompts of a file or of the keyboard: a jinja file, the folder of a
        tokenizer, "plain" for the marks of HH, or "none" for texts as they are; None for the template that the run's
        prompts were prepared with or, if that is not known, the one that its tokenizer brings.
      template_date: the day that a template which writes today's date takes for today, as YEAR-MONTH-DAY; the run's
        prompts were prepared with such a day too.
      limit: prompts that are answered, the first so many; None for all.
      samples: responses to a prompt.
      sampler: how tokens are drawn.
      response_length: most tokens of a response.
      seed: of the responses.
      vocabulary: the run's vocabulary, if it is not known or has moved.
      end_prompts: whether prompts of a file or of the keyboard end with the vocabulary's end id; None for what the
        run's prompts did or, if that is not known, what is usual for the vocabulary.
      format: "text" to read, or "jsonl": a record for each prompt.
      batch_size: prompts at a time, over all devices.
      mesh: the device mesh.
    """

    run: str | None = None
    step: int | None = None
    prompts: str | None = None
    template: str | None = None
    template_date: str = DATE
    limit: int | None = None
    samples: int = 1
    sampler: SamplerConfig = SamplerConfig()
    response_length: int = 128
    seed: int = 0
    vocabulary: str | None = None
    end_prompts: bool | None = None
    format: str = "text"
    batch_size: int = 8
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError where a setting is unknown or out of its range."""
        checks.one_of(self, FORMATS, "format")
        check_date("template_date", self.template_date)
        checks.at_least(self, 1, "limit", "samples", "response_length", "batch_size")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")


def sample_texts(config: SampleConfig) -> Iterator[str]:
    """A text for every prompt, as soon as it is answered. A prompt that comes again gets new answers.

    An answer also ends with any end id of the tokenizer's generation_config.json.

    Raises:
      UserError: the run, its vocabulary or the template cannot be used, or a prompt cannot be read or encoded.
    """
    if config.run is None:
        raise UserError("run is not set: give the folder of a policy")
    mesh, run = make_mesh(config.mesh), config.run
    network = policy_network(run, config.step)
    vocabulary = on_every_process(lambda: _vocabulary(config, network))
    template = on_every_process(lambda: _template(config, network))
    stops = policy_ends(run, vocabulary.eos_id, config.step)
    policy, params = load_policy(run, mesh, config.step)
    ends = network.end_prompts if config.end_prompts is None else config.end_prompts
    conversation: list[dict[str, str]] | None = [] if template and config.prompts is None else None
    encode = functools.partial(_encode, vocabulary, ends, template)
    prompts = itertools.islice(_prompts(config.prompts, encode, conversation), config.limit)
    settings = {
        "samples": config.samples,
        "max_length": config.response_length,
        "eos_id": stops,
        "config": config.sampler,
    }
    draw = drawing(policy, params, mesh, jax.random.key(config.seed), **settings)
    show = _as_text if config.format == "text" else _as_record
    # At the keyboard every prompt is answered at once; the other rows of its batch repeat it.
    size = 1 if config.prompts is None else config.batch_size
    seen: collections.Counter[int] = collections.Counter()
    while asked := list(itertools.islice(prompts, size)):
        rows = _rows(asked)
        batching = Batching(mesh, config.batch_size, (rows[1].shape[1:] * 2,))
        repeats = [_count(seen, number) for number in rows[0].tolist()]
        drawn = draw(batching, rows, repeats)
        for row, prompt in enumerate(asked):
            lengths = drawn.lengths[row]
            answers = [tokens[:length] for tokens, length in zip(drawn.responses[row], lengths, strict=True)]
            if conversation is not None:
                conversation.append({"role": "assistant", "content": _without_end(vocabulary, answers[0], stops)})
            yield show(vocabulary, prompt, answers, drawn.log_probs[row].sum(axis=-1))


def _count(seen: collections.Counter[int], number: int) -> int:
    """How often a prompt's number was counted before; counts it."""
    seen[number] += 1
    return seen[number] - 1


def _rows(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, tokens and lengths of prompts; padded to a power of two, so that few lengths are compiled."""
    lengths = np.array([*map(len, prompts)], np.int32)
    tokens = np.zeros((len(prompts), max(16, 1 << int(lengths.max() - 1).bit_length())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return np.array([*map(prompt_id, prompts)], np.int32), tokens, lengths


def _vocabulary(config: SampleConfig, network: Network) -> Vocabulary:
    if config.vocabulary is None and config.prompts is not None and (at(config.prompts) / CARD).exists():
        vocabulary = find_vocabulary(open_dataset(config.prompts))
    elif (place := config.vocabulary or network.vocabulary) is not None:
        vocabulary = load_vocabulary(place)
    else:
        raise UserError(f"{config.run} does not say where its vocabulary is: give vocabulary")
    if network.vocabulary_digest is not None and vocabulary.digest != network.vocabulary_digest:
        raise UserError(
            f"{config.run} was trained with the vocabulary {network.vocabulary_digest[:12]}, this one is "
            f"{vocabulary.digest[:12]}: give the run's own"
        )
    return vocabulary


def _template(config: SampleConfig, network: Network) -> Template | None:
    """How prompts are written as conversations; None for texts as they are."""
    own, date = tokenizer_of(find_checkpoint(at(str(config.run)), config.step)), config.template_date
    if config.template is not None:
        return None if config.template == AS_THEY_ARE else load_template(config.template, date)
    if network.template is not None:  # Prepared with "plain", records without messages are texts as they are.
        return None if network.template == PLAIN else load_template(network.template, date)
    return load_template(own, date) if own and folder_template(own)[0] else None


def _without_end(vocabulary: Vocabulary, answer: np.ndarray, stops: Sequence[int]) -> str:
    return vocabulary.decode(answer[:-1] if answer[-1] in stops else answer)


def _encode(
    vocabulary: Vocabulary, ends: bool | None, template: Template | None, prompt: str | Messages, where: str
) -> np.ndarray:
    """The token ids of a prompt: of a text, which is what a user says if there is a template, or of messages."""
    try:
        if template is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = template.render(messages_of(messages, "prompt"), ask=True)
        if not isinstance(prompt, str):
            raise UserError(f"{where} holds messages, and the run has no chat template: give template")
        ids = prompt_ids(prompt, vocabulary, ends)
    except (BadPair, Malformed, EncodingError) as problem:
        raise UserError(f"{where}: {': '.join(filter(None, problem.args))}") from None
    if not ids:
        raise UserError(f"{where}: the prompt is empty: write a text, or remove it")
    return np.array(ids, np.int32)


def _prompts(place: str | None, encode: Encode, conversation: list[dict[str, str]] | None) -> Iterator[np.ndarray]:
    """The prompts as token ids.

    With a conversation, each line from the keyboard is the user's next turn in it; an empty line begins a new one.
    """
    if place is None:
        for line in _typed():
            if conversation is None:
                if line:
                    yield encode(line, "the keyboard")
            elif not line:
                conversation.clear()
            else:
                conversation.append({"role": "user", "content": line})
                yield encode(conversation, "the keyboard")
    elif (at(place) / CARD).exists():
        yield from (example.prompt for example in open_dataset(place))
    elif not at(place).is_file():
        raise UserError(
            f"prompts is {place!r}: give a dataset's folder or a file of prompts, or leave it out to type them"
        )
    else:
        lines = list(_lines(at(place)))
        if not lines:
            raise UserError(f"{place} holds no prompt: write one on each line")
        yield from itertools.starmap(encode, lines)


def _lines(path: AnyPath) -> Iterator[tuple[str | Messages, str]]:
    """The prompts of a file, each with its place."""
    for number, line in enumerate(io.StringIO(path.read_text(encoding="utf-8")), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line.rstrip("\n"), where
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        is_messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not (isinstance(prompt, str) or is_messages):
            raise UserError(f'{where} has no prompt: write {{"prompt": ...}}, a text or messages with role and content')
        yield prompt, where


def _typed() -> Iterator[str]:
    """Lines from the keyboard of the first process, for all processes, up to the end of input."""
    while line := first_says(_read_line).tobytes().rstrip(b"\0").decode(errors="replace"):
        yield line.strip("\n") if line.strip() else ""


def _read_line() -> np.ndarray:
    """A line with its end, padded; nothing at the end of input."""
    encoded = np.zeros(_LONGEST, np.uint8)
    if is_first_process():
        if sys.stdin.isatty():
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = np.frombuffer(sys.stdin.readline().encode()[:_LONGEST], np.uint8)
        encoded[: len(line)] = line
    return encoded


def _as_text(vocabulary: Vocabulary, prompt: np.ndarray, answers: Iterable[np.ndarray], log_probs: np.ndarray) -> str:
    shown = [f"  {vocabulary.decode(answer)}" for answer in answers]
    return "\n".join([vocabulary.decode(prompt, past_ends=True), *shown, ""])


def _as_record(vocabulary: Vocabulary, prompt: np.ndarray, answers: Sequence[np.ndarray], log_probs: np.ndarray) -> str:
    record: dict[str, Any] = {
        "prompt": vocabulary.decode(prompt, past_ends=True),
        "responses": [vocabulary.decode(answer) for answer in answers],
        "tokens": [*map(len, answers)],
        "log_probs": [round(float(value), 4) for value in log_probs],
    }
    return json.dumps(record, ensure_ascii=False)
