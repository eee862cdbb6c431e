"""A kernel with a low-rank delta (LoRA, 2106.09685): x W + (x a) b, computed without forming W + a b."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignment_gap.models.quantized import is_quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The kernel W + a b in three parts; it replaces W in a policy's parameters. A stack of layers stacks each part.

    Attributes:
      kernel: W [*inputs, *outputs]. It comes first, because flax compares the first leaf's shape with the layer's.
      a: [*inputs, r].
      b: [r, *outputs], already multiplied by the delta's scale.
      key: key of the dropout on the input of `a`; None for no dropout.
      dropout: fraction of the input to set to zero if there is a key; the rest is scaled up.
    """

    kernel: Any
    a: Any
    b: Any
    key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def astype(self, dtype: Any) -> LowRank:
        """All parts in another dtype."""
        kernel, a, b = (each.astype(dtype) for each in (self.kernel, self.a, self.b))
        return dataclasses.replace(self, kernel=kernel, a=a, b=b)

    def dropped(self, x: Array) -> Array:
        """x with dropout, the input of `a`."""
        if self.key is None:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))

    def merged(self) -> Array:
        """W + a b of a stack of layers, in W's dtype; summed in float32."""
        inputs, outputs = "defg"[: self.a.ndim - 2], "xyz"[: self.b.ndim - 2]
        delta = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", self.a, self.b)
        return (self.kernel.astype(jnp.float32) + delta).astype(self.kernel.dtype)


def merged(params: Any) -> Any:
    """Parameters in which every low-rank delta is added to its kernel, except to kernels in int8, which stay so."""

    def whole(leaf: Any) -> Any:
        return leaf.merged() if is_low_rank(leaf) and not is_quantized(leaf.kernel) else leaf

    return jax.tree.map(whole, params, is_leaf=is_low_rank)


def is_low_rank(leaf: Any) -> bool:
    """Whether a node of parameters is a kernel with a delta."""
    return isinstance(leaf, LowRank)
