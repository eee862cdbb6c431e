"""FLOPs of a job's programs equal counts by hand, and XLA's where no loop hides a part from it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from planning import DECODER, SHAPE, T5, config_of, facts_of, program_of, replaced

from alignment_gap.jobs.config import LossConfig, OnlineConfig
from alignment_gap.models import make_policy, score
from alignment_gap.plan.programs import _flops
from alignment_gap.plan.steps import Program
from alignment_gap.sharding import MeshConfig, make_mesh, unbox
from alignment_gap.training.flops import count_flops

PROMPTS, RESPONSES = 8 * 24, 8 * 2 * 16
# FLOPs of a token in one layer: a projection between width and heads, and one matrix of the MLP.
PROJECTION, MATRIX = 2 * 64 * 128, 2 * 64 * 96
LOGITS = RESPONSES * 2 * 64 * 256


def t5_forward():
    """FLOPs of products (without the logits), of attention, and of products whose results no gradient needs."""
    encoder = PROMPTS * (4 * PROJECTION + 3 * MATRIX)
    decoder = RESPONSES * (6 * PROJECTION + 3 * MATRIX) + PROMPTS * 2 * PROJECTION
    attention = PROMPTS * 24 + RESPONSES * (16 + 24)
    return 2 * (encoder + decoder), 2 * 2 * 2 * 128 * attention, 2 * (PROMPTS + RESPONSES) * MATRIX


def decoder_forward():
    """The same for the decoder. Attention and MLP are parallel, so no gradient needs the last product of either."""
    layer = 4 * PROJECTION + 3 * MATRIX
    attention = PROMPTS * 24 + RESPONSES * (24 + 16)
    unneeded = 2 * (PROMPTS + RESPONSES) * (PROJECTION + MATRIX)
    return 2 * (PROMPTS + RESPONSES) * layer, 2 * 2 * 2 * 128 * attention, unneeded


FORWARD = {"t5": (T5, *t5_forward()), "decoder": (DECODER, *decoder_forward())}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def flops_of(program, mesh, **job):
    """All FLOPs of a program, and the FLOPs that the model needs."""
    return _flops(program, config_of(program, **job).job, mesh)


@pytest.mark.parametrize("name", FORWARD)
def test_scores_by_hand(name, mesh):
    model, products, attention, _ = FORWARD[name]
    expected = products + attention + LOGITS
    assert flops_of(program_of("score", model), mesh) == (expected, expected)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_an_update_is_three_forward_passes_and_what_remat_computes_again(name, remat, mesh):
    model, products, attention, unneeded = FORWARD[name]
    again = {"none": 0, "dots": attention, "full": products + attention - unneeded}[remat]
    needed = 3 * (products + attention + LOGITS)
    assert flops_of(program_of("update", dataclasses.replace(model, remat=remat)), mesh) == (needed + again, needed)


def test_logits_in_blocks_are_computed_again(mesh):
    # A block has 64 MiB of float32 logits on each device: 8 * 2**24 values. 256 tokens and a vocabulary of 2**20 give
    # twice as many.
    model = dataclasses.replace(DECODER, vocabulary_size=2**20)
    flops, needed = flops_of(program_of("update", model), mesh)
    assert flops - needed == RESPONSES * 2 * 64 * 2**20


def test_microbatches_do_the_same_work(mesh):
    program = replaced(program_of("update"), batch=16)
    assert flops_of(program, mesh, microbatches=2) == flops_of(program, mesh)


@pytest.mark.parametrize("model", [T5, DECODER], ids=["t5", "decoder"])
def test_sampling_computes_what_scoring_its_samples_does(model, mesh):
    sampled = flops_of(program_of("sample", model), mesh, source=OnlineConfig())
    assert sampled == flops_of(program_of("score", model), mesh)


def test_a_mixture_runs_both_networks(mesh):
    once = flops_of(program_of("sample"), mesh, source=OnlineConfig())
    mixed = flops_of(program_of("sample"), mesh, source=OnlineConfig(mixture=0.5))
    assert mixed == (2 * once[0], 2 * once[1])


def test_divergence_runs_both_networks(mesh):
    one = replaced(program_of("score"), samples=1)
    once = flops_of(one, mesh)
    assert flops_of(dataclasses.replace(one, kind="divergence"), mesh) == (2 * once[0], 2 * once[1])


@pytest.mark.parametrize(("samples", "pairs"), [(2, 1), (4, 6)])
def test_a_preference_model_reads_each_pair_in_both_orders(samples, pairs, mesh):
    judge = replaced(program_of("judge", T5), samples=samples)
    tokens = 8 * 2 * (2 * 16 + 4)  # Two orders of both responses, with three markers and the answer.
    encoder = PROMPTS * (4 * PROJECTION + 3 * MATRIX)
    decoder = tokens * (6 * PROJECTION + 3 * MATRIX) + PROMPTS * 2 * PROJECTION
    attention = 2 * 2 * 128 * (PROMPTS * 24 + tokens * (2 * 16 + 4 + 24))
    answers = 8 * 2 * 2 * 2 * 64  # Two label tokens for each order.
    assert flops_of(judge, mesh)[0] == pairs * (2 * (encoder + decoder + attention) + answers)


def test_a_second_source_is_trained_on_too(mesh):
    one = dataclasses.replace(SHAPE, samples=1)
    update = Program("update", "update", facts_of(DECODER, fresh=one))
    job = {"loss": LossConfig("hypo"), "fresh": OnlineConfig(samples=1)}
    of_pairs, of_one = (flops_of(replaced(program_of("score"), samples=k), mesh)[0] for k in (2, 1))
    assert flops_of(update, mesh, **job) == (3 * (of_pairs + of_one),) * 2


def test_responses_of_other_prompts_have_no_gradient(mesh):
    forward = flops_of(program_of("score"), mesh)[0]
    assert flops_of(program_of("update"), mesh, loss=LossConfig("kto")) == (4 * forward, 4 * forward)


def test_a_fused_kernel_counts_as_the_plain_form(mesh):
    fused = program_of("update", dataclasses.replace(DECODER, attention="splash"))
    assert flops_of(fused, mesh) == flops_of(program_of("update"), mesh)


@pytest.mark.parametrize("config", [T5, DECODER], ids=["t5", "decoder"])
def test_xla_counts_as_much_and_a_little_for_norms_and_softmax(config):
    depth = config.decoder_layers if config is T5 else config.layers
    policy = make_policy(dataclasses.replace(config, scan_unroll=depth))
    params = unbox(jax.eval_shape(policy.init, jax.random.key(0)))
    texts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(2, 24), (2,), (2, 2, 16), (2, 2)]]
    scores = jax.jit(lambda *arrays: score(policy, *arrays))
    expected = count_flops(scores.trace(params, *texts).jaxpr)
    lowered = scores.lower(params, *texts)
    assert "stablehlo.while" not in lowered.as_text()
    if config is DECODER:
        # Of the prompt's last layer only keys and values are read; XLA removes its other products.
        expected -= 2 * 24 * (2 * PROJECTION + 3 * MATRIX + 4 * 128 * 24)
    assert expected < lowered.compile().cost_analysis()["flops"] < 1.1 * expected
