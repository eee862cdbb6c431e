"""Small examples, and an independent notion of their equality."""

import pytest
from random_examples import make_random_examples

from alignment_gap.data.records import Example


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
    return make_random_examples


@pytest.fixture(scope="session")
def plain():
    return _plain
