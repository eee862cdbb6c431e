"""The online source: what it takes from prompts, state and labeller."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import make_batch

from alignment_gap.sampling import Samples, online_source
from alignment_gap.training import TrainState


def test_a_batch_is_prompts_samples_and_labels():
    """A generator that writes step and parameter into its samples, a labeller that counts a token."""
    prompts = {step: make_batch(4, seed=step) for step in range(2)}

    def generate(params, key, step, ids, prompts, lengths):
        responses = jnp.broadcast_to(jnp.stack([step, params, ids[0]]), (4, 2, 3)).at[:, 1, 0].set(9)
        return Samples(responses, jnp.full((4, 2), 3), jnp.zeros((4, 2, 3)), jnp.zeros((4, 2, 3)))

    def labeller(prompts, prompt_lengths, responses, lengths):
        return (responses == 9).sum(-1).astype(jnp.float32)

    source = online_source(prompts.__getitem__, generate, labeller, jax.random.key(0))
    for step in range(2):
        batch = source(step, TrainState(jnp.int32(step), jnp.int32(5), ()))
        first = int(prompts[step].prompt_ids[0])
        np.testing.assert_array_equal(batch.responses[2], [[step, 5, first], [9, 5, first]])
        np.testing.assert_array_equal(batch.scores, [[0, 1]] * 4)
        np.testing.assert_array_equal(batch.prompts, prompts[step].prompts)
        np.testing.assert_array_equal(batch.prompt_ids, prompts[step].prompt_ids)
        np.testing.assert_array_equal(batch.prompt_lengths, prompts[step].prompt_lengths)
        np.testing.assert_array_equal(batch.response_lengths, 3)
        assert batch.reference_log_probs is None
