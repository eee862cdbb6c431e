"""How a Hugging Face folder stores each parameter of a network: the tensor's name, transposed and reshaped.

A linear map is [outputs, inputs] there and [inputs, outputs] here; here heads have an axis of their own. Embeddings
and norms are the same in both, including norms of the (1 + w) form.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.tensors import Entries, Entry
from alignment_gap.models import DecoderConfig, ModelConfig, RewardHead, T5Config

# Copies of tensors that some versions of transformers also write.
_COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
# T5's classifier: the prefix of its policy's tensors, and its head.
_T5_CLASSIFIER = "transformer."
_T5_HEAD = {
    f"score.{ours}.{part}": f"classification_head.{theirs}.{name}"
    for ours, theirs in (("dense", "dense"), ("output", "out_proj"))
    for part, name in (("kernel", "weight"), ("bias", "bias"))
}
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "rotary_emb.inv_freq")


def copies_of(model: ModelConfig, head: RewardHead | None = None) -> dict[str, str]:
    """Tied tensors that a folder may store twice: maps the copy's name to the original's name."""
    if head is not None:  # It has no output embedding.
        prefix = _T5_CLASSIFIER if isinstance(model, T5Config) else ""
        return {prefix + copy: prefix + original for copy, original in _COPIES.items()} if prefix else {}
    if isinstance(model, T5Config):
        return _COPIES | ({"lm_head.weight": "shared.weight"} if model.tied_embeddings else {})
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tied_embeddings else {}


def entries_of(model: ModelConfig, head: RewardHead | None = None) -> Entries:
    """How transformers stores every parameter of the policy, or of the reward model, by its dotted name."""
    names = _t5_names() if isinstance(model, T5Config) else _decoder_names(model)
    if head is not None and isinstance(model, T5Config):
        names = {ours: _T5_CLASSIFIER + theirs for ours, theirs in names.items()} | _T5_HEAD
    elif head is not None:
        names |= {"score.kernel": "score.weight"}
    return {name: _entry(name, names[name], shape) for name, shape in model_shapes(model, head).items()}


def _t5_names() -> dict[str, str]:
    projections = {"query.kernel": "q", "key.kernel": "k", "value.kernel": "v", "out.kernel": "o"}
    mlp = {f"mlp.{name}.kernel": f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")}

    def attention(ours: str, theirs: str) -> dict[str, str]:
        return {f"{ours}.{name}": f"{theirs}.{letter}" for name, letter in projections.items()}

    # The sub-layers of a block, in order: the name of the norm before it, then its projections.
    encoder = [
        ("pre_attention_layer_norm", attention("attention", "SelfAttention")),
        ("pre_mlp_layer_norm", mlp),
    ]
    decoder = [
        ("pre_self_attention_layer_norm", attention("self_attention", "SelfAttention")),
        ("pre_cross_attention_layer_norm", attention("encoder_decoder_attention", "EncDecAttention")),
        ("pre_mlp_layer_norm", mlp),
    ]
    names = {"token_embedder.embedding": "shared", "output_embedder.embedding": "lm_head"}
    for stack, blocks in (("encoder", encoder), ("decoder", decoder)):
        names[f"{stack}.{stack}_norm.scale"] = f"{stack}.final_layer_norm"
        names[f"{stack}.relpos_bias.rel_embedding"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        for place, (norm, sublayer) in enumerate(blocks):
            names[f"{stack}.layers.{norm}.scale"] = f"{stack}.block.{{}}.layer.{place}.layer_norm"
            for ours, theirs in sublayer.items():
                names[f"{stack}.layers.{ours}"] = f"{stack}.block.{{}}.layer.{place}.{theirs}"
    return {ours: f"{theirs}.weight" for ours, theirs in names.items()}


def _decoder_names(model: DecoderConfig) -> dict[str, str]:
    layer = {
        "pre_attention_layer_norm.scale": "input_layernorm",
        "query.kernel": "self_attn.q_proj",
        "key.kernel": "self_attn.k_proj",
        "value.kernel": "self_attn.v_proj",
        "out.kernel": "self_attn.o_proj",
        "query_norm.scale": "self_attn.q_norm",
        "key_norm.scale": "self_attn.k_norm",
        # One name for two norms: the norm after attention if the model has it, else the norm before the MLP.
        "post_attention_layer_norm.scale": "post_attention_layernorm",
        "pre_mlp_layer_norm.scale": "pre_feedforward_layernorm" if model.post_norms else "post_attention_layernorm",
        "post_mlp_layer_norm.scale": "post_feedforward_layernorm",
        "mlp.wi_0.kernel": "mlp.gate_proj",
        "mlp.wi_1.kernel": "mlp.up_proj",
        "mlp.wo.kernel": "mlp.down_proj",
    }
    names = {f"decoder.layers.{ours}": f"model.layers.{{}}.{theirs}.weight" for ours, theirs in layer.items()}
    biases = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    names |= {
        f"decoder.layers.{ours}.bias": f"model.layers.{{}}.self_attn.{name}.bias" for ours, name in biases.items()
    }
    return names | {
        "token_embedder.embedding": "model.embed_tokens.weight",
        "output_embedder.embedding": "lm_head.weight",
        "decoder.decoder_norm.scale": "model.norm.weight",
    }


def _entry(ours: str, theirs: str, shape: tuple[int, ...]) -> Entry:
    """How transformers stores a parameter, by its name: only `out` has heads as inputs."""
    per_layer = "{}" in theirs
    names = tuple(theirs.format(layer) for layer in range(shape[0])) if per_layer else (theirs,)
    shape = shape[1:] if per_layer else shape
    if ours.endswith((".kernel", ".rel_embedding")):
        split = 2 if ours.endswith(".out.kernel") else 1
        linear = (math.prod(shape[split:]), math.prod(shape[:split]))
        back, forth = functools.partial(from_linear, shape), functools.partial(to_linear, linear)
        return Entry(names, linear, back, forth, per_layer)
    there = (math.prod(shape),) if ours.endswith(".bias") else shape
    back, forth = (functools.partial(np.reshape, shape=each) for each in (shape, there))
    return Entry(names, there, back, forth, per_layer)


def from_linear(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Converts a linear map [outputs, inputs] of torch to our shape."""
    return array.T.reshape(shape)


def to_linear(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Converts a linear map of ours to torch's shape [outputs, inputs]."""
    return array.reshape(shape[::-1]).T
