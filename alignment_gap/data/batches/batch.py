"""The one batch type that every source yields and every update step takes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """B prompts with K responses each and a score for every response; K = 2 is a preference pair.

    Lengths say what is real: padding is never told from a token id, so an EOS that shares the padding's id is kept.
    The EOS that ends a response counts into its length and is scored like any other token.

    A row may hold up to S prompts behind each other (*S = S), and in each of its K rows of responses the responses to
    them in the same order; the slots of a row that has fewer have length 0. Without packing there is no such axis.

    Attributes:
      prompt_ids: stable number of each prompt in its dataset; a sample's random key is derived from it.
      prompts: token ids, padded on the right.
      prompt_lengths: tokens of each prompt, at least one.
      responses: token ids, padded on the right.
      response_lengths: tokens of each response, EOS included.
      scores: the higher the better; for a pair the probability that this response is preferred (1, 0 or a tie's 0.5).
      reference_log_probs: log-probabilities in nats of every response token under the reference policy, or None
        where nothing needs them.
    """

    prompt_ids: Int[Array, "B *S"]
    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B *S"]
    responses: Int[Array, "B K R"]
    response_lengths: Int[Array, "B *S K"]
    scores: Float[Array, "B *S K"]
    reference_log_probs: Float[Array, "B K R"] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows have slots for several prompts."""
        return self.prompt_lengths.ndim == 2


def length_mask(lengths: Int[Array, "*B"], size: int) -> Bool[Array, "*B size"]:
    """True at the first `lengths` of `size` positions."""
    return jnp.arange(size) < lengths[..., None]
