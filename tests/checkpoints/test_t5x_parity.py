"""With T5X installed: it reads our checkpoints, we read its own, and both networks give the same logits."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS, make_batch, random_params

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.formats import export_checkpoint, open_foreign
from alignment_gap.checkpoints.tensors import from_array, imported
from alignment_gap.models import make_policy, response_hidden

pytestmark = pytest.mark.skipif(importlib.util.find_spec("t5x") is None, reason="T5X is not installed")

FORMATS = ("t5x", "t5x-legacy", "t5x-file")
READER = pathlib.Path(__file__).parent / "t5x_reader.py"
# T5X's network always has these two values.
CONFIG = dataclasses.replace(CONFIGS["t5"], relative_position_buckets=32, relative_position_max_distance=128)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(random_params(make_policy(CONFIG)))


@pytest.fixture(scope="module")
def batch():
    """One response for each prompt, longer than the exact position buckets. T5X reads id 0 as padding."""
    batch = make_batch(3, responses=1, prompt_length=40, response_length=24)
    prompts = np.maximum(batch.prompts, 1) * (np.arange(40) < batch.prompt_lengths[:, None])
    responses = np.maximum(batch.responses, 1)
    return prompts, np.asarray(batch.prompt_lengths), responses, np.full((3, 1), 24)


@pytest.fixture(scope="module")
def exchanged(params, batch, tmp_path_factory):
    """The folder after T5X has read our checkpoints."""
    folder = tmp_path_factory.mktemp("t5x")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = {jax.tree_util.keystr(path, simple=True, separator="."): from_array(leaf) for path, leaf in leaves}
    tensors = {name: tensor._replace(stacked="layers" in name) for name, tensor in tensors.items()}
    write_checkpoint(folder / "run", 0, Network(model=CONFIG), tensors)
    for name in FORMATS:
        export_checkpoint(folder / "run", folder / name, name)
    prompts, _, responses, _ = batch
    targets = responses[:, 0]
    np.savez(folder / "batch.npz", prompts=prompts, inputs=np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets=targets)
    sizes = {"vocab_size": 13, "emb_dim": 12, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 3}
    (folder / "sizes.json").write_text(json.dumps(sizes | {"head_dim": 5, "mlp_dim": 7}))
    result = subprocess.run([sys.executable, str(READER), str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_t5x_reads_what_we_wrote_and_its_logits_are_ours(name, exchanged, params, batch):
    policy = make_policy(CONFIG)
    prompts, prompt_lengths, responses, _ = batch
    hidden = response_hidden(policy, params, prompts, prompt_lengths, responses)
    output = policy.output(params)
    ours = output.scale * np.asarray(hidden[:, 0]) @ np.asarray(output.embedding).T
    theirs = np.load(exchanged / f"logits-{name}.npy")
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["by-t5x", "by-t5x-legacy"])
def test_we_read_what_t5x_wrote(name, exchanged, params):
    source = open_foreign(exchanged / name)
    assert source.model == CONFIG
    tensors = imported(source.tensors, source.entries)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == len(tensors)
    for path, leaf in leaves:
        found = tensors[jax.tree_util.keystr(path, simple=True, separator=".")]
        np.testing.assert_array_equal(found.read(None), leaf)
