"""What a CPU saves by leaving out prompts whose responses have all ended, with the lengths of recorded responses.

    python benchmarks/ended_rows.py --dataset=runs/prepared/train --size=mini --repeats=5

Each call draws K responses for each of `--batch` prompts with the sampler of the package. Their lengths are those of
responses in the dataset, drawn at random: the policy's distribution is replaced by one that ends there. `halvings` is
how often the loop over tokens may halve its prompts; 0 is one loop to the longest response. Each repeat runs all three
in turn, on the same lengths. `time` is the median over the repeats of the time as a ratio to 0 halvings, with the
smallest and the largest. `rows` is the number of rows computed, as a ratio to the tokens drawn. `compiled` is the time
to trace and compile, in seconds. Responses and log-probs of the three are compared bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from update_step import SIZES

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.lengths import lengths_of
from alignment_gap.errors import UserError
from alignment_gap.models import Policy, abstract_parameters, make_policy
from alignment_gap.sampling import SamplerConfig, sample_keys, sampler
from alignment_gap.sharding import unbox

HALVINGS = (0, 1, 2)
PROMPT, END = 128, 1


class Ending(NamedTuple):
    """Logits [B, K, V] from hidden states with one more number, which says whether the response ends here."""

    output: Any

    def logits(self, hidden: Float[Array, "B K D+1"]) -> Float[Array, "B K V"]:
        """All probability is on the end token where a response ends, and none elsewhere."""
        logits, ends = self.output.logits(hidden[..., :-1]), hidden[..., -1:] > 0
        at_end = jnp.arange(logits.shape[-1]) == END
        return jnp.where(at_end == ends, logits, -jnp.inf)


class OfLengths:
    """A policy whose responses have given lengths [B, K]."""

    def __init__(self, policy: Policy, lengths: Int[Array, "B K"]) -> None:
        self.policy, self.lengths = policy, lengths

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def prefill(self, *args: Any) -> Any:
        """The policy's cache with the lengths, which belong to the prompts as the masks do."""
        return {**self.policy.prefill(*args), "lengths": self.lengths}

    def decode_step(self, params: Any, cache: Any, step: Array, tokens: Array, places: int) -> tuple[Array, Any]:
        """The policy's hidden states, and for each row whether the token at `step` is its last."""
        lengths, cache = cache["lengths"], {name: part for name, part in cache.items() if name != "lengths"}
        hidden, cache = self.policy.decode_step(params, cache, step, tokens, places)
        ends = (step + 1 >= lengths)[..., None].astype(hidden.dtype)
        return jnp.concatenate([hidden, ends], axis=-1), {**cache, "lengths": lengths}

    def output(self, params: Any) -> Ending:
        """The policy's output embedding."""
        return Ending(self.policy.output(params))


def compiled(policy: Policy, halvings: int, batch: int, samples: int, longest: int) -> Any:
    """The sampler `(params, prompts, lengths, key) -> Samples` with at most so many halvings."""
    sampler._HALVINGS = halvings

    def draw(params: Any, prompts: Array, lengths: Array, key: Array) -> sampler.Samples:
        keys = sample_keys(key, jnp.int32(0), jnp.arange(batch), samples)
        full = jnp.full(batch, PROMPT)
        settings: dict[str, Any] = {"max_length": longest, "eos_id": END, "config": SamplerConfig()}
        return sampler.sample(OfLengths(policy, lengths), params, prompts, full, keys, **settings)  # type: ignore[arg-type]

    integers = jax.ShapeDtypeStruct((batch, PROMPT), jnp.int32), jax.ShapeDtypeStruct((batch, samples), jnp.int32)
    return jax.jit(draw).lower(unbox(abstract_parameters(policy.init)), *integers, jax.random.key(0)).compile()


def rows(lengths: np.ndarray, halvings: int) -> int:
    """The number of rows that the loops compute for these lengths [B, K]."""
    left, each = np.array([(lengths.max(-1) > t).sum() for t in range(lengths.max())]), lengths.shape[1]
    sizes = [len(lengths) // 2**n for n in range(halvings + 1)]
    return sum(min(size for size in sizes if size >= prompts) * each for prompts in left)


def main() -> None:
    """Prints a row for each number of samples and of halvings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a prepared dataset")
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--policy", choices=("t5", "decoder"), default="t5")
    parser.add_argument("--batch", type=int, default=32, help="prompts")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    try:
        recorded = lengths_of(open_dataset(options.dataset))[:, 1:].flatten()
    except UserError as error:
        parser.error(str(error))
    policy = make_policy(SIZES[options.size][options.policy])
    params = unbox(jax.jit(policy.init)(jax.random.key(0)))
    prompts = jax.random.randint(jax.random.key(1), (options.batch, PROMPT), 3, policy.config.vocabulary_size)
    rng = np.random.default_rng(0)
    print(f"{len(recorded):,} responses: {recorded.mean():.1f} tokens on average, {recorded.max()} at most\n")
    columns = ("samples", "halvings", "time", "smallest", "largest", "rows", "compiled", "bits")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for samples in options.samples:
        draws, compiling = [], []
        for n in HALVINGS:
            start = time.perf_counter()
            draws.append(compiled(policy, n, options.batch, samples, int(recorded.max())))
            compiling.append(time.perf_counter() - start)
        seconds, computed, same = np.zeros((options.repeats, 3)), np.zeros(3), np.ones(3, bool)
        tokens = 0
        for repeat in range(options.repeats + 1):  # The first one warms up.
            lengths = rng.choice(recorded, (options.batch, samples)).astype(np.int32)
            found = []
            for number, draw in enumerate(draws):
                start = time.perf_counter()
                found.append(jax.block_until_ready(draw(params, prompts, lengths, jax.random.key(repeat))))
                if repeat:
                    seconds[repeat - 1, number] = time.perf_counter() - start
                    computed[number] += rows(lengths, HALVINGS[number])
            tokens += lengths.sum() if repeat else 0
            np.testing.assert_array_equal(found[0].lengths, lengths)
            same &= [jax.tree.all(jax.tree.map(np.array_equal, each, found[0])) for each in found]
        for number, n in enumerate(HALVINGS):
            ratios = seconds[:, number] / seconds[:, 0]
            cells = statistics.median(ratios), ratios.min(), ratios.max(), computed[number] / tokens
            bits = "same" if same[number] else "differ"
            numbers = " | ".join(f"{x:.2f}" for x in cells)
            print(f"| {samples} | {n} | {numbers} | {compiling[number]:.1f} | {bits} |")


if __name__ == "__main__":
    main()
