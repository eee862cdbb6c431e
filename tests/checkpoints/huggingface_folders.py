"""Folders of every family of transformers, as small as possible, and functions that change them."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import load_file, save_file

from alignment_gap.checkpoints import check_entries, imported
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.huggingface import open_foreign
from alignment_gap.checkpoints.huggingface.configs import FAMILIES, GPT_NEOX, OF_GPT_NEOX
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.models import DecoderConfig, T5Config

T5 = T5Config(
    vocabulary_size=13, width=12, encoder_layers=2, decoder_layers=3, heads=2, head_size=5, mlp_width=7
)  # fmt: skip
SIZES = {
    "vocabulary_size": 13,
    "width": 12,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 6,
    "mlp_width": 7,
    "tied_embeddings": False,
}
LLAMA3 = {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_low_frequency_factor": 2.0}
LINEAR = {"rope_scaling": "linear", "rope_scaling_factor": 4.0}


def decoder(family, **settings):
    shared = OF_GPT_NEOX if family == GPT_NEOX else FAMILIES[family].model
    return DecoderConfig(**{**shared, **SIZES, **settings})


CONFIGS = {
    "t5": T5,
    "t5 tied": dataclasses.replace(T5, tied_embeddings=True, relative_position_buckets=8),
    "llama": decoder("llama", norm_epsilon=1e-5, rope_base=5e5, **LLAMA3),
    "llama tied": decoder("llama", tied_embeddings=True, **LINEAR),
    "mistral": decoder("mistral", window=3, full_attention_every=4),
    "mistral without a window": decoder("mistral", norm_epsilon=1e-5),
    "qwen2": decoder("qwen2", rope_base=1e6),
    "qwen3": decoder("qwen3", tied_embeddings=True, window=3, full_attention_every=4),
    "gemma": decoder("gemma", tied_embeddings=True, kv_heads=1),
    "gemma2": decoder(
        "gemma2",
        tied_embeddings=True,
        logits_soft_cap=30.0,
        attention_soft_cap=50.0,
        window=4096,
        full_attention_every=2,
        query_pre_attention_scalar=9.0,
    ),
    "gemma3_text": decoder(
        "gemma3_text",
        tied_embeddings=True,
        window=512,
        full_attention_every=3,
        rope_base=1e6,
        rope_local_base=1e4,
        **LINEAR,
    ),
    "gpt_neox": decoder("gpt_neox", heads=2, kv_heads=2, rotary_size=4, block="parallel_two_norms"),
    "gpt_neox tied": decoder("gpt_neox", heads=2, kv_heads=2, rope_base=5e5, block="serial", tied_embeddings=True),
}


def random_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = model_shapes(config)
    return {
        name: from_array(rng.standard_normal(shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in shapes.items()
    }


def read_all(path):
    source = open_foreign(path)
    check_entries(str(path), source.tensors, source.entries, source.ignored)
    tensors = imported(source.tensors, source.entries)
    return source.model, {name: tensor.read(None) for name, tensor in tensors.items()}


def rewrite(folder, change):
    """Applies `change` to the dictionary of a folder's tensors, and saves it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
