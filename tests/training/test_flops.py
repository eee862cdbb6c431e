"""FLOPs of traced programs equal counts by hand."""

import jax
import jax.numpy as jnp

from alignment_gap.training.flops import count_flops


def count(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_a_product_is_two_flops_for_each_multiply_add():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (4, 3, 5), (4, 7, 5)) == 4 * 2 * 3 * 5 * 7
    assert count(lambda x: jnp.sin(x) + x, (3, 5)) == 0


def test_loops_count_as_often_as_they_run():
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=6)[0]

    def nested(x):
        return jax.lax.fori_loop(0, 5, lambda _, carry: scanned(carry), x)

    assert count(scanned, (4, 4)) == 6 * 2 * 4**3
    assert count(nested, (4, 4)) == 5 * 6 * 2 * 4**3


def test_a_loop_that_may_stop_sooner_counts_to_its_bound():
    def until(x):
        def unfinished(state):
            return (state[0] < 7) & (state[1].sum() < 1e6)

        return jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, state[1] @ x), (0, x))

    assert count(until, (4, 4)) == 7 * 2 * 4**3


def test_of_branches_the_dearest_counts_and_calls_count_once():
    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    called = jax.jit(lambda x: x @ x)
    assert count(branched, (4, 4)) == 2 * 2 * 4**3
    assert count(lambda x: called(x) + jax.checkpoint(called)(x), (4, 4)) == 2 * 2 * 4**3
