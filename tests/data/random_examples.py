"""Small examples, for the tests of data and of what reads it."""

import numpy as np

from alignment_gap.data.records import Example


def make_random_examples(
    count: int, *, responses: int = 2, seed: int = 0, with_reference: bool = False
) -> list[Example]:
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, 100, rng.integers(1, longest + 1)).astype(np.int32)

    examples = []
    for number in range(count):
        answers = tuple(tokens(5) for _ in range(responses))
        reference = tuple(-rng.random(len(a)).astype(np.float32) for a in answers) if with_reference else None
        scores = rng.random(responses).astype(np.float32)
        examples.append(Example(1000 + number, tokens(9), answers, scores, reference))
    return examples
