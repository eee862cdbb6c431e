"""Shapes in types. Only checks of types read them, as our tests do; losses run without jaxtyping."""

try:
    from jaxtyping import Array, Bool, Float, Int
except ImportError:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int

    from jax import Array

__all__ = ["Array", "Bool", "Float", "Int"]
