"""PaLM-style decoder (2204.02311): parallel attention and MLP, multi-query attention, SwiGLU, RoPE, no biases."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models import layers
from alignment_gap.models.policy import Output, check_sizes
from alignment_gap.models.stack import constrain_stream, init_stack, scan_stack


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and settings of a PaLM-style decoder.

    Attributes:
      architecture: always "decoder"; tells the config of a policy from another's.
      vocabulary_size: rows of the embedding, which is the output embedding too.
      width: of the residual stream.
      layers: depth.
      heads: query heads.
      kv_heads: key and value heads; 1 is multi-query attention. Divides `heads`.
      head_size: width of one head; even.
      mlp_width: hidden width of SwiGLU.
      rope_base: wavelengths of the rotary embedding grow from 2 pi to 2 pi times this.
      dtype: of the computation; parameters, norms, softmax and losses are float32.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      scan_unroll: layers per iteration of the loop over layers; more compiles longer and runs faster on a CPU.
    """

    architecture: str = "decoder"
    vocabulary_size: int = 32128
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 1
    head_size: int = 16
    mlp_width: int = 128
    rope_base: float = 10000.0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1


class DecoderLayer(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm for both."""

    config: DecoderConfig

    def setup(self) -> None:
        """Makes the norm, the projections and the MLP."""
        config = self.config
        key_value = ((config.kv_heads, config.head_size), ("embed", "kv_heads", "kv"))
        self.pre_layer_norm = layers.RMSNorm(config.dtype)
        self.query = layers.projection((config.heads, config.head_size), ("embed", "heads", "kv"), dtype=config.dtype)
        self.key = layers.projection(*key_value, dtype=config.dtype)
        self.value = layers.projection(*key_value, dtype=config.dtype)
        self.out = layers.projection(config.width, ("heads", "kv", "embed"), inputs=2, dtype=config.dtype)
        self.mlp = layers.GatedMLP(config.width, config.mlp_width, nn.silu, config.dtype)

    def prompt(
        self, x: Float[Array, "B P D"], positions: Int[Array, "B P"], mask: Array
    ) -> tuple[Float[Array, "B P D"], tuple[Array, Array]]:
        """One layer over the prompts; also their keys and values [B, P, G, C], for the responses to attend to."""
        y = self.pre_layer_norm(x)
        keys, values = self._keys_values(y, positions)
        query = self._query(y, positions)[:, None]
        attention = layers.attend(query, [layers.Segment(keys, values, mask)], scale=self.config.head_size**-0.5)
        return x + self.out(attention[:, 0]) + self.mlp(y), (keys, values)

    def __call__(
        self,
        x: Float[Array, "B K Q D"],
        positions: Int[Array, "B 1 Q"],
        prompt: layers.Segment,
        mask: Array,
        cache: Any,
        step: Any,
    ) -> tuple[Float[Array, "B K Q D"], tuple[Array, Array]]:
        """One layer over Q response positions, which attend to the shared prompt and to their own row so far."""
        y = self.pre_layer_norm(x)
        keys_values = layers.update_cache(cache, self._keys_values(y, positions), step)
        segments = [prompt, layers.Segment(*keys_values, mask)]
        attention = layers.attend(self._query(y, positions), segments, scale=self.config.head_size**-0.5)
        return x + self.out(attention) + self.mlp(y), keys_values

    def _query(self, y: Array, positions: Array) -> Array:
        return layers.rotate(self.query(y), positions, self.config.rope_base)

    def _keys_values(self, y: Array, positions: Array) -> tuple[Array, Array]:
        return layers.rotate(self.key(y), positions, self.config.rope_base), self.value(y)


@dataclasses.dataclass(frozen=True)
class DecoderPolicy:
    """The policy contract of `alignment_gap.models.policy.Policy` for a decoder-only model.

    The prompt's last token is the first input of every response, so that its K rows share all before it.
    """

    config: DecoderConfig

    def __post_init__(self) -> None:
        """Raises UserError where a size is not positive, does not divide, or a setting is unknown."""
        check_sizes(self.config)
        if self.config.head_size % 2:
            raise UserError(f"DecoderConfig.head_size is {self.config.head_size}: rotary positions need it even")

    def init(self, key: Array) -> Any:
        """Fresh float32 parameters, each in a box with its logical axis names."""
        config = self.config
        x, positions = jnp.zeros((1, 1, config.width), config.dtype), jnp.zeros((1, 1), jnp.int32)
        keys = jax.random.split(key, 3)
        return {
            "token_embedder": {"embedding": layers.embedding(keys[0], config.vocabulary_size, config.width)},
            "decoder": {
                "layers": init_stack(
                    lambda key: DecoderLayer(config).init(
                        key, x, positions, jnp.ones((1, 1, 1, 1), bool), method="prompt"
                    )["params"],
                    keys[1],
                    config.layers,
                ),
                "decoder_norm": layers.RMSNorm(config.dtype).init(keys[2], x)["params"],
            },
        }

    def output(self, params: Any) -> Output:
        """The shared embedding; logits are scaled by 1 / sqrt(width), as in PaLM."""
        return Output(params["token_embedder"]["embedding"], self.config.width**-0.5)

    def start_tokens(self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The last token of each prompt."""
        return jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]

    def hidden(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        inputs: Int[Array, "B K R"],
    ) -> Float[Array, "B K R D"]:
        """Final hidden states at every response position; the prompt is computed once for its K responses."""
        decoder, size = DecoderLayer(self.config), inputs.shape[-1]
        prompt_positions, prompt_causal, shared = self._prompt_layout(prompts, prompt_lengths)
        positions = (prompt_lengths[:, None] - 1 + jnp.arange(size))[:, None]
        mask = layers.causal_mask(size)

        def layer(carry: tuple[Array, Array], layer_params: Any, _: None) -> tuple[tuple[Array, Array], None]:
            def apply(module: DecoderLayer) -> tuple[Array, Array]:
                prompt, keys_values = module.prompt(carry[0], prompt_positions, prompt_causal)
                segment = layers.Segment(*keys_values, shared)
                return prompt, module(carry[1], positions, segment, mask, None, None)[0]

            outputs: Any = nn.apply(apply, decoder)({"params": layer_params})
            return outputs, None

        carry = self._embed(params, prompts), self._embed(params, inputs)
        (_, x), _ = scan_stack(layer, carry, params["decoder"]["layers"], config=self.config)
        return self._norm(params, x)

    def prefill(
        self, params: Any, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B"], samples: int, max_length: int
    ) -> Any:
        """The cache for sampling: every layer's keys and values of the prompts, and room for the responses."""
        config, decoder = self.config, DecoderLayer(self.config)
        positions, causal, shared = self._prompt_layout(prompts, prompt_lengths)

        def layer(x: Array, layer_params: Any, _: None) -> tuple[Array, Any]:
            return decoder.apply({"params": layer_params}, x, positions, causal, method="prompt")

        _, prompt = scan_stack(layer, self._embed(params, prompts), params["decoder"]["layers"], config=self.config)
        shape = (config.layers, len(prompts), samples, max_length, config.kv_heads, config.head_size)
        empty = jnp.zeros(shape, config.dtype)
        return {
            "prompt": prompt,
            "prompt_mask": shared,
            "prompt_lengths": prompt_lengths,
            "responses": (empty, empty),
        }

    def decode_step(
        self, params: Any, cache: Any, step: Int[Array, ""], tokens: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states that predict the token at position `step` from the token before it."""
        decoder = DecoderLayer(self.config)
        positions = (cache["prompt_lengths"] - 1 + step)[:, None, None]
        mask = (jnp.arange(cache["responses"][0].shape[3]) <= step)[None, None, None]

        def layer(x: Array, layer_params: Any, inputs: Any) -> tuple[Array, Any]:
            prompt, responses = inputs
            keys, values = prompt
            segment = layers.Segment(keys, values, cache["prompt_mask"])
            return decoder.apply({"params": layer_params}, x, positions, segment, mask, responses, step)

        x, responses = scan_stack(
            layer,
            self._embed(params, tokens[..., None]),
            params["decoder"]["layers"],
            (cache["prompt"], cache["responses"]),
            config=self.config,
        )
        return self._norm(params, x)[:, :, 0], {**cache, "responses": responses}

    def _prompt_layout(self, prompts: Array, prompt_lengths: Array) -> tuple[Array, Array, Array]:
        """Positions of the prompt, its causal mask, and the part that responses see: all but the last token."""
        batch, size = prompts.shape
        positions = jnp.broadcast_to(jnp.arange(size), (batch, size))
        return positions, layers.causal_mask(size), layers.prefix_mask(prompt_lengths - 1, size)

    def _embed(self, params: Any, tokens: Array) -> Array:
        return constrain_stream(params["token_embedder"]["embedding"].astype(self.config.dtype)[tokens])

    def _norm(self, params: Any, x: Array) -> Any:
        return layers.RMSNorm(self.config.dtype).apply({"params": params["decoder"]["decoder_norm"]}, x)
