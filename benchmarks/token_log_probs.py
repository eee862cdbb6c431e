"""Time and peak temporary memory of `token_log_probs`, value and gradient, compared with the plain form.

    python benchmarks/token_log_probs.py --tokens 8192 --vocabulary 32128 --width 1024 --dtype float32

Both are timed in turn in one run, because on a busy machine their ratio is more reliable than a single time. The table
has the best wall time of each and, on a CPU, the processor time over all threads, which is disturbed less. The floor is
the time of the three products that every form computes (the logits, and the gradients of both factors) at the rate that
the same run measures for the product of the logits alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignment_gap import losses


def plain(hidden: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
    """All logits at once."""
    logits = jnp.matmul(hidden, embedding.T, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def value_and_gradients(form: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The log-probs, and the gradients of their weighted sum."""

    def run(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        log_probs, pullback = jax.vjp(lambda hidden, embedding: form(hidden, embedding, targets), hidden, embedding)
        return log_probs, pullback(weights)

    return run


def seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - wall, time.process_time() - processor


def compiled_forms(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Both forms and the product alone, compiled for these arguments."""
    forms = {
        "plain": value_and_gradients(plain),
        "blocked": value_and_gradients(losses.token_log_probs),
        "product": lambda hidden, embedding, targets, weights: jnp.matmul(
            hidden, embedding.T, preferred_element_type=jnp.float32
        ),
    }
    return {name: jax.jit(form).lower(*arguments).compile() for name, form in forms.items()}


def main() -> None:
    """Prints one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (options.tokens, options.width), options.dtype)
    embedding = jax.random.normal(keys[1], (options.vocabulary, options.width), options.dtype) / options.width**0.5
    targets = jax.random.randint(keys[2], (options.tokens,), 0, options.vocabulary)
    arguments = (hidden, embedding.astype(options.dtype), targets, jax.random.normal(keys[3], (options.tokens,)))

    forms = compiled_forms(arguments)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(options.repeats + 1):
        for name, form in forms.items():
            times[name].append(seconds(form, arguments))
    # The first call of each warms up.
    wall, processor = ({name: min(each[i] for each in calls[1:]) for name, calls in times.items()} for i in (0, 1))
    memory = {name: form.memory_analysis().temp_size_in_bytes / 2**20 for name, form in forms.items()}

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, best of {options.repeats}")
    print(f"{options.tokens} tokens x {options.vocabulary} vocabulary x width {options.width}, {options.dtype}\n")
    print("| form | seconds | of plain | processor seconds | of plain | of the floor | peak temporary MiB | of plain |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("plain", "blocked"):
        print(
            f"| {name} | {wall[name]:.3f} | {wall[name] / wall['plain']:.2f} "
            f"| {processor[name]:.3f} | {processor[name] / processor['plain']:.2f} "
            f"| {wall[name] / (3 * wall['product']):.2f} "
            f"| {memory[name]:.0f} | 1/{memory['plain'] / max(memory[name], 1e-9):.1f} |"
        )


if __name__ == "__main__":
    main()
