"""Import and export of Hugging Face reward models without torch; tests/parity compares their scores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_folders import CONFIGS as POLICIES
from huggingface_folders import read_all, reconfigure, rewrite
from safetensors.numpy import load_file, save_file

from alignment_gap.checkpoints import Network, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.formats import describe, export_checkpoint, import_checkpoint, model_shapes
from alignment_gap.checkpoints.huggingface import folder as folder_module
from alignment_gap.checkpoints.huggingface import open_foreign, write
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.errors import UserError
from alignment_gap.models import RewardHead
from alignment_gap.models.reward_head import without_output

HEAD = RewardHead(pad_id=4)
# OpenAssistant's over Pythia: a bias, and the last token whatever it is.
OPEN_ASSISTANT = RewardHead(bias=True)
CONFIGS = {name: without_output(config) for name, config in POLICIES.items() if "tied" not in name}
CLASSES = {
    "t5": "T5ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "mistral without a window": "LlamaForSequenceClassification",  # The two classes compute the same.
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
}


def random_tensors(shapes):
    rng = np.random.default_rng(0)
    return {
        name: from_array(rng.normal(size=shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in shapes.items()
    }


def write_reward_model(folder, name, head=HEAD):
    tensors = random_tensors(model_shapes(CONFIGS[name], head))
    write(folder, CONFIGS[name], tensors, head=head)
    return tensors


@pytest.fixture
def folder(tmp_path):
    """A complete folder of the Llama; tests change it."""
    write_reward_model(tmp_path / "folder", "llama")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_as_it_was(name, tmp_path):
    tensors = write_reward_model(tmp_path / "folder", name)
    values = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (values["architectures"], values["id2label"]) == ([CLASSES[name]], {"0": "LABEL_0"})
    assert open_foreign(tmp_path / "folder").head == HEAD
    model, found = read_all(tmp_path / "folder")
    assert model == CONFIGS[name]
    assert found.keys() == tensors.keys()
    for parameter, tensor in tensors.items():
        np.testing.assert_array_equal(found[parameter], tensor.read(None), err_msg=parameter)


def test_tensors_by_hand(tmp_path):
    ours = write_reward_model(tmp_path / "llama", "llama")
    theirs = load_file(tmp_path / "llama" / "model.safetensors")
    assert theirs["score.weight"].shape == (1, 12)
    np.testing.assert_array_equal(theirs["score.weight"][0], ours["score.kernel"].read(None)[:, 0])
    assert "lm_head.weight" not in theirs
    ours = write_reward_model(tmp_path / "t5", "t5")
    theirs = load_file(tmp_path / "t5" / "model.safetensors")
    dense, output = (theirs[f"classification_head.{name}.weight"] for name in ("dense", "out_proj"))
    np.testing.assert_array_equal(dense, ours["score.dense.kernel"].read(None).T)
    np.testing.assert_array_equal(output, ours["score.output.kernel"].read(None).T)
    np.testing.assert_array_equal(theirs["classification_head.dense.bias"], ours["score.dense.bias"].read(None))
    np.testing.assert_array_equal(theirs["transformer.shared.weight"], ours["token_embedder.embedding"].read(None))
    assert {name.partition(".")[0] for name in theirs} == {"transformer", "classification_head"}


def test_a_reward_model_of_open_assistant(tmp_path):
    ours = write_reward_model(tmp_path / "folder", "gpt_neox", OPEN_ASSISTANT)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")
    np.testing.assert_array_equal(theirs["out_proj.weight"][0], ours["score.kernel"].read(None)[:, 0])
    np.testing.assert_array_equal(theirs["out_proj.bias"], ours["score.bias"].read(None))
    reconfigure(tmp_path / "folder", eos_token_id=7)
    network = import_checkpoint(tmp_path / "folder", tmp_path / "run").network
    assert network == Network("bradley_terry", CONFIGS["gpt_neox"], head=OPEN_ASSISTANT)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "huggingface", companions=tmp_path / "folder")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("folder", "out"))
    assert after == before
    named = ("model_type", "architectures", "pooling", "eos_token_id")
    assert [after[name] for name in named] == ["gpt_neox_reward_model", ["GPTNeoXRewardModel"], "last", 7]
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == again.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_a_reward_model_of_open_assistant_that_reads_the_mean_is_refused(tmp_path):
    write_reward_model(tmp_path / "folder", "gpt_neox", OPEN_ASSISTANT)
    reconfigure(tmp_path / "folder", pooling="mean")
    with pytest.raises(UserError, match=r"pooling is 'mean', which is not supported: it must be 'last'"):
        import_checkpoint(tmp_path / "folder", tmp_path / "run")


def test_copies_of_t5s_embedding_may_be_there(tmp_path):
    write_reward_model(tmp_path / "t5", "t5")

    def change(tensors):
        tensors["transformer.encoder.embed_tokens.weight"] = tensors["transformer.shared.weight"].copy()

    rewrite(tmp_path / "t5", change)
    assert "transformer.encoder.embed_tokens.weight" in open_foreign(tmp_path / "t5").ignored


def test_an_import_is_a_bradley_terry_model_and_goes_out_as_it_came(folder, tmp_path):
    """The export also has the settings that only transformers uses, and the tokenizer's files."""
    reconfigure(folder, final_setting="kept", pad_token_id=7, problem_type="regression")
    (folder / "tokenizer.json").write_text("{}")
    network = import_checkpoint(folder, tmp_path / "run").network
    assert network == Network("bradley_terry", CONFIGS["llama"], head=RewardHead(pad_id=7))
    assert network.preference_model().head == RewardHead(pad_id=7)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "huggingface")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after == {name: value for name, value in before.items() if name != "problem_type"}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    theirs, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert theirs.keys() == again.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_show_tells_a_reward_model(folder):
    facts, _ = describe(folder)
    assert (facts["kind"], facts["head"]["pad_id"]) == ("bradley_terry", 4)


def scores(stored, *texts):
    params = {}
    for name, tensor in stored.tensors.items():
        *path, last = name.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(tensor.read(None))
    model = stored.network.preference_model()
    return jax.jit(lambda p, *a: model.scores(p, *a, labels="rewards"))(params, *texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt_neox"])
def test_a_model_that_was_trained_here_goes_out_with_its_rewards(name, tmp_path):
    """The head is the difference of two rows of the output embedding. The markers stay around the response."""
    tensors = random_tensors(model_shapes(POLICIES[name]))
    write_checkpoint(tmp_path / "run", 0, Network("bradley_terry", POLICIES[name], (12, 11, 10, 9, 8)), tensors)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "huggingface")
    table = "token_embedder" if "tied" in name else "output_embedder"
    rows = tensors[f"{table}.embedding"].read(None)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(theirs["score.weight"], (rows[9] - rows[8])[None])
    assert "lm_head.weight" not in theirs
    again = import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert again.network.head == RewardHead(before=12, after=10)
    rng = np.random.default_rng(0)
    texts = (rng.integers(0, 8, (3, 5)), np.array([5, 1, 3]), rng.integers(0, 8, (3, 2, 4)), np.array([[4, 1]] * 3))
    wanted = scores(open_checkpoint(tmp_path / "run"), *map(jnp.asarray, texts))
    np.testing.assert_allclose(scores(again, *map(jnp.asarray, texts)), wanted, rtol=1e-4, atol=1e-4)
    assert float(jnp.std(wanted)) > 0.1


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "bradley_terry"), ("gemma2", "bradley_terry"), ("llama", "pairwise")]
)
def test_any_other_preference_model_goes_out_as_the_policy_inside(name, kind, tmp_path):
    """T5's classifier reads its texts in another way. Gemma 2 has a cap between the embedding and the logits."""
    tensors = random_tensors(model_shapes(POLICIES[name]))
    write_checkpoint(tmp_path / "run", 0, Network(kind, POLICIES[name], (12, 11, 10, 9, 8)), tensors)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "huggingface")
    assert open_foreign(tmp_path / "out").head is None


MANY = {f"{number}": f"LABEL_{number}" for number in range(3)}
REFUSED = {
    "two labels": ({"id2label": None}, "the model has 2 labels .id2label, num_labels., but a judge needs one reward"),
    "three labels": ({"id2label": MANY}, "the model has 3 labels"),
    "num_labels": ({"id2label": None, "num_labels": 5}, "the model has 5 labels"),
    "OpenAssistant's DeBERTa": (
        {"architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2"},
        "architectures is 'DebertaV2ForSequenceClassification', which is not supported: .*LlamaForSequence",
    ),
    "another head": ({"architectures": ["LlamaForRewardModelWithGating"]}, "'LlamaForRewardModelWithGating', which is"),
    "rewards of tokens": ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification', which"),
    "another family's": ({"model_type": "qwen2"}, "architectures is 'LlamaForSequenceClassification', which is not"),
    "a text for an id": ({"pad_token_id": "0"}, "pad_token_id is '0': it must be of type int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_before_a_tensor_is_read(name, folder, tmp_path):
    changes, message = REFUSED[name]
    reconfigure(folder, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(folder, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_two_rows_of_the_head_or_a_bias_are_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"score.weight": np.zeros((2, 12), np.float32)}))
    with pytest.raises(UserError, match=r"score.weight has the shape \(2, 12\), the model has \(1, 12\)"):
        import_checkpoint(folder, folder.parent / "run")
    rewrite(folder, lambda tensors: tensors.update({"score.bias": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match=r"score.bias of the shape \(1,\) is in no place of the model"):
        import_checkpoint(folder, folder.parent / "run")


def test_the_config_of_a_hub_repository_is_checked_before_its_tensors_are_downloaded(folder, monkeypatch):
    class Hub:
        asked = ()

        @classmethod
        def snapshot_download(cls, name, allow_patterns):
            cls.asked = (*cls.asked, tuple(allow_patterns))
            return str(folder)

    reconfigure(folder, id2label=MANY)
    monkeypatch.setattr(folder_module, "installed", lambda module: Hub)
    with pytest.raises(UserError, match="the model has 3 labels"):
        open_foreign(folder_module.Path("somebody/reward"))
    assert Hub.asked == (("config.json",),)


@pytest.mark.parametrize("format_name", ["t5x", "t5x-legacy", "t5x-file"])
def test_a_head_has_no_place_in_other_formats(format_name, tmp_path):
    write_reward_model(tmp_path / "folder", "t5")
    import_checkpoint(tmp_path / "folder", tmp_path / "run")
    message = f"is a reward model with a head, which {format_name} has no place for: choose huggingface"
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "out", format_name)


def test_a_reward_model_is_no_base_of_peft(folder, tmp_path):
    import_checkpoint(folder, tmp_path / "run")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    save_file({}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is a reward model, whose head replaces the output embedding: give a policy"):
        import_checkpoint(tmp_path / "lora", tmp_path / "adapters", base=tmp_path / "run")


def test_metadata_keep_the_head(folder, tmp_path):
    import_checkpoint(folder, tmp_path / "run")
    network = open_checkpoint(tmp_path / "run").network
    assert network.head == HEAD
    assert dataclasses.replace(network, head=None) != network
