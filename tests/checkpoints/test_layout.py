"""Orbax restores parameters that we write tensor by tensor, and we read tensor by tensor what training saves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_models import CONFIGS

from alignment_gap.checkpoints import Network, end_ids, find_checkpoint, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints import layout as layout_module
from alignment_gap.checkpoints.layout import open_store, write_store
from alignment_gap.checkpoints.tensors import Tensor, from_array
from alignment_gap.errors import UserError
from alignment_gap.training import Checkpoints, TrainState, abstract_params, load_policy, load_preference_model


def tensors_of(params):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: from_array(leaf, stacked="layers" in name) for name, leaf in named.items()}


def assert_equal_trees(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(wanted))


@pytest.fixture(scope="module")
def written(policy, params, tmp_path_factory):
    run = tmp_path_factory.mktemp("written")
    write_checkpoint(run, 0, Network(model=policy.config, vocabulary_digest="abc"), tensors_of(params))
    return run


def test_orbax_restores_what_was_written(written, params):
    restored = ocp.StandardCheckpointer().restore((written / "checkpoints" / "0" / "params").absolute())
    assert_equal_trees(restored, params)


def test_training_restores_what_was_written_sharded(written, policy, params, mesh):
    loaded, restored = load_policy(str(written), mesh)
    assert loaded == policy
    assert_equal_trees(restored, params)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(policy.init, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == wanted


def test_what_training_saves_is_read_tensor_by_tensor(policy, params, tmp_path):
    network = Network("bradley_terry", policy.config, (1, 2, 3, 4, 5), "somewhere", "abc")
    with Checkpoints(tmp_path / "checkpoints", network) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), params, {}))
    stored = open_checkpoint(tmp_path)
    assert (stored.folder, stored.network) == (tmp_path / "checkpoints" / "7", network)
    for name, wanted in tensors_of(params).items():
        tensor = stored.tensors[name]
        assert (tensor.shape, tensor.dtype, tensor.stacked) == (wanted.shape, wanted.dtype, "layers" in name)
        np.testing.assert_array_equal(tensor.read(None), wanted.read(None))
        if tensor.stacked:
            np.testing.assert_array_equal(tensor.read(1), wanted.read(1))
    assert stored.tensors.keys() == tensors_of(params).keys()


def test_a_preference_model_is_one_again(policy, params, mesh, tmp_path):
    network = Network("bradley_terry", policy.config, (1, 2, 3, 4, 5))
    write_checkpoint(tmp_path, 3, network, tensors_of(params))
    model, restored = load_preference_model(tmp_path, mesh)
    assert (model.policy, model.kind, tuple(model.markers)) == (policy, "bradley_terry", (1, 2, 3, 4, 5))
    assert_equal_trees(restored, params)


def test_a_policy_is_no_preference_model(written, mesh):
    with pytest.raises(UserError, match="is a policy, no preference model"):
        load_preference_model(written, mesh)


def test_large_tensors_are_cut_into_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 64)
    arrays = {
        "a.layers.kernel": np.arange(3 * 7 * 5, dtype=np.float32).reshape(3, 7, 5),
        "a.bias": np.arange(33, dtype=np.float32),
        "b": np.int32(4),
    }
    write_store(tmp_path / "s", {name: from_array(np.asarray(a), stacked=a.ndim == 3) for name, a in arrays.items()})
    restored = ocp.StandardCheckpointer().restore((tmp_path / "s").absolute())
    found = {"a.layers.kernel": restored["a"]["layers"]["kernel"], "a.bias": restored["a"]["bias"], "b": restored["b"]}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(open_store(tmp_path / "s")[name].read(None), array)


def test_bfloat16_becomes_float32(tmp_path):
    array = np.asarray(jnp.arange(6.0, dtype=jnp.bfloat16))
    write_store(tmp_path / "s", {"w": from_array(array)})
    tensor = open_store(tmp_path / "s")["w"]
    assert tensor.dtype == "float32"
    np.testing.assert_array_equal(tensor.read(None), np.arange(6.0))


def test_a_step_may_be_named_in_three_ways(written):
    step = written / "checkpoints" / "0"
    assert find_checkpoint(written) == find_checkpoint(step.parent, 0) == find_checkpoint(step) == step
    with pytest.raises(UserError, match="no checkpoint of step 3: choose one of 0"):
        find_checkpoint(written, 3)
    with pytest.raises(UserError, match="nowhere has no complete checkpoint"):
        find_checkpoint(written / "nowhere")


def test_a_failed_write_leaves_no_checkpoint(tmp_path):
    def fail(layer):
        raise UserError("no such tensor")

    network = Network(model=CONFIGS["t5"])
    with pytest.raises(UserError, match="no such tensor"):
        write_checkpoint(tmp_path, 0, network, {"w": Tensor((3,), "float32", fail)})
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    write_checkpoint(tmp_path, 0, network, {"w": from_array(np.ones(3, np.float32))})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [0]
    with pytest.raises(UserError, match="exists already"):
        write_checkpoint(tmp_path, 0, network, {})


def test_reading_makes_no_folder(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_say_what_it_holds(tmp_path, mesh):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {}))
    with pytest.raises(UserError, match=r"does not say what network it holds.* give MODEL") as error:
        load_policy(tmp_path, mesh)
    assert "\n" not in str(error.value)


def test_all_tensors_that_differ_are_named(written, policy, mesh):
    config = policy.config
    other = type(policy)(dataclasses.replace(config, mlp_width=2 * config.mlp_width, width=2 * config.width))
    with (
        Checkpoints(written / "checkpoints") as checkpoints,
        pytest.raises(UserError, match=r"decoder_norm.scale has the shape \(\d+,\), the model has \(\d+,\).*\d more"),
    ):
        checkpoints.restore_params(abstract_params(other.init, mesh))


def test_a_part_that_is_lost_is_named(tmp_path):
    import tensorstore

    write_store(tmp_path / "s", {"a.w": from_array(np.ones((2, 3), np.float32), stacked=True)})
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": (tmp_path / "s").as_uri() + "/"}).result()
    store.delete_range(tensorstore.KvStore.KeyRange("a.w/1", "a.w/2")).result()
    with pytest.raises(UserError, match=r"is damaged: a.w has 1 of 2 parts"):
        open_store(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"custom_metadata": 3}'])
def test_a_damaged_description_is_one_line(text, tmp_path, mesh):
    folder = write_checkpoint(tmp_path, 0, Network(), {"w": from_array(np.ones(3, np.float32))})
    (folder / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(UserError, match="_CHECKPOINT_METADATA cannot be read"):
        load_policy(tmp_path, mesh)


def test_a_field_of_a_later_version_is_named(tmp_path, mesh):
    folder = write_checkpoint(tmp_path, 0, Network(), {"w": from_array(np.ones(3, np.float32))})
    path = folder / "_CHECKPOINT_METADATA"
    values = json.loads(path.read_text())
    values["custom_metadata"]["network"]["model"]["experts"] = 8
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unknown key network\.model\.experts"):
        load_policy(tmp_path, mesh)


@pytest.mark.parametrize(("named", "found"), [([7, 1, 8], (1, 7, 8)), (7, (1, 7)), (1, (1,)), (None, (1,)), ([], (1,))])
def test_the_end_ids_are_the_vocabulary_s_and_those_of_the_generation_config(named, found, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert end_ids(tmp_path, 1) == found


def test_without_a_generation_config_the_vocabulary_s_end_id_ends_an_answer(tmp_path):
    assert end_ids(None, 3) == end_ids(tmp_path, 3) == (3,)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert end_ids(tmp_path, 3) == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, "</s>"]}')
    with pytest.raises(
        UserError, match=r"generation_config.json has eos_token_id=\[3, '</s>'\]: give a token id, or a"
    ):
        end_ids(tmp_path, 3)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not JSON .*: fetch the file again"):
        end_ids(tmp_path, 3)
