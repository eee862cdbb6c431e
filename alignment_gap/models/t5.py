"""T5 v1.1 encoder-decoder (2002.05202 over 1910.10683): RMS norm, relative position buckets, gated GELU, no biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models import layers, t5_attention
from alignment_gap.models.fused_attention import platform
from alignment_gap.models.packing import Packing, Ranges
from alignment_gap.models.policy import OUTPUT, Output, check_choice, check_sizes
from alignment_gap.models.stack import constrain_stream, decode_stack, init_stack, scan_stack
from alignment_gap.sharding import constrain

ATTENTIONS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and settings of a T5 v1.1 policy; parameter names follow T5X.

    Attributes:
      architecture: always "t5"; it identifies the class of a stored config.
      vocabulary_size: rows of the embedding.
      width: width of the residual stream.
      encoder_layers: depth of the encoder.
      decoder_layers: depth of the decoder.
      heads: attention heads.
      head_size: width of one head; it need not divide `width`.
      mlp_width: hidden width of the gated MLP.
      relative_position_buckets: buckets of the learned position bias of each head.
      relative_position_max_distance: greater distances share the last bucket.
      tied_embeddings: whether the input embedding / sqrt(width) is also the output embedding (not in v1.1).
      attention: implementation for training, scoring and prompts: "xla", "pallas" (a fused kernel for TPUs) or "auto",
        pallas on TPUs and xla elsewhere; decoding always uses xla.
      dtype: dtype of the computation; parameters, norms, softmax and losses are float32.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      scan_unroll: layers in each iteration of the loop over layers; a larger value compiles longer and runs faster on
        a CPU.
    """

    architecture: str = "t5"
    vocabulary_size: int = 32128
    width: int = 64
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    head_size: int = 16
    mlp_width: int = 128
    relative_position_buckets: int = 32
    relative_position_max_distance: int = 128
    tied_embeddings: bool = False
    attention: str = "auto"
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1


class Attention(nn.Module):
    """The four projections of multi-head attention; the caller gives the keys and the mask."""

    config: T5Config

    def setup(self) -> None:
        """Makes the projections; T5 scales the query's initial kernel, not the logits."""
        config = self.config
        split = partial(
            layers.projection, (config.heads, config.head_size), ("embed", "heads", "kv"), dtype=config.dtype
        )
        self.query = split(variance=1 / config.head_size)
        self.key = split()
        self.value = split()
        self.out = layers.projection(config.width, ("heads", "kv", "embed"), inputs=2, dtype=config.dtype)

    def keys_values(self, x: Float[Array, "*B S D"]) -> layers.KeysValues:
        """The keys and values of x: [*B, H, S, C]."""
        return layers.heads_first(self.key(x), self.value(x))

    def __call__(self, x: Float[Array, "B K Q D"], segment: layers.Segment) -> Float[Array, "B K Q D"]:
        """The queries of x attend to the segment."""
        return self.out(layers.attend(self.query(x), [segment], scale=1.0))

    def fused(
        self, x: Float[Array, "B K Q D"], source: Float[Array, "B *K S D"], attend: t5_attention.Attend
    ) -> Float[Array, "B K Q D"]:
        """The queries of x attend to the keys of the source by a fused kernel."""
        return self.out(attend(self.query(x), self.key(source), self.value(source)))


class EncoderLayer(nn.Module):
    """Self-attention, then MLP; each reads the normalised stream and adds to the stream."""

    config: T5Config

    def setup(self) -> None:
        """Makes the sub-layers."""
        config = self.config
        self.pre_attention_layer_norm = layers.RMSNorm(config.dtype)
        self.attention = Attention(config)
        self.pre_mlp_layer_norm = layers.RMSNorm(config.dtype)
        self.mlp = layers.MLP(config.width, config.mlp_width, nn.gelu, config.dtype)

    def __call__(self, x: Float[Array, "B 1 P D"], mask: Array, bias: Array) -> Float[Array, "B 1 P D"]:
        """One layer over the prompts."""
        y = self.pre_attention_layer_norm(x)
        x = x + self.attention(y, layers.Segment(*self.attention.keys_values(y), mask, bias))
        return x + self.mlp(self.pre_mlp_layer_norm(x))

    def fused(self, x: Float[Array, "B 1 P D"], attend: t5_attention.Attend) -> Float[Array, "B 1 P D"]:
        """One layer over the prompts; a fused kernel computes the attention."""
        y = self.pre_attention_layer_norm(x)
        x = x + self.attention.fused(y, y, attend)
        return x + self.mlp(self.pre_mlp_layer_norm(x))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the prompt, then MLP."""

    config: T5Config

    def setup(self) -> None:
        """Makes the sub-layers."""
        config = self.config
        self.pre_self_attention_layer_norm = layers.RMSNorm(config.dtype)
        self.self_attention = Attention(config)
        self.pre_cross_attention_layer_norm = layers.RMSNorm(config.dtype)
        self.encoder_decoder_attention = Attention(config)
        self.pre_mlp_layer_norm = layers.RMSNorm(config.dtype)
        self.mlp = layers.MLP(config.width, config.mlp_width, nn.gelu, config.dtype)

    def prompt_keys_values(self, encoded: Float[Array, "B P D"]) -> layers.KeysValues:
        """Keys and values [B, H, P, C] of the prompts, shared by all their responses."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(
        self,
        x: Float[Array, "B K Q D"],
        prompt: layers.Segment,
        mask: Array,
        bias: Array,
        cache: Any = None,
        layer: Any = None,
        step: Any = None,
    ) -> tuple[Float[Array, "B K Q D"], Any]:
        """One layer over Q response positions; they attend to the prompt and to earlier positions of their row.

        With a cache, the cache holds the row's earlier keys and values. The result has the new ones at `step`.
        """
        y = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(y)
        if cache is not None:
            cache, own = layers.extend_cache(cache, own, layer, step, mask.shape[-1])
        x = x + self.self_attention(y, layers.Segment(*own, mask, bias))
        x = x + self.encoder_decoder_attention(self.pre_cross_attention_layer_norm(x), prompt)
        return x + self.mlp(self.pre_mlp_layer_norm(x)), cache

    def fused(
        self,
        x: Float[Array, "B K R D"],
        encoded: Float[Array, "B P D"],
        to_own: t5_attention.Attend,
        to_prompt: t5_attention.Attend,
    ) -> Float[Array, "B K R D"]:
        """One layer over whole responses; fused kernels compute the attention."""
        y = self.pre_self_attention_layer_norm(x)
        x = x + self.self_attention.fused(y, y, to_own)
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.fused(y, encoded, to_prompt)
        return x + self.mlp(self.pre_mlp_layer_norm(x))


@dataclasses.dataclass(frozen=True)
class T5Policy:
    """The policy contract of `alignment_gap.models.policy.Policy` for T5 v1.1."""

    config: T5Config

    def __post_init__(self) -> None:
        """Raises UserError if a size is not positive, the position buckets do not work, or a setting is unknown."""
        check_sizes(self.config)
        check_choice(self.config, "attention", ATTENTIONS)
        buckets, distance = self.config.relative_position_buckets, self.config.relative_position_max_distance
        if buckets < 4:
            raise UserError(f"T5Config.relative_position_buckets is {buckets}: it must be at least 4")
        if distance <= buckets // 2:
            raise UserError(
                f"T5Config.relative_position_max_distance is {distance}: it must be above {buckets // 2}, "
                f"half of relative_position_buckets={buckets}"
            )

    def init(self, key: Array) -> Any:
        """Fresh float32 parameters, each in a box with its logical axis names."""
        config = self.config
        x, mask = jnp.zeros((1, 1, 1, config.width), config.dtype), jnp.ones((1, 1, 1, 1), bool)
        bias = jnp.zeros((config.heads, 1, 1))
        shared = jnp.zeros((1, config.heads, 1, config.head_size), config.dtype)
        prompt = layers.Segment(shared, shared, mask)
        keys = jax.random.split(key, 8)
        positions = jnp.arange(1)

        def decoder_layer(key: Array) -> Any:
            def both(module: DecoderLayer) -> Any:
                return module.prompt_keys_values(x[:, 0]), module(x, prompt, mask, bias)

            return nn.init(both, DecoderLayer(config))(key)["params"]

        params = {
            "token_embedder": {"embedding": layers.embedding(keys[0], config.vocabulary_size, config.width)},
            "encoder": {
                "relpos_bias": self._relative_bias(True).init(keys[1], positions, positions)["params"],
                "layers": init_stack(
                    lambda key: EncoderLayer(config).init(key, x, mask, bias)["params"], keys[2], config.encoder_layers
                ),
                "encoder_norm": layers.RMSNorm(config.dtype).init(keys[3], x)["params"],
            },
            "decoder": {
                "relpos_bias": self._relative_bias(False).init(keys[4], positions, positions)["params"],
                "layers": init_stack(decoder_layer, keys[5], config.decoder_layers),
                "decoder_norm": layers.RMSNorm(config.dtype).init(keys[6], x)["params"],
            },
        }
        if not config.tied_embeddings:
            params[OUTPUT] = {
                "embedding": layers.embedding(keys[7], config.vocabulary_size, config.width, config.width**-0.5)
            }
        return params

    def output(self, params: Any) -> Output:
        """The output embedding and the scale of its logits."""
        if self.config.tied_embeddings:
            return Output(params["token_embedder"]["embedding"], self.config.width**-0.5)
        return Output(params[OUTPUT]["embedding"])

    def start_tokens(self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B *S"]) -> Int[Array, "B *S"]:
        """Zeros: T5's decoder starts from id 0."""
        return jnp.zeros_like(prompt_lengths)

    def hidden(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B *S"],
        inputs: Int[Array, "B K R"],
        packing: Packing | None = None,
    ) -> Float[Array, "B K R D"]:
        """Final hidden states at every response position; the prompt is encoded once for its K responses.

        Packed rows differ only in the masks: within a text, distances in the row equal distances in the text.
        """
        encoded = self._encode(params, prompts, prompt_lengths, packing)
        if self._is_fused():
            layer = self._fused_layer(params, encoded, prompt_lengths, inputs.shape, packing)
        else:
            layer = self._layer(params, encoded, prompt_lengths, inputs.shape[-1], packing)
        x, _ = scan_stack(layer, self._embed(params, inputs), params["decoder"]["layers"], config=self.config)
        return self._norm(params["decoder"]["decoder_norm"], x)

    def _layer(
        self, params: Any, encoded: Array, prompt_lengths: Array, length: int, packing: Packing | None
    ) -> Callable[[Array, Any, Any], tuple[Array, None]]:
        """A layer of the decoder over whole responses, for `scan_stack`."""
        positions = jnp.arange(length)
        bias: Any = self._relative_bias(False).apply({"params": params["decoder"]["relpos_bias"]}, positions, positions)
        mask = layers.causal_mask(positions, positions)
        prompt_mask = layers.prefix_mask(prompt_lengths, encoded.shape[1]) if packing is None else packing.across()
        if packing is not None:
            mask &= packing.within_responses()
        decoder = DecoderLayer(self.config)

        def layer(x: Array, layer_params: Any, _: None) -> tuple[Array, None]:
            def apply(module: DecoderLayer) -> Array:
                prompt = layers.Segment(*module.prompt_keys_values(encoded), prompt_mask)
                return module(x, prompt, mask, bias)[0]

            outputs: Any = nn.apply(apply, decoder)({"params": layer_params})
            return outputs, None

        return layer

    def _fused_layer(
        self, params: Any, encoded: Array, prompt_lengths: Array, shape: tuple[int, ...], packing: Packing | None
    ) -> Callable[[Array, Any, Any], tuple[Array, None]]:
        """`_layer` with fused attention."""
        if packing is None:
            own, prompt = Ranges.causal(shape), Ranges.prefix(prompt_lengths, shape)
        else:
            own, prompt = packing.causal_ranges(), packing.across_ranges()
        to_own = t5_attention.make(own, self._line(params["decoder"], shape[-1], bidirectional=False))
        to_prompt = t5_attention.make(prompt)
        decoder = DecoderLayer(self.config)

        def layer(x: Array, layer_params: Any, _: None) -> tuple[Array, None]:
            outputs: Any = decoder.apply({"params": layer_params}, x, encoded, to_own, to_prompt, method="fused")
            return outputs, None

        return layer

    def prefill(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        samples: int,
        max_length: int,
        cache_dtype: str | None = None,
    ) -> Any:
        """The cache for sampling: each decoder layer's keys and values of the prompts, and space for the responses."""
        config = self.config
        encoded = self._encode(params, prompts, prompt_lengths)
        decoder = DecoderLayer(config)

        def layer(_: None, layer_params: Any, __: None) -> tuple[None, Any]:
            keys_values: Any = decoder.apply({"params": layer_params}, encoded, method="prompt_keys_values")
            return None, layers.held(keys_values, cache_dtype)

        _, prompt = scan_stack(layer, None, params["decoder"]["layers"], config=self.config)
        shape = (config.decoder_layers, len(prompts), config.heads, samples, max_length, config.head_size)
        return {
            "prompt": prompt,
            "prompt_mask": layers.prefix_mask(prompt_lengths, prompts.shape[-1]),
            "responses": layers.empty_cache(shape, config.dtype),
        }

    def decode_step(
        self, params: Any, cache: Any, step: Int[Array, ""], tokens: Int[Array, "B K"], places: int
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states that predict the token at position `step` from the token before it."""
        positions = jnp.arange(places)
        bias_params = {"params": params["decoder"]["relpos_bias"]}
        bias: Any = self._relative_bias(False).apply(bias_params, step[None], positions)
        bias = constrain(bias, None, None, None)  # Gathered once, not in every layer.
        mask = layers.causal_mask(step[None], positions)
        decoder = DecoderLayer(self.config)

        def layer(x: Array, responses: Any, index: Array, layer_params: Any, prompt: layers.PromptKeysValues) -> Any:
            segment = layers.Segment(*prompt, cache["prompt_mask"])
            return decoder.apply({"params": layer_params}, x, segment, mask, bias, responses, index, step)

        x, responses = decode_stack(
            layer,
            self._embed(params, tokens[..., None]),
            cache["responses"],
            params["decoder"]["layers"],
            cache["prompt"],
            config=self.config,
        )
        x = self._norm(params["decoder"]["decoder_norm"], x)
        return x[:, :, 0], {**cache, "responses": responses}

    def _encode(
        self, params: Any, prompts: Array, prompt_lengths: Array, packing: Packing | None = None
    ) -> Float[Array, "B P D"]:
        encoder, size = params["encoder"], prompts.shape[-1]
        module = EncoderLayer(self.config)
        if self._is_fused():
            if packing is None:
                ranges = Ranges.prefix(prompt_lengths, (len(prompts), 1, size))
                ranges = ranges.only(layers.prefix_mask(prompt_lengths, size)[:, 0])
            else:
                ranges = packing.prompt_ranges()
            given: tuple[Any, ...] = (t5_attention.make(ranges, self._line(encoder, size, bidirectional=True)),)
        else:
            positions = jnp.arange(size)
            mask = layers.prefix_mask(prompt_lengths, size) if packing is None else packing.within_prompts()
            bias = self._relative_bias(True).apply({"params": encoder["relpos_bias"]}, positions, positions)
            given = mask, bias

        def layer(x: Array, layer_params: Any, _: None) -> tuple[Array, None]:
            method = "fused" if self._is_fused() else "__call__"
            outputs: Any = module.apply({"params": layer_params}, x, *given, method=method)
            return outputs, None

        x = self._embed(params, prompts)[:, None]
        x, _ = scan_stack(layer, x, encoder["layers"], config=self.config)
        return self._norm(encoder["encoder_norm"], x)[:, 0]

    def _is_fused(self) -> bool:
        attention, machine = self.config.attention, platform()
        if attention == "pallas" and machine not in ("tpu", "cpu"):
            raise UserError(f"T5Config.attention is 'pallas' on {machine}: it needs a TPU; use auto or xla")
        return attention == "pallas" or (attention == "auto" and machine == "tpu")

    def _line(self, params: Any, length: int, *, bidirectional: bool) -> Float[Array, "H W"]:
        """The biases of the distances that a fused kernel reads."""
        distances = t5_attention.line_distances(length, self.config.relative_position_max_distance)
        bias = self._relative_bias(bidirectional)
        found: Any = bias.apply({"params": params["relpos_bias"]}, jnp.zeros(1, jnp.int32), jnp.asarray(distances))
        return found[:, 0]

    def _embed(self, params: Any, tokens: Array) -> Array:
        return constrain_stream(params["token_embedder"]["embedding"].astype(self.config.dtype)[tokens])

    def _norm(self, params: Any, x: Array) -> Any:
        return layers.RMSNorm(self.config.dtype).apply({"params": params}, x)

    def _relative_bias(self, bidirectional: bool) -> layers.RelativePositionBias:
        config = self.config
        return layers.RelativePositionBias(
            config.relative_position_buckets, config.relative_position_max_distance, config.heads, bidirectional
        )
