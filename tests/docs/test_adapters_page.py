"""The commands of docs/adapters.md run, with a base and pairs that are as small as possible."""

import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest
from built_in import write_posts

from alignment_gap.checkpoints import Network, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.adapters import plain_tensors
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.huggingface import open_foreign
from alignment_gap.checkpoints.tensors import from_array, imported
from alignment_gap.cli.main import main
from alignment_gap.data.text import load_vocabulary
from alignment_gap.models import T5Config

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
MODEL = T5Config(vocabulary_size=136, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=8, mlp_width=16)
# Shortens the runs of the page.
SHORT = {"train": ["--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=8"], "sample": ["--response_length=4"]}


def read_all(tensors):
    return {name: tensor.read(None) for name, tensor in tensors.items()}


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # The tests have their own cache of compiled functions.
    write_posts(tmp_path / "pairs", 16)
    rng = np.random.default_rng(0)
    tensors = {
        name: from_array(rng.normal(0, 0.1, shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in model_shapes(MODEL).items()
    }
    network = Network(model=MODEL, vocabulary="posts", vocabulary_digest=load_vocabulary("posts").digest)
    write_checkpoint(tmp_path / "sft", 0, network, tensors)
    for command in re.search(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)[1].replace("\\\n", " ").splitlines():
        words = shlex.split(command.replace("=runs/", f"={tmp_path}/"))
        monkeypatch.setattr(sys, "argv", words + SHORT.get(words[1], []))
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0, (command, capsys.readouterr().err)
    trained, again = (open_checkpoint(tmp_path / name) for name in ("lora", "lora_imported"))
    adapters = [each.network.adapter for each in (trained, again)]
    assert {(each.rank, each.alpha, each.dropout) for each in adapters} == {(8, 32.0, 0.0)}
    ours, theirs = read_all(trained.tensors), read_all(again.tensors)
    assert ours.keys() == theirs.keys() and all(name.endswith((".a", ".b")) for name in ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    # The exported kernels are the sums of base and deltas, not the base alone.
    source = open_foreign(tmp_path / "lora_merged")
    found, expected = read_all(imported(source.tensors, source.entries)), read_all(plain_tensors(trained))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    kernel = "decoder.layers.mlp.wo.kernel"
    delta = 4 * np.einsum("lir,lro->lio", ours[f"{kernel}.a"], ours[f"{kernel}.b"])
    np.testing.assert_allclose(found[kernel] - tensors[kernel].read(None), delta, rtol=0, atol=1e-6)
    assert np.abs(delta).max() > 1e-6
    config = json.loads((tmp_path / "lora_peft" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["target_modules"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]


def test_the_table_has_every_setting_with_its_default():
    import dataclasses

    from alignment_gap.models import AdapterConfig

    rows = re.findall(r"^\| `ADAPTER_(\w+)` \| `(\w+)` \| ([^|]+) \|", TEXT, flags=re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(AdapterConfig)}
    assert [name.lower() for name, _, _ in rows] == [field for _, field, _ in rows] == [*fields]
    for _, field, shown in rows:
        default = fields[field]
        assert shown.strip(" `") == (
            "none"
            if default is None
            else f"{default:g}"
            if field in ("alpha", "dropout")
            else str(default).replace("'", '"')
        )
