"""Adapters of a policy: the projections that get one, their initial values, and the product of a kernel with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import AdapterConfig, Adapters, make_policy, merged, score
from alignment_gap.models.adapters import projections
from alignment_gap.models.low_rank import LowRank
from alignment_gap.sharding import unbox

BATCH = make_batch(3)
T5, DECODER = (make_policy(CONFIGS[name]) for name in ("t5", "decoder"))


def named(policy, *targets):
    """The names of the projections that have an adapter."""
    adapters = Adapters(policy, AdapterConfig(1, targets=targets))
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: unbox(adapters.init(jax.random.key(0)))))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {path.removesuffix(".kernel.a").replace(".layers", "") for path in paths if path.endswith(".a")}


def random_adapters(adapters, seed=1):
    """Adapters without zeros."""
    shapes = jax.eval_shape(lambda: unbox(adapters.init(jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def by_hand(params, adapters, scale):
    """The parameters with W + scale * A B instead of W in each layer; numpy multiplies the matrices."""
    if set(adapters) == {"a", "b"}:
        a, b = (np.asarray(adapters[name]) for name in "ab")
        matrices = a.reshape(len(a), -1, a.shape[-1]) @ b.reshape(len(b), b.shape[1], -1)
        return np.asarray(params) + scale * matrices.reshape(params.shape)
    return {**params, **{name: by_hand(params[name], each, scale) for name, each in adapters.items()}}


@pytest.mark.parametrize("policy", [T5, DECODER])
def test_a_kernel_with_adapters_is_the_sum_by_hand(policy):
    adapters, base = Adapters(policy, AdapterConfig(3, alpha=6.0)), random_params(policy)
    parts = random_adapters(adapters)
    assert named(policy, "attention", "mlp") == set(projections(policy))
    whole, summed = adapters.on(base, parts), by_hand(base, parts, 2.0)
    found = jax.tree.map(np.asarray, merged(whole))
    assert jax.tree.structure(found) == jax.tree.structure(summed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, summed)
    scored = jax.jit(functools.partial(score, policy))
    ours, expected, plain = (np.asarray(scored(each, *texts(BATCH))) for each in (whole, summed, base))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - plain).max() > 0.1


@pytest.mark.parametrize("policy", [T5, DECODER])
def test_fresh_adapters_change_no_bit(policy):
    adapters, base = Adapters(policy, AdapterConfig(2)), random_params(policy)
    fresh = unbox(adapters.init(jax.random.key(0)))
    scored = jax.jit(functools.partial(score, policy))
    whole = adapters.on(base, fresh, jax.random.key(1))
    np.testing.assert_array_equal(scored(whole, *texts(BATCH)), scored(base, *texts(BATCH)))
    a, b = fresh["decoder"]["layers"]["mlp"]["wo"]["kernel"].values()
    # Uniform between -1 / sqrt(7) and 1 / sqrt(7), like PEFT's.
    assert a.shape == (3, 7, 2) and 0.3 < float(jnp.abs(a).max()) < 7**-0.5
    assert b.shape == (3, 2, 12) and not b.any()
    assert not jnp.array_equal(a[0], a[1])


def test_the_base_is_not_copied():
    adapters, base = Adapters(DECODER, AdapterConfig(2, targets=("query",))), random_params(DECODER)
    whole = adapters.on(base, random_adapters(adapters))
    assert whole["decoder"]["layers"]["query"]["kernel"].kernel is base["decoder"]["layers"]["query"]["kernel"]
    assert whole["decoder"]["layers"]["key"]["kernel"] is base["decoder"]["layers"]["key"]["kernel"]
    assert not isinstance(base["decoder"]["layers"]["query"]["kernel"], LowRank)


def test_axes_are_those_of_the_kernel():
    """So adapters are split like their kernels. The rank has its own axis name."""
    boxes = jax.eval_shape(lambda: Adapters(DECODER, AdapterConfig(2)).init(jax.random.key(0)))["decoder"]["layers"]
    names = {name: [boxes[name]["kernel"][part].names for part in "ab"] for name in ("query", "value", "out")}
    assert names["query"] == [("layers", "embed", "rank"), ("layers", "rank", "heads", "kv")]
    assert names["value"] == [("layers", "embed", "rank"), ("layers", "rank", "kv_heads", "kv")]
    assert names["out"] == [("layers", "heads", "kv", "rank"), ("layers", "rank", "embed")]
    assert boxes["mlp"]["wo"]["kernel"]["a"].names == ("layers", "mlp", "rank")
    assert boxes["out"]["kernel"]["a"].value.shape == (3, 4, 6, 2)


@pytest.mark.parametrize(
    ("policy", "targets", "found"),
    [
        (DECODER, ("query", "value"), {"decoder.query", "decoder.value"}),
        (DECODER, ("q_proj", "v_proj"), {"decoder.query", "decoder.value"}),
        (DECODER, ("mlp",), {"decoder.mlp.wi_0", "decoder.mlp.wi_1", "decoder.mlp.wo"}),
        (DECODER, ("gate_proj", "down_proj"), {"decoder.mlp.wi_0", "decoder.mlp.wo"}),
        (DECODER, ("all-linear",), set(projections(DECODER))),
        (T5, ("encoder",), {name for name in projections(T5) if name.startswith("encoder.")}),
        (T5, ("self_attention.q",), {"decoder.self_attention.query"}),
        (T5, ("decoder.mlp.wo", "o"), {"decoder.mlp.wo", *(n for n in projections(T5) if n.endswith(".out"))}),
    ],
)
def test_targets_by_the_names_that_people_know(policy, targets, found):
    assert named(policy, *targets) == found and found


def test_dropout_is_of_the_adapters_input_alone():
    """W reads all of x; A reads x after dropout, scaled up. W = 0 and A B = 1 make the dropout visible."""
    x = jnp.ones((1, 4000))
    kernel = LowRank(jnp.zeros((4000, 1)), jnp.ones((4000, 1)), jnp.ones((1, 1)), jax.random.key(0), 0.25)
    kept = kernel.dropped(x)
    np.testing.assert_allclose(np.unique(kept), [0.0, 4 / 3], rtol=1e-6)
    # The share is binomial; the bound is four standard deviations.
    assert abs(float((kept == 0).mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    np.testing.assert_array_equal(kept, kernel.dropped(x))


def test_dropout_follows_from_its_key_alone():
    adapters, base = Adapters(DECODER, AdapterConfig(2, dropout=0.5)), random_params(DECODER)
    parts, scored = random_adapters(adapters), jax.jit(functools.partial(score, DECODER))
    one, again, other, none = (
        np.asarray(scored(adapters.on(base, parts, key), *texts(BATCH)))
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2 and np.abs(one - none).max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0: it must be at least 1"),
        ({"rank": 8}, "rank is 8, but decoder.mlp.wi_0 is a matrix of 12 x 7: set it to 7 at most"),
        ({"rank": 2, "targets": ("qurey",)}, "targets has 'qurey', which names no projection .* did you mean query?"),
        ({"rank": 2, "targets": ("q_porj",)}, "did you mean q_proj?"),
        ({"rank": 2, "targets": ("encoder",)}, "targets has 'encoder', which names no projection of this model"),
        ({"rank": 2, "targets": ()}, "targets is empty"),
        ({"rank": 2, "alpha": 0.0}, "alpha is 0.0: it must be above 0"),
        ({"rank": 2, "dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        Adapters(DECODER, AdapterConfig(**settings))
    assert "\n" not in str(error.value)
