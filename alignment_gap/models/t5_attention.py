"""T5's attention as one Pallas kernel for TPUs: nothing of size queries x keys is in HBM.

T5's bias depends on the distance from query to key alone, so a head's bias over all distances is a short line. A tile
of logits needs only the tile's distance from the diagonal: distances above the last bucket's start share one value. So
the kernel expands the line to a few tiles, once for each head, and adds the right one. The gradient goes the other
way: tiles are summed over queries and batch, and their diagonals give the gradient of the line.

The keys of a query are a range: a prompt, or a text of a packed row, or its part up to the query. Tiles outside all
ranges are skipped, so padding costs nothing.

Logits are kept transposed, keys by queries. Maxima and sums over keys are then rows, which broadcast for free. Heads
stay side by side, as the projections write them: a block has as many heads as fill the 128 lanes of a register, and
the kernel zeroes the other heads' lanes. So no array is transposed or padded in HBM.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from alignment_gap.models.fused_attention import LANES, least_padding, platform
from alignment_gap.models.layers import MASKED
from alignment_gap.models.packing import Ranges
from alignment_gap.sharding import spec_within

SUBLANES = 8
# Queries and keys of a tile, at most. The bias of both heads of a block then takes 2.5 MiB of on-chip memory.
BLOCK = 2 * LANES
# Above masked logits and below all others. So a masked logit has weight 0, even if all logits of a query are masked.
_LOWEST = 0.1 * MASKED
# On-chip memory that a kernel gets by default on every TPU.
_VMEM = 16 * 2**20


Attend = Callable[[Array, Array, Array], Float[Array, "B K Q H C"]]


class _Sizes(NamedTuple):
    """Static sizes of a call.

    Attributes:
      heads: heads in a block.
      head_size: width of a head.
      queries: queries of a tile.
      keys: keys of a tile.
      tiles: number of tiles of the bias of each head; 0 without a bias.
      interpret: whether Pallas's interpreter runs the kernel, on a CPU.
    """

    heads: int
    head_size: int
    queries: int
    keys: int
    tiles: int
    interpret: bool


def block_of(length: int, most: int = BLOCK) -> int:
    """Queries or keys of a tile, for rows of this length: `most`, or half of it if that needs less padding."""
    return least_padding(length, (most // 2, most))


def line_distances(length: int, farthest: int, most: int = BLOCK) -> Int[np.ndarray, " W"]:
    """The distances, key minus query, of the line of biases that `make` takes.

    Args:
      length: number of queries, and of keys.
      farthest: all distances of at least this, in either direction, have one bias.
      most: queries and keys of a tile, at most.
    """
    block = block_of(length, most)
    # A tile that is this many blocks off the diagonal has one bias. Rows of few blocks have no such tile.
    off = min(-(-(farthest + block - 1) // block), -(-length // block) - 1)
    width = (2 * off + 2) * block
    columns = np.arange(width)
    # The kernel rotates row k of the expanded line right by k. Columns that come from the end count as negative.
    return off * block - np.where(columns < width - block, columns, columns - width)


def make(ranges: Ranges, line: Float[Array, "H W"] | None = None, most: int = BLOCK) -> Attend:
    """A function that attends: queries [B, K, Q, H, C]; keys, values [B, K, S, H, C], or [B, S, H, C] for all K rows.

    softmax_s(q . k_s + line[distance of s]) v_s, over the keys of the query's range; 0 where the range is empty. Logits
    and softmax are float32, the weights have the values' dtype, and their products are summed in float32.

    Args:
      ranges: the keys of each query.
      line: float32 biases of each head at `line_distances`; then S is Q and all K rows have keys of their own.
      most: queries and keys of a tile, at most.
    """

    def attend(query: Array, keys: Array, values: Array) -> Array:
        rows: Any = ("batch", None, None, "heads", None)
        arrays = [query, keys, values, *ranges] + ([] if line is None else [line])
        shared = rows if keys.ndim == 5 else ("batch", None, "heads", None)
        names: list[Any] = [rows, shared, shared, rows[:3], rows[:3], ("heads", None)]
        specs = [spec_within(x.shape, *axes) for x, axes in zip(arrays, names, strict=False)]
        on_device = functools.partial(_on_device, most, platform() == "cpu")
        if specs[0] is None:
            return on_device(*arrays)
        return jax.shard_map(on_device, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*arrays)

    return attend


def _on_device(
    most: int, interpret: bool, query: Array, keys: Array, values: Array, begin: Array, end: Array, *line: Array
) -> Float[Array, "B K Q H C"]:
    """The kernel on a device's own batch and heads: rows flattened, and padded to whole tiles and lanes."""
    shape, rows = query.shape, math.prod(keys.shape[:-3])
    *_, heads, size = shape
    fit = next((n for n in range(1, heads) if heads % n == 0 and n * size % LANES == 0), heads)

    def flat(x: Array) -> Array:
        x = x.reshape(rows, -1, heads * size)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_of(x.shape[1], most)), (0, -heads * size % LANES)))

    length = query.size // (rows * heads * size)
    blocks = block_of(length, most), block_of(keys.shape[-3], most)
    begin, end = (x.reshape(rows, 1, length) for x in (begin, end))
    begin, end = (jnp.pad(x, ((0, 0), (0, 0), (0, -length % blocks[0]))) for x in (begin, end))
    biases = line[0].reshape(heads // fit, fit, -1) if line else None
    sizes = _Sizes(fit, size, *blocks, biases.shape[-1] // blocks[0] - 1 if biases is not None else 0, interpret)
    output = _attend(sizes, flat(query), flat(keys), flat(values), begin, end, biases)
    return output[:, :length, : heads * size].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: _Sizes, query: Any, keys: Any, values: Any, begin: Any, end: Any, line: Any) -> Any:
    return _attend_forward(sizes, query, keys, values, begin, end, line)[0]


def _attend_forward(sizes: _Sizes, query: Any, keys: Any, values: Any, begin: Any, end: Any, line: Any) -> Any:
    inputs = {"query": query, "keys": keys, "values": values, "begin": begin, "end": end, "line": line}
    groups = query.shape[2] // _width(sizes)
    log_sum = jax.ShapeDtypeStruct((len(query), groups, sizes.heads, query.shape[1]), jnp.float32)
    scratch = {"turned": (_turned(sizes, keys), values.dtype), **_tiles(sizes, "tiles")}
    found = _run(_forward, sizes, inputs, {"output": query, "log_sum": log_sum}, scratch, products=2)
    return found["output"], (inputs, found)


def _attend_backward(sizes: _Sizes, residuals: Any, gradient: Array) -> Any:
    inputs, found = residuals
    query, keys = inputs["query"], inputs["keys"]
    groups = found["log_sum"].shape[1]
    both = gradient.astype(jnp.float32) * found["output"].astype(jnp.float32)
    both = both[..., : groups * sizes.heads * sizes.head_size]
    # The sum over a query's keys of the weight times its gradient.
    mean = jnp.einsum("bqghc->bghq", both.reshape(*both.shape[:2], groups, sizes.heads, sizes.head_size))
    inputs |= {"gradient": gradient, "log_sum": found["log_sum"], "mean": mean}
    outputs = {"of_query": query, "of_keys": keys, "of_values": inputs["values"], "of_line": inputs["line"]}
    row = ((keys.shape[1], _width(sizes)), jnp.float32)
    scratch = {"turned": (_turned(sizes, keys), keys.dtype), "sum_keys": row, "sum_values": row}
    scratch |= _tiles(sizes, "tiles", "sum_tiles")
    found = _run(_backward, sizes, inputs, outputs, scratch, products=5)
    return found["of_query"], found["of_keys"], found["of_values"], None, None, found.get("of_line")


_attend.defvjp(_attend_forward, _attend_backward)


def _width(sizes: _Sizes) -> int:
    """Lanes of a block."""
    return sizes.heads * sizes.head_size + -sizes.heads * sizes.head_size % LANES


def _turned(sizes: _Sizes, keys: Any) -> tuple[int, int, int]:
    """The shape of a row of keys or values, transposed tile by tile."""
    return keys.shape[1] // sizes.keys, _width(sizes), sizes.keys


def _tiles(sizes: _Sizes, *names: str) -> dict[str, Any]:
    """Shapes and dtypes of tiles of biases or of their gradients; none without a bias."""
    shape = (sizes.heads, sizes.tiles, sizes.keys, sizes.queries)
    return {name: (shape, jnp.float32) for name in names if sizes.tiles}


def _run(
    kernel: Callable[[_Sizes, Any], None],
    sizes: _Sizes,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    scratch: dict[str, Any],
    products: int,
) -> dict[str, Array]:
    """Calls a kernel for every group of heads, row and tile of queries, in this order; a group is the slowest.

    Args:
      kernel: gets the sizes and the references to blocks, by name.
      sizes: static sizes.
      inputs: arrays by name; None is left out.
      outputs: arrays of the outputs' shapes and dtypes.
      scratch: shapes and dtypes of on-chip memory.
      products: number of products of a tile with a head, for the compiler's schedule.
    """
    inputs, outputs = ({name: x for name, x in each.items() if x is not None} for each in (inputs, outputs))
    query, keys = inputs["query"], inputs["keys"]
    grid = (query.shape[2] // _width(sizes), len(query), query.shape[1] // sizes.queries)
    names, begin, end = [*inputs, *outputs, *scratch], inputs["begin"], inputs["end"]
    begin, end = (x.reshape(len(query) * grid[2], sizes.queries) for x in (begin, end))
    some = end > begin
    first = jnp.min(jnp.where(some, begin, keys.shape[1]), axis=1) // sizes.keys
    last = pl.cdiv(jnp.max(jnp.where(some, end, 0), axis=1), sizes.keys)

    def body(first: Any, last: Any, *references: Any) -> None:
        row, tile = pl.program_id(1), pl.program_id(2)
        at = SimpleNamespace(**dict(zip(names, references, strict=True)), tile=tile)
        at.row_starts, at.row_ends = tile == 0, tile == grid[2] - 1
        at.group_starts, at.group_ends = at.row_starts & (row == 0), at.row_ends & (row == grid[1] - 1)
        at.first, at.last = first[row * grid[2] + tile], last[row * grid[2] + tile]
        kernel(sizes, at)

    blocked = inputs | outputs
    specs = {name: _spec(name, x, sizes) for name, x in blocked.items()}
    needed = _needed(sizes, [(specs[name].block_shape, x.dtype) for name, x in blocked.items()], [*scratch.values()])
    weights = query.shape[1] * keys.shape[1] * len(query)
    found = pl.pallas_call(
        body,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(*each) for each in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=None if needed < _VMEM else needed,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * weights * query.shape[2],
            transcendentals=weights * grid[0] * sizes.heads,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in blocked.values()),
        ),
        interpret=sizes.interpret,
        name=f"t5_attention{kernel.__name__}",
    )(first, last, *inputs.values())
    return dict(zip(outputs, found, strict=True))


def _needed(sizes: _Sizes, blocks: list[Any], scratch: list[Any]) -> int:
    """Bytes of on-chip memory that a kernel needs, from the shapes and dtypes of its blocks and scratch memory."""
    # Every block has two buffers.
    held = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in [*blocks, *blocks, *scratch])
    # Logits, weights, their gradients, and biases that are converted between line and tiles.
    return held + 4 * sizes.queries * sizes.keys * (8 + 3 * (sizes.tiles + 1))


def _spec(name: str, x: Any, sizes: _Sizes) -> pl.BlockSpec:
    """The block of an array that a step of the grid (group of heads, row, tile of queries) works on."""
    width = _width(sizes)
    if name in ("begin", "end"):
        return pl.BlockSpec((1, 1, sizes.queries), lambda group, row, tile, *_: (row, 0, tile))
    if name in ("log_sum", "mean"):
        return pl.BlockSpec((1, 1, sizes.heads, sizes.queries), lambda group, row, tile, *_: (row, group, 0, tile))
    if name in ("line", "of_line"):
        return pl.BlockSpec((1, *x.shape[1:]), lambda group, row, tile, *_: (group, 0, 0))
    if name in ("keys", "values", "of_keys", "of_values"):
        return pl.BlockSpec((1, x.shape[1], width), lambda group, row, tile, *_: (row, 0, group))
    return pl.BlockSpec((1, sizes.queries, width), lambda group, row, tile, *_: (row, tile, group))


def _forward(sizes: _Sizes, at: Any) -> None:
    """Outputs of a tile of queries, and the logarithm of each query's sum of exponentials."""

    @pl.when(at.row_starts)
    def _() -> None:
        _turn(at.values, at.turned)

    _fill_tiles(sizes, at)
    outputs = []
    for head in range(sizes.heads):
        query, own = _own(at.query, head, sizes), _own_rows(head, sizes)

        def visit(block: Any, carry: Any, head: int = head, query: Any = query, own: slice = own) -> Any:
            most, total, output = carry
            logits = _logits(sizes, at, head, query, block)
            new = jnp.maximum(most, jnp.max(logits, axis=0, keepdims=True))
            weights, faded = jnp.exp(logits - new), jnp.exp(most - new)
            total = total * faded + jnp.sum(weights, axis=0, keepdims=True)
            values = at.turned[block, own]
            return new, total, output * faded + _dot(values, weights.astype(values.dtype))

        shapes, values = ((1, 1, sizes.head_size), (_LOWEST, 0.0, 0.0))
        start = [jnp.full((n, sizes.queries), value, jnp.float32) for n, value in zip(shapes, values, strict=True)]
        most, total, output = jax.lax.fori_loop(at.first, at.last, visit, tuple(start))
        outputs.append(output / jnp.where(total == 0, 1.0, total))
        # For a query without keys this is above any logit, so its weights are 0 in the backward pass.
        at.log_sum[0, 0, head : head + 1] = jnp.where(total == 0, -_LOWEST, most + jnp.log(total))
    at.output[0] = _turned_back(outputs, at.output)


def _backward(sizes: _Sizes, at: Any) -> None:
    """Gradients of a tile of queries; those of keys, values and biases are summed over the grid."""

    @pl.when(at.row_starts)
    def _() -> None:
        _turn(at.keys, at.turned)
        at.sum_keys[...] = jnp.zeros_like(at.sum_keys)
        at.sum_values[...] = jnp.zeros_like(at.sum_values)

    _fill_tiles(sizes, at)
    if sizes.tiles:

        @pl.when(at.group_starts)
        def _() -> None:
            at.sum_tiles[...] = jnp.zeros_like(at.sum_tiles)

    outputs = []
    for head in range(sizes.heads):
        query, gradient = (_own(x, head, sizes) for x in (at.query, at.gradient))
        log_sum, mean = (x[0, 0, head : head + 1] for x in (at.log_sum, at.mean))
        own = _own_rows(head, sizes)

        def visit(
            block: Any,
            of_query: Any,
            head: int = head,
            query: Any = query,
            gradient: Any = gradient,
            log_sum: Any = log_sum,
            mean: Any = mean,
            own: slice = own,
        ) -> Any:
            weights, keys = jnp.exp(_logits(sizes, at, head, query, block) - log_sum), _block(block, sizes)
            of_logits = weights * (_dot(at.values[0, keys], gradient, transposed=True) - mean)
            if sizes.tiles:
                tile = _tile(sizes, at, block)
                at.sum_tiles[head, tile] = at.sum_tiles[head, tile] + of_logits
            at.sum_values[keys] = at.sum_values[keys] + _dot(weights.astype(gradient.dtype), gradient)
            of_logits = of_logits.astype(query.dtype)
            at.sum_keys[keys] = at.sum_keys[keys] + _dot(of_logits, query)
            return of_query + _dot(at.turned[block, own], of_logits)

        start = jnp.zeros((sizes.head_size, sizes.queries), jnp.float32)
        outputs.append(jax.lax.fori_loop(at.first, at.last, visit, start))
    at.of_query[0] = _turned_back(outputs, at.of_query)

    @pl.when(at.row_ends)
    def _() -> None:
        at.of_keys[0] = at.sum_keys[...].astype(at.of_keys.dtype)
        at.of_values[0] = at.sum_values[...].astype(at.of_values.dtype)

    if sizes.tiles:

        @pl.when(at.group_ends)
        def _() -> None:
            for head in range(sizes.heads):
                at.of_line[0, head : head + 1] = _line_of([at.sum_tiles[head, tile] for tile in range(sizes.tiles)])


def _logits(sizes: _Sizes, at: Any, head: int, query: Array, block: Any) -> Float[Array, "S Q"]:
    """The logits of a tile with bias, masked outside the queries' ranges."""
    logits = _dot(at.keys[0, _block(block, sizes)], query, transposed=True)
    if sizes.tiles:
        logits += at.tiles[head, _tile(sizes, at, block)]
    key = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    begin, end = (x[0] - block * sizes.keys for x in (at.begin, at.end))
    return jnp.where((key >= begin) & (key < end), logits, MASKED)


def _block(block: Any, sizes: _Sizes) -> Any:
    return pl.ds(pl.multiple_of(block * sizes.keys, sizes.keys), sizes.keys)


def _tile(sizes: _Sizes, at: Any, block: Any) -> Any:
    """The index of the tile of biases for this block of keys; it follows from the distance to the diagonal."""
    off = sizes.tiles // 2
    return jnp.clip(at.tile - block, -off, off) + off


def _own(block: Any, head: int, sizes: _Sizes) -> Float[Array, "Q W"]:
    """A tile of queries with zeros in the lanes of other heads."""
    x = block[0]
    if x.shape[1] == sizes.head_size:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) - head * sizes.head_size
    # This selects in float32, because some TPUs cannot select in bfloat16.
    return jnp.where((lane >= 0) & (lane < sizes.head_size), x.astype(jnp.float32), 0.0).astype(x.dtype)


def _own_rows(head: int, sizes: _Sizes) -> slice:
    return slice(head * sizes.head_size, (head + 1) * sizes.head_size)


def _dot(left: Array, right: Array, *, transposed: bool = False) -> Float[Array, "M N"]:
    """left @ right, or left @ right.T if `transposed`, summed in float32."""
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _turn(row: Any, turned: Any) -> None:
    """Transposes a row of keys or values, tile by tile."""
    blocks, _, size = turned.shape
    for block in range(blocks):
        turned[block] = row[0, block * size : (block + 1) * size].T


def _turned_back(outputs: list[Array], to: Any) -> Float[Array, "Q W"]:
    """The heads' outputs [C, Q] side by side in lanes; lanes without a head are 0."""
    rows = to.shape[2] - len(outputs) * outputs[0].shape[0]
    if rows:
        outputs = [*outputs, jnp.zeros((rows, to.shape[1]), outputs[0].dtype)]
    return jnp.concatenate(outputs).T.astype(to.dtype)


def _fill_tiles(sizes: _Sizes, at: Any) -> None:
    """Expands the group's lines to tiles, at the first step of the group."""
    if not sizes.tiles:
        return

    @pl.when(at.group_starts)
    def _() -> None:
        for head in range(sizes.heads):
            wide = _turn_rows_right(at.line[0, head : head + 1], sizes.keys)
            for tile in range(sizes.tiles):
                at.tiles[head, tile] = wide[:, tile * sizes.queries : (tile + 1) * sizes.queries]


def _turn_rows_right(line: Float[Array, "1 W"], rows: int) -> Float[Array, "S W"]:
    """A matrix with the line in every row; row k is rotated right by k."""
    wide = jnp.broadcast_to(line, (SUBLANES, line.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 0)
    for step in (1, 2, 4):
        wide = jnp.where(row & step != 0, pltpu.roll(wide, step, 1), wide)
    while len(wide) < rows:
        wide = jnp.concatenate([wide, pltpu.roll(wide, len(wide), 1)])
    return wide


def _line_of(tiles: list[Array]) -> Float[Array, "1 W"]:
    """The gradient of a line from those of its tiles: row k is rotated left by k, then all rows are summed."""
    wide = jnp.concatenate([*tiles, jnp.zeros_like(tiles[0])], axis=1)
    width = wide.shape[1]
    while len(wide) > SUBLANES:
        half = len(wide) // 2
        wide = wide[:half] + pltpu.roll(wide[half:], width - half, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 0)
    for step in (1, 2, 4):
        wide = jnp.where(row & step != 0, pltpu.roll(wide, width - step, 1), wide)
    return jnp.sum(wide, axis=0, keepdims=True)
