"""The batch type that all sources yield and all update steps take."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignment_gap.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """B prompts with K responses each and a score for every response; K = 2 is a preference pair.

    Masks come from lengths, never from token ids, so an EOS that shares the padding's id is kept. The EOS that ends a
    response counts in its length and is scored like any other token.

    A packed row holds up to S prompts, one after another (*S = S). Each of its K rows of responses holds the responses
    to these prompts in the same order. Unused slots of a row have length 0. Only packed batches have the axis S.

    Attributes:
      prompt_ids: stable number of each prompt in its dataset; a sample's random key is derived from it.
      prompts: token ids, padded on the right.
      prompt_lengths: tokens of each prompt, at least one.
      responses: token ids, padded on the right.
      response_lengths: tokens of each response, including the EOS.
      scores: score of each response; higher is better. A score is either the probability that this response of the pair
        is preferred (1, 0, or 0.5 for a tie), or a reward, which is any number. The dataset's card says which.
      reference_log_probs: log-probs of every response token under the reference policy, in nats; 0 at padding.
      sampler_log_probs: log-probs of every response token under the distribution that it was drawn from, in nats; 0 at
        padding.
      fresh: fresh samples of the policy, from a second source; records do not store it.
      mismatched: the same prompts with the responses of other prompts; records do not store it.
    """

    prompt_ids: Int[Array, "B *S"]
    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B *S"]
    responses: Int[Array, "B K R"]
    response_lengths: Int[Array, "B *S K"]
    scores: Float[Array, "B *S K"]
    reference_log_probs: Float[Array, "B K R"] | None = None
    sampler_log_probs: Float[Array, "B K R"] | None = None
    fresh: PreferenceBatch | None = None
    mismatched: PreferenceBatch | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows have slots for several prompts."""
        return self.prompt_lengths.ndim == 2


def check_token_ids(place: str, network: str, vocabulary_size: int, *tokens: Any) -> None:
    """Raises UserError if a token id on the host is outside a network's vocabulary; the devices would take another one.

    `place` and `network` name the tokens and the network in the error.
    """
    largest = max(map(np.max, tokens))
    if largest >= vocabulary_size:
        raise UserError(
            f"{place} has the token id {largest}, but {network} has vocabulary_size={vocabulary_size}: use a larger "
            "one, or prepare the dataset with a vocabulary that fits"
        )


def length_mask(lengths: Int[Array, "*B"], size: int) -> Bool[Array, "*B size"]:
    """True at the first `lengths` of `size` positions."""
    return jnp.arange(size) < lengths[..., None]
