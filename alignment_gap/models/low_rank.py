"""A kernel with a low-rank delta beside it (LoRA, 2106.09685): x W + (x a) b, for which W + a b is never formed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The kernel W + a b in three parts, in a policy's parameters in place of W; a stack of layers has a stack of them.

    Attributes:
      kernel: W [*inputs, *outputs]; the first leaf, whose shape flax compares with the layer's.
      a: [*inputs, r].
      b: [r, *outputs], with the scale of the delta in it.
      key: of the dropout of what `a` reads; None for none.
      dropout: the fraction that is zeroed where there is a key; the rest is scaled up.
    """

    kernel: Any
    a: Any
    b: Any
    key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def astype(self, dtype: Any) -> LowRank:
        """The same in another dtype."""
        kernel, a, b = (each.astype(dtype) for each in (self.kernel, self.a, self.b))
        return dataclasses.replace(self, kernel=kernel, a=a, b=b)

    def dropped(self, x: Array) -> Array:
        """The input of `a`."""
        if self.key is None:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))

    def merged(self) -> Array:
        """W + a b of a stack of layers, in W's dtype; the sum is float32."""
        inputs, outputs = "defg"[: self.a.ndim - 2], "xyz"[: self.b.ndim - 2]
        delta = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", self.a, self.b)
        return (self.kernel.astype(jnp.float32) + delta).astype(self.kernel.dtype)


def merged(params: Any) -> Any:
    """Parameters with plain kernels: of every low-rank delta the sum with its kernel."""
    return jax.tree.map(lambda leaf: leaf.merged() if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)


def is_low_rank(leaf: Any) -> bool:
    """Whether a node of parameters is a kernel with a delta."""
    return isinstance(leaf, LowRank)
