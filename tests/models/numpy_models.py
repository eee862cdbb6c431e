"""Both policies in plain numpy at float64: one response at a time, no cache, no loop over stacked layers, no sharing.

Written from the papers: T5 (1910.10683, with the gated GELU of 2002.05202), PaLM (2204.02311), RoPE (2104.09864),
Gemma (2403.08295, 2408.00118, 2503.19786), Llama 3 (2407.21783), Qwen 2 and 3 (2407.10671, 2505.09388),
GPT-NeoX (2204.06745).
"""

import math

import jax
import numpy as np


def relative_bucket(distance, *, bidirectional, buckets, max_distance):
    """The bucket of key position minus query position, as T5 defines it."""
    offset = 0
    if bidirectional:
        buckets //= 2
        if distance > 0:
            offset = buckets
        near = abs(distance)
    else:
        near = max(-distance, 0)
    exact = buckets // 2
    if near < exact:
        return offset + near
    # In floats the logarithm may fall just below a whole number.
    steps = math.floor(math.log(near / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-9)
    return offset + min(exact + steps, buckets - 1)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def norm(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def gelu(x):
    """The tanh form; T5 v1.1 was trained with it."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def silu(x):
    return x / (1 + np.exp(-x))


def cap(logits, bound):
    return bound * np.tanh(logits / bound) if bound else logits


def attention(query, key, value, *, bias=0.0, mask, scale, soft_cap=None):
    """Query [Q, H, C], key and value [S, G, C]; each group of H / G query heads reads one key head."""
    output = np.zeros_like(query)
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        logits = cap(scale * query[:, head] @ key[:, group].T, soft_cap)
        logits = logits + (bias if np.isscalar(bias) else bias[head])
        output[:, head] = softmax(np.where(mask, logits, -1e9)) @ value[:, group]
    return output


def rope(x, positions, frequencies):
    """Pair i of a head (components i and i + half) as a complex number, rotated by position * frequencies[i]."""
    half = len(frequencies)
    turn = np.exp(1j * np.outer(positions, frequencies))[:, None]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def rope_frequencies(config, *, local):
    """The frequency of each pair of a head. Llama 3.1's scaling depends on the wavelength in tokens."""
    base = config.rope_local_base if local and config.rope_local_base else config.rope_base
    size = config.rotary_size or config.head_size
    found = [base ** (-2 * pair / size) for pair in range(size // 2)]
    if config.rope_scaling == "none" or (local and config.rope_local_base):
        return np.array(found)
    if config.rope_scaling == "linear":
        return np.array(found) / config.rope_scaling_factor
    longest = config.rope_original_length / config.rope_low_frequency_factor
    shortest = config.rope_original_length / config.rope_high_frequency_factor
    for pair, frequency in enumerate(found):
        wavelength = 2 * math.pi / frequency
        if wavelength > longest:
            found[pair] = frequency / config.rope_scaling_factor
        elif wavelength > shortest:
            smooth = (config.rope_original_length / wavelength - config.rope_low_frequency_factor) / (
                config.rope_high_frequency_factor - config.rope_low_frequency_factor
            )
            found[pair] = (1 - smooth) * frequency / config.rope_scaling_factor + smooth * frequency
    return np.array(found)


def _split(x, kernel):
    return np.einsum("sd,dhc->shc", x, kernel)


def _merge(x, kernel):
    return np.einsum("shc,hcd->sd", x, kernel)


def _linear(x, params):
    return x @ params["kernel"] + params.get("bias", 0.0)


def _mlp(x, params, activation):
    if "wi" in params:
        return _linear(activation(_linear(x, params["wi"])), params["wo"])
    return _linear(activation(_linear(x, params["wi_0"])) * _linear(x, params["wi_1"]), params["wo"])


def _layer(stacked, index):
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _t5_attention(x, source, params, mask, bias=0.0):
    heads = [
        _split(inputs, params[name]["kernel"]) for inputs, name in ((x, "query"), (source, "key"), (source, "value"))
    ]
    return _merge(attention(*heads, bias=bias, mask=mask, scale=1.0), params["out"]["kernel"])


def _t5_bias(params, size, config, *, bidirectional):
    rules = {"buckets": config.relative_position_buckets, "max_distance": config.relative_position_max_distance}
    buckets = [[relative_bucket(k - q, bidirectional=bidirectional, **rules) for k in range(size)] for q in range(size)]
    return params["relpos_bias"]["rel_embedding"][:, buckets]


def t5_logits(config, params, prompt, response):
    """Logits [R, V] of each token of one response to one prompt, both without padding."""
    table, encoder, decoder = params["token_embedder"]["embedding"], params["encoder"], params["decoder"]
    x = table[prompt]
    bias, mask = _t5_bias(encoder, len(prompt), config, bidirectional=True), np.ones((len(prompt), len(prompt)), bool)
    for index in range(config.encoder_layers):
        layer = _layer(encoder["layers"], index)
        y = norm(x, layer["pre_attention_layer_norm"]["scale"])
        x = x + _t5_attention(y, y, layer["attention"], mask, bias)
        x = x + _mlp(norm(x, layer["pre_mlp_layer_norm"]["scale"]), layer["mlp"], gelu)
    encoded = norm(x, encoder["encoder_norm"]["scale"])

    size = len(response)
    x = table[np.concatenate([[0], response[:-1]]).astype(int)]
    bias, causal = _t5_bias(decoder, size, config, bidirectional=False), np.tril(np.ones((size, size), bool))
    for index in range(config.decoder_layers):
        layer = _layer(decoder["layers"], index)
        y = norm(x, layer["pre_self_attention_layer_norm"]["scale"])
        x = x + _t5_attention(y, y, layer["self_attention"], causal, bias)
        y = norm(x, layer["pre_cross_attention_layer_norm"]["scale"])
        everything = np.ones((size, len(prompt)), bool)
        x = x + _t5_attention(y, encoded, layer["encoder_decoder_attention"], everything)
        x = x + _mlp(norm(x, layer["pre_mlp_layer_norm"]["scale"]), layer["mlp"], gelu)
    x = norm(x, decoder["decoder_norm"]["scale"])
    if config.tied_embeddings:
        return x @ table.T / math.sqrt(config.width)
    return x @ params["output_embedder"]["embedding"].T


def _decoder_norm(x, params, config):
    if config.norm == "layer":
        deviation = np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        return (x - x.mean(-1, keepdims=True)) / deviation * params["scale"] + params["bias"]
    scale = params["scale"] + 1 if config.norm == "one_plus_scale" else params["scale"]
    return norm(x, scale, config.norm_epsilon)


def _decoder_attention(config, index, layer, y):
    """Self-attention of layer `index` of a decoder, over one sequence y [S, D] of normalised inputs."""
    local = config.window is not None and (index + 1) % config.full_attention_every != 0
    positions = np.arange(len(y))
    distance = positions[:, None] - positions
    mask = (distance >= 0) & (distance < config.window) if local else distance >= 0
    heads = {name: _split(y, layer[name]["kernel"]) for name in ("query", "key", "value")}
    if config.query_key_value_bias:
        heads = {name: head + layer[name]["bias"] for name, head in heads.items()}
    if config.query_key_norm:
        heads |= {name: _decoder_norm(heads[name], layer[f"{name}_norm"], config) for name in ("query", "key")}
    frequencies = rope_frequencies(config, local=local)
    mixed = attention(
        rope(heads["query"], positions, frequencies),
        rope(heads["key"], positions, frequencies),
        heads["value"],
        mask=mask,
        scale=1 / math.sqrt(config.query_pre_attention_scalar or config.head_size),
        soft_cap=config.attention_soft_cap,
    )
    return _merge(mixed, layer["out"]["kernel"]) + layer["out"].get("bias", 0.0)


def decoder_logits(config, params, prompt, response):
    """Logits [R, V] of each token of one response; prompt and response are one sequence."""
    table, decoder = params["token_embedder"]["embedding"], params["decoder"]
    activation = {"silu": silu, "gelu": gelu, "exact_gelu": exact_gelu}[config.activation]
    x = table[np.concatenate([prompt, response[:-1]]).astype(int)]
    if config.embedding_scale == "sqrt_width":
        x = x * math.sqrt(config.width)
    for index in range(config.layers):
        layer = _layer(decoder["layers"], index)

        def normed(y, name, layer=layer):
            return _decoder_norm(y, layer[name], config)

        def behind(y, name):
            return normed(y, name) if config.post_norms else y

        y = normed(x, "pre_layer_norm" if config.block == "parallel" else "pre_attention_layer_norm")
        entered = x
        x = x + behind(_decoder_attention(config, index, layer, y), "post_attention_layer_norm")
        if config.block != "parallel":
            y = normed(x if config.block == "serial" else entered, "pre_mlp_layer_norm")
        x = x + behind(_mlp(y, layer["mlp"], activation), "post_mlp_layer_norm")
    x = _decoder_norm(x, decoder["decoder_norm"], config)
    output = table if config.tied_embeddings else params["output_embedder"]["embedding"]
    scale = 1 / math.sqrt(config.width) if config.logits_scale == "inverse_sqrt_width" else 1.0
    return cap(scale * x @ output.T, config.logits_soft_cap)[len(prompt) - 1 :]


def logits_of(config, params, prompt, response):
    """Logits [R, V] of either policy at float64."""
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    function = t5_logits if config.architecture == "t5" else decoder_logits
    return function(config, double, np.asarray(prompt), np.asarray(response))


def score_rows(config, params, prompts, prompt_lengths, responses, response_lengths):
    """Log-probs [B, K, R] of every token, 0 at padding; computes each response separately."""
    scores = np.zeros(responses.shape)
    for b, k in np.ndindex(*responses.shape[:2]):
        prompt, response = prompts[b, : prompt_lengths[b]], responses[b, k, : response_lengths[b, k]]
        log_probs = log_softmax(logits_of(config, params, prompt, response))
        scores[b, k, : len(response)] = log_probs[np.arange(len(response)), response]
    return scores
