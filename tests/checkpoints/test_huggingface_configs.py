"""config.json and a policy's config: every policy of a family converts both ways; each field's meaning by hand."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies

from alignment_gap.checkpoints.huggingface.configs import (
    FAMILIES,
    GPT_NEOX_REWARD,
    OF_GPT_NEOX,
    POLICIES,
    T5_FAMILIES,
    read_config,
    read_head,
    write_config,
)
from alignment_gap.checkpoints.huggingface.entries import copies_of
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config, sizes

FLOATS = strategies.sampled_from([0.5, 3.0, 50.0])
SIZES = strategies.integers(1, 40)


@strategies.composite
def decoders(draw, family):
    """A policy that the family can compute; every setting in it has an effect."""
    fields, settings = FAMILIES[family].optional, dict(FAMILIES[family].model)
    names = ("vocabulary_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width")
    settings |= {name: draw(SIZES) for name in names}
    settings |= {
        "tied_embeddings": draw(strategies.booleans()),
        "norm_epsilon": draw(strategies.sampled_from([1e-6, 1e-5])),
    }
    settings["rope_base"] = draw(strategies.sampled_from([1e4, 5e5]))
    scaling = draw(strategies.sampled_from(["none", "linear", "llama3"]))
    if scaling != "none":
        settings |= {"rope_scaling": scaling, "rope_scaling_factor": draw(strategies.sampled_from([2.0, 8.0]))}
    if scaling == "llama3":
        settings |= {"rope_low_frequency_factor": draw(FLOATS), "rope_original_length": draw(SIZES)}
    if "final_logit_softcapping" in fields:
        settings["logits_soft_cap"] = draw(strategies.none() | FLOATS)
    if "attn_logit_softcapping" in fields:
        settings["attention_soft_cap"] = draw(strategies.none() | FLOATS)
    if "query_pre_attn_scalar" in fields:
        scalar = draw(strategies.none() | FLOATS)
        settings["query_pre_attention_scalar"] = None if scalar == settings["head_size"] else scalar
    if "sliding_window" in fields and draw(strategies.booleans()):
        # If n is larger than the number of layers, every layer has a window.
        first = settings["layers"] + 1 if fields.get("sliding_window_pattern", 1) is None else 2
        every = draw(strategies.integers(first, settings["layers"] + 1))
        settings |= {"window": draw(SIZES), "full_attention_every": every}
        if "rope_local_base_freq" in fields:
            settings["rope_local_base"] = draw(strategies.sampled_from([10.0, 100.0]))
    return DecoderConfig(**settings)


def through_json(values):
    return json.loads(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_of_a_family_is_the_same_after_its_config_json(family):
    @hypothesis.settings(max_examples=30, deadline=None)
    @hypothesis.given(model=decoders(family))
    def check(model):
        # Two families may compute the same; `model_type` chooses this one.
        values = through_json(write_config(model, {"model_type": family}))
        assert (values["model_type"], values["architectures"]) == (family, [FAMILIES[family].architecture])
        assert read_config(values, "config.json") == model
        assert read_config(write_config(model), "config.json") == model

    check()


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    sizes=strategies.tuples(*[SIZES] * 5),
    quarter=SIZES,
    rotary=strategies.sampled_from([1, 2, 3, None]),
    block=strategies.sampled_from(["parallel_two_norms", "serial"]),
    tied=strategies.booleans(),
    epsilon=strategies.sampled_from([1e-6, 1e-5]),
    base=strategies.sampled_from([1e4, 5e5]),
)
def test_every_gpt_neox_is_the_same_after_its_config_json(sizes, quarter, rotary, block, tied, epsilon, base):
    vocabulary_size, layers, heads, _, mlp_width = sizes
    model = DecoderConfig(
        vocabulary_size=vocabulary_size,
        width=4 * quarter * heads,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=4 * quarter,
        mlp_width=mlp_width,
        block=block,
        norm_epsilon=epsilon,
        tied_embeddings=tied,
        rope_base=base,
        rotary_size=rotary and rotary * quarter,
        **OF_GPT_NEOX,
    )
    values = through_json(write_config(model))
    assert (values["model_type"], values["architectures"]) == ("gpt_neox", ["GPTNeoXForCausalLM"])
    assert read_config(values, "config.json") == model


def test_what_is_absent_of_a_gpt_neox_is_what_transformers_takes():
    model = read_config(LEAST | {"model_type": "gpt_neox", "hidden_size": 32}, "config.json")
    assert (model.head_size, model.rotary_size, model.kv_heads, model.block) == (8, 2, 4, "parallel_two_norms")
    assert (model.norm_epsilon, model.rope_base, model.tied_embeddings) == (1e-5, 1e4, False)


def test_a_gpt_neox_with_heads_of_its_own_size_is_refused():
    model = sizes.get("pythia_70m", head_size=32, rotary_size=16)
    message = r"gpt_neox is the nearest and differs in head_size \(32 here, 64 there\)"
    with pytest.raises(UserError, match=message):
        write_config(model)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(sizes=strategies.tuples(*[SIZES] * 8), tied=strategies.booleans())
def test_every_t5_is_the_same_after_its_config_json(sizes, tied):
    names = ("vocabulary_size", "width", "encoder_layers", "decoder_layers", "heads", "head_size", "mlp_width")
    model = T5Config(**dict(zip(names, sizes, strict=False)), relative_position_buckets=sizes[-1], tied_embeddings=tied)
    assert read_config(through_json(write_config(model)), "config.json") == model
    # mT5 has its own output embedding.
    family = write_config(model, {"model_type": "mt5"})["model_type"]
    assert family == ("t5" if tied else "mt5")


LEAST = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 48,
}
LEAST_T5 = {
    "vocab_size": 9,
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "d_kv": 4,
    "d_ff": 6,
    "feed_forward_proj": "gated-gelu",
}
# The values that transformers takes for absent fields: head size, key heads, tied, window, every, base, local base,
# caps.
DEFAULTS = {
    "llama": (6, 4, False, None, 1, 1e4, None, None, None),
    "mistral": (6, 4, False, 4096, 7, 1e4, None, None, None),
    "qwen2": (6, 4, False, None, 1, 1e4, None, None, None),
    "qwen3": (128, 4, False, None, 1, 1e4, None, None, None),
    "gemma": (256, 4, True, None, 1, 1e4, None, None, None),
    "gemma2": (256, 4, True, 4096, 2, 1e4, None, 30.0, 50.0),
    "gemma3_text": (256, 4, True, 4096, 6, 1e6, 1e4, None, None),
}
FIELDS = (
    "head_size", "kv_heads", "tied_embeddings", "window", "full_attention_every", "rope_base", "rope_local_base",
    "logits_soft_cap", "attention_soft_cap",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_absent_is_what_transformers_takes(family):
    model = read_config(LEAST | {"model_type": family}, "config.json")
    assert tuple(getattr(model, field) for field in FIELDS) == DEFAULTS[family]
    assert (model.vocabulary_size, model.width, model.layers, model.heads, model.mlp_width) == (100, 24, 6, 4, 48)
    assert model.norm_epsilon == 1e-6 and model.query_pre_attention_scalar is None
    # Null means absent if the field has a default.
    nulls = dict.fromkeys(("num_key_value_heads", "rope_scaling", "layer_types", "rope_parameters"))
    assert read_config(LEAST | nulls | {"model_type": family}, "config.json") == model
    # The head size is an exception: null means a part of the width.
    assert read_config(LEAST | {"head_dim": None, "model_type": family}, "config.json").head_size == 24 // 4


@pytest.mark.parametrize("name", LEAST)
def test_a_size_that_is_absent_or_of_another_type_is_named(name):
    values = LEAST | {"model_type": "llama"}
    with pytest.raises(UserError, match=f"^path has no field {name}: it is no complete config of its model_type$"):
        read_config({key: value for key, value in values.items() if key != name}, "path")
    for wrong in (None, "8", 8.0, True, [8]):
        with pytest.raises(UserError, match=rf"^path: {name} is .*: it must be of type int$"):
            read_config(values | {name: wrong}, "path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': it must be of type float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: it must be of type bool"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': it must be of type dict"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is None: it must be of type float"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta is '1e4': it must be of type float"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_path(change, message):
    with pytest.raises(UserError, match=f"^path: {message}$"):
        read_config(LEAST | {"model_type": "llama"} | change, "path")


@pytest.mark.parametrize(
    ("family", "tie", "scale", "tied"),
    [
        # In transformers 4 "tied" means both. Version 5 ties all, and another field says whether the logits are scaled.
        ("t5", None, None, True),
        ("t5", True, None, True),
        ("t5", False, None, False),
        ("t5", "null", None, True),
        ("t5", True, True, True),
        ("t5", True, False, False),
        ("mt5", None, None, False),
        ("mt5", False, None, False),
        ("mt5", True, None, False),
        ("mt5", True, True, False),
    ],
)
def test_whether_a_t5_is_tied(family, tie, scale, tied):
    values = LEAST_T5 | {"model_type": family, "num_decoder_layers": None}
    values |= {} if tie is None else {"tie_word_embeddings": None if tie == "null" else tie}
    values |= {} if scale is None else {"scale_decoder_outputs": scale}
    model = read_config(values, "config.json")
    assert model.tied_embeddings == tied and (model.encoder_layers, model.decoder_layers) == (2, 2)
    assert (model.relative_position_buckets, model.relative_position_max_distance) == (32, 128)
    with pytest.raises(UserError, match="decoder_start_token_id is 1, which is not supported: it must be 0 or None"):
        read_config(values | {"decoder_start_token_id": 1}, "config.json")


def test_the_first_version_of_t5_has_another_mlp():
    values = {"vocab_size": 9, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 6}
    with pytest.raises(UserError, match=r"feed_forward_proj is 'relu', .*: it must be 'gated-gelu'"):
        read_config(values | {"model_type": "t5"}, "config.json")
    assert read_config(values | {"model_type": "mt5"}, "config.json").mlp_width == 6


@pytest.mark.parametrize("is_causal", [False, None, "no"])
@pytest.mark.parametrize("family", [*POLICIES, GPT_NEOX_REWARD])
def test_decoders_that_see_later_tokens_are_refused(family, is_causal):
    values = (LEAST_T5 if family in T5_FAMILIES else LEAST) | {"model_type": family}
    assert read_config(values | {"is_causal": True}, "config.json") == read_config(values, "config.json")
    with pytest.raises(UserError, match=rf"^config.json: is_causal is {is_causal!r}, which is not supported: .* True"):
        read_config(values | {"is_causal": is_causal}, "config.json")


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"layer_types": [S, S, F, S, S, F]}, (4096, 3)),
        ({"layer_types": [S, S, S, S, S, F]}, (4096, 6)),
        # Every layer has a window: n is the number of layers plus one. No layer has one: the window is None.
        ({"layer_types": [S] * 6}, (4096, 7)),
        ({"layer_types": [F] * 6}, (None, 1)),
        ({"layer_types": [S, S, S, S, F, S]}, (4096, 5)),
        ({"sliding_window_pattern": 2, "sliding_window": 8}, (8, 2)),
        ({"sliding_window": None, "layer_types": [F] * 6}, (None, 1)),
        # The list of layers overrides the pattern.
        ({"sliding_window_pattern": 3, "layer_types": [S, F] * 3}, (4096, 2)),
        ({"layer_types": [F, S, F, S, F, S]}, None),
        ({"layer_types": [S, F, F, S, F, F]}, None),
        ({"layer_types": [S, F]}, None),
        ({"layer_types": [F, F]}, None),
        ({"layer_types": [[F]] * 6}, None),
        ({"layer_types": [S, S, "chunked_attention", S, S, F]}, None),
    ],
)
def test_which_layers_have_a_window(change, found):
    values = LEAST | {"model_type": "gemma2"} | change
    if found is None:
        with pytest.raises(UserError, match=r"layer_types is \[.*\], which is not supported: of 6 layers every n-th"):
            read_config(values, "config.json")
        return
    model = read_config(values, "config.json")
    assert (model.window, model.full_attention_every) == found


def test_the_pattern_of_layers_is_gemma_3s_alone():
    """transformers ignores it elsewhere, so another value than its own is of another model."""
    assert (
        read_config(LEAST | {"model_type": "gemma3_text", "sliding_window_pattern": 3}, "path").full_attention_every
        == 3
    )
    for family, only in (("gemma2", "2"), ("mistral", "None")):
        with pytest.raises(UserError, match=rf"^path: sliding_window_pattern is 3, .*: it must be {only}$"):
            read_config(LEAST | {"model_type": family, "sliding_window_pattern": 3}, "path")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_layers_with_a_window_need_its_width(family):
    with pytest.raises(
        UserError, match=r"^path: layer_types has sliding_attention, but sliding_window is None: set sliding_win"
    ):
        read_config(LEAST | {"model_type": family, "sliding_window": None}, "path")


NAN = float("nan")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None: it must be of type float"),
        ("llama", {"rms_norm_eps": NAN}, "rms_norm_eps is nan: it must be a finite number"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta is inf: it must be a finite number"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0: it must be at least 1"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0: it must be at least 1"),
        ("llama", {"head_dim": 0}, "head_dim is 0: it must be at least 1"),
        ("llama", {"intermediate_size": -48}, "intermediate_size is -48: it must be at least 1"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings is None: it must be of type bool"),
        ("gpt_neox", {"layer_norm_eps": None}, "layer_norm_eps is None: it must be of type float"),
        ("gpt_neox", {"use_parallel_residual": None}, "use_parallel_residual is None: it must be of type bool"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: it must be at least 1"),
        ("qwen2", {"max_window_layers": None}, "max_window_layers is None: it must be of type int"),
        (
            "t5",
            {"relative_attention_max_distance": None},
            "relative_attention_max_distance is None: it must be of type",
        ),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu', which is not supported: it must be 'gelu_new' or"),
        ("mt5", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu', which is not supported: it must be 'gelu_new' or"),
        ("t5", {"is_gated_act": False}, "is_gated_act is False, which is not supported: it must be True"),
        ("t5", {"num_heads": 0}, "num_heads is 0: it must be at least 1"),
    ],
)
def test_values_that_give_no_model_are_refused(family, change, message):
    values = LEAST_T5 if family in T5_FAMILIES else LEAST
    with pytest.raises(UserError, match=f"^path: {message}"):
        read_config(values | {"model_type": family} | change, "path")


def test_fields_that_are_no_names_are_refused():
    for model_type in (["llama"], {"a": 1}, None):
        with pytest.raises(UserError, match=r"^path: model_type is .*, which is not supported: the families are t5"):
            read_config(LEAST | {"model_type": model_type}, "path")
    for architectures in ({"a": 1}, "LlamaForCausalLM"):
        with pytest.raises(UserError, match=r"^path: architectures is .*: it must be of type list"):
            read_head(LEAST | {"architectures": architectures}, "path")
    assert read_head(LEAST | {"architectures": None}, "path") is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        # Qwen's first layers, up to max_window_layers, have no window.
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None, 1)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 7)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 6}, (None, 1)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, 1)),
    ],
)
def test_windows_of_qwen(change, found):
    for family in ("qwen2", "qwen3"):
        model = read_config(LEAST | {"model_type": family} | change, "config.json")
        assert (model.window, model.full_attention_every) == found


def test_mistral_has_a_window_in_all_layers_or_in_none():
    values = LEAST | {"model_type": "mistral", "sliding_window": None}
    assert read_config(values, "config.json").window is None
    written = write_config(read_config(values, "config.json"), {"model_type": "mistral"})
    assert written["sliding_window"] is None and "layer_types" not in written
    windows = read_config(values | {"sliding_window": 8}, "config.json")
    assert (windows.window, windows.full_attention_every) == (8, 7)
    some = dataclasses.replace(windows, full_attention_every=2)
    with pytest.raises(UserError, match=r"no architecture .* differs in .*full_attention_every \(2 here, 7 there\)"):
        write_config(some, {"model_type": "mistral"})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The notations of transformers 4 and of transformers 5.
        ({"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 7, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7, **LLAMA3}},
        ),
        # If a field has two names, the first one counts.
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, {}),
        ({"partial_rotary_factor": None}, {"rope_scaling": {"type": "default", "partial_rotary_factor": 1.0}}),
    ],
)
def test_rotary_positions_in_two_notations(first, second):
    one, other = (read_config(LEAST | {"model_type": "llama"} | values, "path") for values in (first, second))
    assert one == other


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "base"),
    [
        ({"rope_scaling": LINEAR | {"rope_theta": 77.0}}, 77.0),
        ({"rope_scaling": LINEAR | {"rope_theta": 77.0}, "rope_theta": None}, 77.0),
        ({"rope_scaling": LINEAR, "rope_theta": 77.0}, 77.0),
        ({"rope_scaling": LINEAR, "rope_parameters": {}}, 1e4),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 7.0}, "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 7.0}, "rope_theta": 9.0}, 7.0),
    ],
)
def test_a_scaled_rope_and_its_base(change, base):
    model = read_config(LEAST | {"model_type": "llama"} | change, "path")
    assert (model.rope_base, model.rope_scaling, model.rope_scaling_factor) == (base, "linear", 4.0)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "llama",
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parame",
        ),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 3.0}}, "rope_scaling and rope_p"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "original_max_position_embeddings": 16},
            "original_max_position_embeddings is 16, which is not supported: it must be 64",
        ),
        ("llama", {"rope_theta": None}, "rope_theta is None: it must be of type float"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta is None: it must be of type"),
        ("gpt_neox", {"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters.type is 'linear', which"),
        ("gpt_neox", {"head_dim": 12}, "head_dim is 12, which is not supported: it must be None or 6"),
        ("gpt_neox", {"rotary_pct": None}, "rotary_pct is None: it must be of type float"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 4.0}}},
            "rope_parameters.sliding_attention.type is 'linear', which is not supported: it must be 'default'",
        ),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type is 'linear', which"),
        ("gemma3_text", {"rope_local_base_freq": None}, "rope_local_base_freq is None: it must be of type float"),
    ],
)
def test_a_rope_that_would_be_read_as_another_is_refused(family, change, message):
    with pytest.raises(UserError, match=f"^path: {message}"):
        read_config(LEAST | {"model_type": family} | change, "path")


def test_heads_of_a_gpt_neox_may_have_their_size_in_the_config():
    values = LEAST | {"model_type": "gpt_neox"}
    for size in (None, 6):
        assert read_config(values | {"head_dim": size}, "path") == read_config(values, "path")


def test_the_length_of_llama_3s_scaling_is_the_longest_text_where_it_is_not_said():
    scaling = {"rope_type": "llama3", **LLAMA3}
    del scaling["original_max_position_embeddings"]
    values = LEAST | {"model_type": "llama", "rope_scaling": scaling}
    assert read_config(values | {"max_position_embeddings": 99}, "path").rope_original_length == 99
    with pytest.raises(UserError, match=r"^path has no field rope_scaling\.original_max_position_embeddings: "):
        read_config(values, "path")


def test_bases_of_gemma_3_in_two_notations():
    values = LEAST | {"model_type": "gemma3_text"}
    nested = {
        "full_attention": {"rope_theta": 9.0, "rope_type": "linear", "factor": 4.0},
        "sliding_attention": {"rope_theta": 5},
    }
    model = read_config(values | {"rope_parameters": nested}, "path")
    assert (model.rope_base, model.rope_local_base, model.rope_scaling_factor) == (9.0, 5.0, 4.0)
    flat = {"rope_theta": 9, "rope_local_base_freq": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 4}}
    assert read_config(values | flat, "path") == model
    nested["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(UserError, match=r"rope_parameters\.sliding_attention\.rope_type is 'linear', which is not"):
        read_config(values | {"rope_parameters": nested}, "path")


def test_local_layers_that_are_scaled_too_are_in_no_family():
    gemma3 = DecoderConfig(
        **FAMILIES["gemma3_text"].model,
        layers=4,
        window=8,
        full_attention_every=2,
        rope_base=100.0,
        rope_local_base=10.0,
    )
    assert write_config(gemma3)["rope_local_base_freq"] == 10.0
    # Without scaling, equal bases are one base. With scaling, the local layers would be scaled too.
    same = dataclasses.replace(gemma3, rope_local_base=None)
    assert read_config(write_config(same), "path") == same
    scaled = dataclasses.replace(same, rope_scaling="linear", rope_scaling_factor=4.0)
    with pytest.raises(
        UserError, match=r"gemma3_text is the nearest and differs in rope_local_base \(None here, 100.0"
    ):
        write_config(scaled, {"model_type": "gemma3_text"})


def test_what_is_kept_of_the_config_that_a_policy_came_with():
    like = LEAST | {
        "model_type": "qwen2",
        "eos_token_id": 7,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 3.0},
    }
    model = read_config(like, "path")
    kept = write_config(model, like)
    assert kept["eos_token_id"] == 7 and kept["rope_theta"] == 3.0
    assert not {"dtype", "rope_parameters"} & kept.keys()
    # Values that come from the policy override the kept ones.
    wider = write_config(dataclasses.replace(model, mlp_width=49), like)
    assert (wider["intermediate_size"], wider["eos_token_id"]) == (49, 7)
    # If the policy is now of another family, nothing is kept.
    other = write_config(dataclasses.replace(model, query_key_value_bias=False), like)
    assert other["model_type"] != "qwen2" and "eos_token_id" not in other


def test_tensors_that_may_be_there_twice():
    embedding = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
    assert copies_of(T5Config()) == embedding
    assert copies_of(T5Config(tied_embeddings=True)) == embedding | {"lm_head.weight": "shared.weight"}
    assert copies_of(DecoderConfig()) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert copies_of(DecoderConfig(tied_embeddings=False)) == {}
    assert copies_of(DecoderConfig(norm="layer")) == {"embed_out.weight": "gpt_neox.embed_in.weight"}
