"""FLOPs of a config against a count by hand and against XLA's, where no loop hides a part from XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from alignment_gap.models import DecoderConfig, T5Config, make_policy, score
from alignment_gap.plan import flops
from alignment_gap.plan.flops import Lengths
from alignment_gap.sharding import unbox

LENGTHS = Lengths(batch=2, prompt=24, samples=2, response=16)
T5 = T5Config(vocabulary_size=256, width=128, encoder_layers=2, decoder_layers=2, heads=4, head_size=32, mlp_width=192)
DECODER = DecoderConfig(vocabulary_size=256, width=128, layers=2, heads=4, kv_heads=2, head_size=32, mlp_width=192)


def test_t5_by_hand():
    prompts, responses = 2 * 24, 2 * 2 * 16
    square, mlp = 2 * 128 * 128, 3 * 2 * 128 * 192
    encoder = prompts * (4 * square + mlp)
    decoder = responses * (6 * square + mlp) + prompts * 2 * square
    forward = flops.forward_flops(T5, LENGTHS)
    assert forward.products == 2 * encoder + 2 * decoder
    assert forward.attention == 2 * 4 * 128 * (prompts * 24 + responses * (16 + 24))
    assert forward.logits == responses * 2 * 128 * 256
    assert flops.update_flops(T5, LENGTHS) == 3 * forward.total


def test_decoder_by_hand():
    tokens, responses = 2 * 24 + 2 * 2 * 16, 2 * 2 * 16
    layer = 2 * 2 * 128 * 128 + 2 * 2 * 128 * 64 + 3 * 2 * 128 * 192
    forward = flops.forward_flops(DECODER, LENGTHS)
    assert forward.products == 2 * tokens * layer
    assert forward.attention == 2 * 4 * 128 * (2 * 24 * 24 + responses * (24 + 16))
    assert forward.logits == responses * 2 * 128 * 256


@pytest.mark.parametrize("config", [T5, DECODER], ids=["t5", "decoder"])
def test_xla_counts_as_much_and_a_little_for_norms_and_softmax(config):
    depth = config.decoder_layers if config is T5 else config.layers
    policy = make_policy(dataclasses.replace(config, scan_unroll=depth))
    params = unbox(jax.eval_shape(policy.init, jax.random.key(0)))
    shapes = [(2, 24), (2,), (2, 2, 16), (2, 2)]
    texts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    lowered = jax.jit(lambda *arrays: score(policy, *arrays)).lower(params, *texts)
    assert "stablehlo.while" not in lowered.as_text()
    expected = flops.forward_flops(config, LENGTHS).total
    if config is DECODER:
        # Nothing reads the prompt's last layer but its keys and values; XLA leaves the rest of it out.
        expected -= 2 * 24 * (2 * 2 * 128 * 128 + 3 * 2 * 128 * 192 + 4 * 128 * 24)
    counted = lowered.compile().cost_analysis()["flops"]
    assert expected < counted < 1.05 * expected


def test_remat_says_what_is_computed_again():
    forward = flops.forward_flops(T5, LENGTHS)
    again = {
        remat: flops.recomputed_flops(dataclasses.replace(T5, remat=remat), LENGTHS)
        for remat in ("none", "dots", "full")
    }
    assert again == {
        "none": forward.logits,
        "dots": forward.attention + forward.logits,
        "full": forward.total,
    }


def test_sampling_is_a_prefill_and_a_decoding_step_for_each_token():
    parts = flops.prefill_flops(T5, LENGTHS) + 16 * flops.decode_flops(T5, LENGTHS)
    assert parts == pytest.approx(flops.forward_flops(T5, LENGTHS).total)
    # Keys and values of 2 layers, 4 heads of 32, for 2 prompts of 24 and their 4 responses of 16, in float32.
    assert flops.cache_bytes(T5, LENGTHS) == 2 * 4 * 2 * 4 * 32 * (2 * 24 + 4 * 16)
    assert flops.cache_bytes(dataclasses.replace(DECODER, dtype="bfloat16"), LENGTHS) == 2 * 2 * 2 * 2 * 32 * 112


def test_a_preference_model_reads_each_pair_in_both_orders():
    contexts = Lengths(batch=2, prompt=24, samples=2, response=2 * 16 + 4)
    once = flops.forward_flops(T5, contexts, logits=False).total
    assert flops.scores_flops(T5, LENGTHS) == once
    assert flops.scores_flops(T5, dataclasses.replace(LENGTHS, samples=4)) == 6 * once
