"""The commands of docs/checkpoints.md run in order, then its Python runs."""

import dataclasses
import pathlib
import re

import jax
import pytest
from tiny_models import CONFIGS, random_params

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.formats import export_checkpoint
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.cli import checkpoint
from alignment_gap.models import make_policy

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(CONFIGS["t5"], relative_position_max_distance=128)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(random_params(make_policy(config))))
    tensors = {jax.tree_util.keystr(path, simple=True, separator="."): from_array(leaf) for path, leaf in leaves}
    write_checkpoint(pathlib.Path("run"), 0, Network(model=config), tensors)
    export_checkpoint(pathlib.Path("run"), pathlib.Path("t5x_run"), "t5x")
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines():
        program, _, *arguments = line.split()
        assert program == "alignment-gap"
        checkpoint.main(["alignment-gap checkpoint", *arguments])
    output = capsys.readouterr().out
    count = sum(leaf.size for _, leaf in leaves)
    assert output.count(f" of {count} parameters") == 3
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["policy"].config == config
    assert sum(leaf.size for leaf in jax.tree.leaves(scope["params"])) == count
    assert re.search(r"decoder\.layers\.mlp\.wo\.kernel +float32 +3x7x12", output)
    assert re.search(r"decoder\.layers_2\.mlp\.wo\.kernel +float32 +7x12", output)
