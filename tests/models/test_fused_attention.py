"""Fused attention: rows and masks by hand, equality with XLA's attention, and the settings that it refuses."""

import dataclasses
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from tiny_models import CONFIGS, SETTINGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config, fused_attention, make_policy, score, stack
from alignment_gap.models.fused_attention import BLOCKS, Row, block_of
from alignment_gap.models.packing import Packing
from alignment_gap.plan.programs import TPU_VARIABLES
from alignment_gap.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    shardings_of,
    spec_within,
    unbox,
    within,
)

BATCH = make_batch(4, responses=3)


def test_a_row_by_hand():
    # Prompts 5 6 7 and 8. Their last tokens are the first inputs of two responses of two tokens each.
    row = Row(prompt=2, rows=2, length=2)
    prompts, lengths = jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([3, 1])
    inputs = jnp.array([[[7, 1], [7, 2]], [[8, 3], [8, 4]]])
    text = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(row.segments(lengths), 1 - text)
    tokens = row.tokens(prompts, lengths, inputs)
    np.testing.assert_array_equal(tokens * text, [[5, 6, 7, 1, 7, 2], [0, 0, 8, 3, 8, 4]])
    np.testing.assert_array_equal(row.positions(lengths) * text, [[0, 1, 2, 3, 2, 3], [0, 0, 0, 1, 0, 1]])
    tree = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(row.mask(None, 7), tree)
    windowed = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(row.mask(2, 7), windowed)
    np.testing.assert_array_equal(row.responses(jnp.arange(12.0).reshape(2, 6, 1))[0, ..., 0], [[2, 3], [4, 5]])


def test_no_slot_attends_to_nothing():
    """Without any key, its softmax would be undefined."""
    row = Row(5, 3, 5)
    segments = np.pad(row.segments(jnp.array([1, 4, 6])), ((0, 0), (0, 4)))
    for window in (None, 1, 3):
        seen = (segments[:, :, None] == segments[:, None]) & row.mask(window, 24)
        assert seen.any(-1).all()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    prompt=strategies.integers(0, 6),
    rows=strategies.integers(1, 3),
    length=strategies.integers(1, 4),
    window=strategies.none() | strategies.integers(1, 5),
    padding=strategies.integers(0, 5),
)
def test_a_slot_attends_to_the_texts_that_it_ends(prompt, rows, length, window, padding):
    """The text of a slot is the prompt and its response up to the slot. A window keeps the last tokens of this text."""
    row = Row(prompt, rows, length)
    before = list(range(prompt))
    texts = [before[: slot + 1] for slot in before]
    for response in range(rows):
        start = prompt + response * length
        texts += [[*before, *range(start, start + token + 1)] for token in range(length)]
    mask = row.mask(window, row.size + padding)
    assert row.size == len(texts) and not mask[len(texts) :, : len(texts)].any()
    for slot, text in enumerate(texts):
        seen = text if window is None else text[-window:]
        assert np.flatnonzero(mask[slot]).tolist() == seen


def test_a_row_of_several_prompts_by_hand():
    """Prompts 5 6 and 7 have a response each, of two tokens and of one. Their last tokens are the first inputs."""
    packing = Packing.of(jnp.array([[2, 1]]), jnp.array([[[2], [1]]]), 4, 4)
    row = Row(prompt=4, rows=1, length=4)
    tokens, positions, segments = row.packed(jnp.array([[5, 6, 7, 0]]), jnp.array([[[6, 1, 7, 0]]]), packing)
    assert tokens.tolist() == [[5, 6, 7, 0, 6, 1, 7, 0]]
    # The texts 5 6 1 and 7. Their slots are those of segments 0 and 1.
    text = np.array([[1, 0, 0, 0, 1, 1, 1, 0]])
    assert (positions * text).tolist() == [[0, 0, 0, 0, 1, 2, 0, 0]]
    assert segments.tolist() == [[0, 2, 2, 2, 0, 0, 1, 2]]


def test_texts_of_a_packed_row_are_segments_of_their_own():
    """For any lengths: a prompt and its responses form one segment. A prompt's last token is only in its responses."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 4, (1, 3, 3))
        prompts, sizes = lengths[..., 0], lengths[..., 1:]
        packing = Packing.of(jnp.asarray(prompts), jnp.asarray(sizes), 10, 10)
        row = Row(10, 2, 10)
        inputs = jnp.ones((1, 2, 10), jnp.int32)
        _, positions, segments = (np.asarray(x[0]) for x in row.packed(jnp.ones((1, 10), jnp.int32), inputs, packing))
        assert len(segments) == row.size == 30
        for slot in range(3):
            # The prompt without its last token; then each response, which begins with this token.
            expected = list(range(prompts[0, slot] - 1))
            for k in range(2):
                expected += [prompts[0, slot] - 1 + token for token in range(sizes[0, slot, k])]
            assert positions[segments == slot].tolist() == expected


def test_a_part_of_a_mask_is_that_part_of_the_whole():
    """Splash asks for blocks, because the mask of a long row does not fit in memory."""
    row = Row(prompt=7, rows=2, length=4)
    for window in (None, 3):
        block = row.mask(window, 16, slice(4, 12), slice(8, 16))
        np.testing.assert_array_equal(block, row.mask(window, 16)[4:12, 8:16])
    tree = fused_attention._TreeMask
    masks = {tree(row, None, 16), tree(row._replace(), None, 16), tree(row, 3, 16), tree(row._replace(length=3), 3, 16)}
    assert len(masks) == 3


def test_blocks_need_the_least_padding_and_are_large():
    """Prompts of 1024 tokens and two responses of 128 fill two blocks of 640."""
    assert [block_of(size) for size in (40, 128, 129, 384, 896, 1152, 1280, 32768)] == [
        *(128, 128, 256, 384),
        *(512, 384, 640, 512),
    ]
    assert all(block % 128 == 0 for block in BLOCKS)


@pytest.mark.parametrize(
    ("name", "kernel", "dtype"),
    [("decoder", "splash", None), ("gemma2", "splash", None), ("decoder", "splash", "int8"), ("qwen3", "cudnn", None)],
)
def test_a_kernel_fills_the_same_cache_as_xla(name, kernel, dtype, monkeypatch):
    """For prompts of one block and of two. Gemma 2 has windows. cuDNN gets rows of a multiple of 8 slots."""
    plain_form, sizes = jax.nn.dot_product_attention, []

    def watched(query, *rest, **settings):
        sizes.append(query.shape[1])
        return plain_form(query, *rest, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", watched)
    monkeypatch.setattr(fused_attention, "CUDNN", "xla")
    monkeypatch.setattr(fused_attention, "check", lambda config: None)
    config = {**CONFIGS, **SETTINGS}[name]
    params = random_params(make_policy(config), 2)
    for size in (9, 300):
        prompts = jnp.asarray(np.random.default_rng(size).integers(0, config.vocabulary_size, (2, size)))
        plain, fused = (
            make_policy(dataclasses.replace(config, attention=attention)).prefill(
                params, prompts, jnp.array([size, 5]), 2, 5, dtype
            )["prompt"]
            for attention in ("xla", kernel)
        )
        for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
            # Rounding may go the other way.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1 if a.dtype == jnp.int8 else 1e-5)
    assert {*sizes} == ({16, 304} if kernel == "cudnn" else set())


def test_the_machine_chooses(monkeypatch):
    windowed = DecoderConfig(window=8, full_attention_every=2)
    assert fused_attention.choose(DecoderConfig()) == "xla"
    monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
    assert fused_attention.choose(DecoderConfig()) == "splash"
    assert fused_attention.choose(DecoderConfig(attention="xla")) == "xla"
    # Packed rows of a model with windows are computed by XLA, unless the settings name the kernel.
    assert fused_attention.choose(windowed) == "splash"
    assert fused_attention.choose(windowed, packed=True) == "xla"
    assert fused_attention.choose(DecoderConfig(), packed=True) == "splash"
    monkeypatch.setattr(fused_attention, "platform", lambda: "cuda")
    assert fused_attention.choose(DecoderConfig(dtype="bfloat16")) == "xla"


def _value_and_gradient(config, params, batch=BATCH):
    def total(params):
        log_probs = score(make_policy(config), params, *texts(batch))
        return jnp.sum(log_probs * jnp.linspace(0.5, 1.5, log_probs.size).reshape(log_probs.shape)), log_probs

    (_, log_probs), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return log_probs, gradient


def _assert_equal_attention(config, kernel):
    params = random_params(make_policy(config), 2)
    plain, fused = (
        _value_and_gradient(dataclasses.replace(config, attention=attention), params) for attention in ("xla", kernel)
    )
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), fused[1], plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["palm", "gemma2"])
def test_splash_equals_xla_in_value_and_gradient(name):
    """In the interpreter of the kernel. Gemma 2 has windows, soft caps and grouped heads."""
    _assert_equal_attention({"palm": CONFIGS["decoder"], **SETTINGS}[name], "splash")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_row_of_cudnn_equals_xla_in_value_and_gradient(name, monkeypatch):
    """At float32, with the plain form of the function that calls cuDNN."""
    monkeypatch.setattr(fused_attention, "CUDNN", "xla")
    monkeypatch.setattr(fused_attention, "check", lambda config: None)
    _assert_equal_attention(SETTINGS[name], "cudnn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "model", "layout"), [(1, 2, "fsdp_tensor"), (2, 2, "sequence"), (2, 4, "fsdp_tensor")]
)
def test_splash_over_a_mesh_equals_splash_on_one_device(kv_heads, model, layout, monkeypatch):
    """One key head is on every device, for all query heads. Several are split like their query heads.

    Where the mesh has more parts than there are key heads, each part of the query heads gets a copy of its own. The
    layout "sequence" splits the positions of a row, also if its texts have an odd number of slots.
    """
    config = dataclasses.replace(CONFIGS["decoder"], kv_heads=kv_heads, layers=1, attention="splash")
    policy, batch, seen, streams = make_policy(config), make_batch(4), set(), set()
    kernel, constrain = fused_attention._splash_on_device, stack.constrain

    def streamed(x, *names):
        streams.add((x.shape[1], (spec_within(x.shape, *names) or [None, None])[1]))
        return constrain(x, *names)

    def watched(row, window, soft_cap, query, keys, *rest):
        seen.add((query.shape[2], keys.shape[2]))
        return kernel(row, window, soft_cap, query, keys, *rest)

    monkeypatch.setattr(fused_attention, "_splash_on_device", watched)
    monkeypatch.setattr(stack, "constrain", streamed)
    params, mesh = random_params(policy), make_mesh(MeshConfig(data=2, fsdp=4 // model, model=model, layout=layout))

    def total(params, *texts):
        log_probs = score(policy, params, *texts)
        return log_probs.sum(), log_probs

    step = jax.grad(total, has_aux=True)
    alone = jax.jit(step)(params, *texts(batch))
    assert seen == {(4, kv_heads)}
    # 5 slots for the prompt and 10 for its responses, and one that makes them even.
    assert streams == {(16, None)}
    seen.clear()
    streams.clear()
    split = jax.device_put(params, shardings_of(jax.eval_shape(policy.init, jax.random.key(0)), mesh))
    over_mesh = jax.jit(within(mesh, step))(split, *jax.device_put(texts(batch), batch_sharding(mesh)))
    assert seen == {(4 // model, 1)}
    assert streams == {(16, "model" if layout == "sequence" else None)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), over_mesh, alone)


TPU_PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from alignment_gap.models import DecoderConfig, make_policy, score
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh, shardings_of, unbox, within

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2), topology.devices)
policy = make_policy(DecoderConfig(
    vocabulary_size=256, width=128, heads=4, kv_heads=2, head_size=64, block="serial", attention_soft_cap=5.0,
    window=64, full_attention_every=2, dtype="bfloat16"))
boxed = jax.eval_shape(policy.init, jax.random.key(0))
params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    unbox(boxed), shardings_of(boxed, mesh))
texts = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
         for shape in ((8, 97), (8,), (8, 2, 80), (8, 2))]
step = jax.value_and_grad(lambda params, *texts: score(policy, params, *texts).sum())
fill = lambda params, *prompts: policy.prefill(params, *prompts, 2, 8)
for function, arguments in ((step, texts), (fill, texts[:2])):
    lowered = jax.jit(within(mesh, function)).trace(params, *arguments).lower(lowering_platforms=("tpu",))
    print(lowered.compile().as_text(), end="END")
"""
SPLASH = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")


@pytest.mark.slow
def test_splash_compiles_for_a_tpu_slice():
    """Value and gradient, and the prompts of a sampler, compile ahead of time for eight chips of v5e, as by default."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs ahead of time")
    process = subprocess.run(
        [sys.executable, "-c", TPU_PROGRAM], env=os.environ | TPU_VARIABLES, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    # Of the forward and the two backward kernels, one for full layers and one for layers with a window.
    found = [
        [sum(kernel in line and "tpu_custom_call" in line for line in text.splitlines()) for kernel in SPLASH]
        for text in process.stdout.split("END")[:2]
    ]
    assert found == [[2, 2, 2], [2, 0, 0]]


def test_cudnn_is_what_a_gpu_would_run(monkeypatch):
    """The program is lowered for CUDA without a GPU; the test fakes the version of cuDNN and the platform."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention, "platform", lambda: "cuda")
    policy = make_policy(DecoderConfig(heads=4, kv_heads=2, head_size=64, dtype="bfloat16", attention="cudnn"))
    params = unbox(jax.eval_shape(policy.init, jax.random.key(0)))
    step = jax.grad(lambda params, *texts: score(policy, params, *texts).sum())
    text = jax.jit(step).trace(params, *texts(BATCH)).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmha" in text.as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text.as_text()


def test_a_kernel_of_another_machine_is_refused():
    policy = make_policy(DecoderConfig(head_size=64, dtype="bfloat16", attention="cudnn"))
    with pytest.raises(UserError, match="attention is 'cudnn' on cpu: it needs a CUDA GPU; use auto or xla"):
        jax.eval_shape(lambda key: score(policy, unbox(policy.init(key)), *texts(BATCH)), jax.random.key(0))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DecoderConfig(), {"attention": "flash"}, "attention is 'flash': choose one of auto, xla, cudnn, splash"),
        (DecoderConfig(), {"attention": "cudnn"}, "'cudnn' with dtype=float32: it computes in bfloat16"),
        (DecoderConfig(), {"attention": "cudnn", "head_size": 20}, "'cudnn' with head_size=20: it takes multiples"),
        (
            DecoderConfig(),
            {"attention": "cudnn", "attention_soft_cap": 5.0},
            "'cudnn', which has no attention_soft_cap",
        ),
        (T5Config(), {"attention": "splash"}, "T5Config.attention is 'splash': choose one of auto, xla, pallas"),
    ],
)
def test_settings_that_no_kernel_can_do_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        make_policy(dataclasses.replace(config, **change))
