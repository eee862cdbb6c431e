"""FLOPs of a program as jax traces it: 2 for each multiply-add of a matrix product, as often as loops run it.

Attention counts all positions that a query is multiplied with, masked or not, as in PaLM's MFU (2204.02311, appendix
B). Norms, softmax, rotations and the look-up of embeddings are less than a hundredth of the rest and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def count_flops(jaxpr: Any) -> int:
    """The FLOPs of one call, over all devices; of branches the dearest one counts.

    Args:
      jaxpr: of a function without fused attention kernels, whose products are not in it.
    """
    return sum(_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops(equation: Any) -> int:
    name, inner = equation.primitive.name, [count_flops(each) for each in _jaxprs(equation)]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left, result = equation.invars[0].aval, equation.outvars[0].aval
        return 2 * result.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "cond":
        return max(inner)
    if name == "scan":
        return int(equation.params["length"]) * sum(inner)
    return (_most_runs(equation) if name == "while" else 1) * sum(inner)


def _jaxprs(equation: Any) -> Iterator[Any]:
    """What an equation runs: the body of a loop, branches, a function that is called."""
    for value in equation.params.values():
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if hasattr(each, "eqns"))


def _most_runs(loop: Any) -> int:
    """How often a loop with a condition runs at most: the bound that its condition compares with.

    A sampler's loop may stop sooner, where all samples have ended.
    """
    inputs = [each for equation in loop.params["cond_jaxpr"].eqns for each in equation.invars]
    bounds = [int(each.val) for each in inputs if hasattr(each, "val") and each.aval.dtype.kind == "i"]
    return max(bounds, default=1)
