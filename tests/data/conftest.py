"""Small examples, and an independent notion of their equality."""

import numpy as np
import pytest

from alignment_gap.data import Example


def _make_examples(count: int, *, responses: int = 2, seed: int = 0, with_reference: bool = False) -> list[Example]:
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


def _plain(example: Example) -> tuple:
    """The content as Python numbers, which compare exactly."""
    reference = example.reference_log_probs
    return (
        int(example.prompt_id),
        example.prompt.tolist(),
        [response.tolist() for response in example.responses],
        example.scores.tolist(),
        None if reference is None else [row.tolist() for row in reference],
    )


@pytest.fixture(scope="session")
def make_examples():
    return _make_examples


@pytest.fixture(scope="session")
def plain():
    return _plain
