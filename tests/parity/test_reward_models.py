"""Reward models from transformers give the same scores here, and there again after an export."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_transformers import DECODER, GEMMA_2, LLAMA3, NEOX, SLIDING, T5, params_of
from transformers_harness import random_model, reload, their_rewards

from alignment_gap.checkpoints import Network, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.formats import export_checkpoint, import_checkpoint, model_shapes
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.models import DecoderConfig

PAD, EOS = 0, 2
ONE = {"num_labels": 1}
CASES = {
    "t5": ("T5Classifier", {**T5, **ONE, "eos_token_id": EOS, "pad_token_id": PAD}),
    "t5_uneven": ("T5Classifier", {**T5, **ONE, "eos_token_id": EOS, "num_decoder_layers": 1, "num_layers": 3}),
    "mt5": ("MT5Classifier", {**T5, **ONE, "eos_token_id": EOS, "pad_token_id": PAD}),
    "llama": ("LlamaClassifier", {**DECODER, **ONE, "rope_parameters": LLAMA3}),
    "llama_pad_is_end": ("LlamaClassifier", {**DECODER, **ONE, "pad_token_id": EOS}),
    "llama_without_pad": ("LlamaClassifier", {**DECODER, **ONE, "pad_token_id": None}),
    "mistral": ("MistralClassifier", {**DECODER, **ONE, "sliding_window": 5}),
    "qwen2": ("Qwen2Classifier", {**DECODER, **ONE, "head_dim": 6}),
    "qwen3": ("Qwen3Classifier", {**DECODER, **ONE}),
    "gemma": ("GemmaClassifier", {**DECODER, **ONE, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Classifier", {**DECODER, **ONE, **GEMMA_2, "sliding_window": 5}),
    "gemma3": ("Gemma3Classifier", {**DECODER, **ONE, "sliding_window": 4, "layer_types": [SLIDING] * 3}),
    "gpt_neox": ("GPTNeoXClassifier", {**NEOX, **ONE}),
    "open_assistant": ("OpenAssistant", NEOX),
}
RNG = np.random.default_rng(0)
PROMPT_LENGTHS, LENGTHS = np.array([14, 1, 6]), np.array([[9, 1], [4, 9], [2, 7]])
PROMPTS = RNG.integers(3, 50, (3, 14)).astype(np.int32)
RESPONSES = RNG.integers(3, 50, (3, 2, 9)).astype(np.int32)
np.put_along_axis(RESPONSES, LENGTHS[..., None] - 1, EOS, axis=2)  # Every response ends.
TEXTS = [
    np.concatenate([PROMPTS[i, : PROMPT_LENGTHS[i]], RESPONSES[i, k, : LENGTHS[i, k]]]) for i, k in np.ndindex(3, 2)
]


def rewards_here(stored):
    """The rewards [3, 2] of the padded texts."""
    return rewards_of(stored.network.preference_model(), params_of(stored.tensors))


def rewards_of(model, params):
    arrays = map(jnp.asarray, (PROMPTS, PROMPT_LENGTHS, RESPONSES, LENGTHS))
    return np.asarray(jax.jit(lambda p, *a: model.scores(p, *a, labels="rewards"))(params, *arrays))


@pytest.mark.parametrize("case", CASES)
def test_scores_here_and_after_an_export_there(case, tmp_path):
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    stored = import_checkpoint(tmp_path / "theirs", tmp_path / "run")
    theirs = np.array([their_rewards(model, [text], PAD)[0] for text in TEXTS])
    ours = rewards_here(stored).reshape(-1)
    difference = np.abs(ours - theirs).max()
    print(f"{case}: scores differ by at most {difference:.1e}, their deviation is {theirs.std():.2f}")
    assert difference < 1e-5
    assert theirs.std() > 0.02
    # transformers reads all rows in one batch, padded on the right.
    if model.config.pad_token_id is not None:
        np.testing.assert_allclose(ours, their_rewards(model, TEXTS, model.config.pad_token_id), rtol=0, atol=1e-5)
    export_checkpoint(tmp_path / "run", tmp_path / "exported", "huggingface")
    again = reload(tmp_path / "exported")
    for (key, tensor), (other, copy) in zip(
        sorted(model.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert key == other and torch.equal(tensor, copy), key
    np.testing.assert_allclose(their_rewards(again, TEXTS[:1], PAD), theirs[:1], rtol=0, atol=1e-5)
    assert again.config.pad_token_id == model.config.pad_token_id
    assert type(again) is type(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_trained_here_gives_its_rewards_there(tied, tmp_path):
    """transformers reads the prompt, the first marker, the response and the question."""
    sizes = {"vocabulary_size": 50, "width": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_size": 10}
    config = DecoderConfig(**sizes, mlp_width=20, block="serial", logits_scale="one", tied_embeddings=tied)
    tensors = {
        name: from_array(RNG.normal(scale=0.5, size=shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in model_shapes(config).items()
    }
    network = Network("bradley_terry", config, (49, 48, 47, 46, 45))
    write_checkpoint(tmp_path / "run", 0, network, tensors)
    ours = rewards_here(open_checkpoint(tmp_path / "run"))
    export_checkpoint(tmp_path / "run", tmp_path / "exported", "huggingface")
    model = reload(tmp_path / "exported")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    for i, k in np.ndindex(3, 2):
        prompt, response = PROMPTS[i, : PROMPT_LENGTHS[i]], RESPONSES[i, k, : LENGTHS[i, k]]
        text = np.concatenate([prompt, [49], response, [47]])
        np.testing.assert_allclose(their_rewards(model, [text], PAD)[0], ours[i, k], rtol=0, atol=1e-5)
    again = import_checkpoint(tmp_path / "exported", tmp_path / "again")
    np.testing.assert_allclose(rewards_here(again), ours, rtol=0, atol=1e-5)
    assert ours.std() > 0.02
