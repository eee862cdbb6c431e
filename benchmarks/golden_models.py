"""Asks what a golden model of HH needs to agree with people as often as a regression on n-grams does.

alignment-gap study --config=configs/study/hh.py --workdir=runs/hh ... --job=seed0-sft
python benchmarks/golden_models.py --data=runs/hh/jobs/seed0-data-* --start=runs/hh/jobs/seed0-sft-* --workdir=margins

Each network starts from the SFT policy and is a Bradley-Terry model. It trains on all training pairs but the last
3,600, and predicts these and the validation pairs. Its margins are kept in the workdir, and a network whose margins are
there is not trained again. One takes 6 to 17 minutes on one core. docs/results/README.md has the table.
"""

from alignment_gap import freed_memory

freed_memory.keep_on_cpu()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from alignment_gap.data.records import Example, open_dataset  # noqa: E402
from alignment_gap.jobs import baselines  # noqa: E402
from alignment_gap.models.policy import Policy, response_hidden  # noqa: E402
from alignment_gap.sharding import MeshConfig, make_mesh  # noqa: E402
from alignment_gap.training import load_policy  # noqa: E402

HELD_OUT, PROMPT, BATCH, WARMUP = 3600, 64, 64, 50
# Padded lengths of responses, and the token that replaces one that is left out.
LENGTHS, UNKNOWN = (24, 48, 98), 2
# Weights of hashed bigrams.
BUCKETS = 2**18


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network to train.

    Attributes:
      name: its name in the table.
      seed: seed of the order of the pairs and of the head.
      steps: gradient steps of 64 pairs.
      learning_rate: at the end of the warm-up; it falls linearly to 0.
      reads_all: whether the reward reads the sum of the states after all tokens too, not only the last state.
      dropout: fraction of the head's inputs that is set to zero.
      left_out: fraction of the response's tokens that the network does not see.
      has_bigrams: whether every token and bigram has a weight of its own in the reward.
      average: weight of the past in the average of the parameters, which is what predicts.
    """

    name: str
    seed: int = 0
    steps: int = 450
    learning_rate: float = 5e-4
    reads_all: bool = False
    dropout: float = 0.0
    left_out: float = 0.0
    has_bigrams: bool = False
    average: float = 0.98


REGULARISED = Variant("regularised", steps=600, reads_all=True, dropout=0.3, left_out=0.1)
VARIANTS = (
    Variant("as in the study"),
    Variant("as in the study, another order", seed=1),
    dataclasses.replace(REGULARISED, steps=750),
    dataclasses.replace(REGULARISED, name="regularised, another order", seed=1),
    dataclasses.replace(REGULARISED, name="regularised, a third order", seed=2),
    dataclasses.replace(
        REGULARISED, name="more regularised", steps=1200, learning_rate=1e-3, dropout=0.5, left_out=0.25, average=0.99
    ),
    Variant("with bigrams", has_bigrams=True),
    dataclasses.replace(REGULARISED, name="regularised, with bigrams", has_bigrams=True),
)
NGRAMS = "n-grams"
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    """Trains what is not kept, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    train, validation = (
        [each for each in open_dataset(options.data / split)[:] if each.scores[0] != each.scores[1]]
        for split in ("train", "validation")
    )
    pairs, held_out = train[:-HELD_OUT], train[-HELD_OUT:] + validation
    margins = {NGRAMS: kept(options.workdir, NGRAMS, lambda: ngram_margins(pairs, held_out))}
    policy, params = load_policy(options.start, make_mesh(MeshConfig()))
    for variant in VARIANTS:
        train_and_predict = functools.partial(margins_of, variant, policy, params, arrays(pairs), arrays(held_out))
        margins[variant.name] = kept(options.workdir, variant.name, train_and_predict)
    ensemble = [variant.name for variant in VARIANTS[:5]]
    margins["the first five"] = mean_of(margins, ensemble)
    margins["the first five and n-grams"] = mean_of(margins, [*ensemble, NGRAMS])
    print(f"{len(pairs):,} pairs to train on, {len(held_out):,} to predict\n")
    print(
        "| what predicts the pairs | agrees with people | minus n-grams | standard error |\n| --- | --- | --- | --- |"
    )
    for name, each in margins.items():
        gap = (each > 0) - (margins[NGRAMS] > 0).astype(float)
        error = gap.std() / len(gap) ** 0.5
        print(f"| {name} | {(each > 0).mean():.2%} | {100 * gap.mean():+.2f} points | {100 * error:.2f} |")


def kept(workdir: Path, name: str, make: Any) -> np.ndarray:
    """The margins of this name from the workdir; made and kept there if they are missing."""
    path = workdir / f"{name}.npy"
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def mean_of(margins: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """The mean of several predictors' margins, each in units of its own spread on the first held-out pairs."""
    return sum(margins[name] / margins[name][:HELD_OUT].std() for name in names) / len(names)


def ngram_margins(pairs: Sequence[Example], held_out: Sequence[Example]) -> np.ndarray:
    """The margins of the study's regression on n-grams."""
    columns = baselines._ngrams_of_several(pairs)
    known, asked = (baselines._differences(each, columns) for each in (pairs, held_out))
    return asked @ baselines._fitted(known, 3e-3)


def arrays(examples: Sequence[Example]) -> Pairs:
    """Padded prompts and responses with their lengths; the preferred response comes first."""
    count = len(examples)
    prompts, prompt_lengths = np.zeros((count, PROMPT), np.int32), np.zeros(count, np.int32)
    responses, lengths = np.zeros((count, 2, LENGTHS[-1]), np.int32), np.zeros((count, 2), np.int32)
    for row, example in enumerate(examples):
        prompt = example.prompt[-PROMPT:]
        prompts[row, : len(prompt)], prompt_lengths[row] = prompt, len(prompt)
        for side, response in enumerate(example.responses[:: 1 if example.scores[0] > example.scores[1] else -1]):
            responses[row, side, : len(response)], lengths[row, side] = response, len(response)
    return prompts, prompt_lengths, responses, lengths


def margins_of(variant: Variant, policy: Policy, params: Any, train: Pairs, held_out: Pairs) -> np.ndarray:
    """Trains a network, and returns its reward of the preferred response minus that of the other."""
    width = policy.config.width
    kernel = np.random.default_rng(variant.seed).normal(size=width) * width**-0.5 * 0.3
    head = {"kernel": jnp.asarray(kernel, jnp.float32)}
    if variant.has_bigrams:
        head |= {"bigrams": jnp.zeros(BUCKETS), "tokens": jnp.zeros(policy.config.vocabulary_size)}
    state = {"network": params, "head": head}
    optimizer = optimizer_of(variant, state)

    def loss(state: Any, key: Any, pairs: Pairs) -> Any:
        both = rewards(variant, policy, state, key, *pairs)
        return -jnp.mean(jax.nn.log_sigmoid(both[:, 0] - both[:, 1]))

    @jax.jit
    def update(state: Any, moments: Any, average: Any, key: Any, pairs: Pairs) -> Any:
        changes, moments = optimizer.update(jax.grad(loss)(state, key, pairs), moments, state)
        state = optax.apply_updates(state, changes)
        weight = variant.average
        return state, moments, jax.tree.map(lambda old, new: weight * old + (1 - weight) * new, average, state)

    moments, average = optimizer.init(state), state
    for step, rows in zip(range(variant.steps), orders(train[3], variant.seed), strict=False):
        key = jax.random.key(step + 1000 * variant.seed)
        state, moments, average = update(state, moments, average, key, picked(train, rows))
    predict = jax.jit(functools.partial(rewards, variant, policy))
    order, margins = np.argsort(held_out[3].max(1)), np.zeros(len(held_out[0]))
    for first in range(0, len(order), 4 * BATCH):
        rows = order[first : first + 4 * BATCH]
        filled = np.resize(rows, 4 * BATCH)  # One shape of batches, so that fewer are compiled.
        both = np.asarray(predict(average, None, *picked(held_out, filled)))
        margins[rows] = (both[:, 0] - both[:, 1])[: len(rows)]
    return margins


def optimizer_of(variant: Variant, state: Any) -> optax.GradientTransformation:
    """AdamW with a warm-up, then a linear fall; weights of tokens and bigrams learn ten times as fast."""
    parts = [optax.linear_schedule(0, 1, WARMUP), optax.linear_schedule(1, 0, variant.steps - WARMUP)]
    schedule = optax.join_schedules(parts, [WARMUP])

    def rate(path: Any, _: Any) -> float:
        return variant.learning_rate * (10 if path[-1] in map(jax.tree_util.DictKey, ("bigrams", "tokens")) else 1)

    rates = jax.tree.map_with_path(rate, state)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(lambda step: -schedule(step)),
        optax.stateless(lambda changes, _: jax.tree.map(jnp.multiply, changes, rates)),
    )


def orders(lengths: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The rows of each batch, epoch after epoch; a batch has responses of like lengths."""
    for epoch in range(1000):
        random = np.random.default_rng((seed, epoch))
        shuffled, batches = random.permutation(len(lengths)), list[np.ndarray]()
        for first in range(0, len(lengths), 8 * BATCH):
            chunk = shuffled[first : first + 8 * BATCH]
            chunk = chunk[np.argsort(lengths[chunk].max(1))]
            batches += [chunk[i : i + BATCH] for i in range(0, len(chunk) - BATCH + 1, BATCH)]
        for place in random.permutation(len(batches)):
            yield batches[place]


def picked(pairs: Pairs, rows: np.ndarray) -> Pairs:
    """Some rows, in the shortest padded length that holds them."""
    prompts, prompt_lengths, responses, lengths = (each[rows] for each in pairs)
    size = next(size for size in LENGTHS if lengths.max() <= size)
    return prompts, prompt_lengths, responses[:, :, :size], lengths


def rewards(
    variant: Variant,
    policy: Policy,
    state: Any,
    key: Any,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    responses: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """The rewards [B, 2] of the responses; tokens and inputs of the head are left out only if there is a key."""
    if key is not None and variant.left_out:
        of_tokens, key = jax.random.split(key)
        is_left_out = jax.random.bernoulli(of_tokens, variant.left_out, responses.shape) & (responses > 3)
        responses = jnp.where(is_left_out, UNKNOWN, responses)
    # The state after the last token predicts one token more.
    slots = jnp.pad(responses, ((0, 0), (0, 0), (0, 1)))
    hidden = response_hidden(policy, state["network"], prompts, prompt_lengths, slots).astype(jnp.float32)
    read = jnp.take_along_axis(hidden, lengths[..., None, None], axis=2)[:, :, 0]
    if variant.reads_all:
        place = jnp.arange(slots.shape[-1])
        is_token = (place >= 1) & (place <= lengths[..., None])
        read = jnp.sum(hidden * is_token[..., None], 2) / 20.0 + read
    if key is not None and variant.dropout:
        kept = 1 - variant.dropout
        read = jnp.where(jax.random.bernoulli(key, kept, read.shape), read / kept, 0)
    found = read @ state["head"]["kernel"]
    if not variant.has_bigrams:
        return found
    before = jnp.pad(responses[..., :-1], ((0, 0), (0, 0), (1, 0)))
    each = state["head"]["bigrams"][bucket(before, responses)] + state["head"]["tokens"][responses]
    return found + jnp.sum(each * (jnp.arange(responses.shape[-1]) < lengths[..., None]), -1)


def bucket(first: jax.Array, second: jax.Array) -> jax.Array:
    """The weight of a bigram, by a hash."""
    mixed = first.astype(jnp.uint32) * jnp.uint32(2654435761) + second.astype(jnp.uint32) * jnp.uint32(40503)
    mixed += jnp.uint32(12345)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return (mixed ^ (mixed >> 13)) % jnp.uint32(BUCKETS)


if __name__ == "__main__":
    main()
