import pathlib
import sys

import jax
import pytest

# Tests import loss_oracles from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(autouse=True)
def strict_promotion():
    """No implicit change of dtype or rank anywhere in the losses."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
