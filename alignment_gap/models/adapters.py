"""Low-rank adapters of a policy (LoRA, 2106.09685): training changes the adapters and leaves the parameters unchanged.

Adapters are a tree of their own. A kernel's adapter {"a": ..., "b": ...} has the same path in this tree as the kernel
has in the parameters. `Adapters.on` joins both trees without a copy; a policy takes the result like any parameters.
The adapters of a reward model come with its head, which is trained whole, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.models.low_rank import LowRank
from alignment_gap.models.policy import HEAD, Policy, abstract_parameters, compute_params
from alignment_gap.models.quantized import INT8, Quantized, quantize, rounded
from alignment_gap.models.reward_head import RewardHead, init_head, replace_output
from alignment_gap.sharding import constrain, is_box, unbox

ATTENTION, MLP = ("query", "key", "value", "out"), ("wi_0", "wi_1", "wi", "wo")
# Names for groups of projections, and PEFT's names of single projections, for decoders, T5 and GPT-NeoX.
GROUPS = {
    "attention": ATTENTION,
    "mlp": MLP,
    "all-linear": (*ATTENTION, *MLP),
    "query_key_value": ATTENTION[:3],
}
ALIASES = {
    **dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), ATTENTION, strict=True)),
    **dict(zip(("q", "k", "v", "o"), ATTENTION, strict=True)),
    "gate_proj": "wi_0",
    "up_proj": "wi_1",
    "down_proj": "wo",
    "dense": "out",
    "dense_h_to_4h": "wi",
    "dense_4h_to_h": "wo",
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank deltas (alpha / rank) a b on the kernels of named projections (2106.09685).

    Attributes:
      rank: columns of a and rows of b; None for no adapters: then all parameters are trained.
      alpha: the deltas are multiplied by alpha / rank.
      targets: projections that get an adapter, in every layer: a group ("attention", "mlp", "all-linear"), or one
        projection by its name here ("query") or in PEFT ("q_proj"). The name of a part takes all its projections
        ("decoder"); as a prefix it takes one projection of this part only ("self_attention.query").
      dropout: fraction of the adapters' inputs that is set to zero in training.
      base_dtype: "int8" holds all projections of the base in int8, with a scale for each output; None holds them in the
        dtype of the computation.
    """

    rank: int | None = None
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mlp")
    dropout: float = 0.0
    base_dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "rank")
        checks.above(self, 0, "alpha")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.base_dtype not in (None, INT8):
            raise UserError(f"base_dtype is {self.base_dtype!r}: choose {INT8}, or None for that of the computation")
        if self.base_dtype is not None and self.rank is None:
            raise UserError(f"base_dtype is {self.base_dtype!r}, but there are no adapters: set rank, or leave it out")
        if not self.targets:
            raise UserError(f"targets is empty: name projections, such as {', '.join(AdapterConfig.targets)}")

    @property
    def scale(self) -> float:
        """The factor on the deltas."""
        assert self.rank is not None
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a policy.

    Attributes:
      policy: the policy whose parameters are the base.
      config: the projections with a delta, and the rank.
      head: a reward model's head, which takes the place of the base's output embedding; None for a policy.
    """

    policy: Policy
    config: AdapterConfig
    head: RewardHead | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a target matches no projection, or a targeted matrix is too small for the rank."""
        rank, kernels = self.config.rank or 0, projections(self.policy)
        for target in self.config.targets:
            if not any(_names(target, name) for name in kernels):
                parts = {part for name in kernels for part in name.split(".")}
                known = (*GROUPS, *sorted(parts | {alias for alias, ours in ALIASES.items() if ours in parts}))
                raise UserError(
                    f"targets has {target!r}, which names no projection of this model: {checks.nearest(target, known)}"
                )
        for name, kernel in self._targeted().items():
            inputs, outputs = (math.prod(sizes) for sizes in split_axes(kernel.names[1:], kernel.value.shape[1:]))
            if rank > min(inputs, outputs):
                raise UserError(
                    f"rank is {rank}, but {name} is a matrix of {inputs} x {outputs}: set it to {min(inputs, outputs)} "
                    "at most, or leave this target out"
                )

    def init(self, key: Array) -> Any:
        """Fresh float32 adapters in boxes with their logical axis names; `a` is initialised as in PEFT, `b` is zero."""
        tree: dict[str, Any] = {}
        named = self._targeted()
        for (name, kernel), of_kernel in zip(named.items(), jax.random.split(key, len(named)), strict=True):
            *path, last = _place(name)
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
            node[last] = self._init_kernel(kernel, of_kernel)
        if self.head is not None:
            tree[HEAD] = init_head(self.policy, self.head, jax.random.fold_in(key, len(named)))
        return tree

    def on(self, base: Any, adapters: Any, key: Array | None = None) -> Any:
        """The base's parameters with the adapters in place; a key turns on dropout, for training."""
        key = key if self.config.dropout else None
        return self.placed(base, _scaled(adapters, self.config.scale), key)

    def placed(self, base: Any, scaled: Any, key: Array | None = None) -> Any:
        """As `on`, for adapters (arrays or shapes) that are already scaled; computes nothing."""
        tree = base
        for number, name in enumerate(self._targeted()):
            place = _place(name)
            a, b = (_at(scaled, (*place, part)) for part in "ab")
            keys = None if key is None else jax.random.split(jax.random.fold_in(key, number), a.shape[0])
            tree = _with(tree, place, LowRank(_at(base, place), a, b, keys, self.config.dropout))
        return tree if self.head is None else replace_output(tree, scaled[HEAD])

    def rounded(self, base: Any) -> Any:
        """A base in float32 whose projections have the values that int8 gives them."""
        for name, inputs in input_axes(self.policy).items():
            path = tuple(name.split("."))
            base = _with(base, path, rounded(_at(base, path), inputs))
        return base

    def _targeted(self) -> dict[str, Any]:
        """The kernels, in boxes, of the targeted projections."""
        named = projections(self.policy)
        return {
            name: each for name, each in named.items() if any(_names(target, name) for target in self.config.targets)
        }

    def _init_kernel(self, kernel: Any, key: Array) -> dict[str, Any]:
        (layers, *shape), (_, *names), rank = kernel.value.shape, kernel.names, self.config.rank or 0
        (inputs, outputs), (ins, outs) = split_axes(names, shape), split_axes(names, names)
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (layers, *inputs, rank), jnp.float32, -bound, bound)
        return {
            "a": nn.LogicallyPartitioned(a, ("layers", *ins, "rank")),
            "b": nn.LogicallyPartitioned(jnp.zeros((layers, rank, *outputs)), ("layers", "rank", *outs)),
        }


def projections(policy: Policy) -> dict[str, Any]:
    """The abstract kernels, in boxes, of the projections in a policy's layers, by names such as "decoder.mlp.wo"."""
    found = {}
    for path, box in _boxes(abstract_parameters(policy.init)):
        if path[-1] == "kernel" and "layers" in path:
            found[".".join(part for part in path[:-1] if part != "layers")] = box
    return found


def abstract_base(policy: Policy, base_dtype: str | None = None) -> Any:
    """Shapes and dtypes of a base as it is held in memory, in boxes with their logical axes; see `AdapterConfig`."""
    boxed = abstract_parameters(policy.init)
    held = jax.eval_shape(functools.partial(compute_params, policy), unbox(boxed))
    tree = jax.tree.map(lambda box, leaf: box.replace_boxed(leaf), boxed, held, is_leaf=is_box)
    if base_dtype == INT8:
        for name, box in projections(policy).items():
            tree = _with(tree, _place(name), _abstract_quantized(box))
    return tree


def _abstract_quantized(box: Any) -> Quantized:
    """Every device has all scales, as in `in_int8`."""
    inputs, _ = split_axes(box.names[1:], box.names[1:])
    shapes = jax.eval_shape(functools.partial(quantize, inputs=len(inputs)), box.value)
    whole = (None,) * shapes.scale.ndim
    return Quantized(nn.LogicallyPartitioned(shapes.values, box.names), nn.LogicallyPartitioned(shapes.scale, whole))


def input_axes(policy: Policy) -> dict[str, int]:
    """The number of input axes of each projection's kernel, by the dotted name of the kernel among the parameters."""
    named = projections(policy)
    return {kernel_name(name): len(split_axes(box.names[1:], box.names[1:])[0]) for name, box in named.items()}


def in_int8(policy: Policy, params: Any) -> Any:
    """Parameters whose projections are in int8; a projection with adapters that are not merged stays as it is.

    Every device has all scales, which are small: a product then needs no further collective.
    """
    for name, inputs in input_axes(policy).items():
        path = tuple(name.split("."))
        kernel = _at(params, path)
        if isinstance(kernel, jax.Array):
            held = quantize(kernel.astype(jnp.float32), inputs)
            scale = constrain(held.scale, *[None] * held.scale.ndim)
            params = _with(params, path, dataclasses.replace(held, scale=scale))
    return params


def kernel_name(name: str) -> str:
    """The dotted name of a projection's kernel among the parameters."""
    return ".".join(_place(name))


def split_axes(names: Any, values: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits values, one for each axis of a layer's kernel (or of its `a` or `b`), into input axes and output axes.

    Either the input or the output is a single axis: "embed", the residual stream, or "rank", the adapter's own.
    """
    inputs = 1 if names[0] in ("embed", "rank") else len(names) - 1
    return tuple(values[:inputs]), tuple(values[inputs:])


def _place(name: str) -> tuple[str, ...]:
    stack, *rest = name.split(".")
    return (stack, "layers", *rest, "kernel")


def _boxes(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in tree.items():
        if isinstance(each, Mapping):
            yield from _boxes(each, (*path, name))
        else:
            yield (*path, name), each


def _names(target: str, name: str) -> bool:
    """Whether a target matches a projection: by its group, or by adjacent parts of its name."""
    if target in GROUPS:
        return name.rpartition(".")[2] in GROUPS[target]
    asked = ".".join(ALIASES.get(part, part) for part in target.split("."))
    return f".{asked}." in f".{name}."


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, part: node[part], path, tree)


def _with(tree: Any, path: tuple[str, ...], leaf: Any) -> Any:
    first, *rest = path
    return {**tree, first: _with(tree[first], tuple(rest), leaf) if rest else leaf}


@functools.partial(jax.jit, static_argnums=1)
def _scaled(adapters: Any, scale: float) -> Any:
    """The adapters with b times the scale; jitted, because eager code would transfer the number from the host."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, adapters)
