"""Equal bits have one digest, whether they are arrays on devices or tensors that are read layer by layer."""

import json

import jax
import numpy as np
import pytest

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.digest import TensorsDigest, checksum_of, params_digest
from alignment_gap.checkpoints.layout import DIGESTS, METADATA, open_store
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.errors import UserError
from alignment_gap.training import Checkpoints, OptimizerConfig, abstract_state, load_policy, make_optimizer


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def tensors_of(params, dtype=None):
    arrays = named(params)
    return {
        name: from_array(array.astype(dtype or array.dtype), stacked="layers" in name) for name, array in arrays.items()
    }


def read_all(tensors):
    for tensor in tensors.values():
        for layer in range(tensor.shape[0]) if tensor.stacked else (None,):
            tensor.read(layer)


def test_tensors_read_layer_by_layer_have_the_digest_of_the_arrays(params):
    digest = TensorsDigest(tensors_of(params))
    assert any(tensor.stacked for tensor in digest.tensors.values())
    read_all(digest.tensors)
    assert digest.value() == params_digest(params)


def test_parts_count_once_however_often_they_are_read(params):
    digest = TensorsDigest(tensors_of(params))
    stacked = next(tensor for tensor in digest.tensors.values() if tensor.stacked)
    for layer in (0, None, 0):
        stacked.read(layer)
    # Nothing else was read so far.
    assert digest.value() == params_digest(params)


def test_half_precision_keeps_its_digest_if_it_is_not_cast(params):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    assert TensorsDigest(tensors_of(half), as_float32=False).value() == params_digest(half)


def test_half_precision_has_the_digest_of_what_is_written(params):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    digest = TensorsDigest(tensors_of(half))
    read_all(digest.tensors)
    assert digest.value() == params_digest(jax.tree.map(lambda leaf: leaf.astype("float32"), half))


def test_parts_add_up_wherever_they_are_cut(monkeypatch):
    values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    whole = checksum_of(values)
    assert whole.tolist() == sum((checksum_of(values[i], 35 * i) for i in range(3)), np.zeros(2, np.uint32)).tolist()
    monkeypatch.setattr("alignment_gap.checkpoints.digest._AT_ONCE", 4)
    assert checksum_of(values).tolist() == whole.tolist()
    assert checksum_of(values.swapaxes(0, 1)).tolist() != whole.tolist()


def test_places_count_modulo_two_to_the_32(monkeypatch):
    values = np.ones(4, np.float32)
    assert checksum_of(values, 2**32 - 1).tolist() != checksum_of(values).tolist()
    assert checksum_of(values, 2**32).tolist() == checksum_of(values).tolist()


@pytest.fixture
def imported(policy, params, tmp_path):
    network = Network(model=policy.config)
    return write_checkpoint(tmp_path / "run", 0, network, tensors_of(params))


def test_a_written_checkpoint_says_what_it_holds(imported, policy, params, mesh):
    said = json.loads((imported / METADATA).read_text())["custom_metadata"]
    assert said[DIGESTS]["params"] == params_digest(params) and said[DIGESTS].keys() == {"params", "network"}
    _, restored = load_policy(imported.parent.parent, mesh)
    assert params_digest(restored) == params_digest(params)


def test_an_imported_checkpoint_is_no_run_to_go_on_with(imported, policy, mesh):
    """The error says so, and the checkpoint stays where it is."""
    optimizer = make_optimizer(OptimizerConfig())
    abstract = abstract_state(policy.init, optimizer, mesh)
    with (
        Checkpoints(imported.parent) as checkpoints,
        pytest.raises(UserError, match="was imported, or saved by an earlier version, and has no whole state"),
    ):
        checkpoints.restore_last(abstract, print)
    assert imported.exists()


def test_another_weight_in_an_imported_checkpoint_is_seen(imported, policy, params, mesh):
    """A writer that ignores the digest changes one weight. All files are whole."""
    said = (imported / METADATA).read_text()
    changed = {name: array.copy() for name, array in named(params).items()}
    name = min(changed)
    changed[name].reshape(-1)[0] += 1
    other = write_checkpoint(
        imported.parents[1] / "other",
        0,
        Network(model=policy.config),
        {name: from_array(array, stacked="layers" in name) for name, array in changed.items()},
    )
    assert open_store(other / "params").keys() == changed.keys()
    (other / METADATA).write_text(said)
    with pytest.raises(UserError, match="params are not what was saved"):
        load_policy(other.parent.parent, mesh)
