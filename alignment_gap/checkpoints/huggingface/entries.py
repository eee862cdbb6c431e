"""How a Hugging Face folder stores each parameter of a network: the tensor's name, transposed and reshaped.

A linear map is [outputs, inputs] there and [inputs, outputs] here; here heads have an axis of their own. Embeddings
and norms are the same in both, including norms of the (1 + w) form. GPT-NeoX stores query, key and value in one tensor,
which is split before and joined after the conversion.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.tensors import Entries, Entry, Tensor
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
UNUSED = (
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    "rotary_emb.inv_freq",
    # The causal mask and the value of masked logits, in older folders of GPT-NeoX.
    ".attention.bias",
    ".attention.masked_bias",
)
# GPT-NeoX's tensor of three projections, and the names of its parts here.
_FUSED, _PARTS = "query_key_value", ("query", "key", "value")


def copies_of(model: ModelConfig, head: RewardHead | None = None) -> dict[str, str]:
    """Tied tensors that a folder may store twice: maps the copy's name to the original's name."""
    if head is not None:  # It has no output embedding.
        prefix = _T5_CLASSIFIER if isinstance(model, T5Config) else ""
        return {prefix + copy: prefix + original for copy, original in _COPIES.items()} if prefix else {}
    if isinstance(model, T5Config):
        return _COPIES | ({"lm_head.weight": "shared.weight"} if model.tied_embeddings else {})
    names = _decoder_names(model)
    output, table = names["output_embedder.embedding"], names["token_embedder.embedding"]
    return {output: table} if model.tied_embeddings else {}


def entries_of(model: ModelConfig, head: RewardHead | None = None) -> Entries:
    """How transformers stores every parameter of the policy, or of the reward model, by its dotted name."""
    names = _t5_names() if isinstance(model, T5Config) else _decoder_names(model)
    if head is not None and isinstance(model, T5Config):
        names = {ours: _T5_CLASSIFIER + theirs for ours, theirs in names.items()} | _T5_HEAD
    elif head is not None:
        score = "out_proj" if head.bias else "score"
        names |= {"score.kernel": f"{score}.weight", "score.bias": f"{score}.bias"}
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


def split_fused(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder, with the parts of a fused tensor in its place; a tensor of another size stays."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = 3 * model.heads
        if is_gpt_neox(model) and f".{_FUSED}." in name and tensor.shape[0] % rows == 0:
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            for number, part in enumerate(_PARTS):
                read = functools.partial(_read_part, tensor, model.heads, number)
                found[name.replace(_FUSED, part)] = Tensor(shape, tensor.dtype, read)
        else:
            found[name] = tensor
    return found


def join_fused(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_fused`."""
    if not is_gpt_neox(model):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = re.search(rf"\.({'|'.join(_PARTS)})\.", name)
        if part is None:
            found[name] = tensor
        elif part[1] == _PARTS[0]:
            parts = [tensors[name.replace(_PARTS[0], each)] for each in _PARTS]
            shape = (3 * tensor.shape[0], *tensor.shape[1:])
            read = functools.partial(_read_joined, parts, model.heads)
            found[name.replace(_PARTS[0], _FUSED)] = Tensor(shape, tensor.dtype, read)
    return found


def _read_part(fused: Tensor, heads: int, number: int, _: int | None = None) -> np.ndarray:
    """The rows of one part: each head has its rows of query, then of key, then of value."""
    whole = fused.read(None)
    rows = whole.reshape(heads, len(_PARTS), -1, *whole.shape[1:])
    return np.ascontiguousarray(rows[:, number].reshape(-1, *whole.shape[1:]))


def _read_joined(parts: list[Tensor], heads: int, _: int | None = None) -> np.ndarray:
    each = [part.read(None) for part in parts]
    rows = [array.reshape(heads, -1, *array.shape[1:]) for array in each]
    return np.stack(rows, axis=1).reshape(-1, *each[0].shape[1:])


def is_gpt_neox(model: ModelConfig) -> bool:
    """Whether a folder names the policy's tensors as GPT-NeoX does: of the decoders, it alone has layer norms."""
    return isinstance(model, DecoderConfig) and model.norm == "layer"


def _gpt_neox_names() -> dict[str, str]:
    norms = {"pre_attention_layer_norm": "input_layernorm", "pre_mlp_layer_norm": "post_attention_layernorm"}
    projections = {part: f"attention.{part}" for part in _PARTS} | {
        "out": "attention.dense",
        "mlp.wi": "mlp.dense_h_to_4h",
        "mlp.wo": "mlp.dense_4h_to_h",
    }
    names = {"token_embedder.embedding": "gpt_neox.embed_in.weight", "output_embedder.embedding": "embed_out.weight"}
    for modules, first in ((norms, "scale"), (projections, "kernel")):
        for ours, theirs in modules.items():
            names[f"decoder.layers.{ours}.{first}"] = f"gpt_neox.layers.{{}}.{theirs}.weight"
            names[f"decoder.layers.{ours}.bias"] = f"gpt_neox.layers.{{}}.{theirs}.bias"
    norm = "gpt_neox.final_layer_norm"
    return names | {"decoder.decoder_norm.scale": f"{norm}.weight", "decoder.decoder_norm.bias": f"{norm}.bias"}


def _decoder_names(model: DecoderConfig) -> dict[str, str]:
    if is_gpt_neox(model):
        return _gpt_neox_names()
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
