"""Every family's folder from transformers gives the same logits here, and there again after an export."""

import copy
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers_harness import our_logits, random_model, reload, their_logits

from alignment_gap.checkpoints import Network, check_entries, imported, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.huggingface import open_foreign, write
from alignment_gap.models import make_policy, score

T5 = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
DECODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA_2 = {"query_pre_attn_scalar": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5}
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}
# Prompts have up to 14 tokens, responses up to 9: more than the short windows, and than llama3's original length.
CASES = {
    "t5_untied": ("T5", {**T5, "tie_word_embeddings": False}),
    "t5_tied": ("T5", {**T5, "tie_word_embeddings": True}),
    "byt5": ("T5", {**T5, "tie_word_embeddings": False, "num_layers": 3, "num_decoder_layers": 1, "vocab_size": 384}),
    "t5_short_positions": (
        "T5",
        {
            **T5,
            "tie_word_embeddings": False,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
    ),
    "mt5": ("MT5", T5),
    "gemma": ("Gemma", {**DECODER, "num_key_value_heads": 1}),
    "gemma2_long_window": ("Gemma2", {**DECODER, **GEMMA_2, "sliding_window": 40}),
    "gemma2_short_window": ("Gemma2", {**DECODER, **GEMMA_2, "sliding_window": 5}),
    "gemma2_no_caps": (
        "Gemma2",
        {**DECODER, "final_logit_softcapping": None, "attn_logit_softcapping": None, "query_pre_attn_scalar": 10},
    ),
    "gemma3": ("Gemma3", {**DECODER, "sliding_window": 4, "layer_types": [SLIDING, SLIDING, FULL]}),
    "gemma3_only_windows": ("Gemma3", {**DECODER, "sliding_window": 30, "query_pre_attn_scalar": 6}),
    "gemma3_linear": (
        "Gemma3",
        {
            **DECODER,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
    "llama_grouped": ("Llama", {**DECODER, "rms_norm_eps": 1e-5}),
    "llama_tied": ("Llama", {**DECODER, "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": None}),
    "llama3_scaling": ("Llama", {**DECODER, "rope_parameters": LLAMA3}),
    "llama_linear": ("Llama", {**DECODER, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {**DECODER, "sliding_window": None}),
    "mistral_windows": ("Mistral", {**DECODER, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**DECODER, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", {**DECODER, "head_dim": 6}),
    "qwen3": ("Qwen3", DECODER),
    "qwen3_windows": (
        "Qwen3",
        {**DECODER, "use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING] * 3},
    ),
}
CASES |= {
    # Of each head of 8, four, two or all components are turned.
    "gpt_neox": ("GPTNeoX", {**NEOX, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt_neox_serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "layer_norm_eps": 1e-3}),
    "gpt_neox_whole": (
        "GPTNeoX",
        {
            **NEOX,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    ),
}
RNG = np.random.default_rng(0)
PROMPT_LENGTHS, RESPONSE_LENGTHS = np.array([14, 1, 6]), np.array([[9, 1], [4, 9], [9, 9]])
PROMPTS = RNG.integers(3, 50, (3, 14)).astype(np.int32)
RESPONSES = RNG.integers(3, 50, (3, 2, 9)).astype(np.int32)


def params_of(tensors):
    params = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(tensor.read(None))
    return params


def through_our_checkpoint(folder, run):
    source = open_foreign(folder)
    check_entries(str(folder), source.tensors, source.entries, source.ignored)
    write_checkpoint(run, 0, Network(model=source.model), imported(source.tensors, source.entries))
    return open_checkpoint(run)


def check_logits(stored, model):
    """Compares logits and log-probs of all rows. Here they are padded to one shape; there each row is alone."""
    policy, params = make_policy(stored.network.model), params_of(stored.tensors)
    arrays = PROMPTS, PROMPT_LENGTHS, RESPONSES
    logits = our_logits(policy, params, *arrays)
    log_probs = jax.jit(lambda p: score(policy, p, *map(jnp.asarray, (*arrays, RESPONSE_LENGTHS))))(params)
    for row, column in np.ndindex(3, 2):
        size = RESPONSE_LENGTHS[row, column]
        response = RESPONSES[row, column, :size]
        theirs = their_logits(model, PROMPTS[row, : PROMPT_LENGTHS[row]], response)
        np.testing.assert_allclose(logits[row, column, :size], theirs, rtol=0, atol=1e-4)
        expected = torch.log_softmax(torch.tensor(theirs), -1).numpy()[np.arange(size), response]
        np.testing.assert_allclose(log_probs[row, column, :size], expected, rtol=0, atol=1e-4)
    assert float(jnp.std(logits)) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_logits_here_and_after_an_export_there(case, tmp_path):
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    stored = through_our_checkpoint(tmp_path / "theirs", tmp_path / "run")
    check_logits(stored, model)
    for name, companions, limit in (("like", tmp_path / "theirs", 8000), ("alone", None, 10**9)):
        write(tmp_path / name, stored.network.model, stored.tensors, companions, limit)
        assert (tmp_path / name / "model.safetensors").exists() == (companions is None)
        again = reload(tmp_path / name)
        theirs, ours = model.state_dict(), again.state_dict()
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            assert torch.equal(tensor, ours[key]), key
        for row in range(3):
            arrays = PROMPTS[row, : PROMPT_LENGTHS[row]], RESPONSES[row, 0]
            # The tensors are equal. The last bits of torch's products depend on where the tensors are in memory.
            logits = their_logits(again, *arrays), their_logits(model, *arrays)
            np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["t5_untied", "gemma3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(case, dtype, tmp_path):
    model = random_model(*CASES[case])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / "theirs")
    check_logits(through_our_checkpoint(tmp_path / "theirs", tmp_path / "run"), model)
