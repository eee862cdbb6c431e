"""Import and export of PEFT adapters without torch; tests/parity compares with peft itself."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignment_gap.checkpoints import Network, known_network, open_checkpoint, read_digest, write_checkpoint
from alignment_gap.checkpoints.adapters import plain_tensors
from alignment_gap.checkpoints.formats import export_checkpoint, import_checkpoint, model_shapes
from alignment_gap.checkpoints.huggingface.configs import FAMILIES
from alignment_gap.checkpoints.layout import METADATA
from alignment_gap.checkpoints.tensors import from_array, shapes_of
from alignment_gap.errors import UserError
from alignment_gap.models import (
    AdapterConfig,
    Adapters,
    DecoderConfig,
    RewardHead,
    abstract_parameters,
    make_policy,
    sizes,
)
from alignment_gap.models.reward_head import without_output
from alignment_gap.sharding import unbox

LLAMA = DecoderConfig(
    **FAMILIES["llama"].model,
    vocabulary_size=13,
    width=12,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=6,
    mlp_width=7,
    tied_embeddings=False,
)
ADAPTER = AdapterConfig(2, alpha=5.0, targets=("query", "out"), dropout=0.25)
PREFIX = "base_model.model.model.layers."


def random_tensors(shapes):
    rng = np.random.default_rng(0)
    return {
        name: from_array(rng.normal(size=shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in shapes.items()
    }


def write_base(folder, model=LLAMA):
    write_checkpoint(folder, 3, Network(model=model, vocabulary="posts"), random_tensors(model_shapes(model)))
    return folder


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def run(base, tmp_path):
    """A run of adapters on the base."""
    adapters = Adapters(make_policy(LLAMA), ADAPTER)
    shapes = shapes_of(unbox(abstract_parameters(adapters.init)))
    step = base / "checkpoints" / "3"
    network = Network(model=LLAMA, adapter=ADAPTER, base=str(step), base_digest=read_digest(step))
    write_checkpoint(tmp_path / "run", 7, network, random_tensors(shapes))
    return tmp_path / "run"


@pytest.fixture
def folder(run, tmp_path):
    export_checkpoint(run, tmp_path / "adapters", "peft")
    return tmp_path / "adapters"


def test_a_folder_is_as_peft_reads_it(run, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5.0, 0.25)
    assert config["target_modules"] == ["o_proj", "q_proj"]
    found = load_file(folder / "adapter_model.safetensors")
    modules = [f"{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "o_proj")]
    assert sorted(found) == sorted(f"{PREFIX}{name}.lora_{part}.weight" for name in modules for part in "AB")
    ours = {name: tensor.read(None) for name, tensor in open_checkpoint(run).tensors.items()}
    query, out = (f"decoder.layers.{name}.kernel" for name in ("query", "out"))
    # Matrix A has a row for each rank, B one for each output; heads and their components share an axis.
    np.testing.assert_array_equal(found[f"{PREFIX}1.self_attn.q_proj.lora_A.weight"], ours[f"{query}.a"][1].T)
    b = found[f"{PREFIX}1.self_attn.q_proj.lora_B.weight"]
    assert b.shape == (24, 2) and b[6 + 5, 1] == ours[f"{query}.b"][1, 1, 1, 5]
    a = found[f"{PREFIX}2.self_attn.o_proj.lora_A.weight"]
    assert a.shape == (2, 24) and a[1, 3 * 6 + 4] == ours[f"{out}.a"][2, 3, 4, 1]


def change_a_weight(step):
    """Writes the checkpoint again with one other weight and the metadata of before."""
    said, tensors = (step / METADATA).read_text(), dict(open_checkpoint(step).tensors)
    name = min(tensors)
    values = tensors[name].read(None) + 1
    others = {each: from_array(tensors[each].read(None), stacked=tensors[each].stacked) for each in tensors}
    network = known_network(step)
    shutil.rmtree(step)
    changed = {name: from_array(values, stacked=tensors[name].stacked)}
    write_checkpoint(step.parents[1], int(step.name), network, others | changed)
    (step / METADATA).write_text(said)


@pytest.mark.parametrize("damaged", ["base", "run"])
def test_damaged_adapters_or_a_damaged_base_are_not_exported(damaged, run, base, tmp_path):
    step = {"base": base / "checkpoints" / "3", "run": run / "checkpoints" / "7"}[damaged]
    change_a_weight(step)
    with pytest.raises(UserError, match=rf"^{step} is damaged \(params are not what was saved\): take another step$"):
        export_checkpoint(run, tmp_path / "merged", "huggingface")
    if damaged == "run":
        with pytest.raises(UserError, match=rf"^{step} is damaged"):
            export_checkpoint(run, tmp_path / "out", "peft")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "out").exists()


def test_what_comes_in_is_what_went_out(run, base, folder, tmp_path):
    again = import_checkpoint(folder, tmp_path / "again", base=base)
    ours = open_checkpoint(run)
    assert again.tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(tensor.read(None), again.tensors[name].read(None))
    targets = ("decoder.out", "decoder.query")
    adapter = again.network.adapter
    assert dataclasses.replace(adapter, targets=tuple(sorted(adapter.targets))) == dataclasses.replace(
        ADAPTER, targets=targets
    )
    assert again.network.base_digest == ours.network.base_digest and again.network.vocabulary == "posts"


def test_the_adapters_of_a_reward_model_come_with_its_head(base, tmp_path):
    """On a policy, whose config.json says which token is padding, and which has an output embedding of its own."""
    head = RewardHead(pad_id=5)
    adapters = Adapters(make_policy(LLAMA), ADAPTER, head)
    tensors = random_tensors(shapes_of(unbox(abstract_parameters(adapters.init))))
    step = base / "checkpoints" / "3"
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "config.json").write_text('{"pad_token_id": 5}')
    network = Network("bradley_terry", without_output(LLAMA), adapter=ADAPTER, head=head)
    network = dataclasses.replace(network, base=str(step), base_digest=read_digest(step))
    write_checkpoint(tmp_path / "run", 7, network, tensors)
    export_checkpoint(tmp_path / "run", tmp_path / "adapters", "peft")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")["base_model.model.score.weight"]
    np.testing.assert_array_equal(stored, tensors["score.kernel"].read(None).T)
    again = import_checkpoint(tmp_path / "adapters", tmp_path / "again", base=base)
    assert again.network.head == head and again.network.kind == "bradley_terry"
    assert again.network.model == network.model and again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(None), again.tensors[name].read(None))
    whole = plain_tensors(again)
    assert whole.keys() == model_shapes(network.model, head).keys()
    np.testing.assert_array_equal(whole["score.kernel"].read(None), tensors["score.kernel"].read(None))
    rewrite(tmp_path / "adapters", modules_to_save=["score", "embed_tokens"])
    with pytest.raises(UserError, match=re.escape("modules_to_save is ['embed_tokens'], which is not supported")):
        import_checkpoint(tmp_path / "adapters", tmp_path / "other", base=base)


def test_the_base_is_found_from_every_folder(base, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = import_checkpoint(Path("adapters"), Path("again"), base=Path("base"))
    assert again.network.base == str(base / "checkpoints" / "3")
    monkeypatch.chdir("/")
    export_checkpoint(tmp_path / "again", tmp_path / "merged", "huggingface")


def rewrite(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


def test_rank_stabilised_scales_become_alpha(base, folder, tmp_path):
    rewrite(folder, use_rslora=True, lora_alpha=3)
    found = import_checkpoint(folder, tmp_path / "again", base=base).network.adapter
    assert found.scale == pytest.approx(3 / 2**0.5)


def refused(folder, tmp_path, **settings):
    with pytest.raises(UserError) as error:
        import_checkpoint(folder, tmp_path / "again", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "again").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', which is not supported: it must be 'LORA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not supported: it must be True"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is [5, 6]"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"r": 0}, "r is 0: it must be at least 1"),
        ({"r": float("inf")}, "r, lora_alpha and lora_dropout must be numbers"),
        ({"r": None}, "r, lora_alpha and lora_dropout must be numbers"),
    ],
)
def test_other_kinds_are_refused_by_their_field(values, message, base, folder, tmp_path):
    rewrite(folder, **values)
    assert message in refused(folder, tmp_path, base=base)


def test_adapters_of_another_base_are_refused_by_their_shapes(folder, tmp_path):
    other = write_base(tmp_path / "other", dataclasses.replace(LLAMA, width=10))
    found = refused(folder, tmp_path, base=other)
    assert "q_proj.lora_A.weight has the shape (2, 12), the model has (2, 10)" in found and "of another model" in found


def test_adapters_of_gpt_neox_have_no_place_in_peft(folder, tmp_path):
    """peft has one adapter for query, key and value."""
    model = sizes.get("pythia_70m", vocabulary_size=13, width=8, layers=1, heads=2, kv_heads=2, head_size=4)
    model = dataclasses.replace(model, mlp_width=5, rotary_size=2)
    base, adapter = write_base(tmp_path / "neox", model), AdapterConfig(2, targets=("query_key_value",))
    shapes = shapes_of(unbox(abstract_parameters(Adapters(make_policy(model), adapter).init)))
    assert {name.split(".")[2] for name in shapes} == {"query", "key", "value"}
    step = base / "checkpoints" / "3"
    network = Network(model=model, adapter=adapter, base=str(step), base_digest=read_digest(step))
    write_checkpoint(tmp_path / "tuned", 7, network, random_tensors(shapes))
    message = "peft has no place for adapters of GPT-NeoX.*: export the merged policy to the format huggingface"
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "tuned", tmp_path / "out", "peft")
    assert "peft has no place for adapters of GPT-NeoX" in refused(folder, tmp_path, base=base)
    export_checkpoint(tmp_path / "tuned", tmp_path / "out", "huggingface")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt_neox"


def test_adapters_of_some_layers_are_refused(base, folder, tmp_path):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: each for name, each in tensors.items() if ".2." not in name}, folder / "adapter_model.safetensors")
    assert f"{PREFIX}2.self_attn.o_proj.lora_A.weight is missing" in (line := refused(folder, tmp_path, base=base))
    assert line.endswith(f"(the base is {base}; --base=RUN names another)")


def test_a_base_is_asked_for_and_is_for_adapters_alone(base, folder, tmp_path):
    assert "give base, the run that they are for, by --base=RUN" in refused(folder, tmp_path)
    with pytest.raises(UserError, match="holds no adapters: choose one of huggingface"):
        export_checkpoint(base, tmp_path / "out", "peft")
    export_checkpoint(base, tmp_path / "whole", "huggingface")
    assert "holds no adapters of PEFT: leave base out" in refused(tmp_path / "whole", tmp_path, base=base)


def test_a_policy_that_no_architecture_computes_has_no_such_folder(folder, tmp_path):
    palm = dataclasses.replace(LLAMA, block="parallel", logits_scale="inverse_sqrt_width")
    other = write_base(tmp_path / "palm", palm)
    assert "no architecture of transformers computes this policy" in refused(folder, tmp_path, base=other)
