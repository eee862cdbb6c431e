import pathlib
import sys

import jax
import pytest

# Makes loss_oracles importable from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(autouse=True)
def strict_promotion():
    """No loss may change a dtype or a rank implicitly."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
