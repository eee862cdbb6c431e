"""Sizes by name: T5 v1.1, PaLM, a ladder of small PaLM-style decoders, and the shapes of pretrained decoders.

Sources: T5 v1.1 (2002.05202, 1910.10683), PaLM table 1 (2204.02311), Gemma 1 to 3 (2403.08295, 2408.00118, 2503.19786),
Llama 3 (2407.21783; 8B and 70B are version 3.1, 1B and 3B are 3.2), Qwen 2.5 and 3 (2412.15115, 2505.09388), Pythia
(2304.01373).
"""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from alignment_gap.errors import UserError
from alignment_gap.models.decoder import DecoderConfig
from alignment_gap.models.t5 import T5Config

Shape = tuple[int, int, int, int, int, int]


def get(name: str, **overrides: Any) -> T5Config | DecoderConfig:
    """The config of a size, such as get("t5_xl", dtype="bfloat16") or get("t5_small", vocabulary_size=250112) for mT5.

    Args:
      name: one of `NAMES`.
      overrides: fields of the config to change, with their values.

    Raises:
      UserError: the name or a field does not exist. The message gives the nearest one.
    """
    if name not in SIZES:
        raise UserError(f"model size {name!r} is unknown: {_remedy(name, NAMES)}")
    fields = [field.name for field in dataclasses.fields(SIZES[name])]
    for field in overrides:
        if field not in fields:
            raise UserError(f"model size {name} has no setting {field!r}: {_remedy(field, fields)}")
    return dataclasses.replace(SIZES[name], **overrides)


def _remedy(name: str, valid: list[str]) -> str:
    near = get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}"


def _t5(width: int, mlp_width: int, layers: int, heads: int, head_size: int = 64) -> T5Config:
    return T5Config(
        width=width, encoder_layers=layers, decoder_layers=layers, heads=heads, head_size=head_size, mlp_width=mlp_width
    )


def _palm(width: int, layers: int, heads: int, head_size: int = 256, vocabulary_size: int = 256_000) -> DecoderConfig:
    return DecoderConfig(
        vocabulary_size=vocabulary_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=1,
        head_size=head_size,
        mlp_width=4 * width,
    )


def _shaped(family: DecoderConfig, shape: Shape, **settings: Any) -> DecoderConfig:
    """A family's decoder with (width, layers, heads, kv_heads, head_size, mlp_width)."""
    names = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width")
    settings |= dict(zip(names, shape, strict=True))
    return dataclasses.replace(family, **settings)


_SERIAL = DecoderConfig(block="serial", logits_scale="one")
_GEMMA = dataclasses.replace(
    _SERIAL, vocabulary_size=256_000, activation="gelu", norm="one_plus_scale", embedding_scale="sqrt_width"
)
_GEMMA2 = dataclasses.replace(
    _GEMMA, post_norms=True, attention_soft_cap=50.0, logits_soft_cap=30.0, window=4096, full_attention_every=2
)
_GEMMA3 = dataclasses.replace(
    _GEMMA,
    vocabulary_size=262_144,
    post_norms=True,
    query_key_norm=True,
    rope_base=1e6,
    rope_local_base=1e4,
    full_attention_every=6,
)
_LLAMA3 = dataclasses.replace(
    _SERIAL, vocabulary_size=128_256, norm_epsilon=1e-5, rope_base=5e5, rope_scaling="llama3", rope_scaling_factor=8.0
)
_LLAMA32 = dataclasses.replace(_LLAMA3, rope_scaling_factor=32.0)
_QWEN2 = dataclasses.replace(_SERIAL, vocabulary_size=151_936, query_key_value_bias=True, rope_base=1e6)
_QWEN3 = dataclasses.replace(_SERIAL, vocabulary_size=151_936, query_key_norm=True, rope_base=1e6)
_PYTHIA = dataclasses.replace(
    _SERIAL,
    vocabulary_size=50_304,
    block="parallel_two_norms",
    gated_mlp=False,
    activation="exact_gelu",
    norm="layer",
    norm_epsilon=1e-5,
    query_key_value_bias=True,
    out_and_mlp_bias=True,
    tied_embeddings=False,
)


def _pythia(width: int, layers: int, heads: int, vocabulary_size: int = 50_304) -> DecoderConfig:
    size = width // heads
    shape = (width, layers, heads, heads, size, 4 * width)
    return _shaped(_PYTHIA, shape, rotary_size=size // 4, vocabulary_size=vocabulary_size)


SIZES: dict[str, T5Config | DecoderConfig] = {
    # Two decades of sizes for a laptop, named by the parameters in their layers. With a small vocabulary, the layers
    # hold nearly all parameters.
    "t5_30k": _t5(24, 56, 2, 3, 8),
    "t5_300k": _t5(80, 160, 2, 5, 16),
    "t5_3m": _t5(160, 448, 4, 5, 32),
    "palm_30k": _palm(32, 2, 2, 16, 32_128),
    "palm_300k": _palm(72, 4, 6, 12, 32_128),
    "palm_3m": _palm(192, 6, 6, 32, 32_128),
    "t5_small": _t5(512, 1024, 8, 6),
    "t5_base": _t5(768, 2048, 12, 12),
    "t5_large": _t5(1024, 2816, 24, 16),
    "t5_xl": _t5(2048, 5120, 24, 32),
    "t5_xxl": _t5(4096, 10240, 24, 64),
    # The ladder: PaLM's shape with T5's vocabulary, so that the small models are not mostly embedding.
    "palm_10m": _palm(192, 6, 4, 64, 32_128),
    "palm_30m": _palm(384, 8, 6, 64, 32_128),
    "palm_100m": _palm(768, 9, 12, 64, 32_128),
    "palm_300m": _palm(1024, 18, 16, 64, 32_128),
    "palm_1b": _palm(2048, 16, 16, 128, 32_128),
    "palm_3b": _palm(3072, 22, 24, 128, 32_128),
    "palm_8b": _palm(4096, 32, 16),
    "palm_62b": _palm(8192, 64, 32),
    "palm_540b": _palm(18_432, 118, 48),
    "gemma_2b": _shaped(_GEMMA, (2048, 18, 8, 1, 256, 16_384)),
    "gemma_7b": _shaped(_GEMMA, (3072, 28, 16, 16, 256, 24_576)),
    "gemma2_2b": _shaped(_GEMMA2, (2304, 26, 8, 4, 256, 9216)),
    "gemma2_9b": _shaped(_GEMMA2, (3584, 42, 16, 8, 256, 14_336)),
    "gemma2_27b": _shaped(_GEMMA2, (4608, 46, 32, 16, 128, 36_864), query_pre_attention_scalar=144.0),
    "gemma3_1b": _shaped(_GEMMA3, (1152, 26, 4, 1, 256, 6912), window=512),
    "llama3_1b": _shaped(_LLAMA32, (2048, 16, 32, 8, 64, 8192)),
    "llama3_3b": _shaped(_LLAMA32, (3072, 28, 24, 8, 128, 8192)),
    "llama3_8b": _shaped(_LLAMA3, (4096, 32, 32, 8, 128, 14_336), tied_embeddings=False),
    "llama3_70b": _shaped(_LLAMA3, (8192, 80, 64, 8, 128, 28_672), tied_embeddings=False),
    "qwen2.5_0.5b": _shaped(_QWEN2, (896, 24, 14, 2, 64, 4864)),
    "qwen2.5_1.5b": _shaped(_QWEN2, (1536, 28, 12, 2, 128, 8960)),
    "qwen2.5_7b": _shaped(_QWEN2, (3584, 28, 28, 4, 128, 18_944), tied_embeddings=False, vocabulary_size=152_064),
    "qwen3_0.6b": _shaped(_QWEN3, (1024, 28, 16, 8, 128, 3072)),
    "qwen3_1.7b": _shaped(_QWEN3, (2048, 28, 16, 8, 128, 6144)),
    "qwen3_4b": _shaped(_QWEN3, (2560, 36, 32, 8, 128, 9728)),
    "qwen3_8b": _shaped(_QWEN3, (4096, 36, 32, 8, 128, 12_288), tied_embeddings=False),
    "pythia_70m": _pythia(512, 6, 8),
    "pythia_160m": _pythia(768, 12, 12),
    "pythia_410m": _pythia(1024, 24, 16),
    "pythia_1b": _pythia(2048, 16, 8),
    "pythia_1.4b": _pythia(2048, 24, 16),
    "pythia_2.8b": _pythia(2560, 32, 32),
    "pythia_6.9b": _pythia(4096, 32, 32, 50_432),
    "pythia_12b": _pythia(5120, 36, 40, 50_688),
}
NAMES: list[str] = list(SIZES)
