"""All formats together: which format a path has, which files go with the tensors, and what a failed export leaves."""

import dataclasses
import itertools
import json
import shutil

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies
from tiny_models import CONFIGS, random_params

from alignment_gap.checkpoints import (
    Network,
    find_checkpoint,
    known_network,
    open_checkpoint,
    read_network,
    tokenizer_of,
    write_checkpoint,
)
from alignment_gap.checkpoints import layout as layout_module
from alignment_gap.checkpoints.formats import FORMATS, _module, describe, export_checkpoint, import_checkpoint
from alignment_gap.checkpoints.layout import METADATA, check_parts, write_store
from alignment_gap.checkpoints.t5x import last_step
from alignment_gap.checkpoints.tensors import Tensor, from_array
from alignment_gap.errors import UserError
from alignment_gap.models import make_policy

CONFIG = dataclasses.replace(CONFIGS["t5"], encoder_layers=1, decoder_layers=1, relative_position_max_distance=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints of a T5. Next to it, the last one in every format."""
    folder = tmp_path_factory.mktemp("formats") / "run"
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(random_params(make_policy(CONFIG))))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    for step in (2, 10):
        tensors = {name: from_array(leaf * step, stacked="layers" in name) for name, leaf in named.items()}
        write_checkpoint(folder, step, Network(model=CONFIG), tensors)
    for name in FORMATS:
        export_checkpoint(folder, folder.parent / name, name)
    return folder


def test_each_format_is_recognised_as_itself_alone(run):
    for name in FORMATS:
        assert [other for other in FORMATS if _module(other).recognises(run.parent / name)] == [name]
    for path in (run, run / "checkpoints" / "10", run.parent, run.parent / "nowhere"):
        assert not any(_module(name).recognises(path) for name in FORMATS), path


def test_the_step_that_is_asked_for_is_exported(run, tmp_path):
    export_checkpoint(run, tmp_path / "two", "t5x-file", 2)
    for path, step in ((tmp_path / "two", 2), (run.parent / "t5x-file", 10)):
        stored = import_checkpoint(path, tmp_path / f"run{step}")
        wanted = open_checkpoint(run, step).tensors["encoder.layers.mlp.wo.kernel"].read(None)
        np.testing.assert_array_equal(stored.tensors["encoder.layers.mlp.wo.kernel"].read(None), wanted)


@pytest.mark.parametrize("name", ["huggingface", "t5x-file"])
def test_what_a_failed_export_left_is_replaced(name, run, tmp_path):
    """One format writes a folder, the other one file."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half of it")
    export_checkpoint(run, tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert describe(tmp_path / "out")[0]["format"] == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", ["params", "network"])
def test_a_damaged_checkpoint_is_not_exported(name, damage, run, tmp_path):
    """All files are whole, but one weight or one setting is not what was saved."""
    step = tmp_path / "run" / "checkpoints" / "10"
    shutil.copytree(run / "checkpoints" / "10", step)
    said = (step / METADATA).read_text()
    if damage == "params":
        tensors = dict(open_checkpoint(run, 10).tensors)
        last = max(tensors)
        values = tensors[last].read(None).copy()
        values.reshape(-1)[-1] += 1
        shutil.rmtree(step)
        tensors[last] = from_array(values, stacked=tensors[last].stacked)
        write_checkpoint(tmp_path / "run", 10, Network(model=CONFIG), tensors)
    else:
        said = said.replace('"relative_position_max_distance": 128', '"relative_position_max_distance": 129')
    (step / METADATA).write_text(said)
    with pytest.raises(UserError, match=rf"10 is damaged \({damage} are not what was saved\): take another step$"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_without_digests_is_exported(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "10", tmp_path / "run" / "checkpoints" / "10")
    metadata = tmp_path / "run" / "checkpoints" / "10" / METADATA
    said = json.loads(metadata.read_text())
    del said["custom_metadata"]["digests"]
    metadata.write_text(json.dumps(said))
    export_checkpoint(tmp_path / "run", tmp_path / "out", "t5x-file")
    assert (tmp_path / "out").read_bytes() == (run.parent / "t5x-file").read_bytes()


def test_files_of_a_tokenizer_go_in_and_out_with_the_parameters(run, tmp_path):
    shutil.copytree(run.parent / "huggingface", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "notes.txt").write_text("")
    asked = []

    def digest(folder):
        asked.append(sorted(path.name for path in folder.iterdir()))
        return "0123"

    stored = import_checkpoint(tmp_path / "theirs", tmp_path / "run", tokenizer_digest=digest)
    tokenizer = tmp_path / "run" / "tokenizer"
    assert asked == [["config.json", "tokenizer.json"]] and tokenizer_of(stored.folder) == tokenizer
    assert (stored.network.vocabulary, stored.network.vocabulary_digest) == (str(tokenizer), "0123")
    export_checkpoint(tmp_path / "run", tmp_path / "again", "huggingface")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    # If nothing can read the tokenizer, the vocabulary is unknown, but the files are kept.
    other = import_checkpoint(tmp_path / "theirs", tmp_path / "other")
    assert other.network.vocabulary is None and tokenizer_of(other.folder) is not None
    assert tokenizer_of(find_checkpoint(run)) is None
    with pytest.raises(UserError, match=r"nothing is no folder: give the one that holds the tokenizer's files"):
        export_checkpoint(run, tmp_path / "third", "huggingface", companions=tmp_path / "nothing")


def test_a_checkpoint_from_before_networks_were_kept_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "10" / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    assert read_network(path.parent) is None
    assert describe(tmp_path / "run")[0] == {"checkpoint": str(path.parent), "network": "it does not say"}
    with pytest.raises(UserError, match=r"10 does not say what network it holds, .*: give MODEL"):
        known_network(path.parent)
    with pytest.raises(UserError, match="10 does not say what network it holds"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", "t5x")
    # The earlier step still names its network.
    assert read_network(find_checkpoint(tmp_path / "run", 2)).model == CONFIG


def test_unfinished_checkpoints_are_no_steps(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("12.orbax-checkpoint-tmp", "11_notes", "latest"):
        (checkpoints / name).mkdir()
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(checkpoints) == checkpoints / "10"
    with pytest.raises(UserError, match="no checkpoint of step 12: choose one of 2, 10, or none for the last"):
        find_checkpoint(tmp_path / "run", 12)
    # The unfinished checkpoint is written again.
    (checkpoints / "12.orbax-checkpoint-tmp" / "params").mkdir()
    write_checkpoint(tmp_path / "run", 12, Network(model=CONFIG), {"w": from_array(np.ones(2, np.float32))})
    assert find_checkpoint(tmp_path / "run").name == "12" and len(list(checkpoints.glob("12*"))) == 1


def test_the_last_of_t5xs_steps_is_that_of_the_largest_number(tmp_path):
    for name in ("checkpoint_9", "checkpoint_100", "checkpoint_20", "checkpoint_500.tmp", "checkpoint_x"):
        (tmp_path / name).mkdir()
    assert last_step(tmp_path) == tmp_path / "checkpoint_100"
    assert last_step(tmp_path / "checkpoint_9") == tmp_path / "checkpoint_9"


def test_a_bias_in_each_layer_is_another_t5(tmp_path):
    """T5X's scalable T5 has a position bias in each layer; its t5_1_1 shares one bias between layers."""
    name = "target.encoder.layers_0.relative_posemb.rel_embedding"
    write_store(tmp_path / "checkpoint_1" / "state", {name: from_array(np.ones((2, 8), np.float32))})
    with pytest.raises(UserError, match=r"relative position bias in each layer, .*, but T5 here shares one for all"):
        import_checkpoint(tmp_path, tmp_path / "run")


def test_lost_parts_are_counted_and_four_are_shown():
    parts = {"whole": (3, 3)} | {f"w{i}": (i, 9) for i in range(6)}
    shown = "w0 has 0 of 9 parts; w1 has 1 of 9 parts; w2 has 2 of 9 parts; w3 has 3 of 9 parts; 2 more"
    with pytest.raises(UserError, match=f"^run is damaged: {shown}$"):
        check_parts("run", parts)
    check_parts("run", {"whole": (3, 3), "more than whole": (4, 3)})


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    shape=strategies.lists(strategies.integers(1, 9), max_size=4).map(tuple), stacked=strategies.booleans()
)
def test_chunks_are_small_and_cover_a_tensor_once(shape, stacked):
    """A chunk has at most 48 bytes; a number takes four."""
    stacked = stacked and len(shape) > 1
    tensor = Tensor(shape, "float32", lambda layer: np.zeros(shape), stacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "LARGEST_CHUNK", 48)
        chunk = layout_module._chunk_shape(tensor, 4)
    assert len(chunk) == len(shape) and 4 * np.prod(chunk, dtype=int) <= 48
    assert not stacked or chunk[0] == 1
    count = np.zeros(shape, int)
    for part in layout_module._parts(shape, chunk):
        count[part] += 1
        assert all(edge.stop - edge.start <= size for edge, size in zip(part, chunk, strict=True))
    assert (count == 1).all()
    whole = itertools.product(*(range(-(-size // part)) for size, part in zip(shape, chunk, strict=True)))
    assert len(list(layout_module._parts(shape, chunk))) == len(list(whole))
