"""Shapes in type hints. Only type checks, such as those in our tests, use them; losses run without jaxtyping."""

try:
    from jaxtyping import Array, Bool, Float, Int
except ImportError:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int

    from jax import Array

__all__ = ["Array", "Bool", "Float", "Int"]
