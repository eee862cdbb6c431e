"""Converts between a Hugging Face config.json and the config of a policy; refuses what no policy here computes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignment_gap.checkpoints.network import RUN_TIME
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, ModelConfig, RewardHead, T5Config
from alignment_gap.models.reward_head import without_output

Values = Mapping[str, Any]
REQUIRED: Any = object()
FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """The common settings of the decoders of one `model_type`.

    Attributes:
      architecture: the class in transformers.
      model: fields of DecoderConfig that all of them share.
      optional: fields of config.json that not every family has, and their defaults in transformers.
      only: fields of config.json that change the computation, and the values that our decoder supports; the first is
        the default in transformers.
    """

    architecture: str
    model: dict[str, Any]
    optional: dict[str, Any]
    only: dict[str, tuple[Any, ...]]


_SERIAL = {"block": "serial", "logits_scale": "one"}
_GEMMA = {**_SERIAL, "activation": "gelu", "norm": "one_plus_scale", "embedding_scale": "sqrt_width"}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA_2 = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GELU: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh",)}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}
_CAUSAL: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _SERIAL, {}, {**_SILU, **_NO_BIAS, "mlp_bias": (False,)}),
    # Either every layer has a window or no layer has. The config does not list layers.
    "mistral": Family("MistralForCausalLM", _SERIAL, {"sliding_window": 4096, "sliding_window_pattern": None}, _SILU),
    "qwen2": Family("Qwen2ForCausalLM", {**_SERIAL, "query_key_value_bias": True}, _QWEN_WINDOW, _SILU),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_SERIAL, "query_key_norm": True},
        {**_QWEN_WINDOW, "head_dim": 128},
        {**_SILU, **_NO_BIAS},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA,
        {"tie_word_embeddings": True, "head_dim": 256},
        # The first releases have "gelu", but were trained with its tanh form, which transformers computes.
        {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": (None, *_GELU["hidden_activation"])}
        | _NO_BIAS
        | _CAUSAL,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA, "post_norms": True},
        {
            **_GEMMA_2,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        {**_GELU, **_NO_BIAS, **_CAUSAL},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, "post_norms": True, "query_key_norm": True},
        {
            **_GEMMA_2,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        {**_GELU, **_NO_BIAS, **_CAUSAL, "attn_logit_softcapping": (None,)},
    ),
}
T5_FAMILIES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
# GPT-NeoX, which is Pythia's architecture, and OpenAssistant's reward models over it.
GPT_NEOX, GPT_NEOX_REWARD = "gpt_neox", "gpt_neox_reward_model"
OF_GPT_NEOX: dict[str, Any] = {
    "logits_scale": "one",
    "gated_mlp": False,
    "activation": "exact_gelu",
    "norm": "layer",
    "query_key_value_bias": True,
    "out_and_mlp_bias": True,
}
POLICIES = {
    **T5_FAMILIES,
    **{name: family.architecture for name, family in FAMILIES.items()},
    GPT_NEOX: "GPTNeoXForCausalLM",
}
# The classes of reward models. All but two are named after the class of the policy.
REWARD_MODELS = {
    name: re.sub("For[A-Z].*", "ForSequenceClassification", policy) for name, policy in POLICIES.items()
} | {"gemma3_text": "Gemma3TextForSequenceClassification", GPT_NEOX_REWARD: "GPTNeoXRewardModel"}
# A field of ours: the tokens before and after the response in the text of a reward model that was trained here.
_AROUND = "tokens_around_response"
# The names of llama3's factors in transformers and here.
_LLAMA3 = {
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_length",
}
# Fields that repeat other fields in the notation of another version of transformers.
_NOTATIONS = {
    "dtype",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "rotary_pct",
    "rotary_emb_base",
    "layer_types",
    "_sliding_window_pattern",
    "scale_decoder_outputs",
}
# Fields that belong to the head of a classifier.
_OF_HEAD = {"id2label", "label2id", "num_labels", "problem_type", "pooling", _AROUND}


def read_config(values: Values, source: str) -> ModelConfig:
    """The policy that a config.json describes.

    Args:
      values: the content of config.json.
      source: its path, for errors.

    Raises:
      UserError: a field is missing, has another type, or needs something that the policies do not compute.
    """
    fields, model_type = _Fields(values, source), _policy_of(values)
    if not isinstance(model_type, str) or model_type not in POLICIES:
        raise UserError(
            f"{source}: model_type is {model_type!r}, which is not supported: the families are {', '.join(POLICIES)}"
        )
    fields.only("quantization_config", (None,))
    # transformers takes null for false here: the tokens of a decoder then see the later ones.
    fields.only("is_causal", (True,))
    if model_type in T5_FAMILIES:
        return _read_t5(fields, model_type)
    return _normal(_read_gpt_neox(fields) if model_type == GPT_NEOX else _read_decoder(fields, FAMILIES[model_type]))


def read_head(values: Values, source: str) -> RewardHead | None:
    """How the reward model that a config.json describes reads a response; None if it describes a policy.

    Raises:
      UserError: it is a classifier of a class that is not read here, or with more than one label.
    """
    architecture = str((_Fields(values, source).get("architectures", list, None) or [None])[0])
    if not re.search("Classification|Reward", architecture):
        return None
    if architecture != REWARD_MODELS.get(str(values.get("model_type"))):
        there = ", ".join(REWARD_MODELS.values())
        raise UserError(
            f"{source}: architectures is {architecture!r}, which is not supported: the reward models are {there}"
        )
    fields = _Fields(values, source)
    if values.get("model_type") == GPT_NEOX_REWARD:
        fields.only("pooling", ("last",))
        return RewardHead(bias=True)
    named = fields.get("id2label", dict, None)
    labels = fields.get("num_labels", int, 2) if named is None else len(named)  # transformers' default is 2.
    if labels != 1:
        raise UserError(
            f"{source}: the model has {labels} labels (id2label, num_labels), but a judge needs one reward: give a "
            "model with one label"
        )
    before, after = fields.get(_AROUND, list, None) or (None, None)
    return RewardHead(fields.get("pad_token_id", int, None), before, after)


def write_config(model: ModelConfig, like: Values | None = None, head: RewardHead | None = None) -> dict[str, Any]:
    """The config.json of a policy, or of a reward model with a head.

    Args:
      model: the policy's config.
      like: the config.json that the policy came with. The result keeps its family, and settings that a policy does not
        have, such as token ids.
      head: the reward model's head; None for a policy.

    Raises:
      UserError: no family of transformers computes the same as the policy; the message names the nearest.
    """
    like = like or {}
    families = [name for name in POLICIES if (name in T5_FAMILIES) == isinstance(model, T5Config)]
    differences = {}
    for family in sorted(families, key=lambda family: family != _policy_of(like)):
        values = _write_policy(model, family)
        found = read_config(values, "config.json")
        differences[family] = _differences(model, found if head is None else without_output(found))
        if not differences[family]:
            kept = like if family == _policy_of(like) else {}
            dropped = _NOTATIONS if head is None else _NOTATIONS | _OF_HEAD
            kept = {name: value for name, value in kept.items() if name not in dropped}
            return kept | values | (_write_head(head, family) if head else {})
    nearest = min(differences, key=lambda family: len(differences[family]))
    raise UserError(
        f"no architecture of transformers computes this policy: {nearest} is the nearest and differs in "
        f"{', '.join(differences[nearest])}; export it to another format"
    )


def _policy_of(values: Values) -> Any:
    """The `model_type` of the policy that a config.json describes, or of the policy inside a reward model."""
    model_type = values.get("model_type")
    return GPT_NEOX if model_type == GPT_NEOX_REWARD else model_type


def _write_policy(model: ModelConfig, family: str) -> dict[str, Any]:
    if isinstance(model, T5Config):
        return _write_t5(model, family)
    return _write_gpt_neox(model) if family == GPT_NEOX else _write_decoder(model, family)


def _write_head(head: RewardHead, family: str) -> dict[str, Any]:
    if head.bias:
        return {
            "architectures": [REWARD_MODELS[GPT_NEOX_REWARD]],
            "model_type": GPT_NEOX_REWARD,
            "pooling": "last",
        }
    values: dict[str, Any] = {
        "architectures": [REWARD_MODELS[family]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    if head.pad_id is not None:
        values["pad_token_id"] = head.pad_id
    return values | ({_AROUND: [head.before, head.after]} if head.after is not None else {})


class _Fields:
    """The fields of a config.json, with errors that name them."""

    def __init__(self, values: Values, source: str, path: str = "") -> None:
        self.values, self.source, self.path = values, source, path

    def get(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A field's value; null becomes None if there is a default."""
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise UserError(f"{self.source} has no field {self.path}{name}: it is no complete config of its model_type")
        if kind is float and type(value) is int:
            return float(value)
        if kind is float and type(value) is float and not math.isfinite(value):
            raise UserError(f"{self.source}: {self.path}{name} is {value!r}: it must be a finite number")
        if (value is None and default is not REQUIRED) or type(value) is kind:
            return value
        raise UserError(f"{self.source}: {self.path}{name} is {value!r}: it must be of type {kind.__name__}")

    def given(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """As `get`, but null is refused: transformers does not take the default for it."""
        value = self.get(name, kind, default)
        if value is None:
            raise UserError(f"{self.source}: {self.path}{name} is None: it must be of type {kind.__name__}")
        return value

    def size(self, name: str, default: Any = REQUIRED) -> Any:
        """An int of at least 1, or None if that is the default."""
        value = self.get(name, int, default)
        if value is not None and value < 1:
            raise UserError(f"{self.source}: {self.path}{name} is {value}: it must be at least 1")
        return value

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuses a value that is not allowed; an absent field counts as the first allowed value."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(
                f"{self.source}: {self.path}{name} is {value!r}, which is not supported: it must be {choices}"
            )

    def group(self, name: str) -> _Fields:
        """The fields inside a field; empty if it is absent or null."""
        return _Fields(self.get(name, dict, None) or {}, self.source, f"{self.path}{name}.")


def _read_t5(fields: _Fields, model_type: str) -> T5Config:
    # The defaults of transformers: T5's first version, or mT5's, which is version 1.1.
    activation = fields.get("feed_forward_proj", str, "relu" if model_type == "t5" else "gated-gelu")
    _Fields({"feed_forward_proj": activation}, fields.source).only("feed_forward_proj", ("gated-gelu",))
    # Two names of one function. Without this field transformers takes it for "gated-gelu".
    fields.only("dense_act_fn", ("gelu_new", "gelu_pytorch_tanh"))
    fields.only("is_gated_act", (True,))
    fields.only("layer_norm_epsilon", (1e-6,))
    fields.only("decoder_start_token_id", (0, None))
    tied = fields.get("tie_word_embeddings", bool, True) is not False
    # transformers 5 sets tie_word_embeddings for all T5s. Whether the logits are scaled, which is what tied means here,
    # is in scale_decoder_outputs. It never scales mT5's logits.
    tied = model_type == "t5" and bool(fields.get("scale_decoder_outputs", bool, tied))
    depth = fields.size("num_layers")
    return T5Config(
        vocabulary_size=fields.size("vocab_size"),
        width=fields.size("d_model"),
        encoder_layers=depth,
        decoder_layers=fields.size("num_decoder_layers", None) or depth,
        heads=fields.size("num_heads"),
        head_size=fields.size("d_kv"),
        mlp_width=fields.size("d_ff"),
        relative_position_buckets=fields.given("relative_attention_num_buckets", int, 32),
        relative_position_max_distance=fields.given("relative_attention_max_distance", int, 128),
        tied_embeddings=tied,
    )


def _write_t5(model: T5Config, family: str) -> dict[str, Any]:
    return {
        "architectures": [T5_FAMILIES[family]],
        "model_type": family,
        "is_encoder_decoder": True,
        "vocab_size": model.vocabulary_size,
        "d_model": model.width,
        "num_layers": model.encoder_layers,
        "num_decoder_layers": model.decoder_layers,
        "num_heads": model.heads,
        "d_kv": model.head_size,
        "d_ff": model.mlp_width,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": model.relative_position_buckets,
        "relative_attention_max_distance": model.relative_position_max_distance,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": model.tied_embeddings,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def _read_decoder(fields: _Fields, family: Family) -> DecoderConfig:
    for name, allowed in family.only.items():
        fields.only(name, allowed)

    def optional(name: str, kind: type) -> Any:
        """A field that not every family has; None if this family does not have it."""
        return fields.get(name, kind, family.optional[name]) if name in family.optional else None

    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    depth = fields.size("num_hidden_layers")
    return DecoderConfig(
        vocabulary_size=fields.size("vocab_size"),
        width=width,
        layers=depth,
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", None) or heads,
        head_size=fields.size("head_dim", family.optional.get("head_dim")) or width // heads,
        mlp_width=fields.size("intermediate_size"),
        norm_epsilon=fields.given("rms_norm_eps", float, 1e-6),
        tied_embeddings=fields.given("tie_word_embeddings", bool, family.optional.get("tie_word_embeddings", False)),
        logits_soft_cap=optional("final_logit_softcapping", float),
        attention_soft_cap=optional("attn_logit_softcapping", float),
        query_pre_attention_scalar=optional("query_pre_attn_scalar", float),
        **_read_windows(fields, family, depth),
        **_read_rope(fields, family),
        **family.model,
    )


def _read_windows(fields: _Fields, family: Family, depth: int) -> dict[str, Any]:
    """The fields `window` and `full_attention_every`; transformers lists the layers or gives the list's pattern."""
    if "sliding_window" not in family.optional:
        return {}
    window = fields.size("sliding_window", family.optional["sliding_window"])
    if "use_sliding_window" in family.optional:
        window = window if fields.given("use_sliding_window", bool, False) else None
        first = fields.given("max_window_layers", int, family.optional["max_window_layers"])
        default = [SLIDING if window and layer >= first else FULL for layer in range(depth)]
    else:
        every = family.optional["sliding_window_pattern"]
        if "rope_local_base_freq" in family.optional:
            every = fields.size("sliding_window_pattern", every)
        elif not fields.get("layer_types", list, None):
            fields.only("sliding_window_pattern", (every,))  # transformers reads it in gemma3_text alone.
        # In mistral, null means that no layer has a window.
        default = _layer_types(depth, every or (depth + 1 if window else 1))
    kinds = fields.get("layer_types", list, default) or default
    every = kinds.index(FULL) + 1 if FULL in kinds else depth + 1
    if kinds != _layer_types(depth, every):
        raise UserError(
            f"{fields.source}: {fields.path}layer_types is {kinds}, which is not supported: of {depth} layers every "
            f"n-th must be {FULL} and the others {SLIDING}"
        )
    if every == 1:
        return {}
    if not window:
        raise UserError(
            f"{fields.source}: {fields.path}layer_types has {SLIDING}, but sliding_window is None: set sliding_window "
            f"to the width, or layer_types to {FULL}"
        )
    return {"window": window, "full_attention_every": every}


def _layer_types(depth: int, every: int) -> list[str]:
    return [SLIDING if (layer + 1) % every else FULL for layer in range(depth)]


def _read_rope(fields: _Fields, family: Family) -> dict[str, Any]:
    """The rotary positions, in the notation of transformers 5, `rope_parameters`, or of version 4, `rope_scaling`."""
    notations = [name for name in ("rope_scaling", "rope_parameters") if fields.group(name).values]
    found = [_read_notation(fields, family, name) for name in notations or ["rope_parameters"]]
    if found[0] != found[-1]:
        raise UserError(
            f"{fields.source}: {fields.path}rope_scaling and rope_parameters give other rotary positions: remove the "
            "one that the model was not trained with"
        )
    return found[0]


def _read_notation(fields: _Fields, family: Family, name: str) -> dict[str, Any]:
    """The rotary positions if only one of the two notations is there."""
    local, given = "rope_local_base_freq" in family.optional, fields.group(name)
    full = given.group(FULL) if local and name == "rope_parameters" else given
    full.only(FULL, (None,))
    if local and name == "rope_scaling" and "rope_type" not in full.values:
        full.only("type", ("default",))  # transformers 4 reads it, and version 5 ignores it.
    rope_type = _rope_type(full, ("default", "linear", "llama3"))
    for group in (fields, full):
        group.only("partial_rotary_factor", (1.0, None))
    default = family.optional.get("rope_theta", 1e4)
    found: dict[str, Any] = {"rope_base": _rope_number(full, "rope_theta", fields, "rope_theta", default)}
    if local:
        sliding = given.group(SLIDING)
        _rope_type(sliding, ("default",))
        default = family.optional["rope_local_base_freq"]
        found["rope_local_base"] = _rope_number(sliding, "rope_theta", fields, "rope_local_base_freq", default)
    if rope_type != "default":
        found |= {"rope_scaling": rope_type, "rope_scaling_factor": full.get("factor", float)}
    if rope_type == "llama3":
        longest = fields.values.get("max_position_embeddings", REQUIRED)
        length = full.given("original_max_position_embeddings", int, longest)
        # In some families of transformers 5 this field overrides the one that is read here.
        fields.only("original_max_position_embeddings", (length,))
        given_factors = {each: full.get(each, float) for each in ("low_freq_factor", "high_freq_factor")}
        given_factors["original_max_position_embeddings"] = length
        found |= {_LLAMA3[each]: value for each, value in given_factors.items()}
    return found


def _rope_type(rope: _Fields, allowed: tuple[str, ...]) -> str:
    """The kind of rotary positions, which has two names; the first name counts."""
    name = "rope_type" if "rope_type" in rope.values else "type"
    rope.only(name, allowed)
    return rope.values.get(name, "default")


def _rope_number(rope: _Fields, inside: str, fields: _Fields, outside: str, default: float) -> float:
    """A number inside a group of rotary settings, or outside, where it has another name."""
    return rope.given(inside, float) if inside in rope.values else fields.given(outside, float, default)


def _write_decoder(model: DecoderConfig, model_type: str) -> dict[str, Any]:
    family = FAMILIES[model_type]
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "llama3":
        scaling |= {name: getattr(model, field) for name, field in _LLAMA3.items()}
    windowed = model.window is not None and model.full_attention_every > 1
    lists_layers = family.optional.get("sliding_window_pattern", 1) is not None
    scalar = model.query_pre_attention_scalar or float(model.head_size)
    optional = {
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "final_logit_softcapping": model.logits_soft_cap,
        "attn_logit_softcapping": model.attention_soft_cap,
        "use_sliding_window": windowed,
        "max_window_layers": 0,
        # If the config lists layers, transformers needs a width even if no layer has a window.
        "sliding_window": model.window or (family.optional.get("sliding_window") if lists_layers else None),
        "sliding_window_pattern": model.full_attention_every if lists_layers else None,
        "rope_local_base_freq": model.rope_local_base or model.rope_base,
    }
    values = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.mlp_width,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_base,
        "rope_scaling": None if model.rope_scaling == "none" else scaling,
        "torch_dtype": "float32",
    }
    values |= {name: allowed[0] for name, allowed in family.only.items() if allowed[0] is not None}
    values |= {name: value for name, value in optional.items() if name in family.optional}
    if "sliding_window" in family.optional and lists_layers:
        values["layer_types"] = _layer_types(model.layers, model.full_attention_every if windowed else 1)
    return values


def _read_gpt_neox(fields: _Fields) -> DecoderConfig:
    fields.only("hidden_act", ("gelu",))
    fields.only("attention_bias", (True,))
    fields.only("rope_scaling", (None,))
    # In transformers 5 both rotary settings are in `rope_parameters`.
    rope = fields.group("rope_parameters")
    _rope_type(rope, ("default",))
    share = _rope_number(rope, "partial_rotary_factor", fields, "rotary_pct", 0.25)
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    # transformers takes another value for the rotary positions alone.
    fields.only("head_dim", (None, width // heads))
    return DecoderConfig(
        vocabulary_size=fields.size("vocab_size"),
        width=width,
        layers=fields.size("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp_width=fields.size("intermediate_size"),
        block="parallel_two_norms" if fields.given("use_parallel_residual", bool, True) else "serial",
        norm_epsilon=fields.given("layer_norm_eps", float, 1e-5),
        tied_embeddings=fields.given("tie_word_embeddings", bool, False),
        rope_base=_rope_number(rope, "rope_theta", fields, "rotary_emb_base", 1e4),
        rotary_size=int(width // heads * share),
        **OF_GPT_NEOX,
    )


def _write_gpt_neox(model: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": [POLICIES[GPT_NEOX]],
        "model_type": GPT_NEOX,
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": model.block == "parallel_two_norms",
        "layer_norm_eps": model.norm_epsilon,
        "rotary_pct": (model.rotary_size or model.head_size) / model.head_size,
        "rotary_emb_base": model.rope_base,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": "float32",
    }


def _differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields that make two configs compute different things, with both values."""
    ours, theirs = _normal(model), _normal(other)
    names = [field.name for field in dataclasses.fields(ours) if field.name not in RUN_TIME]
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return [f"{name} ({a!r} here, {b!r} there)" for name, (a, b) in pairs.items() if a != b]


def _normal(model: ModelConfig) -> ModelConfig:
    """Among all configs that compute the same, the one with the fewest settings."""
    if isinstance(model, T5Config):
        return model
    changes: dict[str, Any] = {}
    if model.query_pre_attention_scalar == model.head_size:
        changes["query_pre_attention_scalar"] = None
    if model.rotary_size == model.head_size:
        changes["rotary_size"] = None
    if model.rope_scaling == "none" or (model.rope_scaling == "linear" and model.rope_scaling_factor == 1.0):
        changes |= {name: getattr(DecoderConfig, name) for name in ("rope_scaling", "rope_scaling_factor")}
    if model.rope_scaling != "llama3":
        changes |= {name: getattr(DecoderConfig, name) for name in _LLAMA3.values()}
    if model.full_attention_every > model.layers:
        changes["full_attention_every"] = model.layers + 1
    if not model.window or model.full_attention_every == 1:
        changes |= {"window": None, "full_attention_every": 1, "rope_local_base": None}
    elif model.rope_local_base == model.rope_base and changes.get("rope_scaling") == "none":
        changes["rope_local_base"] = None
    return dataclasses.replace(model, **changes)
