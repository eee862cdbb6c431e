"""Model FLOPs counted from a config: 2 for each multiply-add of a matrix product, and nothing else.

Attention is counted over all positions that a query is multiplied with, masked or not, as in PaLM's MFU (2204.02311,
appendix B). Norms, softmax, rotations and the look-up of embeddings are under a hundredth and not counted.
"""

from __future__ import annotations

import dataclasses

from alignment_gap.models import DecoderConfig, ModelConfig, T5Config


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Shape of a batch.

    Attributes:
      batch: prompts.
      prompt: tokens of each, padding included.
      samples: responses of a prompt.
      response: tokens of each, padding included.
    """

    batch: int
    prompt: int
    samples: int
    response: int


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass by what they are spent on.

    Attributes:
      products: of activations and parameters, the output embedding apart.
      attention: of queries and keys, and of weights and values.
      logits: of hidden states and the output embedding.
    """

    products: float
    attention: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.attention + self.logits


def forward_flops(config: ModelConfig, lengths: Lengths, *, logits: bool = True) -> Forward:
    """The forward pass over prompts, each computed once, and all their responses; with or without the logits."""
    prompts, responses = lengths.batch * lengths.prompt, lengths.batch * lengths.samples * lengths.response
    output = 2.0 * config.width * config.vocabulary_size * responses if logits else 0.0
    if isinstance(config, T5Config):
        return _t5(config, lengths, prompts, responses, output)
    attended = prompts * lengths.prompt + responses * (lengths.prompt + lengths.response)
    return Forward(
        products=float((prompts + responses) * config.layers * _decoder_layer(config)),
        attention=4.0 * config.layers * config.heads * config.head_size * attended,
        logits=output,
    )


def _t5(config: T5Config, lengths: Lengths, prompts: int, responses: int, output: float) -> Forward:
    """Encoder over the prompts; decoder layers over the responses, and their keys and values over the prompts."""
    heads = config.heads * config.head_size
    projection, mlp = 2 * config.width * heads, 6 * config.width * config.mlp_width
    products = prompts * config.encoder_layers * (4 * projection + mlp)
    products += config.decoder_layers * (responses * (6 * projection + mlp) + prompts * 2 * projection)
    attended = config.encoder_layers * prompts * lengths.prompt
    attended += config.decoder_layers * responses * (lengths.response + lengths.prompt)
    return Forward(float(products), 4.0 * heads * attended, output)


def _decoder_layer(config: DecoderConfig) -> int:
    """Of one token: query and output, keys and values, the three matrices of the gated MLP."""
    query, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    return 2 * config.width * (2 * query + 2 * keys) + 6 * config.width * config.mlp_width


def update_flops(config: ModelConfig, lengths: Lengths) -> float:
    """An update step's model FLOPs: the backward pass is twice the forward one."""
    return 3 * forward_flops(config, lengths).total


def recomputed_flops(config: ModelConfig, lengths: Lengths) -> float:
    """What the backward pass computes again: by the config's remat, and the logits that are never all kept."""
    forward = forward_flops(config, lengths)
    again = {"none": 0.0, "dots": forward.attention, "full": forward.products + forward.attention}
    return again[config.remat] + forward.logits


def scores_flops(config: ModelConfig, lengths: Lengths) -> float:
    """A pairwise preference model's labels: each pair of responses in both orders, between markers; no logits."""
    pairs = lengths.samples * (lengths.samples - 1) // 2
    contexts = Lengths(lengths.batch, lengths.prompt, 2, 2 * lengths.response + 4)
    return pairs * forward_flops(config, contexts, logits=False).total


def prefill_flops(config: ModelConfig, lengths: Lengths) -> float:
    """The prompts' part of sampling."""
    return forward_flops(config, dataclasses.replace(lengths, samples=0)).total


def decode_flops(config: ModelConfig, lengths: Lengths) -> float:
    """One step of sampling: a token of each response, which attends to the whole cache."""
    return (forward_flops(config, lengths).total - prefill_flops(config, lengths)) / max(lengths.response, 1)


def cache_bytes(config: ModelConfig, lengths: Lengths) -> float:
    """Keys and values of prompts and responses in all layers that attend to them, in the dtype of the computation."""
    size = 2 if config.dtype == "bfloat16" else 4
    groups = config.heads if isinstance(config, T5Config) else config.kv_heads
    layers = config.decoder_layers if isinstance(config, T5Config) else config.layers
    positions = lengths.batch * (lengths.prompt + lengths.samples * lengths.response)
    return 2.0 * size * layers * groups * config.head_size * positions
