"""Every loss of TRL, value and gradient, equals TRL's own code; deliberate differences are asserted too."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import nanstd
from trl_harness import Outputs, agree, relative, tensor, trainer, with_prompt

from alignment_gap import losses
from alignment_gap.models.preference import pair_loss

PAIRS, TOKENS = 6, 7
RNG = np.random.default_rng(0)
# Chosen responses come in the first half, rejected ones in the second, as in TRL.
LOGPS = RNG.uniform(-3, -0.05, (2 * PAIRS, TOKENS)).astype(np.float32)
REFERENCE = RNG.uniform(-3, -0.05, (2 * PAIRS, TOKENS)).astype(np.float32)
COLLISIONS = RNG.uniform(-3, -0.05, (2 * PAIRS, TOKENS)).astype(np.float32)
LENGTHS = RNG.integers(1, TOKENS + 1, 2 * PAIRS)
MASK = np.arange(TOKENS) < LENGTHS[:, None]


def halves(name, array):
    return {f"chosen_{name}": jnp.asarray(array[:PAIRS]), f"rejected_{name}": jnp.asarray(array[PAIRS:])}


def total(logps):
    return jnp.sum(jnp.where(MASK, logps, 0.0), axis=-1)


def ours_on_pairs(loss):
    """The mean over the batch, and its gradient with respect to the token log-probs."""

    def mean(logps):
        reference = jnp.asarray(REFERENCE)
        arrays = {
            **halves("logps", total(logps)),
            **{f"ref_{name}": value for name, value in halves("logps", total(reference)).items()},
            **halves("lengths", LENGTHS.astype(np.int32)),
            **halves("token_logps", logps),
            **{f"ref_{name}": value for name, value in halves("token_logps", reference).items()},
            **halves("mask", MASK),
            **halves("log_collisions", COLLISIONS),
        }
        return jnp.mean(loss(arrays))

    return jax.value_and_grad(mean)(jnp.asarray(LOGPS))


def named(name, *arrays, **settings):
    """A loss that gets the arrays that it requires, and the named ones."""
    loss = losses.get(name, **settings)
    reads = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", *arrays)
    return lambda given: loss(**{each: given[each] for each in reads})


def trl_dpo(**settings):
    """The value and gradient of TRL's DPOTrainer."""
    attributes = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "args": types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }
    logps = tensor(LOGPS, gradient=True)
    attributes["ref_model"] = lambda **_: Outputs(tensor(np.where(MASK, REFERENCE, 0)))
    instance = trainer(DPOTrainer, **{**attributes, **settings})
    mask = with_prompt(MASK)
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = instance._compute_loss(lambda **_: Outputs(logps * tensor(MASK), tensor(COLLISIONS)), inputs, False)
    loss.backward()
    return loss.item(), logps.grad.numpy()


LENGTH_ARRAYS = ("chosen_lengths", "rejected_lengths")
DPO_CASES = [
    ("sigmoid", {}, "dpo", named("sigmoid", beta=0.3)),
    ("hinge", {}, "slic", named("hinge", beta=0.3)),
    ("ipo", {}, 'ipo, over_tokens="mean"', named("ipo", *LENGTH_ARRAYS, beta=0.3, over_tokens="mean")),
    ("exo_pair", {"label_smoothing": 1e-3}, "exo", named("exo_pair", beta=0.3)),
    ("exo_pair", {"label_smoothing": 0.2}, "exo", named("exo", beta=0.3, label_smoothing=0.2)),
    ("nca_pair", {}, "nca", named("nca_pair", beta=0.3)),
    (
        "robust",
        {"label_smoothing": 0.2},
        'dpo, smoothing="robust"',
        named("robust", beta=0.3, label_smoothing=0.2),
    ),
    ("bco_pair", {}, "bco, shift=0.0", named("bco_pair", beta=0.3)),
    ("sppo_hard", {}, "sppo", named("sppo_hard", beta=0.3)),
    ("aot", {"label_smoothing": 0.1}, "aot", named("aot", beta=0.3, label_smoothing=0.1)),
    (
        "aot_unpaired",
        {"label_smoothing": 0.1},
        'aot, coupling="unpaired"',
        named("aot_unpaired", beta=0.3, label_smoothing=0.1),
    ),
    ("apo_zero", {}, "apo_zero", named("apo_zero", beta=0.3)),
    ("apo_down", {}, "apo_down", named("apo_down", beta=0.3)),
    ("discopop", {}, "discopop", named("discopop", beta=0.3)),
    ("sigmoid_norm", {}, 'dpo, over_tokens="mean"', named("sigmoid_norm", *LENGTH_ARRAYS, beta=0.3)),
    (
        "sigmoid",
        {"f_divergence_type": "forward_kl"},
        'f_dpo, divergence="forward_kl"',
        named("f_dpo", beta=0.3, divergence="forward_kl"),
    ),
    (
        "sigmoid",
        {"f_divergence_type": "js_divergence"},
        'f_dpo, divergence="jensen_shannon"',
        named("f_dpo", beta=0.3, divergence="jensen_shannon"),
    ),
    (
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        'f_dpo, divergence="alpha", alpha=1 - 0.3',
        named("f_dpo", beta=0.3, divergence="alpha", alpha=0.7),
    ),
    (
        "sigmoid",
        {"ld_alpha": 0.4},
        "ld_dpo",
        lambda n: losses.ld_dpo(
            **{
                f"{policy}{side}_token_logps": n[f"{policy}{side}_token_logps"]
                for policy in ("", "ref_")
                for side in ("chosen", "rejected")
            },
            chosen_mask=n["chosen_mask"],
            rejected_mask=n["rejected_mask"],
            beta=0.3,
            alpha=0.4,
        ),
    ),
    (
        "sigmoid",
        {"use_weighting": True},
        'wpo, alignment="sampled"',
        lambda n: losses.wpo(
            n["chosen_token_logps"],
            n["rejected_token_logps"],
            n["ref_chosen_logps"],
            n["ref_rejected_logps"],
            n["chosen_mask"],
            n["rejected_mask"],
            chosen_log_collisions=n["chosen_log_collisions"],
            rejected_log_collisions=n["rejected_log_collisions"],
            beta=0.3,
            alignment="sampled",
        ),
    ),
    # TRL averages over all tokens of the batch; here every example has the same weight.
    (
        "sft",
        {},
        "sft, times pairs / tokens of the batch",
        lambda n: losses.sft(n["chosen_logps"][:, None]) * PAIRS / LENGTHS[:PAIRS].sum(),
    ),
]


@pytest.mark.parametrize(("loss_type", "settings", "label", "loss"), DPO_CASES)
def test_dpo_trainer(loss_type, settings, label, loss):
    value, gradient = ours_on_pairs(loss)
    theirs, their_gradient = trl_dpo(loss_types=[loss_type], **settings)
    shown = ", ".join(f"{name}={setting}" for name, setting in settings.items())
    agree(f"DPO `{loss_type}`", shown, f"`{label}`", (value, theirs), (gradient, their_gradient))


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        # Here IPO sums over tokens by default, and BCO's shift is that of its paper.
        ("ipo", named("ipo", beta=0.3)),
        ("bco_pair", named("bco", beta=0.3)),
    ],
)
def test_defaults_that_differ_on_purpose(loss_type, loss):
    value, gradient = ours_on_pairs(loss)
    theirs, their_gradient = trl_dpo(loss_types=[loss_type])
    assert max(relative(value, theirs), relative(gradient, their_gradient)) > 1e-3


def trl_kto(desirable, **settings):
    logps = tensor(LOGPS, gradient=True)
    mask = with_prompt(MASK)
    kl = np.where(MASK, np.roll(LOGPS, 1, axis=0), 0)
    ref_kl = np.where(MASK, np.roll(REFERENCE, 1, axis=0), 0).sum(-1)
    attributes = {
        "beta": 0.3,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.8,
        "precompute_ref_logps": True,
        "args": types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        **settings,
    }
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": mask,
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": mask,
        "label": tensor(desirable),
        "ref_logps": tensor(np.where(MASK, REFERENCE, 0).sum(-1)),
        "ref_KL_logps": tensor(ref_kl),
    }
    # The first call computes the KL, if it is requested.
    outputs = [Outputs(tensor(kl))] if settings["calculate_KL"] else []
    outputs.append(Outputs(logps * tensor(MASK)))
    instance = trainer(KTOTrainer, **attributes)
    loss = instance._compute_loss(lambda **_: outputs.pop(0), inputs, False)
    loss.backward()
    return (loss.item(), logps.grad.numpy()), (kl.sum(-1), ref_kl)


@pytest.mark.parametrize(("loss_type", "calculate_kl"), [("kto", True), ("apo_zero_unpaired", False)])
def test_kto_trainer(loss_type, calculate_kl):
    desirable = np.arange(2 * PAIRS) % 3 > 0
    (theirs, their_gradient), kl = trl_kto(desirable, loss_type=loss_type, calculate_KL=calculate_kl)
    kl = kl if calculate_kl else (kl[0], kl[0])
    weights = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}

    def mean(logps):
        reference = total(jnp.asarray(REFERENCE))
        kls = [jnp.asarray(each) for each in kl]
        return jnp.mean(losses.kto(total(logps), reference, jnp.asarray(desirable, jnp.float32), *kls, **weights))

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGPS))
    label = "`kto`" if calculate_kl else "`kto` with kl_logps = ref_kl_logps"
    agree(f"KTO `{loss_type}`", "both weights", label, (value, theirs), (gradient, their_gradient))


def sides(gradient=True):
    sums = np.where(MASK, LOGPS, 0).sum(-1)
    means = (sums / LENGTHS).astype(np.float32)
    return [[tensor(each[half], gradient) for half in (slice(PAIRS), slice(PAIRS, None))] for each in (sums, means)]


def back(pair, weight):
    """Converts gradients with respect to the scores of both sides to gradients with respect to token log-probs."""
    scores = np.concatenate([side.grad.numpy() for side in pair])
    return np.where(MASK, scores[:, None] * weight[:, None], 0)


def trl_cpo(pair, **settings):
    attributes = {"alpha": 0.0, "beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 0.4}
    loss = trainer(CPOTrainer, **{**attributes, **settings}).cpo_loss(*pair)[0].mean()
    loss.backward()
    return loss.item()


def test_cpo_trainer():
    pair, _ = sides()
    theirs = trl_cpo(pair)
    value, gradient = ours_on_pairs(
        lambda n: losses.cpo(n["chosen_logps"], n["rejected_logps"], beta=0.3, sft_weight=0.0)
    )
    gradients = gradient, back(pair, np.ones(2 * PAIRS))
    agree("CPO `sigmoid`", "without its NLL", "`cpo, sft_weight=0`", (value, theirs), gradients)


def test_simpo_in_the_cpo_trainer():
    _, pair = sides()
    theirs = trl_cpo(pair, loss_type="simpo")
    value, gradient = ours_on_pairs(
        lambda n: losses.simpo(
            n["chosen_logps"], n["rejected_logps"], n["chosen_lengths"], n["rejected_lengths"], beta=0.3, gamma=0.4
        )
    )
    agree("CPO `simpo`", "", "`simpo`", (value, theirs), (gradient, back(pair, 1 / LENGTHS)))


def test_slic_in_the_cpo_trainer():
    pair, _ = sides()
    theirs = trl_cpo(pair, loss_type="hinge")
    # TRL scales by beta; ours has scale 1 and a margin of 1 / beta.
    value, gradient = ours_on_pairs(
        lambda n: 0.3 * losses.slic_hf(n["chosen_logps"], n["rejected_logps"], delta=1 / 0.3, sft_weight=0.0)
    )
    label = "`slic_hf, delta=1/beta, sft_weight=0`, times beta"
    agree("CPO `hinge`", "without its NLL", label, (value, theirs), (gradient, back(pair, np.ones(2 * PAIRS))))


def test_orpo_trainer():
    _, pair = sides()
    # TRL's NLL covers prompt and response, over the tokens of the batch. So only the contrast is compared.
    loss = -trainer(ORPOTrainer, beta=0.3).odds_ratio_loss(*pair)[0].mean()
    loss.backward()

    def contrast(n):
        arrays = (n["chosen_logps"], n["rejected_logps"], n["chosen_lengths"], n["rejected_lengths"])
        return losses.orpo(*arrays, beta=0.3) - losses.orpo(*arrays, beta=0.0)

    value, gradient = ours_on_pairs(contrast)
    agree("ORPO", "without its NLL", "`orpo`", (value, loss.item()), (gradient, back(pair, 1 / LENGTHS)))


GROUPS = 3
SCORES = RNG.uniform(0, 1, 2 * PAIRS).astype(np.float32)


def in_groups(array, groups=GROUPS):
    return jnp.asarray(array).reshape(groups, len(array) // groups, *array.shape[1:])


@pytest.mark.parametrize(
    ("loss_type", "groups", "settings", "label"),
    [
        ("grpo", GROUPS, {}, "`grpo`"),
        # TRL averages over the tokens of the batch, ours over those of a prompt: equal for one prompt.
        ("bnpo", 1, {"over_tokens": "group"}, '`grpo, over_tokens="group"`, one prompt'),
        ("dr_grpo", GROUPS, {"max_length": 11}, "`dr_grpo, max_length=...`"),
    ],
)
def test_grpo_trainer(loss_type, groups, settings, label):
    loss = losses.get("dr_grpo" if loss_type == "dr_grpo" else "grpo", beta=0.1, clip_high=0.3, **settings)
    rewards = tensor(SCORES).reshape(groups, -1)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if loss_type != "dr_grpo":
        advantages = advantages / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    logps = tensor(LOGPS, gradient=True)
    old = (LOGPS + RNG.normal(0, 0.2, LOGPS.shape)).astype(np.float32)
    instance = trainer(
        GRPOTrainer,
        beta=0.1,
        epsilon_low=0.2,
        epsilon_high=0.3,
        loss_type=loss_type,
        max_completion_length=11,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    mask = tensor(MASK).long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages.reshape(-1),
        "old_per_token_logps": tensor(old),
        "ref_per_token_logps": tensor(REFERENCE),
    }
    theirs = instance._compute_loss(None, inputs)
    theirs.backward()

    def mean(logps):
        return jnp.mean(loss(*(in_groups(each, groups) for each in (logps, SCORES, MASK, old, REFERENCE))))

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGPS))
    agree(f"GRPO `{loss_type}`", "beta=0.1", label, (value, theirs.item()), (gradient, logps.grad.numpy()))


@pytest.mark.parametrize("on_policy", [True, False])
def test_rloo_trainer(on_policy):
    """TRL's value always has a ratio. At the sampling policy our gradient without `old_logps` is the same."""
    logps = tensor(LOGPS, gradient=True)
    old = total(LOGPS) + (0.0 if on_policy else jnp.asarray(RNG.normal(0, 0.3, 2 * PAIRS), jnp.float32))
    rewards = tensor(SCORES).reshape(GROUPS, -1)
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    instance = trainer(
        RLOOTrainer,
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    mask = tensor(MASK).long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": (rewards - others).reshape(-1),
        "old_logps": tensor(old),
    }
    theirs = instance._compute_loss(None, inputs)
    theirs.backward()

    def mean(logps):
        sampler = None if on_policy else in_groups(old)
        return jnp.mean(losses.rloo(in_groups(total(logps)), in_groups(SCORES), None, sampler, clip=0.2))

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGPS))
    gradients = gradient, logps.grad.numpy()
    if on_policy:
        agree("RLOO", "at the sampling policy", "`rloo`, gradient only", (0.0, 0.0), gradients)
    else:
        agree("RLOO", "old log-probs", "`rloo, clip=0.2` with `old_logps`", (value, theirs.item()), gradients)


def test_reward_trainer():
    """The objective of a Bradley-Terry model, from the rewards of both responses."""
    scores = RNG.normal(size=2 * PAIRS).astype(np.float32)
    rewards = tensor(scores, gradient=True)

    def model(**inputs):
        return types.SimpleNamespace(logits=rewards[:, None])

    args = types.SimpleNamespace(center_rewards_coefficient=None)
    loss = trainer(RewardTrainer, args=args).compute_loss(model, {"attention_mask": torch.ones(2 * PAIRS, 1)})
    loss.backward()

    def mean(rewards):
        return jnp.mean(pair_loss(rewards[:PAIRS] - rewards[PAIRS:], jnp.ones(PAIRS)))

    ours, gradient = jax.value_and_grad(mean)(jnp.asarray(scores))
    agree("Reward", "", "`KIND=bradley_terry`, labels of 0 and 1", (ours, loss.detach()), (gradient, rewards.grad))
