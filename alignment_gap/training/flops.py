"""FLOPs of a traced program: 2 for each multiply-add of a matrix product, multiplied by the runs of its loops.

For attention, all positions count, masked or not, as in PaLM's MFU (2204.02311, appendix B). Norms, softmax, rotations
and embedding look-ups are less than 1 % of the rest and do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def count_flops(jaxpr: Any) -> int:
    """The FLOPs of one call, over all devices; the most expensive branch of a conditional counts.

    Args:
      jaxpr: the jaxpr of a function. It must not use fused attention kernels, whose products do not appear in it.
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
    """The jaxprs that an equation runs: a loop's body, branches, or a called function."""
    for value in equation.params.values():
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if hasattr(each, "eqns"))


def _most_runs(loop: Any) -> int:
    """The largest number of runs of a loop with a condition: the bound in the condition.

    A sampler's loop may stop earlier, when all samples have ended.
    """
    inputs = [each for equation in loop.params["cond_jaxpr"].eqns for each in equation.invars]
    bounds = [int(each.val) for each in inputs if hasattr(each, "val") and each.aval.dtype.kind == "i"]
    return max(bounds, default=1)
