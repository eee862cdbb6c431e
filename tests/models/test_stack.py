"""A stack compiles one layer; the result equals a loop over layers."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MESHES

from alignment_gap.models.layers import empty_cache, extend_cache
from alignment_gap.models.stack import REMAT_POLICIES, constrain_stream, decode_stack, init_stack, scan_stack
from alignment_gap.sharding import batch_sharding, make_mesh, replicated, within


@dataclasses.dataclass(frozen=True)
class Config:
    remat: str = "none"
    scan_unroll: int = 1


RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.standard_normal((5, 4, 4)), jnp.float32),
    "b": jnp.asarray(RNG.random((5, 4)), jnp.float32),
}
INPUTS = jnp.arange(5.0)
X = jnp.asarray(RNG.standard_normal((2, 3, 4)), jnp.float32)


def layer(x, params, number):
    y = jnp.tanh(x @ params["w"] + params["b"]) + number
    return y, y.sum(-1)


def by_hand(x, params, inputs):
    outputs = []
    for index, number in enumerate(np.asarray(inputs)):
        x = np.tanh(x @ np.asarray(params["w"][index]) + np.asarray(params["b"][index])) + number
        outputs.append(x.sum(-1))
    return x, np.stack(outputs)


@pytest.mark.parametrize("config", itertools.starmap(Config, [("none", 1), ("none", 5), ("full", 2), ("dots", 1)]))
def test_a_stack_is_its_layers_one_after_another_however_it_runs(config):
    """In value and gradient. The outputs are those of all layers."""
    last, outputs = jax.jit(lambda x, p: scan_stack(layer, x, p, INPUTS, config=config))(X, PARAMS)
    wanted = by_hand(np.asarray(X), PARAMS, INPUTS)
    np.testing.assert_allclose(last, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(outputs, wanted[1], rtol=1e-5)

    def total(params):
        return scan_stack(layer, X, params, INPUTS, config=config)[0].sum()

    gradient, epsilon = jax.jit(jax.grad(total))(PARAMS)["b"], 1e-2
    moved = [jnp.zeros((5, 4)).at[index, 1].set(epsilon) for index in (0, 4)]
    for index, step in zip((0, 4), moved, strict=True):
        up, down = (
            by_hand(np.asarray(X), PARAMS | {"b": PARAMS["b"] + sign * step}, INPUTS)[0].sum() for sign in (1, -1)
        )
        np.testing.assert_allclose(gradient[index, 1], (up - down) / (2 * epsilon), rtol=2e-2, atol=1e-3)


def test_the_names_of_remat_are_those_that_configs_take():
    assert set(REMAT_POLICIES) == {"none", "full", "dots"} and REMAT_POLICIES["none"] is None


def test_layers_of_a_stack_are_drawn_each_anew_and_name_their_axis():
    def init(key):
        box = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", "mlp"))
        return {"kernel": box(key, (3, 2), jnp.float32)}

    stacked = init_stack(init, jax.random.key(0), 4)["kernel"]
    assert stacked.names == ("layers", "embed", "mlp") and stacked.value.shape == (4, 3, 2)
    for key, value in zip(jax.random.split(jax.random.key(0), 4), stacked.value, strict=True):
        np.testing.assert_allclose(init(key)["kernel"].value, value, rtol=1e-6)
    assert len({tuple(value.ravel().tolist()) for value in stacked.value}) == 4


@pytest.mark.parametrize("unroll", [1, 3])
def test_every_layer_of_a_decoding_stack_writes_its_own_part_of_the_cache(unroll):
    """A layer writes at its step, and reads what it has written so far."""
    depth, steps = 3, 4

    @jax.jit
    def step_of(x, cache, step):
        def run(x, cache, index, params, inputs):
            new = (x * params)[:, :, None]
            cache, (keys, _) = extend_cache(cache, (new, -new), index, step, steps)
            return x + keys.sum((2, 3))[:, :, None] + inputs, cache

        return decode_stack(run, x, cache, params, inputs, config=Config(scan_unroll=unroll))

    params, inputs = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 10.0, 20.0])
    cache = empty_cache((depth, 1, 2, 1, steps, 1), jnp.float32)
    written = np.zeros((depth, 2, steps))
    for step in range(steps):
        x = jnp.array([1.0, -2.0]).reshape(1, 2, 1, 1) * (step + 1)
        expected = np.asarray(x).ravel()
        for index in range(depth):
            written[index, :, step] = expected * params[index]
            expected = expected + written[index].sum(-1) + inputs[index]
        x, cache = step_of(x, cache, jnp.int32(step))
        np.testing.assert_allclose(np.ravel(x), expected, rtol=1e-5)
        np.testing.assert_allclose(cache[0][:, 0, :, 0, :, 0], written, rtol=1e-5)
        np.testing.assert_allclose(cache[1], -cache[0])


def test_a_stream_is_laid_out_by_batch_and_by_position_where_the_rules_split_it():
    x = np.zeros((8, 2, 6, 16), np.float32)
    for name, shard in (("all", (2, 2, 6, 16)), ("sequence", (2, 2, 3, 16)), ("model", (8, 2, 6, 16))):
        mesh = make_mesh(MESHES[name])
        found = jax.jit(within(mesh, lambda x: constrain_stream(x + 1)))(jax.device_put(x, replicated(mesh)))
        assert found.sharding.shard_shape(x.shape) == shard, name
    assert found.sharding.is_equivalent_to(batch_sharding(mesh), 4)
    assert constrain_stream(found) is found
