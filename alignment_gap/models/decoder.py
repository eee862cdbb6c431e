"""One class for all decoder-only policies: PaLM by default (2204.02311).

Settings give Gemma 1 to 3, Llama 3, Qwen 2 and 3, and GPT-NeoX (2204.06745), which is the architecture of Pythia.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models import fused_attention, layers, rope
from alignment_gap.models.packing import Packing
from alignment_gap.models.policy import OUTPUT, Output, check_choice, check_sizes
from alignment_gap.models.stack import constrain_stream, decode_stack, init_stack, scan_stack

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "exact_gelu": partial(nn.gelu, approximate=False),
}
CHOICES = {
    "block": ("parallel", "parallel_two_norms", "serial"),
    "activation": tuple(ACTIVATIONS),
    "norm": ("scale", "one_plus_scale", "layer"),
    "embedding_scale": ("one", "sqrt_width"),
    "logits_scale": ("inverse_sqrt_width", "one"),
    "rope_scaling": rope.SCALINGS,
    "attention": fused_attention.ATTENTIONS,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and settings of a decoder; the defaults are PaLM's.

    Attributes:
      architecture: always "decoder"; it identifies the class of a stored config.
      vocabulary_size: rows of the embedding.
      width: width of the residual stream.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads: 1 for multi-query attention, fewer than `heads` for grouped attention.
        It must divide `heads`.
      head_size: width of one head; even; it need not be width / heads.
      mlp_width: hidden width of the MLP.
      block: "parallel" computes attention and MLP from the same norm of the input and adds both;
        "parallel_two_norms" does the same from two norms of the input (GPT-NeoX); "serial" computes attention, then
        the MLP, each with its own norm.
      gated_mlp: whether the MLP has a gate.
      activation: activation of the MLP's gate, or of the MLP without a gate: "silu" (SwiGLU), "gelu" (GeGLU, the tanh
        form) or "exact_gelu" (GPT-NeoX).
      norm: "scale" divides by the root of the mean square and multiplies by w, "one_plus_scale" by 1 + w (Gemma);
        "layer" also subtracts the mean and adds a bias (GPT-NeoX).
      norm_epsilon: added to the mean square or the variance.
      post_norms: also normalises after attention and after the MLP (Gemma 2 and 3).
      query_key_norm: normalises each head of queries and keys before the rotation (Gemma 3, Qwen 3).
      query_key_value_bias: biases on the query, key and value projections (Qwen 2, GPT-NeoX).
      out_and_mlp_bias: biases on the output projection of attention and on the MLP's projections (GPT-NeoX).
      tied_embeddings: whether the input embedding is also the output embedding.
      embedding_scale: factor on the input embedding: "one", or "sqrt_width" rounded to `dtype` (Gemma).
      logits_scale: factor on the logits: "inverse_sqrt_width" (PaLM) or "one".
      logits_soft_cap: the c of z = c tanh(z / c) on the logits (Gemma 2), or None.
      attention_soft_cap: the same for the attention logits (Gemma 2).
      query_pre_attention_scalar: the attention logits are divided by its square root; None uses `head_size`.
      rope_base: wavelengths of the rotary embedding grow from 2 pi to 2 pi times this.
      rotary_size: width of the part of each head that the rotary embedding turns; even; None for the whole head
        (GPT-NeoX turns a quarter).
      rope_scaling: "none", "linear" (multiplies all wavelengths by the factor) or "llama3" (only the long ones).
      rope_scaling_factor: the factor for "linear" and "llama3".
      rope_low_frequency_factor: for "llama3": wavelengths above rope_original_length / this are scaled in full.
      rope_high_frequency_factor: for "llama3": wavelengths below rope_original_length / this are not scaled.
      rope_original_length: for "llama3": the context length before scaling, in tokens.
      rope_local_base: `rope_base` for the layers with a window, without scaling (Gemma 3); None uses the same rotation
        in all layers.
      window: number of tokens, including its own, that a token attends to in layers with a sliding window; None if no
        layer has a window.
      full_attention_every: with a window, every n-th layer has no window (Gemma 2: 2, Gemma 3: 6).
      attention: implementation for training, scoring and the prompts of a sampler: "xla", "cudnn" (CUDA, bfloat16) or
        "splash" (TPU); "auto" is "splash" on TPUs and "xla" elsewhere. The loop over tokens always uses XLA.
      dtype: dtype of the computation; parameters, norms, softmax and losses are float32.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      scan_unroll: layers in each iteration of the loop over layers; a larger value compiles longer and runs faster on
        a CPU.
    """

    architecture: str = "decoder"
    vocabulary_size: int = 32128
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 1
    head_size: int = 16
    mlp_width: int = 128
    block: str = "parallel"
    gated_mlp: bool = True
    activation: str = "silu"
    norm: str = "scale"
    norm_epsilon: float = 1e-6
    post_norms: bool = False
    query_key_norm: bool = False
    query_key_value_bias: bool = False
    out_and_mlp_bias: bool = False
    tied_embeddings: bool = True
    embedding_scale: str = "one"
    logits_scale: str = "inverse_sqrt_width"
    logits_soft_cap: float | None = None
    attention_soft_cap: float | None = None
    query_pre_attention_scalar: float | None = None
    rope_base: float = 10000.0
    rotary_size: int | None = None
    rope_scaling: str = "none"
    rope_scaling_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    rope_local_base: float | None = None
    window: int | None = None
    full_attention_every: int = 1
    attention: str = "auto"
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1


Tree = TypeVar("Tree")


class View(NamedTuple):
    """The positions of a layer's queries, and the keys that they may attend to.

    Attributes:
      rotation: rotation of the queries, and of the keys at the same positions.
      own: [1, 1, Q, S], True where a query attends to a key of its own row.
      prompt: [B, 1, Q or 1, P], True where a response's query attends to a key of the prompt; None for the prompt's own
        queries.
    """

    rotation: rope.Rotation
    own: Any
    prompt: Any = None


def _norm(config: DecoderConfig, axis: str = "embed") -> layers.RMSNorm | layers.LayerNorm:
    if config.norm == "layer":
        return layers.LayerNorm(config.dtype, config.norm_epsilon, axis)
    return layers.RMSNorm(config.dtype, config.norm_epsilon, config.norm, axis)


def _attention_scale(config: DecoderConfig) -> float:
    return (config.query_pre_attention_scalar or config.head_size) ** -0.5


class DecoderLayer(nn.Module):
    """Attention and MLP: both on the input (parallel), or one after the other (serial)."""

    config: DecoderConfig

    def setup(self) -> None:
        """Makes the norms, the projections and the MLP that the settings need."""
        config = self.config
        project = partial(layers.projection, bias=config.query_key_value_bias, dtype=config.dtype)
        key_value = ((config.kv_heads, config.head_size), ("embed", "kv_heads", "kv"))
        if config.block == "parallel":
            self.pre_layer_norm = _norm(config)
        else:
            self.pre_attention_layer_norm, self.pre_mlp_layer_norm = _norm(config), _norm(config)
        if config.post_norms:
            self.post_attention_layer_norm, self.post_mlp_layer_norm = _norm(config), _norm(config)
        if config.query_key_norm:
            self.query_norm, self.key_norm = _norm(config, "kv"), _norm(config, "kv")
        self.query = project((config.heads, config.head_size), ("embed", "heads", "kv"))
        self.key = project(*key_value)
        self.value = project(*key_value)
        bias, activation = config.out_and_mlp_bias, ACTIVATIONS[config.activation]
        self.out = layers.projection(config.width, ("heads", "kv", "embed"), inputs=2, bias=bias, dtype=config.dtype)
        self.mlp = layers.MLP(config.width, config.mlp_width, activation, config.dtype, config.gated_mlp, bias)

    def prompt(self, x: Float[Array, "B P D"], view: View) -> tuple[Float[Array, "B P D"], layers.KeysValues]:
        """One layer over the prompts; also returns their keys and values [B, G, P, C] for the responses."""
        y = self._first_norm(x)
        keys_values = layers.heads_first(*self._keys_values(y, view))
        attention = self._attend(self._query(y, view)[:, None], [layers.Segment(*keys_values, view.own)])
        return self._add(x, y, attention[:, 0]), keys_values

    def __call__(
        self,
        x: Float[Array, "B K Q D"],
        view: View,
        prompt: layers.PromptKeysValues,
        cache: Any = None,
        layer: Any = None,
        step: Any = None,
    ) -> tuple[Float[Array, "B K Q D"], Any]:
        """One layer over Q response positions; they attend to the shared prompt and to earlier positions of their row.

        With a cache, the cache holds the row's earlier keys and values. The result has the new ones at `step`.
        """
        y = self._first_norm(x)
        own = layers.heads_first(*self._keys_values(y, view))
        if cache is not None:
            cache, own = layers.extend_cache(cache, own, layer, step, view.own.shape[-1])
        segments = [layers.Segment(*prompt, view.prompt), layers.Segment(*own, view.own)]
        return self._add(x, y, self._attend(self._query(y, view), segments)), cache

    def row(
        self, x: Float[Array, "B S D"], rotation: rope.Rotation, attend: fused_attention.Attend
    ) -> tuple[Float[Array, "B S D"], layers.KeysValues]:
        """One layer over rows, by a fused kernel: of prompts alone, or with their responses; also keys and values."""
        y, view = self._first_norm(x), View(rotation, None)
        keys_values = self._keys_values(y, view)
        return self._add(x, y, attend(self._query(y, view), *keys_values)), layers.heads_first(*keys_values)

    def _first_norm(self, x: Array) -> Any:
        return self.pre_layer_norm(x) if self.config.block == "parallel" else self.pre_attention_layer_norm(x)

    def _query(self, y: Array, view: View) -> Array:
        query = self.query(y)
        return rope.rotate(self.query_norm(query) if self.config.query_key_norm else query, view.rotation)

    def _keys_values(self, y: Array, view: View) -> tuple[Array, Array]:
        keys = self.key(y)
        return rope.rotate(self.key_norm(keys) if self.config.query_key_norm else keys, view.rotation), self.value(y)

    def _attend(self, query: Array, segments: list[layers.Segment]) -> Array:
        scale, soft_cap = _attention_scale(self.config), self.config.attention_soft_cap
        return layers.attend(query, segments, scale=scale, soft_cap=soft_cap)

    def _add(self, x: Array, y: Array, attention: Array) -> Array:
        """Adds the projected attention and the MLP to the stream x; y is the normalised x that attention used."""
        config, mixed, before = self.config, self.out(attention), x
        x = x + (self.post_attention_layer_norm(mixed) if config.post_norms else mixed)
        if config.block != "parallel":
            y = self.pre_mlp_layer_norm(x if config.block == "serial" else before)
        mixed = self.mlp(y)
        return x + (self.post_mlp_layer_norm(mixed) if config.post_norms else mixed)


@dataclasses.dataclass(frozen=True)
class DecoderPolicy:
    """The policy contract of `alignment_gap.models.policy.Policy` for a decoder-only model.

    The prompt's last token is the first input of every response. So the K responses share all earlier tokens.
    """

    config: DecoderConfig

    def __post_init__(self) -> None:
        """Raises UserError if a size is not positive or does not divide another, or if a setting is unknown."""
        config = self.config
        check_sizes(config)
        for field, choices in CHOICES.items():
            check_choice(config, field, choices)
        if config.head_size % 2:
            raise UserError(f"DecoderConfig.head_size is {config.head_size}: rotary positions need it even")
        if config.rotary_size is not None and (config.rotary_size % 2 or config.rotary_size > config.head_size):
            raise UserError(
                f"DecoderConfig.rotary_size is {config.rotary_size}: it must be even, and at most head_size="
                f"{config.head_size}"
            )
        if (config.window is None) != (config.full_attention_every == 1):
            raise UserError(
                f"DecoderConfig.window is {config.window} with full_attention_every={config.full_attention_every}: "
                "set both, such as window=512 and full_attention_every=6, or leave both"
            )
        rope.check(config)
        fused_attention.check(config)

    def init(self, key: Array) -> Any:
        """Fresh float32 parameters, each in a box with its logical axis names."""
        config = self.config
        x, view = jnp.zeros((1, 1, config.width), config.dtype), self._prompt_view(1, 0)
        # Initial logits are of order one: the output embedding is small if `logits_scale` does not scale them down.
        small = 1.0 if config.logits_scale == "inverse_sqrt_width" else config.width**-0.5
        keys = jax.random.split(key, 4 if not config.tied_embeddings else 3)
        table = partial(layers.embedding, vocabulary_size=config.vocabulary_size, width=config.width)
        params = {
            "token_embedder": {"embedding": table(keys[0], stddev=small if config.tied_embeddings else 1.0)},
            "decoder": {
                "layers": init_stack(
                    lambda key: DecoderLayer(config).init(key, x, view, method="prompt")["params"],
                    keys[1],
                    config.layers,
                ),
                "decoder_norm": _norm(config).init(keys[2], x)["params"],
            },
        }
        if not config.tied_embeddings:
            params[OUTPUT] = {"embedding": table(keys[3], stddev=small)}
        return params

    def output(self, params: Any) -> Output:
        """The output embedding, and the scale and soft cap of its logits."""
        config = self.config
        embedder = params["token_embedder" if config.tied_embeddings else OUTPUT]
        scale = config.width**-0.5 if config.logits_scale == "inverse_sqrt_width" else 1.0
        return Output(embedder["embedding"], scale, config.logits_soft_cap)

    def start_tokens(self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B *S"]) -> Int[Array, "B *S"]:
        """The last token of each prompt."""
        ends = jnp.cumsum(prompt_lengths.reshape(len(prompts), -1), axis=1)
        return jnp.take_along_axis(prompts, ends - 1, axis=1).reshape(prompt_lengths.shape)

    def hidden(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B *S"],
        inputs: Int[Array, "B K R"],
        packing: Packing | None = None,
    ) -> Float[Array, "B K R D"]:
        """Final hidden states at every response position; the K responses share the prompt's computation."""
        attention = fused_attention.choose(self.config, packed=packing is not None)
        if attention != "xla":
            return self._fused_hidden(attention, params, prompts, prompt_lengths, inputs, packing)
        decoder, size = DecoderLayer(self.config), inputs.shape[-1]
        if packing is None:
            queries = jnp.arange(size)
            prompt_view = self._by_layer(partial(self._prompt_view, prompts.shape[-1]))
            view = self._by_layer(partial(self._response_view, prompt_lengths, prompts.shape[-1], queries, size))
        else:
            prompt_view = self._by_layer(partial(self._packed_prompt_view, packing))
            view = self._by_layer(partial(self._packed_response_view, packing))

        def layer(carry: tuple[Array, Array], layer_params: Any, full: Any) -> tuple[tuple[Array, Array], None]:
            def apply(module: DecoderLayer) -> tuple[Array, Array]:
                prompt, keys_values = module.prompt(carry[0], prompt_view(full))
                return prompt, module(carry[1], view(full), keys_values)[0]

            outputs: Any = nn.apply(apply, decoder)({"params": layer_params})
            return outputs, None

        carry = self._embed(params, prompts), self._embed(params, inputs)
        (_, x), _ = scan_stack(layer, carry, params["decoder"]["layers"], self._full_layers(), config=self.config)
        return self._final_norm(params, x)

    def _fused_hidden(
        self,
        attention: str,
        params: Any,
        prompts: Array,
        prompt_lengths: Array,
        inputs: Array,
        packing: Packing | None,
    ) -> Array:
        """`hidden` with a fused attention kernel, over rows that hold prompts and their responses."""
        prompt = prompts.shape[1] - (packing is None)
        row = fused_attention.Row(prompt, *inputs.shape[1:])
        if packing is None:
            tokens = row.tokens(prompts, prompt_lengths, inputs)
            positions, segments = row.positions(prompt_lengths), row.segments(prompt_lengths)
        else:
            tokens, positions, segments = row.packed(prompts, inputs, packing)
        tokens, positions, segments = (fused_attention.whole_tiles(x) for x in (tokens, positions, segments))
        fused = self._fused_layer(attention, row, segments, positions)

        def layer(x: Array, layer_params: Any, full: Any) -> tuple[Array, None]:
            return fused(x, layer_params, full)[0], None

        x = self._embed(params, tokens)
        x, _ = scan_stack(layer, x, params["decoder"]["layers"], self._full_layers(), config=self.config)
        return self._final_norm(params, row.responses(x))

    def _fused_layer(
        self,
        attention: str,
        row: fused_attention.Row,
        segments: Int[Array, "B S"] | None,
        positions: Int[Array, "#B S"],
    ) -> Callable[[Array, Any, Any], tuple[Array, layers.KeysValues]]:
        """A layer over rows, with a fused kernel; it also returns its keys and values."""
        config, decoder = self.config, DecoderLayer(self.config)
        attend = fused_attention.make(config, attention, row, segments, scale=_attention_scale(config))
        rotation = self._by_layer(partial(self._rotation, positions))

        def layer(x: Array, layer_params: Any, full: Any) -> Any:
            return decoder.apply({"params": layer_params}, x, rotation(full), attend(full), method="row")

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
        """The cache for sampling: each layer's keys and values of the prompts, and space for the responses."""
        config, size = self.config, prompts.shape[-1]
        attention = fused_attention.choose(config)
        if attention == "xla":
            over_prompts = self._prompt_layer(size)
        else:
            over_prompts = self._fused_layer(attention, fused_attention.Row(size), None, jnp.arange(size)[None])

        def layer(x: Array, layer_params: Any, full: Any) -> tuple[Array, Any]:
            x, keys_values = over_prompts(x, layer_params, full)
            return x, layers.held(keys_values, cache_dtype)

        x, stacked = self._embed(params, prompts), params["decoder"]["layers"]
        _, prompt = scan_stack(layer, x, stacked, self._full_layers(), config=config)
        shape = (config.layers, len(prompts), config.kv_heads, samples, max_length, config.head_size)
        return {
            "prompt": prompt,
            "prompt_lengths": prompt_lengths,
            "responses": layers.empty_cache(shape, config.dtype),
        }

    def decode_step(
        self, params: Any, cache: Any, step: Int[Array, ""], tokens: Int[Array, "B K"], places: int
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states that predict the token at position `step` from the token before it."""
        decoder, size = DecoderLayer(self.config), cache["prompt"][0].shape[-2]
        view = self._by_layer(partial(self._response_view, cache["prompt_lengths"], size, step[None], places))

        def layer(x: Array, responses: Any, index: Array, layer_params: Any, inputs: Any) -> Any:
            prompt, full = inputs
            return decoder.apply({"params": layer_params}, x, view(full), prompt, responses, index, step)

        x, responses = decode_stack(
            layer,
            self._embed(params, tokens[..., None]),
            cache["responses"],
            params["decoder"]["layers"],
            (cache["prompt"], self._full_layers()),
            config=self.config,
        )
        return self._final_norm(params, x)[:, :, 0], {**cache, "responses": responses}

    def _prompt_layer(self, size: int) -> Callable[[Array, Any, Any], tuple[Array, layers.KeysValues]]:
        """A layer over prompts; it also returns their keys and values."""
        decoder, view = DecoderLayer(self.config), self._by_layer(partial(self._prompt_view, size))

        def layer(x: Array, layer_params: Any, full: Any) -> Any:
            return decoder.apply({"params": layer_params}, x, view(full), method="prompt")

        return layer

    def _full_layers(self) -> Bool[Array, " L"] | None:
        """True at layers without a window; None if no layer has a window."""
        config = self.config
        if config.window is None:
            return None
        return (jnp.arange(config.layers) + 1) % config.full_attention_every == 0

    def _by_layer(self, view: Callable[[int | None], Tree]) -> Callable[[Any], Tree]:
        """A function from a layer's entry of `_full_layers` to `view(window)` of this layer."""
        full = view(None)
        if self.config.window is None:
            return lambda _: full
        local = view(self.config.window)
        return lambda is_full: jax.tree.map(partial(jnp.where, is_full), full, local)

    def _prompt_view(self, size: int, window: int | None) -> View:
        positions = jnp.arange(size)
        return View(self._rotation(positions[None], window), layers.causal_mask(positions, positions, window))

    def _response_view(
        self, prompt_lengths: Array, prompt_size: int, queries: Int[Array, "Q"], size: int, window: int | None
    ) -> View:
        """The view of responses of `size` at `queries`; they see the whole prompt except its last token."""
        positions = (prompt_lengths[:, None] - 1 + queries)[:, None]
        prompt = layers.prefix_mask(prompt_lengths - 1, prompt_size)
        if window is not None:
            prompt &= positions[..., None] - jnp.arange(prompt_size) < window
        own = layers.causal_mask(queries, jnp.arange(size), window)
        return View(self._rotation(positions, window), own, prompt)

    def _packed_prompt_view(self, packing: Packing, window: int | None) -> View:
        places = jnp.arange(packing.prompts.slot.shape[-1])
        own = layers.causal_mask(places, places, window) & packing.within_prompts()
        return View(self._rotation(packing.prompts.position, window), own)

    def _packed_response_view(self, packing: Packing, window: int | None) -> View:
        positions, places = packing.response_positions(), jnp.arange(packing.responses.slot.shape[-1])
        prompt = packing.across() & ~packing.is_last()[:, None, None]
        if window is not None:
            prompt &= positions[..., None] - packing.prompts.position[:, None, None] < window
        own = layers.causal_mask(places, places, window) & packing.within_responses()
        return View(self._rotation(positions, window), own, prompt)

    def _rotation(self, positions: Array, window: int | None) -> rope.Rotation:
        return rope.rotation(positions, rope.frequencies(self.config, local=window is not None))

    def _embed(self, params: Any, tokens: Array) -> Array:
        x = params["token_embedder"]["embedding"].astype(self.config.dtype)[tokens]
        if self.config.embedding_scale == "sqrt_width":
            x *= jnp.asarray(self.config.width**0.5, x.dtype)
        return constrain_stream(x)

    def _final_norm(self, params: Any, x: Array) -> Any:
        return _norm(self.config).apply({"params": params["decoder"]["decoder_norm"]}, x)
