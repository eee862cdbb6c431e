"""Small examples, and a comparison of examples that does not use our code."""

import pytest
from random_examples import make_random_examples
from random_examples import plain as plain_example


@pytest.fixture(scope="session")
def make_examples():
    return make_random_examples


@pytest.fixture(scope="session")
def plain():
    return plain_example
