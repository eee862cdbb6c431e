"""Every named size has the parameter count that its authors publish, and the values of its gin file."""

import json

import pytest

from alignment_gap.cli.gin_files import read_config
from alignment_gap.configuration import to_dict
from alignment_gap.errors import UserError
from alignment_gap.models import count_parameters, make_policy, sizes

# Exact counts of the published checkpoints, from their model cards and weight indices.
PUBLISHED = {
    "t5_small": 76_961_152,
    "t5_base": 247_577_856,
    "t5_large": 783_150_080,
    "t5_xl": 2_849_757_184,
    "t5_xxl": 11_135_332_352,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1.4b": 1_414_647_808,
    "pythia_2.8b": 2_775_208_960,
    "pythia_6.9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
}
# 2204.02311, table 1: width, layers, heads, and the count in billions as printed, which leaves out the norms' scales.
PALM = {"palm_8b": (4096, 32, 16, 8.63), "palm_62b": (8192, 64, 32, 62.50), "palm_540b": (18_432, 118, 48, 540.35)}
LADDER = {"palm_10m": 1e7, "palm_30m": 3e7, "palm_100m": 1e8, "palm_300m": 3e8, "palm_1b": 1e9, "palm_3b": 3e9}
# The counts leave out the embeddings: two tables in T5, one in PaLM.
LAPTOP = {"t5_30k": 3e4, "t5_300k": 3e5, "t5_3m": 3e6, "palm_30k": 3e4, "palm_300k": 3e5, "palm_3m": 3e6}
# The counts of mT5's checkpoints. They have T5 v1.1's shapes and mT5's vocabulary.
MT5 = {"t5_small": 300_176_768, "t5_base": 582_401_280, "t5_xl": 3_742_619_648, "t5_xxl": 12_921_057_280}


def _count(name, **overrides):
    return count_parameters(make_policy(sizes.get(name, **overrides)))


def _by_hand(config):
    """The number of parameters of a decoder, matrix by matrix."""
    width, heads, kv_heads, size = config.width, config.heads, config.kv_heads, config.head_size
    attention = 2 * width * heads * size + 2 * width * kv_heads * size
    attention += (heads + 2 * kv_heads) * size * config.query_key_value_bias + 2 * size * config.query_key_norm
    # A layer norm has a bias too.
    norm = width * (2 if config.norm == "layer" else 1)
    norms = norm * ((1 if config.block == "parallel" else 2) + 2 * config.post_norms)
    wide = 2 if config.gated_mlp else 1
    mlp = (wide + 1) * width * config.mlp_width
    biases = config.out_and_mlp_bias * (2 * width + wide * config.mlp_width)
    layer = attention + mlp + norms + biases
    return config.vocabulary_size * width * (2 - config.tied_embeddings) + config.layers * layer + norm


def test_every_size_has_an_oracle():
    assert set(sizes.NAMES) == set(PUBLISHED) | set(PALM) | set(LADDER) | set(LAPTOP)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name):
    assert _count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in sizes.NAMES if not name.startswith("t5")])
def test_number_of_parameters_by_hand(name):
    assert _count(name) == _by_hand(sizes.get(name))


@pytest.mark.parametrize("name", PALM)
def test_palm_is_table_one(name):
    config, (width, layers, heads, billions) = sizes.get(name), PALM[name]
    assert (config.width, config.layers, config.heads, config.mlp_width) == (width, layers, heads, 4 * width)
    assert (config.kv_heads, config.head_size, config.vocabulary_size) == (1, 256, 256_000)
    assert round((_by_hand(config) - width * (layers + 1)) / 1e9, 2) == billions


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_is_of_about_its_sizes(name):
    assert _count(name) == pytest.approx(LADDER[name], rel=0.05)


@pytest.mark.parametrize("name", LAPTOP)
def test_the_ladder_for_a_laptop_is_of_about_its_sizes_without_the_vocabulary(name):
    config = sizes.get(name)
    tables = (2 if name.startswith("t5") else 1) * config.vocabulary_size * config.width
    assert _count(name) - tables == pytest.approx(LAPTOP[name], rel=0.06)


@pytest.mark.parametrize("name", MT5)
def test_the_vocabulary_of_mt5_gives_its_number_of_parameters(name):
    assert _count(name, vocabulary_size=250_112) == MT5[name]


def test_mt5_large_and_byt5_differ_by_their_vocabulary_only():
    assert _count("t5_large", vocabulary_size=250_112) == 1_229_581_312
    assert _count("t5_base", vocabulary_size=384) == 247_577_856 - 2 * 768 * (32_128 - 384)


@pytest.mark.parametrize("name", sizes.NAMES)
def test_the_gin_file_of_a_size_builds_it(name):
    config = read_config(["runs/sft.gin", f"models/{name}.gin"], ["DATASET='pairs'"])
    assert config.model == sizes.get(name)
    assert json.loads(json.dumps(to_dict(config.model))) == to_dict(config.model)


def test_a_field_of_a_gin_file_can_be_set():
    overrides = ["DATASET='pairs'", "VOCABULARY_SIZE=384", "T5Config.dtype='bfloat16'"]
    config = read_config(["runs/sft.gin", "models/t5_xl.gin"], overrides)
    assert config.model == sizes.get("t5_xl", vocabulary_size=384, dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("t5_xxxl", {}, r"model size 't5_xxxl' is unknown: did you mean t5_xxl\?"),
        ("bert", {}, r"model size 'bert' is unknown: choose one of t5_30k, .*qwen3_8b"),
        ("t5_xl", {"mlp_widht": 3}, r"model size t5_xl has no setting 'mlp_widht': did you mean mlp_width\?"),
    ],
)
def test_a_size_that_there_is_not_is_named(name, overrides, message):
    with pytest.raises(UserError, match=message):
        sizes.get(name, **overrides)
