"""One example of a dataset: its arrays, the form that all examples of a dataset share, and its bytes on disk."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np

from alignment_gap.errors import UserError

# Fields with one number per token of each response. Either all examples of a dataset have such a field, or none has.
TOKEN_FIELDS = ("reference_log_probs", "sampler_log_probs")
_INTS, _FLOATS = np.dtype("<i4"), np.dtype("<f4")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One prompt with K responses, without padding: a row of a PreferenceBatch.

    Attributes:
      prompt_id: stable number of the prompt in its dataset.
      prompt: int32[P] token ids, at least one.
      responses: K arrays int32[R_k] of token ids, including the end id.
      scores: float32[K]; the dataset's card says of which kind.
      reference_log_probs: K arrays float32[R_k] in nats under the reference policy, or None.
      sampler_log_probs: K arrays float32[R_k] in nats under the distribution that the tokens were drawn from, or None.
    """

    prompt_id: int
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scores: np.ndarray
    reference_log_probs: tuple[np.ndarray, ...] | None = None
    sampler_log_probs: tuple[np.ndarray, ...] | None = None


def check_form(example: Example, first: Example, where: str) -> None:
    """Raises UserError unless the example has one score per response, no empty sequence, and the form of `first`.

    The form is the number of responses, and which of the `TOKEN_FIELDS` are present.
    """
    lengths, responses = [len(response) for response in example.responses], len(first.responses)
    problem = None
    if len(lengths) != responses or responses < 1:
        problem = f"has {len(lengths)} responses, but the first has {responses}: give each prompt the same number"
    elif np.shape(example.scores) != (responses,):
        problem = f"has scores of shape {np.shape(example.scores)} for {responses} responses: give one score each"
    elif not len(example.prompt) or not all(lengths):
        problem = "has an empty prompt or response: drop it"
    for name in TOKEN_FIELDS:
        rows = getattr(example, name)
        if (rows is None) != (getattr(first, name) is None):
            problem = problem or f"differs from the first in whether it has {name}: give them for all or for none"
        elif rows is not None and [len(row) for row in rows] != lengths:
            problem = problem or f"has {name} whose lengths are not those of its responses: give one for each token"
    if problem:
        raise UserError(f"{where} (prompt id {example.prompt_id}) {problem}")


def encode(example: Example) -> bytes:
    """Encodes an example as a record."""

    def pack(values: np.ndarray, dtype: np.dtype) -> bytes:
        return np.ascontiguousarray(values, dtype).tobytes()

    record: dict[str, Any] = {
        "prompt_id": int(example.prompt_id),
        "prompt": pack(example.prompt, _INTS),
        "responses": [pack(response, _INTS) for response in example.responses],
        "scores": pack(example.scores, _FLOATS),
    }
    for name in TOKEN_FIELDS:
        if (rows := getattr(example, name)) is not None:
            record[name] = [pack(row, _FLOATS) for row in rows]
    return msgpack.packb(record)


def decode(record: bytes) -> Example:
    """Decodes a record to its example."""
    content = msgpack.unpackb(record)
    return Example(
        prompt_id=content["prompt_id"],
        prompt=np.frombuffer(content["prompt"], _INTS),
        responses=tuple(np.frombuffer(response, _INTS) for response in content["responses"]),
        scores=np.frombuffer(content["scores"], _FLOATS),
        **{
            name: tuple(np.frombuffer(row, _FLOATS) for row in content[name])
            for name in TOKEN_FIELDS
            if name in content
        },
    )
