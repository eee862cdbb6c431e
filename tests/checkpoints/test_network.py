"""The network that a checkpoint records: as JSON, also of older versions, and whether settings and datasets fit it."""

import dataclasses
import json

import pytest
from tiny_models import CONFIGS, SETTINGS

from alignment_gap.checkpoints import Network, agreed_model, check_vocabulary
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.network import RUN_TIME, from_json, to_json
from alignment_gap.errors import UserError
from alignment_gap.models import AdapterConfig, DecoderConfig, T5Config, make_policy
from alignment_gap.models.preference import KINDS, Markers

MODELS = {**CONFIGS, **SETTINGS}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_the_same_after_json(name):
    for network in (
        Network(model=MODELS[name]),
        Network("pairwise", MODELS[name], (1, 2, 3, 4, 5), "vocab/words.txt", "0123"),
        Network("bradley_terry", MODELS[name], (9, 8, 7, 6, 5), vocabulary_digest="0123"),
        Network(model=MODELS[name], adapter=AdapterConfig(2, 3.0, ("query",), 0.1), base="runs/sft", base_digest="0"),
    ):
        assert from_json(json.loads(json.dumps(to_json(network)))) == network


def test_the_json_by_hand():
    network = Network("pairwise", T5Config(width=6), (1, 2, 3, 4, 5))
    values = json.loads(json.dumps(to_json(network)))
    model = values.pop("model")
    names = ("vocabulary", "vocabulary_digest", "adapter", "base", "base_digest", "end_prompts", "template", "head")
    unset = dict.fromkeys(names)
    assert values == {"kind": "pairwise", "markers": [1, 2, 3, 4, 5], **unset}
    assert (model["architecture"], model["width"], model["tied_embeddings"]) == ("t5", 6, False)
    assert model.keys() == {field.name for field in dataclasses.fields(T5Config)}


# A decoder as the first version wrote it; it wrote 0 instead of None for caps, windows and bases.
OLD = {
    "kind": "policy",
    "model": {
        "architecture": "decoder",
        "vocabulary_size": 13,
        "width": 12,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 6,
        "mlp_width": 7,
        "logits_soft_cap": 0.0,
        "attention_soft_cap": 0.0,
        "query_pre_attention_scalar": 0.0,
        "rope_local_base": 0.0,
        "window": 0,
        "full_attention_every": 1,
        "post_norms": False,
        "tied_embeddings": True,
    },
    "markers": [],
    "vocabulary": "",
    "vocabulary_digest": "",
}


def test_a_network_of_the_first_version_is_that_of_today():
    network = from_json(OLD)
    assert network == Network(model=CONFIGS["decoder"])
    assert (network.vocabulary, network.vocabulary_digest) == (None, None)
    assert (network.model.window, network.model.rope_local_base) == (None, None)
    # Values that do not stand for None stay.
    assert network.model.post_norms is False and network.model.full_attention_every == 1 and network.markers == ()
    # The network can be built.
    assert make_policy(network.model) == network.policy()


def test_what_the_first_version_had_set_is_kept():
    settings = {"logits_soft_cap": 30.0, "attention_soft_cap": 50.0, "query_pre_attention_scalar": 9.0, "window": 4}
    settings |= {"rope_local_base": 10.0, "full_attention_every": 2}
    values = OLD | {"model": OLD["model"] | settings, "vocabulary": "bytes", "vocabulary_digest": "ab"}
    network = from_json(values)
    assert network.model == dataclasses.replace(CONFIGS["decoder"], **settings)
    assert (network.vocabulary, network.vocabulary_digest) == ("bytes", "ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": 1}, r"unknown key network\.judge"),
        ({"model": OLD["model"] | {"windw": 3}}, r"unknown key network\.model\.windw: did you mean window\?"),
        ({"model": OLD["model"] | {"width": "12"}}, r"network\.model\.width is '12': it must be of type int"),
        (
            {"model": OLD["model"] | {"architecture": "mamba"}},
            r"network\.model\.architecture is 'mamba': choose one of",
        ),
        ({"markers": [1, "2"]}, r"network\.markers is '2': it must be of type int"),
    ],
)
def test_what_this_version_does_not_know_is_named(change, message):
    with pytest.raises(UserError, match=message):
        from_json(OLD | change)


def test_a_network_gives_its_policy_and_its_preference_model():
    for kind in KINDS:
        model = Network(kind, CONFIGS["t5"], (1, 2, 3, 4, 5)).preference_model()
        assert (model.kind, model.policy, model.markers) == (kind, make_policy(CONFIGS["t5"]), Markers(1, 2, 3, 4, 5))
    with pytest.raises(UserError, match=r"the network is a policy, no preference model: give the folder of"):
        Network(model=CONFIGS["t5"]).preference_model()


@pytest.mark.parametrize(("ours", "theirs"), [(None, None), (None, "a" * 64), ("a" * 64, None), ("a" * 64, "a" * 64)])
def test_vocabularies_that_are_not_known_to_differ_pass(ours, theirs):
    check_vocabulary(Network(vocabulary_digest=ours), theirs, "run", "pairs")


def test_vocabularies_that_differ_are_shown_by_their_beginnings():
    message = r"^pairs was prepared with the vocabulary b{12}, run was trained with a{12}: prepare the dataset with"
    with pytest.raises(UserError, match=message):
        check_vocabulary(Network(vocabulary_digest="a" * 64), "b" * 64, "run", "pairs")


# For each field of a model, another value, so that only this field differs.
OTHERS = {
    "logits_soft_cap": 5.0,
    "attention_soft_cap": 5.0,
    "query_pre_attention_scalar": 5.0,
    "rope_local_base": 5.0,
    "window": 5,
    "rotary_size": 4,
    "dtype": "bfloat16",
    "remat": "full",
    "attention": "splash",
    "block": "serial",
    "activation": "gelu",
    "norm": "one_plus_scale",
    "embedding_scale": "sqrt_width",
    "logits_scale": "one",
    "rope_scaling": "linear",
}


def other(model, field):
    value = getattr(model, field)
    changed = OTHERS[field] if field in OTHERS else not value if isinstance(value, bool) else value + 1
    assert changed != value
    return dataclasses.replace(model, **{field: changed})


FIELDS = [
    (name, field.name)
    for name in ("t5", "decoder")
    for field in dataclasses.fields(CONFIGS[name])
    if field.name != "architecture"
]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_model_may_differ_from_its_checkpoint_in_how_it_runs_alone(name, field):
    network, asked = Network(model=CONFIGS[name]), other(CONFIGS[name], field)
    if field in RUN_TIME:
        assert agreed_model(asked, network, "run") == asked
        # The parameters of the checkpoint fit.
        assert field == "attention" or model_shapes(asked) == model_shapes(network.model)
        return
    values = rf"{getattr(asked, field)}, but {getattr(network.model, field)} in the checkpoint"
    remedy = "to take the checkpoint's own, leave MODEL out or set it to None, in gin by --gin.MODEL=None"
    with pytest.raises(UserError, match=rf"^run is of another model \({field} is {values}\): {remedy}$"):
        agreed_model(asked, network, "run")


def test_how_to_run_is_the_same_in_both_architectures():
    for name in ("t5", "decoder"):
        assert set(RUN_TIME) <= {field.name for field in dataclasses.fields(CONFIGS[name])}


def test_a_model_that_is_not_asked_for_is_the_checkpoints_own():
    network = Network(model=dataclasses.replace(CONFIGS["t5"], remat="dots"))
    assert agreed_model(None, network, "run") is network.model


def test_of_many_differences_three_are_shown():
    asked = dataclasses.replace(CONFIGS["decoder"], width=1, layers=2, heads=3, mlp_width=4, dtype="bfloat16")
    message = r"\(width is 1, but 12 .*; layers is 2, but 3 .*; heads is 3, but 4 in the checkpoint; 1 more\)"
    with pytest.raises(UserError, match=message):
        agreed_model(asked, Network(model=CONFIGS["decoder"]), "run")


def test_another_architecture_is_the_first_difference():
    with pytest.raises(UserError, match=r"\(architecture is t5, but decoder in .* more\): to take .*MODEL=None"):
        agreed_model(CONFIGS["t5"], Network(model=DecoderConfig()), "run")
    ours = dataclasses.replace(T5Config(), vocabulary_size=DecoderConfig().vocabulary_size)
    with pytest.raises(UserError, match=r"encoder_layers is 2, but absent in the checkpoint"):
        agreed_model(ours, Network(model=DecoderConfig()), "run")
