"""T5X from the checkout that `make t5x` names; without it these tests are skipped."""

import os

# This must come before any import of jax.
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib.util
import pathlib
import sys
import warnings

import pytest

TESTS = pathlib.Path(__file__).parents[1]
# Makes built_in importable.
sys.path.insert(0, str(TESTS / "data"))

NEEDED = ("t5x", "airio", "jestimator", "seqio", "fiddle")


@pytest.fixture(scope="session", autouse=True)
def t5x():
    """The t5x package; it imports TensorFlow."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {missing[0]} is installed: run make t5x T5X=CHECKOUT, with a checkout of google-research/t5x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("t5x")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """The folder of 48 pairs of the built-in posts."""
    from built_in import write_posts

    folder = tmp_path_factory.mktemp("t5x") / "pairs"
    write_posts(folder, 48)
    return folder
