"""The sampler agrees with the scorer, with enumeration, and with itself on other meshes."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import log_softmax, logits_of
from scipy import stats
from tiny_models import EVEN_CONFIGS, MESHES, make_batch, random_params

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config, make_policy
from alignment_gap.models.quantized import quantize_rows
from alignment_gap.plan import hlo
from alignment_gap.sampling import SamplerConfig, draw, make_generate, restrict, sample_keys, sampler
from alignment_gap.sampling.sampler import sample
from alignment_gap.sharding import MeshConfig, batch_sharding, layout, make_mesh, replicated
from alignment_gap.training import abstract_params, make_score
from alignment_gap.training.flops import count_flops

PROMPTS = make_batch(8, vocabulary_size=16)
LENGTH = 6
EOS = 1
RUN_KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def even_params(even_policy):
    return random_params(even_policy)


def draw_with(
    policy,
    params,
    config,
    mesh,
    *,
    batch=PROMPTS,
    eos_id=EOS,
    samples=3,
    length=LENGTH,
    step=0,
    reference=None,
    mixture=None,
):
    generate = make_generate(
        policy, mesh, samples=samples, max_length=length, eos_id=eos_id, config=config, mixture=mixture
    )
    texts = jax.device_put((batch.prompt_ids, batch.prompts, batch.prompt_lengths), batch_sharding(mesh))
    params, key, number, reference = jax.device_put((params, RUN_KEY, jnp.int32(step), reference), replicated(mesh))
    beside = () if mixture is None else (reference,)
    return jax.device_get(generate(params, key, number, *texts, *beside))


@pytest.fixture(scope="module")
def drawn(even_policy, even_params, mesh):
    return draw_with(even_policy, even_params, SamplerConfig(), mesh)


@pytest.fixture(scope="module")
def restricted(even_policy, even_params, mesh):
    return draw_with(even_policy, even_params, SamplerConfig(temperature=1.7, top_k=5, top_p=0.8), mesh)


@pytest.fixture(scope="module")
def scorer(even_policy, mesh):
    return make_score(even_policy, mesh)


def test_the_scorer_agrees_with_the_sampler(scorer, even_params, drawn, restricted):
    for samples in (drawn, restricted):
        scores = scorer(even_params, PROMPTS.prompts, PROMPTS.prompt_lengths, samples.responses, samples.lengths)
        np.testing.assert_allclose(samples.log_probs, scores, rtol=1e-4, atol=1e-4)


def test_without_restriction_both_log_probs_are_one(drawn):
    np.testing.assert_array_equal(drawn.log_probs, drawn.sampler_log_probs)


def test_sampler_log_probs_are_of_the_restricted_distribution(even_policy, even_params, restricted):
    limit = jax.jit(partial(restrict, config=SamplerConfig(temperature=1.7, top_k=5, top_p=0.8)))
    for b, k in itertools.product(range(8), range(3)):
        response, length = restricted.responses[b, k], restricted.lengths[b, k]
        prompt = np.asarray(PROMPTS.prompts)[b, : int(PROMPTS.prompt_lengths[b])]
        logits = logits_of(even_policy.config, even_params, prompt, response)
        expected = log_softmax(np.asarray(limit(logits.astype(np.float32)), np.float64))
        chosen = expected[np.arange(LENGTH), response][:length]
        np.testing.assert_allclose(restricted.sampler_log_probs[b, k, :length], chosen, rtol=1e-4, atol=1e-4)


def test_a_response_ends_with_its_first_eos(drawn, restricted):
    for samples in (drawn, restricted):
        inside = np.arange(LENGTH) < samples.lengths[..., None]
        is_eos = samples.responses == EOS
        # EOS is the last token that counts, and has a log-prob; without EOS the response is full.
        ends = np.where(is_eos.any(-1), is_eos.argmax(-1) + 1, LENGTH)
        np.testing.assert_array_equal(samples.lengths, ends)
        assert (samples.log_probs[inside] < 0).all()
        for behind in (samples.responses, samples.log_probs, samples.sampler_log_probs):
            assert not behind[~inside].any()


def test_some_end_early_and_some_do_not(drawn):
    assert drawn.lengths.min() < LENGTH and (drawn.lengths == LENGTH).any()


def test_samples_of_a_prompt_differ(drawn):
    rows = {tuple(row) for row in drawn.responses.reshape(-1, LENGTH)}
    assert len(rows) > 12


def test_top_1_is_greedy_and_without_eos_full(even_policy, even_params, mesh):
    samples = draw_with(even_policy, even_params, SamplerConfig(top_k=1), mesh, eos_id=-1, samples=1)
    np.testing.assert_array_equal(samples.lengths, LENGTH)
    np.testing.assert_allclose(samples.sampler_log_probs, 0.0, atol=1e-6)
    for b in range(8):
        prompt = np.asarray(PROMPTS.prompts)[b, : int(PROMPTS.prompt_lengths[b])]
        logits = logits_of(even_policy.config, even_params, prompt, samples.responses[b, 0])
        np.testing.assert_array_equal(logits.argmax(-1), samples.responses[b, 0])


def test_a_sample_depends_on_run_step_and_prompt_id_only(even_policy, even_params, mesh, drawn):
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    moved = jax.tree.map(lambda leaf: leaf[order], PROMPTS)
    again = draw_with(even_policy, even_params, SamplerConfig(), mesh, batch=moved)
    np.testing.assert_array_equal(again.responses, drawn.responses[order])
    later = draw_with(even_policy, even_params, SamplerConfig(), mesh, step=1)
    assert (later.responses != drawn.responses).any((-1, -2)).all()


# "model" is left out: "two_by_four" leaves the same heads whole, and it splits everything else and the batch.
@pytest.mark.parametrize("name", ["fsdp", "two_by_four", "all", "sequence"])
def test_another_mesh_draws_the_same(name, even_policy, even_params, drawn):
    samples = draw_with(even_policy, even_params, SamplerConfig(), make_mesh(MESHES[name]))
    np.testing.assert_array_equal(samples.responses, drawn.responses)
    np.testing.assert_allclose(samples.log_probs, drawn.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_cpu_halves_the_prompts_and_draws_the_same(even_policy, even_params, mesh, monkeypatch):
    length, settings = 16, {"samples": 2, "eos_id": (1, 2, 3, 4, 5)}
    drawn = draw_with(even_policy, even_params, SamplerConfig(), mesh, length=length, **settings)
    monkeypatch.setattr("alignment_gap.sampling.sampler._FEW", 4)
    monkeypatch.setattr("alignment_gap.sampling.sampler._SHORT", 2)
    texts = PROMPTS.prompt_ids, PROMPTS.prompts, PROMPTS.prompt_lengths
    make = partial(make_generate.__wrapped__, even_policy)  # Not kept: its halvings are those of this test alone.
    for devices, halves in ((jax.devices(), ()), (jax.devices()[:1], (4, 2))):
        on = make_mesh(MeshConfig(), devices)
        generate = make(on, max_length=length, config=SamplerConfig(), **settings)
        given = even_params, RUN_KEY, jnp.int32(0), *texts
        traced = str(jax.make_jaxpr(generate)(*given))
        assert [n for n in (4, 2) if f"i32[{n},2,{length}]" in traced] == [*halves]
    samples = jax.device_get(generate(*given))
    last = np.sort(drawn.lengths.max(-1))
    assert last[3] < last[7]  # The loops with fewer prompts have something to draw.
    np.testing.assert_array_equal(samples.responses, drawn.responses)
    np.testing.assert_array_equal(samples.lengths, drawn.lengths)
    np.testing.assert_allclose(samples.log_probs, drawn.log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(samples.log_probs, samples.sampler_log_probs)


@pytest.mark.parametrize(
    ("length", "ends"),
    [
        (12, [12]),
        (63, [63]),
        (64, [32, 64]),
        (100, [34, 67, 100]),
        (128, [32, 64, 96, 128]),
        (1023, [256, 512, 768, 1023]),
    ],
)
def test_long_responses_have_several_loops_of_about_the_same_length(length, ends):
    assert sampler._loop_ends(length) == ends


@pytest.mark.slow
def test_loops_that_read_only_what_can_be_filled_draw_the_same(even_policy, even_params, mesh, drawn, monkeypatch):
    """By hand: of the 6 places of each response, tokens read 2, 2, 4, 4, 6 and 6 in place of 6 each."""
    generate = partial(make_generate.__wrapped__, even_policy, samples=3, max_length=LENGTH, eos_id=EOS)
    given = even_params, RUN_KEY, jnp.int32(0), PROMPTS.prompt_ids, PROMPTS.prompts, PROMPTS.prompt_lengths
    whole = count_flops(jax.make_jaxpr(generate(mesh, config=SamplerConfig()))(*given))
    monkeypatch.setattr(sampler, "_LEAST_TOKENS", 2)
    in_loops = generate(mesh, config=SamplerConfig())
    config = even_policy.config
    depth = config.layers if isinstance(config, DecoderConfig) else config.decoder_layers
    of_a_place = 2 * 2 * 8 * 3 * config.heads * config.head_size * depth
    assert whole - count_flops(jax.make_jaxpr(in_loops)(*given)) == (36 - 24) * of_a_place
    samples = jax.device_get(in_loops(*given))
    np.testing.assert_array_equal(samples.responses, drawn.responses)
    np.testing.assert_array_equal(samples.lengths, drawn.lengths)
    np.testing.assert_allclose(samples.log_probs, drawn.log_probs, rtol=1e-4, atol=1e-5)
    program = hlo.parse(in_loops.lower(*given).compile().as_text())
    loops = [each for part in program.computations.values() for each in part.values() if each.opcode == "while"]
    # Each device has the responses of one prompt.
    of_tokens = [hlo.trip_count(program, each) for each in loops if f"s32[1,3,{LENGTH}]" in each.type]
    assert of_tokens == [2, 2, 2]


def test_prompts_in_int8_draw_from_what_they_hold(even_policy, even_params, mesh, monkeypatch):
    """As a cache that holds the same rounded numbers in float32; the responses' own keys and values are not rounded."""
    keys = sample_keys(RUN_KEY, jnp.int32(0), PROMPTS.prompt_ids, 3)
    settings = {"max_length": LENGTH, "eos_id": EOS, "config": SamplerConfig(prompt_cache_dtype="int8")}

    def drawn_now():
        draw = jax.jit(partial(sample, even_policy, **settings))
        return draw(even_params, PROMPTS.prompts, PROMPTS.prompt_lengths, keys)

    def rounded(rows):
        held = quantize_rows(rows)
        return held.values.astype(jnp.float32) * held.scale[..., None]

    ours = drawn_now()
    monkeypatch.setattr("alignment_gap.models.layers.quantize_rows", rounded)
    expected = drawn_now()
    np.testing.assert_array_equal(ours.responses, expected.responses)
    np.testing.assert_allclose(ours.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", ["prompt_cache_dtype", "weights_dtype"])
def test_what_is_in_int8_is_close_to_the_policy(setting, even_policy, even_params, mesh, scorer):
    """With these parameters, whose logits are larger than those of a trained policy, within 0.1 nats a token."""
    config = SamplerConfig(**{setting: "int8"})
    samples = draw_with(even_policy, even_params, config, mesh)
    scores = scorer(even_params, PROMPTS.prompts, PROMPTS.prompt_lengths, samples.responses, samples.lengths)
    difference = np.abs(samples.log_probs - scores)
    assert 1e-4 < difference.max() < 0.1
    np.testing.assert_array_equal(samples.log_probs, samples.sampler_log_probs)
    elsewhere = draw_with(even_policy, even_params, config, make_mesh(MESHES["all"]))
    np.testing.assert_array_equal(elsewhere.responses, samples.responses)
    np.testing.assert_allclose(elsewhere.log_probs, samples.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "copies"),
    # Eight devices with all weights each, pairs that split T5's two heads, two groups of four, pairs by the model axis.
    [((1, 8, 1), 8), ((1, 8, 1), 4), ((1, 8, 1), 2), ((1, 4, 2), 4)],
)
def test_copies_of_the_weights_draw_the_same(sizes, copies, even_policy, even_params, drawn, monkeypatch):
    found, own = [], layout.decoding_sizes

    def sizes_of(*arguments):
        found.append(own(*arguments))
        return found[-1]

    monkeypatch.setattr(layout, "weight_copies", lambda *_: copies)
    monkeypatch.setattr(layout, "decoding_sizes", sizes_of)
    # Generators are kept by their mesh; those with other copies must not be used here, nor these elsewhere.
    make_generate.cache_clear()
    samples = draw_with(even_policy, even_params, SamplerConfig(), make_mesh(MeshConfig(*sizes)))
    make_generate.cache_clear()
    assert [each["copies"] for each in found] == [copies]
    np.testing.assert_array_equal(samples.responses, drawn.responses)
    np.testing.assert_allclose(samples.log_probs, drawn.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocabulary_size=256, width=128, heads=8, head_size=16, mlp_width=256),
        DecoderConfig(vocabulary_size=256, width=128, heads=8, head_size=16, mlp_width=256),
    ],
    ids=["t5", "decoder"],
)
def test_under_fsdp_a_token_moves_activations_and_no_weights(config):
    """Eight prompts, one sample of 16 tokens each. The compiled program shows what the loop over tokens moves."""
    length, mesh = 16, make_mesh(MeshConfig(layout="fsdp"))
    policy = make_policy(config)
    split, whole = batch_sharding(mesh), replicated(mesh)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split if shape else whole)

    arguments = (
        abstract_params(policy.init, mesh),
        array(dtype=RUN_KEY.dtype),
        array(),
        array(8),
        array(8, 8),
        array(8),
    )

    def moved_with(settings):
        generate = make_generate(policy, mesh, samples=1, max_length=length, eos_id=EOS, config=settings)
        program = hlo.parse(generate.lower(*arguments).compile().as_text())
        # Collectives before the loop run at most once for each layer.
        return sorted(each.bytes for each in hlo.collectives(program, 8) if each.count >= length)

    moved = moved_with(SamplerConfig())
    # A query's kernel is one of the smallest. Each device has a quarter of its columns.
    assert moved and moved[-1] < 4 * 128 * 8 * 16 / 4
    # Weights in int8 move the same.
    assert moved_with(SamplerConfig(weights_dtype="int8")) == moved


def test_keys_are_distinct_and_repeat():
    keys = jax.random.key_data(sample_keys(RUN_KEY, jnp.int32(3), jnp.arange(5), 4)).reshape(20, -1)
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 20
    same = jax.random.key_data(sample_keys(RUN_KEY, jnp.int32(3), jnp.array([4]), 4))
    np.testing.assert_array_equal(same.reshape(4, -1), keys[16:])
    of_steps = jax.random.key_data(sample_keys(RUN_KEY, jnp.array([1, 3]), jnp.array([4, 4]), 4))
    np.testing.assert_array_equal(of_steps[1], same[0])
    assert (of_steps[0] != of_steps[1]).any()


def test_a_prompt_that_a_step_has_twice_gets_other_samples():
    ids, steps = jnp.array([7, 9, 7, 7]), jnp.array([3, 3, 3, 4])
    keys = jax.random.key_data(sample_keys(RUN_KEY, steps, ids, 2)).reshape(8, -1)
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 8
    # Its first place in each step has the samples that it has alone, however many steps are drawn at once.
    for place, step in ((0, 3), (3, 4)):
        alone = jax.random.key_data(sample_keys(RUN_KEY, jnp.int32(step), ids[:1], 2)).reshape(2, -1)
        np.testing.assert_array_equal(keys[2 * place : 2 * place + 2], alone)


@pytest.fixture(scope="module")
def tiny():
    """A policy over four tokens, its parameters, those of a reference, and one prompt 512 times."""
    config = DecoderConfig(vocabulary_size=4, width=8, layers=1, heads=2, kv_heads=1, head_size=4, mlp_width=8)
    policy, batch = make_policy(config), make_batch(512)
    batch = dataclasses.replace(
        batch,
        prompt_ids=jnp.arange(512),
        prompts=jnp.tile(jnp.array([2, 3]), (512, 1)),
        prompt_lengths=jnp.full(512, 2),
    )
    return policy, random_params(policy, 5), random_params(policy, 6), batch


def enumerated(token_probabilities):
    """The probability of every response of up to two tokens (of four), from the probabilities of tokens."""
    exact = {}
    for first, second in itertools.product(range(4), range(4)):
        probabilities = token_probabilities(np.array([first, second]))
        response = (first, 0) if first == EOS else (first, second)
        exact[response] = probabilities[0, first] * (1.0 if first == EOS else probabilities[1, second])
    assert len(exact) == 13 and abs(sum(exact.values()) - 1) < 1e-12
    return exact


def assert_drawn_from(samples, exact):
    """Compares 4096 samples with all 13 responses: Pearson's chi-square, and the log-prob of every sample."""
    drawn = [tuple(row) for row in samples.responses.reshape(-1, 2).tolist()]
    assert len(drawn) == 4096 and set(drawn) <= set(exact)
    expected = np.array([4096 * p for p in exact.values()])
    counts = np.array([drawn.count(response) for response in exact])
    assert expected.min() > 5
    # Chi-square with 12 degrees of freedom exceeds 39.1 with probability 1e-4.
    assert ((counts - expected) ** 2 / expected).sum() < 39.1
    totals = samples.sampler_log_probs.sum(-1, dtype=np.float64).reshape(-1)
    np.testing.assert_allclose(totals, [np.log(exact[response]) for response in drawn], rtol=1e-5, atol=1e-5)


def test_samples_follow_the_exact_distribution(tiny, mesh):
    policy, params, _, batch = tiny
    samples = draw_with(policy, params, SamplerConfig(temperature=1.5), mesh, batch=batch, samples=8, length=2)

    def probabilities(response):
        return np.exp(log_softmax(logits_of(policy.config, params, np.array([2, 3]), response) / 1.5))

    assert_drawn_from(samples, enumerated(probabilities))


def test_a_mixture_is_the_geometric_one_token_by_token(tiny, mesh):
    """pi^(1 - b) ref^b, normalised for each token, then the temperature. The next test has b = 0 and b = 1."""
    weight = 0.4
    policy, params, reference, batch = tiny
    settings = {"batch": batch, "samples": 8, "length": 2, "reference": reference, "mixture": weight}
    samples = draw_with(policy, params, SamplerConfig(temperature=1.5), mesh, **settings)

    def token_log_probs(leaf, response):
        return log_softmax(logits_of(policy.config, leaf, np.array([2, 3]), response))

    def probabilities(response):
        ours, theirs = (token_log_probs(leaf, response) for leaf in (params, reference))
        powers = (np.exp(ours) ** (1 - weight) * np.exp(theirs) ** weight) ** (1 / 1.5)
        return powers / powers.sum(axis=-1, keepdims=True)

    assert_drawn_from(samples, enumerated(probabilities))
    # The log-probs are those of the policy, even though another distribution is sampled.
    for response, log_probs in zip(samples.responses[:4, 0], samples.log_probs[:4, 0], strict=True):
        expected = token_log_probs(params, response)[np.arange(2), response]
        count = 1 if response[0] == EOS else 2
        np.testing.assert_allclose(log_probs[:count], expected[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_mixture_of_weight_0_is_the_policy_and_of_weight_1_the_reference(even_policy, even_params, mesh, drawn):
    """The same keys draw the same tokens."""
    reference = random_params(even_policy, 1)
    own = draw_with(even_policy, even_params, SamplerConfig(), mesh, reference=reference, mixture=0.0)
    np.testing.assert_array_equal(own.responses, drawn.responses)
    np.testing.assert_allclose(own.sampler_log_probs, drawn.sampler_log_probs, atol=1e-5)
    other = draw_with(even_policy, even_params, SamplerConfig(), mesh, reference=reference, mixture=1.0)
    theirs = draw_with(even_policy, reference, SamplerConfig(), mesh)
    np.testing.assert_array_equal(other.responses, theirs.responses)
    np.testing.assert_allclose(other.sampler_log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)
    assert (other.responses != own.responses).any((1, 2)).all()


def test_the_scorer_agrees_with_the_sampler_of_a_mixture(scorer, even_policy, even_params, mesh):
    """Each network has its own cache. The policy's log-probs equal those of its scorer at every position."""
    reference = random_params(even_policy, 1)
    samples = draw_with(even_policy, even_params, SamplerConfig(), mesh, reference=reference, mixture=0.5)
    texts = (PROMPTS.prompts, PROMPTS.prompt_lengths, samples.responses, samples.lengths)
    np.testing.assert_allclose(samples.log_probs, scorer(even_params, *texts), rtol=1e-4, atol=1e-4)
    assert np.abs(samples.sampler_log_probs - samples.log_probs).max() > 0.1


def restricted_tokens(logits, **settings):
    return np.isfinite(restrict(jnp.asarray(logits), SamplerConfig(**settings))).tolist()


def test_restrict_by_hand():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert restricted_tokens(logits) == [True] * 4
    assert restricted_tokens(logits, top_k=2) == [False, True, False, True]
    assert restricted_tokens(logits, top_k=9) == [True] * 4
    # 0.4 + 0.3 reaches 0.65; 0.4 does not.
    assert restricted_tokens(logits, top_p=0.65) == [False, True, False, True]
    assert restricted_tokens(logits, top_p=0.75) == [False, True, True, True]
    # At least one token stays, however small top_p is.
    assert restricted_tokens(logits, top_p=1e-6) == [False, True, False, False]
    # Top-p works within top-k: 0.4 / 0.7 = 0.571 reaches 0.55, but 0.4 of all tokens would not.
    assert restricted_tokens(logits, top_k=2, top_p=0.55) == [False, True, False, False]
    # Temperature 1/2 squares the weights: 1, 16, 4, 9 of 30. Then 16 / 30 = 0.533 reaches 0.5.
    assert restricted_tokens(logits, top_p=0.5) == [False, True, False, True]
    assert restricted_tokens(logits, temperature=0.5, top_p=0.5) == [False, True, False, False]


def test_a_top_p_of_1_keeps_all_tokens():
    """In float32 the probabilities before the four rarest of these tokens add up to 1."""
    logits = 3 * np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert restricted_tokens(logits, top_p=1.0) == [True] * 1000


def test_tied_tokens_stay_or_go_together():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    assert restricted_tokens(logits, top_k=2) == [True] * 4
    assert restricted_tokens(logits, top_p=0.5) == [True] * 4
    assert restricted_tokens(logits, top_p=0.3) == [True, False, False, False]


def test_restrict_divides_by_the_temperature():
    np.testing.assert_allclose(restrict(jnp.array([1.0, 3.0]), SamplerConfig(temperature=0.5)), [2.0, 6.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0; for greedy decoding use top_k=1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5: it must be from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**settings)


def test_bfloat16_samples_agree_with_their_scorer(mesh):
    """Both read the same rounded hidden states, but compute in another order."""
    policy = make_policy(dataclasses.replace(EVEN_CONFIGS["decoder"], dtype="bfloat16"))
    params = random_params(policy)
    samples = draw_with(policy, params, SamplerConfig(), mesh)
    scores = make_score(policy, mesh)(params, PROMPTS.prompts, PROMPTS.prompt_lengths, *samples[:2])
    assert samples.log_probs.dtype == np.float32
    np.testing.assert_allclose(samples.log_probs, scores, atol=0.1)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_tokens_are_drawn_in_proportion_to_their_probabilities(size):
    rng = np.random.default_rng(size)
    logits = (2 * rng.standard_normal(size)).astype(np.float32)
    logits[rng.random(size) < 0.3] = -np.inf
    logits[-1] = -np.inf
    drawn = jax.jit(jax.vmap(draw, (0, None)))(jax.random.split(jax.random.key(3), 40_000), logits)
    counts = np.bincount(drawn, minlength=size)
    assert len(counts) == size and not counts[np.isinf(logits)].any()
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    likely = probabilities * 40_000 > 5
    assert (
        stats.chisquare(
            counts[likely], counts[likely].sum() * probabilities[likely] / probabilities[likely].sum()
        ).pvalue
        > 1e-3
    )


def test_the_rarest_tokens_of_a_large_vocabulary_are_drawn_too():
    # One token has probability 0.5; 2**20 others have 0.5 / 2**20 each, less than one float32 random number can
    # resolve.
    logits = np.zeros(2**20 + 1, np.float32)
    logits[7] = 20 * np.log(2)
    drawn = np.asarray(jax.jit(jax.vmap(draw, (0, None)))(jax.random.split(jax.random.key(4), 200), logits))
    rare = drawn[drawn != 7]
    assert 70 <= len(rare) <= 130
    assert len(set(rare % 128)) > 40 and len(set(rare)) >= len(rare) - 1
