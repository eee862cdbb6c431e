"""T5X's formats: we read T5X's own files and ours; flax, tensorstore and Orbax read ours without us."""

import dataclasses
import gzip
import json
import pathlib
import shutil

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from tiny_models import CONFIGS, random_params

from alignment_gap.checkpoints import Network, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.flax_msgpack import read_tree
from alignment_gap.checkpoints.formats import describe, export_checkpoint, import_checkpoint, open_foreign
from alignment_gap.checkpoints.layout import write_store
from alignment_gap.checkpoints.t5x_legacy import open_tree
from alignment_gap.checkpoints.t5x_tree import t5_entries
from alignment_gap.checkpoints.tensors import exported, from_array
from alignment_gap.errors import UserError
from alignment_gap.models import T5Config, make_policy

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "data" / "t5x"
for parent in pathlib.Path(__file__).resolve().parents:
    if (parent / "shared" / "data" / "t5x").is_dir():
        FIXTURES = parent / "shared" / "data" / "t5x"
FILE = FIXTURES / "t5x_test_t5_tiny.checkpoint_0"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="T5X's own checkpoints are not beside the project")

CONFIG = dataclasses.replace(CONFIGS["t5"], relative_position_max_distance=128)
FORMATS = ("t5x", "t5x-legacy", "t5x-file")


def tensors_of(params):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: from_array(leaf, stacked="layers" in name) for name, leaf in named.items()}


@pytest.fixture(scope="module")
def params():
    return jax.device_get(random_params(make_policy(CONFIG)))


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5x") / "run"
    write_checkpoint(folder, 4, Network(model=CONFIG), tensors_of(params))
    return folder


@pytest.fixture(scope="module")
def written(run):
    """The same network in each of T5X's formats."""
    for name in FORMATS:
        export_checkpoint(run, run.parent / name, name)
    return run.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_the_same(name, written, params, tmp_path):
    stored = import_checkpoint(written / name, tmp_path / "run")
    assert stored.network.model == CONFIG
    wanted = tensors_of(params)
    assert stored.tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(stored.tensors[key].read(None), tensor.read(None))


def test_the_tree_is_t5xs(written, params):
    """Names and shapes by hand, as t5x/examples/t5/network.py makes them. Only Orbax reads the tree."""
    tree = ocp.StandardCheckpointer().restore((written / "t5x" / "checkpoint_0" / "state").absolute())
    assert tree["state"]["step"] == 0
    target = tree["target"]
    kernel = target["decoder"]["layers_2"]["encoder_decoder_attention"]["query"]["kernel"]
    ours = params["decoder"]["layers"]["encoder_decoder_attention"]["query"]["kernel"][2]
    assert kernel.shape == (12, 2 * 5)
    np.testing.assert_array_equal(kernel[:, 5:], ours[:, 1])
    out = target["encoder"]["layers_1"]["attention"]["out"]["kernel"]
    np.testing.assert_array_equal(out[:5], params["encoder"]["layers"]["attention"]["out"]["kernel"][1, 0])
    np.testing.assert_array_equal(
        target["decoder"]["logits_dense"]["kernel"][:, 3], params["output_embedder"]["embedding"][3]
    )
    assert set(target["decoder"]) == {
        "layers_0", "layers_1", "layers_2", "decoder_norm", "relpos_bias", "logits_dense"
    }  # fmt: skip


def test_every_checkpointer_of_orbax_restores_it(written, params):
    """Without a target they return numpy arrays.

    With a target, as T5X uses it, they return the jax arrays that it asks for.
    """
    folder = (written / "t5x" / "checkpoint_0" / "state").absolute()
    wanted = np.array(params["token_embedder"]["embedding"])
    plain, standard = (maker().restore(folder) for maker in (ocp.PyTreeCheckpointer, ocp.StandardCheckpointer))
    assert jax.tree.structure(plain) == jax.tree.structure(standard)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(standard), strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(plain["target"]["token_embedder"]["embedding"], wanted)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), jax.sharding.PartitionSpec())
    placed = [
        ocp.PyTreeCheckpointer().restore(
            folder, restore_args=jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=sharding), plain)
        ),
        ocp.StandardCheckpointer().restore(
            folder, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), plain)
        ),
    ]
    for tree in placed:
        table = tree["target"]["token_embedder"]["embedding"]
        assert isinstance(table, jax.Array) and table.sharding == sharding
        np.testing.assert_array_equal(table, wanted)


def test_flax_reads_the_file(written, run):
    content = flax.serialization.msgpack_restore((written / "t5x-file").read_bytes())
    assert (content["version"], int(content["optimizer"]["state"]["step"])) == (3, 0)
    found = content["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    np.testing.assert_array_equal(found, open_checkpoint(run).tensors["encoder.layers.mlp.wi_0.kernel"].read(0))


def test_flax_and_tensorstore_read_the_folder(written, run):
    folder = written / "t5x-legacy" / "checkpoint_0"
    content = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    spec = content["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert spec["kvstore"]["path"] == "target.encoder.layers_0.mlp.wi_0.kernel/"
    spec["kvstore"]["path"] = f"{folder}/{spec['kvstore']['path']}"
    found = ts.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(found, open_checkpoint(run).tensors["encoder.layers.mlp.wi_0.kernel"].read(0))


@needs_fixtures
def test_a_file_of_t5xs_own(tmp_path):
    """T5X's tiny T5. Flax reads the whole file, our reader reads it tensor by tensor."""
    wanted = flax.serialization.msgpack_restore(FILE.read_bytes())["optimizer"]
    found = open_tree(FILE)
    flat = flax.traverse_util.flatten_dict(wanted, sep=".")
    assert found.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(found[name].read(None), array)
    stored = import_checkpoint(FILE, tmp_path / "run")
    assert stored.network.model == T5Config("t5", 32128, 8, 2, 2, 4, 3, 16, 32, 128, False)
    query = stored.tensors["decoder.layers.self_attention.query.kernel"].read(1)
    np.testing.assert_array_equal(
        query.reshape(8, 12), wanted["target"]["decoder"]["layers_1"]["self_attention"]["query"]["kernel"]
    )


@needs_fixtures
def test_a_folder_of_t5xs_own():
    """T5X's toy checkpoint stores an optimizer state of a kernel and a bias, and no parameters.

    It has lost its hidden zarr files.
    """
    folder = FIXTURES / "tiny_t5" / "checkpoint_1"
    tensors = open_tree(folder / "checkpoint")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    assert shapes == {
        "state.step": ((), "int32"),
        "state.param_states.step": ((), "int32"),
        "state.param_states.kernel": ((10, 5), "float64"),
        "state.param_states.bias": ((5,), "float32"),
    }
    kernel = tensors["state.param_states.kernel"].read(None)
    np.testing.assert_array_equal(
        kernel.tobytes(), gzip.decompress((folder / "state.param_states.kernel" / "0.0").read_bytes())
    )
    np.testing.assert_array_equal(tensors["state.param_states.bias"].read(None), 1.0)
    with pytest.raises(UserError, match=r"tiny_t5 is no T5 v1.1 of T5X: it has no token_embedder.*it has nothing"):
        open_foreign(FIXTURES / "tiny_t5")


def test_layers_that_t5x_scans(params, tmp_path):
    """In each parameter the second axis is the layers."""
    theirs = exported(tensors_of(params), t5_entries(CONFIG, scanned=True))
    query = theirs["decoder.layers.self_attention.query.kernel"]
    assert query.shape == query.read(None).shape == (12, 3, 10)
    np.testing.assert_array_equal(
        query.read(None)[:, 2, 5:], params["decoder"]["layers"]["self_attention"]["query"]["kernel"][2, :, 1]
    )
    assert theirs["encoder.layers.pre_mlp_layer_norm.scale"].shape == (12, 2)
    state = {f"target.{name}": tensor for name, tensor in theirs.items()}
    write_store(tmp_path / "checkpoint_7" / "state", state)
    stored = import_checkpoint(tmp_path, tmp_path / "run")
    assert stored.network.model == CONFIG
    for name, tensor in tensors_of(params).items():
        np.testing.assert_array_equal(stored.tensors[name].read(None), tensor.read(None))


def test_the_last_checkpoint_of_a_model_is_taken(written, tmp_path):
    for step in (2, 10):
        shutil.copytree(written / "t5x" / "checkpoint_0", tmp_path / f"checkpoint_{step}")
    (tmp_path / "checkpoint_2" / "state" / "manifest.ocdbt").unlink()
    assert open_foreign(tmp_path).model == CONFIG
    with pytest.raises(UserError, match=r"checkpoint_2/state"):
        open_foreign(tmp_path / "checkpoint_2")


def test_tied_embeddings_have_no_logits(tmp_path):
    config = dataclasses.replace(CONFIG, tied_embeddings=True)
    params = random_params(make_policy(config))
    write_checkpoint(tmp_path / "run", 0, Network(model=config), tensors_of(params))
    export_checkpoint(tmp_path / "run", tmp_path / "t5x", "t5x-file")
    assert open_foreign(tmp_path / "t5x").model == config


def damaged(change):
    """Flax's tree of the written file, with its target changed."""

    def make(written, tmp_path):
        content = flax.serialization.msgpack_restore((written / "t5x-file").read_bytes())
        change(content["optimizer"]["target"])
        (tmp_path / "damaged").write_bytes(flax.serialization.msgpack_serialize(content))
        return tmp_path / "damaged"

    return make


def shorten(target):
    target["decoder"]["layers_1"]["mlp"]["wi_1"]["kernel"] = np.zeros((12, 6), np.float32)


def several(target):
    shorten(target)
    del target["encoder"]["layers_0"]["mlp"]["wo"]
    target["encoder"]["layers_0"]["bias"] = np.zeros(4, np.float32)


def rename(target):
    target["encoder"]["relpos"] = target["encoder"].pop("relpos_bias")


DAMAGE = {
    "a wrong shape": (shorten, r"decoder.layers_1.mlp.wi_1.kernel has the shape \(12, 6\), the model has \(12, 7\)$"),
    "several": (
        several,
        r"decoder.layers_1.mlp.wi_1.kernel has .*; encoder.layers_0.bias of the shape \(4,\) is in no place of the "
        r"model; encoder.layers_0.mlp.wo.kernel is missing, the model has it in the shape \(7, 12\)$",
    ),
    "no heads": (rename, r"is no T5 v1.1 of T5X: it has no encoder.relpos_bias.rel_embedding"),
    "a lost layer": (
        lambda target: target["decoder"].pop("layers_1"),
        r"decoder.layers_1.encoder_decoder_attention.key.kernel is missing.*; 10 more$",
    ),
    "heads that do not divide": (
        lambda target: target["encoder"]["relpos_bias"].update(rel_embedding=np.zeros((3, 8), np.float32)),
        "which 3 heads",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_tensor_that_does_not_fit_is_named_before_anything_is_loaded(name, written, tmp_path):
    change, message = DAMAGE[name]
    path = damaged(change)(written, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(path, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_cut_short_names_the_tensor(written, tmp_path):
    content = (written / "t5x-file").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut is cut short: optimizer.target.\S+ has \d+ of its \d+ bytes"):
        import_checkpoint(tmp_path / "cut", tmp_path / "run")


@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_part_of_a_folder_that_is_not_whole_is_named(how, written, tmp_path):
    shutil.copytree(written / "t5x-legacy", tmp_path / "folder")
    part = tmp_path / "folder" / "checkpoint_0" / "target.encoder.encoder_norm.scale" / "0"
    content = part.read_bytes()
    part.unlink()
    if how != "missing":
        part.write_bytes(content[: -5 if how == "cut" else 0])
    with pytest.raises(UserError, match=r"is damaged: target.encoder.encoder_norm.scale has 0 of 1 parts"):
        import_checkpoint(tmp_path / "folder", tmp_path / "run")


def test_a_tensor_that_cannot_be_read_leaves_no_checkpoint(written, tmp_path):
    """A check of sizes cannot find this damage: the file is whole, but some bytes are different."""
    shutil.copytree(written / "t5x-legacy", tmp_path / "folder")
    part = tmp_path / "folder" / "checkpoint_0" / "target.encoder.encoder_norm.scale" / "0"
    content = part.read_bytes()
    part.write_bytes(content[:12] + bytes(reversed(content[12:-4])) + content[-4:])
    with pytest.raises(UserError, match=r"encoder_norm.scale cannot be read"):
        import_checkpoint(tmp_path / "folder", tmp_path / "run")
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(tmp_path / "run")


def test_pieces_of_a_large_array_are_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    (tmp_path / "file").write_bytes(flax.serialization.msgpack_serialize({"a": {"b": array, "c": 3}}))
    tree = read_tree(tmp_path / "file")
    assert tree["a"]["c"] == 3
    assert tree["a"]["b"].shape == (3, 4, 5)
    np.testing.assert_array_equal(tree["a"]["b"].read(None), array)


BAD = {
    "nothing": (None, "does not exist"),
    "text": (b"hello", "is in no known format: the formats are huggingface, t5x, "),
    "empty": (b"", "is in no known format"),
    "numbers": (b"\x81\xa3abc", "is damaged or no file of flax"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_checkpoint(name, tmp_path):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "file", tmp_path / "run")


def test_names_and_folders_that_cannot_be_used(run, written, tmp_path):
    with pytest.raises(UserError, match="format 't5' is unknown: choose one of huggingface, t5x"):
        export_checkpoint(run, tmp_path / "out", "t5")
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(run, tmp_path, "t5x")
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(written / "t5x", tmp_path)
    write_checkpoint(tmp_path / "decoder", 0, Network(model=CONFIGS["decoder"]), decoder_tensors())
    with pytest.raises(UserError, match="the network is a decoder: T5X's format is for T5"):
        export_checkpoint(tmp_path / "decoder", tmp_path / "out", "t5x")


def decoder_tensors():
    return tensors_of(random_params(make_policy(CONFIGS["decoder"])))


def test_an_export_of_a_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    values = json.loads(path.read_text())
    values["custom_metadata"]["network"]["model"]["mlp_width"] = 8
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"wi_0.kernel has the shape \(3, 12, 7\), the model has \(3, 12, 8\)"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", "t5x")
    assert not (tmp_path / "out").exists()


def test_each_says_what_it_holds(run, written):
    facts, tensors = describe(run)
    assert facts["model"]["mlp_width"] == 7
    assert facts["checkpoint"].endswith("run/checkpoints/4")
    assert "decoder.layers.mlp.wo.kernel" in tensors
    for name in FORMATS:
        facts, tensors = describe(written / name)
        assert (facts["format"], facts["model"]["mlp_width"]) == (name, 7)
        assert "decoder.layers_0.mlp.wo.kernel" in tensors
