"""The online source: what it takes from prompts, state and labeller, and that it resumes at every step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from random_examples import make_random_examples
from resumption import assert_equal_output_after_restore
from tiny_models import make_batch, random_params

from alignment_gap.data.batches import offline_source
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.sampling import SamplerConfig, Samples, make_generate, online_source
from alignment_gap.sharding import put_batch, replicated
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


def test_resumes_at_every_step(even_policy, mesh, tmp_path):
    """Shuffled prompts over more than two epochs, and samples of parameters that differ at every step."""
    examples = [dataclasses.replace(e, prompt=e.prompt % 16) for e in make_random_examples(10)]
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    generate = make_generate(even_policy, mesh, samples=2, max_length=4, eos_id=1, config=SamplerConfig())
    params = random_params(even_policy)
    run_key = jax.device_put(jax.random.key(7), replicated(mesh))

    def state(step):
        changed = jax.tree.map(lambda leaf: leaf * (1 + 0.1 * step), params)
        return jax.device_put(TrainState(jnp.int32(step), changed, ()), replicated(mesh))

    def make_source():
        prompts = offline_source(open_dataset(tmp_path), batch_size=8, seed=3, prompt_length=9, response_length=5)
        source = online_source(
            lambda step: put_batch(prompts(step), mesh, 8),
            generate,
            lambda prompts, prompt_lengths, responses, lengths: (responses % 3).sum(-1).astype(jnp.float32),
            run_key,
        )
        return lambda step: source(step, state(step))

    through = assert_equal_output_after_restore(make_source, 4)
    # A prompt comes again with other samples, so that a step's batch is not another's by chance.
    for pair in itertools.pairwise(through):
        of, again = (dict(zip(b.prompt_ids.tolist(), b.responses, strict=True)) for b in pair)
        common = of.keys() & again.keys()
        assert common and any((of[i] != again[i]).any() for i in common)
