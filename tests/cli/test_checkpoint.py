"""`alignment-gap checkpoint`: export, import, show, and one line for every wrong input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from alignment_gap.checkpoints import Network
from alignment_gap.cli import checkpoint
from alignment_gap.errors import UserError
from alignment_gap.models import T5Config, make_policy
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import (
    Checkpoints,
    OptimizerConfig,
    abstract_state,
    load_policy,
    make_optimizer,
    state_from_params,
)

CONFIG = T5Config(vocabulary_size=40, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=8, mlp_width=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with one checkpoint, of step 3."""
    folder, policy = tmp_path_factory.mktemp("checkpoint") / "run", make_policy(CONFIG)
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OptimizerConfig())
    abstract = abstract_state(policy.init, optimizer, mesh)
    params = jax.device_put(random_params(policy), jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
    state = dataclasses.replace(state_from_params(params, abstract, optimizer), step=jnp.int32(3))
    with Checkpoints(folder / "checkpoints", Network("policy", CONFIG)) as checkpoints:
        checkpoints.save(state)
    return folder


def command(*words):
    checkpoint.main(["alignment-gap checkpoint", *map(str, words)])


@pytest.mark.slow
def test_out_and_in_again_it_is_the_same_policy(run, tmp_path, capsys):
    command("export", f"--checkpoint={run}", "--format=t5x", f"--output={tmp_path / 't5x'}")
    assert capsys.readouterr().out == f"{tmp_path / 't5x'}\n"
    command("import", f"--from={tmp_path / 't5x'}", f"--output={tmp_path / 'again'}")
    assert "tensors of" in capsys.readouterr().out
    mesh = make_mesh(MeshConfig())
    ours, theirs = (load_policy(folder, mesh)[1] for folder in (run, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def test_show_counts_the_parameters(run, capsys):
    command("show", run)
    shown = capsys.readouterr().out
    params = jax.eval_shape(make_policy(CONFIG).init, jax.random.key(0))
    count = sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(params))
    assert f"of {count} parameters" in shown and "float32" in shown
    assert any(line.split()[0] == "model.width" and line.split()[1] == "16" for line in shown.splitlines() if line)


BAD = {
    "command": (["imprt"], r"unknown command checkpoint 'imprt': did you mean import\?"),
    "no source": (["import", "--output=x"], "--from is not set"),
    "no output": (["import", "--from=x"], "--output is not set"),
    "source": (["import", "--from=nowhere", "--output=x"], "nowhere"),
    "format": (["export", "--checkpoint=RUN", "--format=onnx", "--output=x"], "onnx"),
    "step": (["export", "--checkpoint=RUN", "--format=t5x", "--step=4", "--output=x"], "4"),
    "no path": (["show"], "checkpoint show needs the path of a checkpoint"),
    "two paths": (["show", "a", "b"], "unexpected argument 'b'"),
    "path": (["show", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, run, tmp_path, monkeypatch):
    words, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        command(*(word.replace("RUN", str(run)) for word in words))
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()
