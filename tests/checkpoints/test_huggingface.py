"""Import and export of Hugging Face folders without torch; tests/parity compares with transformers itself."""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from huggingface_folders import CONFIGS, T5, decoder, random_tensors, read_all, reconfigure, rewrite
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignment_gap.checkpoints import Network, imported, open_checkpoint, write_checkpoint
from alignment_gap.checkpoints.formats import import_checkpoint, model_shapes
from alignment_gap.checkpoints.huggingface import open_foreign, recognises, write
from alignment_gap.checkpoints.huggingface.configs import read_config, write_config
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, count_parameters, make_policy, sizes


@pytest.fixture
def folder(tmp_path):
    """A complete folder of the tied Llama; tests damage it."""
    write(tmp_path / "folder", CONFIGS["llama tied"], random_tensors(CONFIGS["llama tied"]))
    return tmp_path / "folder"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_what_is_written_is_read_as_it_was(name, shard_bytes, tmp_path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    write(tmp_path / "folder", config, tensors, None, shard_bytes)
    model, found = read_all(tmp_path / "folder")
    assert model == config
    assert found.keys() == tensors.keys()
    for parameter, tensor in tensors.items():
        np.testing.assert_array_equal(found[parameter], tensor.read(None), err_msg=parameter)


def test_files_are_as_transformers_reads_them(tmp_path):
    config = CONFIGS["gemma"]
    write(tmp_path / "folder", config, random_tensors(config), None, 2000)
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    there = {}
    for file in files:
        with safe_open(tmp_path / "folder" / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = {name: 4 * math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 2000 or len(sizes) == 1
        there |= dict.fromkeys(sizes, file)
    assert there == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * count_parameters(make_policy(config))
    values = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["GemmaForCausalLM"], "gemma")


def test_decoder_tensors_by_hand(tmp_path):
    config, tensors = CONFIGS["qwen2"], random_tensors(CONFIGS["qwen2"])
    write(tmp_path / "folder", config, tensors)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")
    ours = {name: tensor.read(None) for name, tensor in tensors.items()}
    x, heads = np.arange(12.0), np.arange(24.0)
    # Layer 1. A linear map there is weight @ x, and the heads follow one another.
    query = theirs["model.layers.1.self_attn.q_proj.weight"] @ x + theirs["model.layers.1.self_attn.q_proj.bias"]
    by_head = [x @ ours["decoder.layers.query.kernel"][1][:, head] for head in range(4)]
    np.testing.assert_allclose(query.reshape(4, 6), by_head + ours["decoder.layers.query.bias"][1], rtol=1e-5)
    value = theirs["model.layers.1.self_attn.v_proj.weight"] @ x
    np.testing.assert_allclose(value[6:], x @ ours["decoder.layers.value.kernel"][1][:, 1], rtol=1e-5)
    out = theirs["model.layers.1.self_attn.o_proj.weight"] @ heads
    by_head = [heads[6 * head : 6 * head + 6] @ ours["decoder.layers.out.kernel"][1][head] for head in range(4)]
    np.testing.assert_allclose(out, np.sum(by_head, 0), rtol=1e-4)
    gate, up = (theirs[f"model.layers.1.mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
    np.testing.assert_allclose(gate, x @ ours["decoder.layers.mlp.wi_0.kernel"][1], rtol=1e-5)
    np.testing.assert_allclose(up, x @ ours["decoder.layers.mlp.wi_1.kernel"][1], rtol=1e-5)
    norm = "decoder.layers.pre_mlp_layer_norm.scale"
    np.testing.assert_array_equal(theirs["model.layers.1.post_attention_layernorm.weight"], ours[norm][1])
    np.testing.assert_array_equal(theirs["lm_head.weight"], ours["output_embedder.embedding"])


def test_gpt_neox_tensors_by_hand(tmp_path):
    """One tensor has the rows of query, key and value, head by head."""
    config, tensors = CONFIGS["gpt_neox"], random_tensors(CONFIGS["gpt_neox"])
    write(tmp_path / "folder", config, tensors)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")
    ours = {name: tensor.read(None) for name, tensor in tensors.items()}
    x, layer = np.arange(12.0), "gpt_neox.layers.1"
    fused = theirs[f"{layer}.attention.query_key_value.weight"] @ x + theirs[f"{layer}.attention.query_key_value.bias"]
    for head in range(2):
        for place, name in enumerate(("query", "key", "value")):
            here = x @ ours[f"decoder.layers.{name}.kernel"][1][:, head] + ours[f"decoder.layers.{name}.bias"][1][head]
            start = 18 * head + 6 * place
            np.testing.assert_allclose(fused[start : start + 6], here, rtol=1e-5)
    assert not any(f".{name}." in key for key in theirs for name in ("query", "key", "value"))
    wide = theirs[f"{layer}.mlp.dense_h_to_4h.weight"] @ x + theirs[f"{layer}.mlp.dense_h_to_4h.bias"]
    here = x @ ours["decoder.layers.mlp.wi.kernel"][1] + ours["decoder.layers.mlp.wi.bias"][1]
    np.testing.assert_allclose(wide, here, rtol=1e-5)
    heads = ours["decoder.layers.out.kernel"][1].reshape(12, 12)
    np.testing.assert_array_equal(theirs[f"{layer}.attention.dense.weight"], heads.T)
    np.testing.assert_array_equal(theirs[f"{layer}.attention.dense.bias"], ours["decoder.layers.out.bias"][1])
    norm = "decoder.layers.pre_mlp_layer_norm"
    np.testing.assert_array_equal(theirs[f"{layer}.post_attention_layernorm.bias"], ours[f"{norm}.bias"][1])
    np.testing.assert_array_equal(theirs["gpt_neox.final_layer_norm.weight"], ours["decoder.decoder_norm.scale"])
    np.testing.assert_array_equal(theirs["embed_out.weight"], ours["output_embedder.embedding"])


def test_buffers_in_older_folders_of_gpt_neox_are_not_read(tmp_path):
    write(tmp_path / "folder", CONFIGS["gpt_neox"], random_tensors(CONFIGS["gpt_neox"]))
    _, wanted = read_all(tmp_path / "folder")

    def change(tensors):
        tensors["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 8, 8), bool)
        tensors["gpt_neox.layers.0.attention.masked_bias"] = np.full((), -1e9, np.float32)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    rewrite(tmp_path / "folder", change)
    _, found = read_all(tmp_path / "folder")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_fused_tensor_of_another_size_is_named(tmp_path):
    write(tmp_path / "folder", CONFIGS["gpt_neox"], random_tensors(CONFIGS["gpt_neox"]))
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    rewrite(tmp_path / "folder", lambda tensors: tensors.update({fused: np.zeros((35, 12), np.float32)}))
    with pytest.raises(UserError, match=rf"{fused} of the shape \(35, 12\) is in no place of the model"):
        read_all(tmp_path / "folder")


def test_names_of_the_four_norms_of_gemma(tmp_path):
    tensors = random_tensors(CONFIGS["gemma3_text"])
    write(tmp_path / "folder", CONFIGS["gemma3_text"], tensors)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")
    names = {
        "pre_attention_layer_norm": "input_layernorm",
        "post_attention_layer_norm": "post_attention_layernorm",
        "pre_mlp_layer_norm": "pre_feedforward_layernorm",
        "post_mlp_layer_norm": "post_feedforward_layernorm",
        "key_norm": "self_attn.k_norm",
    }
    for ours, name in names.items():
        here = tensors[f"decoder.layers.{ours}.scale"].read(2)
        np.testing.assert_array_equal(theirs[f"model.layers.2.{name}.weight"], here)
    assert "lm_head.weight" not in theirs


def test_t5_tensors_by_hand(tmp_path):
    tensors = random_tensors(T5)
    write(tmp_path / "folder", T5, tensors)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")
    ours = {name: tensor.read(None) for name, tensor in tensors.items()}
    block, x = "decoder.block.2.layer", np.arange(12.0)
    for place, name in enumerate(
        ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm")
    ):
        here = ours[f"decoder.layers.{name}.scale"][2]
        np.testing.assert_array_equal(theirs[f"{block}.{place}.layer_norm.weight"], here)
    key = ours["decoder.layers.encoder_decoder_attention.key.kernel"][2]
    np.testing.assert_allclose(theirs[f"{block}.1.EncDecAttention.k.weight"][5:] @ x, x @ key[:, 1], rtol=1e-5)
    wo = ours["decoder.layers.mlp.wo.kernel"][2]
    np.testing.assert_array_equal(theirs[f"{block}.2.DenseReluDense.wo.weight"], wo.T)
    # There the bias is [buckets, heads], and only the first block has one.
    bias = theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias[31, 1] == ours["encoder.relpos_bias.rel_embedding"][1, 31]
    assert "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in theirs
    np.testing.assert_array_equal(theirs["shared.weight"], ours["token_embedder.embedding"])


def test_t5_without_an_output_embedding_of_its_own(tmp_path):
    # transformers 5 saves a fresh T5 v1.1 like this: the embeddings are tied, but the logits are not scaled.
    write(tmp_path / "folder", T5, random_tensors(T5))
    rewrite(tmp_path / "folder", lambda tensors: tensors.pop("lm_head.weight"))
    reconfigure(tmp_path / "folder", tie_word_embeddings=True, scale_decoder_outputs=False)
    model, found = read_all(tmp_path / "folder")
    assert not model.tied_embeddings
    np.testing.assert_array_equal(found["output_embedder.embedding"], found["token_embedder.embedding"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_precisions_are_read_exactly(dtype, folder, tmp_path):
    half = {name: array.astype(dtype) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    source = open_foreign(folder)
    write_checkpoint(tmp_path / "run", 0, Network(model=source.model), imported(source.tensors, source.entries))
    stored = open_checkpoint(tmp_path / "run").tensors["token_embedder.embedding"]
    assert stored.dtype == "float32"
    np.testing.assert_array_equal(stored.read(None), half["model.embed_tokens.weight"].astype(np.float32))


def test_what_a_policy_does_not_know_is_kept(folder, tmp_path):
    rope = {"rope_scaling": None, "rope_parameters": {"rope_theta": 3.0}}
    reconfigure(folder, eos_token_id=[7, 8], max_position_embeddings=99, **rope)
    companions = {"tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": [7, 8]}'}
    for name, text in companions.items():
        (folder / name).write_text(text)
    (folder / "secret.txt").write_text("not copied")
    model, _ = read_all(folder)
    write(tmp_path / "again", model, random_tensors(model), folder)
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (values["eos_token_id"], values["max_position_embeddings"]) == ([7, 8], 99)
    # Only one notation of a setting is written; two might differ.
    assert (values["rope_theta"], "rope_parameters" in values) == (3.0, False)
    assert {name: (tmp_path / "again" / name).read_text() for name in companions} == companions
    assert not (tmp_path / "again" / "secret.txt").exists()


# The contents of published config.json files, each with its published number of parameters.
PUBLISHED = {
    "flan-t5-small": (
        {
            "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0,
            "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-06, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
            "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False, "vocab_size": 32128,
        },
        76_961_152,
    ),
    "mt5-small": (
        {
            "model_type": "mt5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "feed_forward_proj": "gated-gelu",
            "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False, "vocab_size": 250112,
        },
        300_176_768,
    ),
    "gemma-2b": (
        {
            "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048,
            "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
        },
        2_506_172_416,
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
        },
        999_885_952,
    ),
    "llama-3.1-8b": (
        {
            "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "qwen2.5-0.5b": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        494_032_768,
    ),
    "qwen3-0.6b": (
        {
            "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    "pythia-2.8b": (
        {
            "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 2560, "intermediate_size": 10240,
            "layer_norm_eps": 1e-05, "num_attention_heads": 32, "num_hidden_layers": 32, "rotary_emb_base": 10000,
            "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
        },
        2_775_208_960,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name):
    values, parameters = PUBLISHED[name]
    config = read_config(values, name)
    assert count_parameters(make_policy(config)) == parameters
    written = write_config(config, values)
    assert read_config(written, name) == config
    assert written["model_type"] == values["model_type"]


def test_settings_of_published_configs():
    def read(name):
        return read_config(PUBLISHED[name][0], name)

    gemma2, gemma3, llama = read("gemma-2-2b"), read("gemma-3-1b"), read("llama-3.1-8b")
    assert (gemma2.window, gemma2.full_attention_every) == (4096, 2)
    assert (gemma2.logits_soft_cap, gemma2.attention_soft_cap) == (30.0, 50.0)
    assert (gemma2.embedding_scale, gemma2.norm, gemma2.activation) == ("sqrt_width", "one_plus_scale", "gelu")
    assert (gemma3.window, gemma3.full_attention_every) == (512, 6)
    assert (gemma3.rope_base, gemma3.rope_local_base, gemma3.logits_soft_cap) == (1e6, 1e4, None)
    assert (llama.rope_scaling, llama.rope_scaling_factor, llama.rope_original_length) == ("llama3", 8.0, 8192)
    assert (llama.norm_epsilon, llama.activation, llama.tied_embeddings) == (1e-5, "silu", False)
    assert (read("qwen2.5-0.5b").query_key_value_bias, read("qwen2.5-0.5b").window) == (True, None)
    pythia = read("pythia-2.8b")
    assert pythia == sizes.get("pythia_2.8b")
    assert (pythia.block, pythia.norm, pythia.rotary_size) == ("parallel_two_norms", "layer", 20)
    assert (read("qwen3-0.6b").query_key_norm, read("qwen3-0.6b").head_size) == (True, 128)


def test_rotary_settings_in_the_notation_of_transformers_5():
    values = dict(PUBLISHED["llama-3.1-8b"][0])
    scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
    config = read_config(values | {"rope_parameters": {**scaling, "rope_theta": theta}}, "llama")
    assert config == read_config(PUBLISHED["llama-3.1-8b"][0], "llama")
    values = dict(PUBLISHED["pythia-2.8b"][0])
    base, share = values.pop("rotary_emb_base"), values.pop("rotary_pct")
    parameters = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
    config = read_config(values | {"rope_parameters": parameters}, "pythia")
    assert config == read_config(PUBLISHED["pythia-2.8b"][0], "pythia")
    values = dict(PUBLISHED["gemma-3-1b"][0])
    del values["rope_theta"], values["rope_local_base_freq"]
    full, sliding = {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0}, {"rope_type": "default", "rope_theta": 5}
    config = read_config(values | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}, "gemma")
    assert (config.rope_base, config.rope_local_base, config.rope_scaling_factor) == (7.0, 5.0, 8.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-3.1-8b", {"model_type": "mixtral"}, "model_type is 'mixtral', which is not supported"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.rope_type is 'yarn'.*'llama3'"),
        ("llama-3.1-8b", {"rope_scaling": {"type": "dynamic"}}, r"rope_scaling\.type is 'dynamic'"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "linear"}}, r"no field rope_scaling\.factor"),
        ("llama-3.1-8b", {"attention_bias": True}, "attention_bias is True, which is not supported: it must be False"),
        ("llama-3.1-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama-3.1-8b", {"hidden_act": "relu"}, "hidden_act is 'relu', which is not supported: it must be 'silu'"),
        ("llama-3.1-8b", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama-3.1-8b", {"hidden_size": "4096"}, "hidden_size is '4096': it must be of type int"),
        ("qwen2.5-0.5b", {"use_sliding_window": True, "max_window_layers": 12}, "layer_types is .* not supported"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("pythia-2.8b", {"attention_bias": False}, "attention_bias is False, which is not supported: it must be True"),
        ("pythia-2.8b", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', which is not supported"),
        ("pythia-2.8b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is "),
        ("pythia-2.8b", {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.rope_type is 'linear'"),
        ("flan-t5-small", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'.*'gated-gelu'"),
        ("flan-t5-small", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
    ],
)
def test_a_config_that_no_policy_computes_is_refused_by_its_field(name, change, message):
    with pytest.raises(UserError, match=f"^path: .*{message}|^path has {message}"):
        read_config(PUBLISHED[name][0] | change, "path")


def test_a_config_without_a_size_is_refused():
    values = {name: value for name, value in PUBLISHED["gemma-2b"][0].items() if name != "vocab_size"}
    with pytest.raises(UserError, match="path has no field vocab_size: it is no complete config of its model_type"):
        read_config(values, "path")


def test_a_policy_that_no_architecture_computes_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no architecture of transformers computes this policy: .*block"):
        write_config(DecoderConfig())
    mixed = decoder("qwen2", query_key_norm=True)
    with pytest.raises(UserError, match=r"qwen. is the nearest and differs in query_key_(norm|value_bias) \(True here"):
        write_config(mixed)


def test_every_tensor_that_does_not_fit_is_named_with_both_shapes(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((12, 7), np.float32)
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        read_all(folder)
    for part in (
        r"model.norm.weight is missing, the model has it in the shape (12,)",
        r"model.layers.1.mlp.up_proj.weight has the shape (12, 7), the model has (7, 12)",
        r"model.layers.1.self_attn.q_proj.bias of the shape (24,)",
    ):
        assert part in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_a_copy_of_a_tied_tensor_may_be_there_if_it_is_one(folder):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(folder, change)
    assert read_all(folder)[1].keys() == random_tensors(CONFIGS["llama tied"]).keys()
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 5))
    message = r"lm_head.weight of the shape \(13, 12\) differs from model.embed_tokens.weight of the shape \(13, 12\)"
    with pytest.raises(UserError, match=message):
        open_foreign(folder)


def test_a_file_that_was_cut_short_names_its_first_tensor_that_is_not_there(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"is cut short: \S+ of the shape \(.*\) ends at byte \d+ of its \d+"):
        open_foreign(folder)
    (folder / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(UserError, match="is no file of safetensors"):
        open_foreign(folder)


def test_quantised_tensors_are_refused_by_name(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(12, np.int8)}))
    with pytest.raises(UserError, match=r"model.norm.weight of the shape \(12,\) is I8, which is not supported"):
        open_foreign(folder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors .*there is pytorch_model.bin: save it again"):
        open_foreign(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is missing, which has model.norm.weight"):
        open_foreign(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        open_foreign(folder)


def test_a_hub_id_without_a_network_is_one_line(folder, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert recognises(folder)
    assert recognises(Path("google/flan-t5-none"))
    assert not recognises(Path("a/folder/that/is/not/there"))
    with pytest.raises(UserError, match="google/flan-t5-none is no folder, and the hub does not give it") as error:
        open_foreign(Path("google/flan-t5-none"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_import_takes_less_than_twice_the_largest_file(tmp_path):
    """The checkpoint has 200 MB in files of 21 MB. A stack of all layers is larger than two files."""
    config = decoder("llama", width=512, layers=32, heads=8, kv_heads=8, head_size=64, mlp_width=1280)
    tiny = dataclasses.replace(config, layers=1, width=16, head_size=2, mlp_width=8)
    for name, model in (("tiny", tiny), ("large", config)):
        shapes = model_shapes(model)
        zeros = {
            parameter: from_array(np.broadcast_to(np.float32(1), shape), stacked="layers" in parameter.split("."))
            for parameter, shape in shapes.items()
        }
        write(tmp_path / name, model, zeros, None, 21_000_000)
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert sum(files) > 9 * max(files)
    assert 2 * max(files) < 4 * 32 * 512 * 1280
    script = """
        import resource, sys
        from pathlib import Path
        from alignment_gap.checkpoints.formats import import_checkpoint

        def peak(name):
            folder = Path(sys.argv[1])
            import_checkpoint(folder / name, folder / ("run" + name), "huggingface")
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        print(peak("tiny"), peak("large"))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    baseline, peak = map(int, subprocess.run(arguments, check=True, capture_output=True).stdout.split())
    assert peak - baseline < 2 * max(files)


def in_two_files(folder):
    """Splits the folder's tensors over two files; the second one also has an old copy of a tensor of the first."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, there in parts.items():
        old = {names[0]: tensors[names[0]] + 1} if file == "b.safetensors" else {}
        save_file({name: tensors[name] for name in there} | old, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, there in parts.items() for name in there}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_a_tensor_comes_from_the_file_that_the_index_names(folder):
    _, wanted = read_all(folder)
    in_two_files(folder)
    (folder / "model.safetensors").unlink()
    _, found = read_all(folder)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_single_file_goes_before_an_index_as_in_transformers(folder):
    tensors = in_two_files(folder)
    save_file({name: array + 2 for name, array in tensors.items()}, folder / "model.safetensors")
    found = open_foreign(folder).tensors
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name].read(None), array + 2)


@pytest.mark.parametrize("weight_map", [None, [], 3, {"model.norm.weight": 3}])
def test_an_index_without_files_is_one_line(weight_map, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        UserError, match=r"index\.json: weight_map does not map tensors to files: fetch the folder again$"
    ):
        open_foreign(folder)


def test_deeply_nested_json_is_one_line(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read \(.*\): give a folder that has it$"):
        open_foreign(folder)


def test_a_tokenizer_that_cannot_be_read_leaves_no_folder(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")

    def fail(_):
        raise UserError("no tokenizer")

    with pytest.raises(UserError, match="no tokenizer"):
        import_checkpoint(folder, tmp_path / "run", tokenizer_digest=fail)
    assert not (tmp_path / "run").exists()
