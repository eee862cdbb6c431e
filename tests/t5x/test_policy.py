"""The model that T5X trains: its losses of pairs equal ours; a loss that pairs cannot serve is refused in one line."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTHS = {"prompt": 9, "chosen": 6, "rejected": 6}
VOCABULARY = 17
# Losses that read more than a pair and its reference.
BEYOND_A_PAIR = ("dr_grpo", "grpo", "hypo", "kto", "nash_md", "online_kl", "ppo_clip", "reinforce", "rloo")


@pytest.fixture(scope="module")
def ours(t5x):
    """Functions of ours and of T5X for these tests; imported here, because T5X may be missing."""
    import seqio
    from t5x import optimizers
    from t5x.examples.t5 import network

    from alignment_gap.data.tasks import seqio_tasks
    from alignment_gap.t5x import EncoderDecoderPolicy

    config = network.T5Config(
        vocab_size=VOCABULARY,
        emb_dim=12,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=4,
        mlp_dim=16,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.1,
    )
    vocabulary = seqio.PassThroughVocabulary(VOCABULARY, 1)

    def make(loss="ipo", module=None, **settings):
        module = module or network.Transformer(config)
        return EncoderDecoderPolicy(module, vocabulary, vocabulary, optimizers.sgd(0.1), loss, **settings)

    return types.SimpleNamespace(
        make=make, config=config, tasks=seqio_tasks, network=network, optimizers=optimizers, vocabulary=vocabulary
    )


@pytest.fixture(scope="module")
def features():
    """A batch of the feature converter: four pairs, one of them a tie."""
    rng = np.random.default_rng(0)
    batch = {"scores": np.array([[1, 0], [0.7, 0.3], [0.5, 0.5], [1, 0]], np.float32)}
    for name, longest in LENGTHS.items():
        lengths = rng.integers(2, longest + 1, 4)
        mask = np.arange(longest) < lengths[:, None]
        batch |= {f"{name}_length": lengths.astype(np.int32)}
        batch |= {f"{name}_tokens": np.where(mask, rng.integers(2, VOCABULARY, mask.shape), 0).astype(np.int32)}
        if name != "prompt":
            batch |= {f"{name}_reference_log_probs": np.where(mask, -3 * rng.random(mask.shape), 0).astype(np.float32)}
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def params(ours, features):
    shapes = {name: value.shape for name, value in features.items()}
    return ours.make().get_initial_variables(jax.random.PRNGKey(0), shapes)["params"]


@pytest.fixture(scope="module")
def scored(params, features, ours):
    """The batch, with log-probs and log collisions from our own network with the same parameters."""
    import flax

    from alignment_gap.checkpoints.t5x_tree import TARGET, t5_foreign
    from alignment_gap.checkpoints.tensors import from_array, imported
    from alignment_gap.models import make_policy, score_with_collisions

    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params), sep=".")
    source = t5_foreign("t5x", {TARGET + name: from_array(np.asarray(leaf)) for name, leaf in flat.items()})
    tensors = imported(source.tensors, source.entries)
    tree = flax.traverse_util.unflatten_dict({name: t.read(None) for name, t in tensors.items()}, sep=".")
    batch = ours.tasks.preference_batch(features)
    texts = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
    return batch, score_with_collisions(make_policy(source.model), tree, *texts)


@pytest.fixture(scope="module")
def theirs(ours, params, features):
    """The log-probs and log collisions from T5X's network."""
    return ours.make("wpo", loss_settings={"alignment": "sampled"})._score(
        params, ours.tasks.preference_batch(features), None
    )


def test_log_probs_are_our_own(scored, theirs):
    """Both are float32; logits of magnitude 1 to 10 are summed in another order."""
    for found, expected in zip(theirs, scored[1], strict=True):
        assert np.abs(expected).max() > 2
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def names():
    from alignment_gap import losses

    return [name for name in losses.names() if name not in losses.aliases() and name not in BEYOND_A_PAIR]


@pytest.mark.parametrize("name", names())
def test_every_loss_has_our_own_value(name, ours, params, features, scored, theirs, monkeypatch):
    """All of them share one run of the network."""
    from alignment_gap import losses
    from alignment_gap.training import apply_loss, loss_inputs

    model = ours.make(name)
    monkeypatch.setattr(model, "_score", lambda *_: theirs)
    batch, (log_probs, collisions) = scored
    expected, diagnostics = apply_loss(losses.get(name), loss_inputs(batch, log_probs, collisions))
    loss, metrics = model.loss_fn(params, features, None)
    np.testing.assert_allclose(loss, expected.mean(), rtol=2e-5, atol=2e-5)
    for each, value in ({"loss": expected} | diagnostics).items():
        np.testing.assert_allclose(metrics[each].compute(), value.mean(), rtol=2e-5, atol=2e-5, err_msg=each)


@pytest.mark.parametrize("name", BEYOND_A_PAIR)
def test_a_loss_of_more_than_a_pair_is_refused(name, ours):
    from alignment_gap.errors import UserError

    with pytest.raises(UserError, match=rf"the loss {name} reads .*, but T5X trains on recorded pairs") as error:
        ours.make(name)
    assert "\n" not in str(error.value)


def test_a_loss_without_a_reference_asks_for_none(ours, params, features):
    assert ours.make("simpo").FEATURE_CONVERTER_CLS is ours.tasks.PreferenceFeatureConverter
    assert ours.make("dpo").FEATURE_CONVERTER_CLS is ours.tasks.ReferenceFeatureConverter
    without = {name: value for name, value in features.items() if "reference" not in name}
    assert np.isfinite(ours.make("simpo").loss_fn(params, without, None)[0])


def test_microbatches_sum_to_the_batch(ours, params, features):
    """T5X sums the microbatches; the batch size is the normalizing factor."""
    model = ours.make("dpo", loss_settings={"beta": 0.5}, loss_normalizing_factor=4)
    whole = model.loss_fn(params, features, None)[0]
    parts = [{name: value[rows] for name, value in features.items()} for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, sum(model.loss_fn(params, part, None)[0] for part in parts), rtol=1e-6)
    np.testing.assert_allclose(whole, ours.make("dpo", loss_settings={"beta": 0.5}).loss_fn(params, features, None)[0])


def test_padding_and_what_follows_the_end_do_not_count(ours, params, features):
    model = ours.make("dpo")
    longer = dict(features)
    for name in ("chosen_tokens", "rejected_tokens", "chosen_reference_log_probs", "rejected_reference_log_probs"):
        longer[name] = jnp.pad(features[name], ((0, 0), (0, 3)))
    np.testing.assert_allclose(
        model.loss_fn(params, longer, None)[0], model.loss_fn(params, features, None)[0], rtol=1e-6
    )


def test_dropout_follows_its_key(ours, params, features):
    model = ours.make("simpo")
    plain, one, again, other = (
        float(model.loss_fn(params, features, key and jax.random.PRNGKey(key))[0]) for key in (None, 1, 1, 2)
    )
    assert one == again and len({plain, one, other}) == 3


def test_rewards_are_compared(ours, params, features):
    rewards = features | {"scores": jnp.array([[3.0, -1.0], [7.0, 5.0], [2.0, 2.0], [0.1, 0.0]])}
    compared = features | {"scores": jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])}
    found = ours.make("dpo", scores="rewards").loss_fn(params, rewards, None)[0]
    np.testing.assert_allclose(found, ours.make("dpo").loss_fn(params, compared, None)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ippo"}, "did you mean .ipo"),
        ({"loss": "ipo", "loss_settings": {"bata": 1}}, "did you mean .beta"),
        ({"scores": "reward"}, "did you mean rewards"),
    ],
)
def test_wrong_settings_are_one_line(settings, message, ours):
    from alignment_gap.errors import UserError

    with pytest.raises(UserError, match=message) as error:
        ours.make(**settings)
    assert "\n" not in str(error.value)


def test_a_loss_of_probabilities_refuses_rewards(ours):
    from alignment_gap import losses
    from alignment_gap.errors import UserError

    def weighted(logps, scores):
        return -scores * logps

    weighted.reads = (losses.PROBABILITIES,)
    ours.make(weighted)
    with pytest.raises(UserError, match="scores is 'rewards', but the loss reads scores as probabilities"):
        ours.make(weighted, scores="rewards")


def test_a_network_of_fewer_tokens_is_refused(ours):
    from alignment_gap.errors import UserError

    module = ours.network.Transformer(ours.config.replace(vocab_size=16))
    with pytest.raises(UserError, match="vocab_size is 16, but the vocabulary has 17 tokens"):
        ours.make(module=module)
