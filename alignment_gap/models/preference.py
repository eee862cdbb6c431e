"""Preference models: a policy reads a prompt with two responses, and answers which response is better.

The judge is an ordinary policy, with the same sizes, checkpoints and sharding. Its context is the prompt, both
responses and a question; its answer is the log-odds of two label tokens, as in text-to-text preference models. So the
parameters of an SFT policy initialise it unchanged, and both orders of the responses share the prompt's computation.
A Bradley-Terry model may have a head of its own instead, as reward models of transformers have.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models import reward_head
from alignment_gap.models.policy import Policy, response_hidden
from alignment_gap.models.ragged import column, join
from alignment_gap.models.reward_head import RewardHead

KINDS = ("pairwise", "bradley_terry")


class Markers(NamedTuple):
    """Reserved token ids that no text contains: the markers of the responses, the question, and the two answers."""

    first: int
    second: int
    question: int
    first_better: int
    second_better: int


@dataclasses.dataclass(frozen=True)
class PreferenceModel:
    """P(first response is better | prompt, both responses).

    Attributes:
      policy: the network.
      markers: reserved token ids; None if the model has a head.
      kind: "pairwise" reads both responses in one context; "bradley_terry" reads one at a time and compares rewards.
      head: how a Bradley-Terry model with a head of its own reads a response; None if two label tokens answer.
    """

    policy: Policy
    markers: Markers | None
    kind: str = "pairwise"
    head: RewardHead | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an unknown kind, or for a pairwise model with a head."""
        if self.kind not in KINDS:
            raise UserError(f"preference model kind {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.head is not None and self.kind != "bradley_terry":
            raise UserError(f"preference model kind is {self.kind!r}: a reward head needs bradley_terry")

    def log_odds(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        responses: Int[Array, "B 2 R"],
        response_lengths: Int[Array, "B 2"],
    ) -> Float[Array, "B"]:
        """log r / (1 - r) where r is the probability that responses[:, 0] is better; float32.

        A pairwise model's answer depends on the order of the responses; `preferences` is free of that bias.
        """
        batch = (params, prompts, prompt_lengths, responses, response_lengths)
        if self.kind == "bradley_terry":
            rewards = self._answers(*batch, rows=((0,), (1,)))
            return rewards[:, 0] - rewards[:, 1]
        return self._answers(*batch, rows=((0, 1),))[:, 0]

    def preferences(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        responses: Int[Array, "B 2 R"],
        response_lengths: Int[Array, "B 2"],
        *,
        soft: bool = False,
    ) -> Float[Array, "B"]:
        """The preference for the first response; it does not depend on which response the model reads first.

        Hard, by the sign rule: 1 if r(x, y1, y2) > r(x, y2, y1), 0 if smaller, 0.5 if equal (2405.08448).
        Soft: the mean of r(x, y1, y2) and 1 - r(x, y2, y1).
        """
        batch = (params, prompts, prompt_lengths, responses, response_lengths)
        if self.kind == "bradley_terry":
            rewards = self._answers(*batch, rows=((0,), (1,)))
            margin = rewards[:, 0] - rewards[:, 1]
            return jax.nn.sigmoid(margin) if soft else (jnp.sign(margin) + 1) / 2
        answers = self._answers(*batch, rows=((0, 1), (1, 0)))
        if soft:
            return (jax.nn.sigmoid(answers[:, 0]) + jax.nn.sigmoid(-answers[:, 1])) / 2
        return (jnp.sign(answers[:, 0] - answers[:, 1]) + 1) / 2

    def scores(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        responses: Int[Array, "B K R"],
        response_lengths: Int[Array, "B K"],
        *,
        labels: str = "hard",
    ) -> Float[Array, "B K"]:
        """Each response's mean preference over the K - 1 other responses to its prompt, or its reward.

        Args:
          params: parameters of the policy, and of the head if there is one.
          prompts, prompt_lengths, responses, response_lengths: a batch.
          labels: "hard" or "soft" preferences (a pair scores p and 1 - p), or "rewards" of a Bradley-Terry model.
        """
        samples = responses.shape[1]
        if labels == "rewards":
            batch = (params, prompts, prompt_lengths, responses, response_lengths)
            return self._answers(*batch, rows=tuple((i,) for i in range(samples)))
        if samples < 2:
            raise UserError(f"{samples} response a prompt: a preference needs 2 or more")
        scores = jnp.zeros(response_lengths.shape, jnp.float32)
        for i, j in itertools.combinations(range(samples), 2):
            pair = jnp.array([i, j])
            two = (responses[:, pair], response_lengths[:, pair])
            won = self.preferences(params, prompts, prompt_lengths, *two, soft=labels == "soft")
            scores = scores.at[:, i].add(won).at[:, j].add(1 - won)
        return scores / (samples - 1)

    def _answers(
        self,
        params: Any,
        prompts: Array,
        prompt_lengths: Array,
        responses: Array,
        response_lengths: Array,
        *,
        rows: tuple[tuple[int, ...], ...],
    ) -> Float[Array, "B rows"]:
        """Log-odds of "the first is better" for each row; a row lists the responses in one context, in order.

        The policy treats the rows as responses, so they share the prompt's computation. With a head, each row has one
        response, and its answer is the head's reward.
        """
        if self.head is not None:
            order = jnp.array([i for (i,) in rows])
            picked = (responses[:, order], response_lengths[:, order])
            return reward_head.rewards(self.policy, self.head, params, prompts, prompt_lengths, *picked)
        assert self.markers is not None
        contexts = [self._context(responses, response_lengths, row) for row in rows]
        text, lengths = (jnp.stack(part, axis=1) for part in zip(*contexts, strict=True))
        hidden = response_hidden(self.policy, params, prompts, prompt_lengths, text)
        answer = jnp.take_along_axis(hidden, lengths[..., None, None], axis=2)[:, :, 0].astype(jnp.float32)
        output = self.policy.output(params)
        labels = output.embedding[jnp.array([self.markers.first_better, self.markers.second_better])]
        logits = output._replace(embedding=labels).logits(answer)
        return logits[..., 0] - logits[..., 1]

    def _context(
        self, responses: Array, response_lengths: Array, row: tuple[int, ...]
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Each response after its marker, then the question and a slot for the answer; also the answer's index."""
        assert self.markers is not None
        mark = partial(column, rows=len(responses), dtype=responses.dtype)
        parts = []
        for marker, i in zip((self.markers.first, self.markers.second), row, strict=False):
            # A marker inside a response would start a second response.
            text = jnp.where(jnp.isin(responses[:, i], jnp.array(self.markers)), 0, responses[:, i])
            parts += [mark(marker), (text, response_lengths[:, i])]
        room = (jnp.zeros((len(responses), 1), responses.dtype), jnp.zeros_like(response_lengths[:, 0]))
        return join([*parts, mark(self.markers.question), room])


def pair_loss(log_odds: Float[Array, "B"], preference: Float[Array, "B"]) -> Float[Array, "B"]:
    """Cross-entropy in nats between the preference, P(first response is better), and the model's answer."""
    return -(preference * jax.nn.log_sigmoid(log_odds) + (1 - preference) * jax.nn.log_sigmoid(-log_odds))
