"""LoRA adapters of PEFT give the same logits here, and there again after an export; merged ones do too."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_reward_models import CASES as REWARD_MODELS
from test_reward_models import PAD, TEXTS, rewards_of
from test_transformers import CASES, PROMPT_LENGTHS, PROMPTS, RESPONSES
from transformers_harness import CLASSES, our_logits, random_model, reload, their_logits, their_rewards

from alignment_gap.checkpoints.formats import export_checkpoint, import_checkpoint
from alignment_gap.models import make_policy
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import load_policy, load_preference_model

MESH = make_mesh(MeshConfig())
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "t5_untied": {"target_modules": ["q", "v", "o", "wi_0", "wo"]},
    "t5_tied": {"target_modules": r"decoder.*\.EncDecAttention\.k"},
    "gemma": {"target_modules": [*ATTENTION, *MLP]},
    "gemma2_short_window": {"target_modules": ["q_proj", "v_proj"]},
    "gemma3": {"target_modules": [*ATTENTION, *MLP], "use_rslora": True},
    "llama_grouped": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "mistral": {"target_modules": ["k_proj", "down_proj"]},
    "qwen2": {"target_modules": [*ATTENTION, *MLP]},
    "qwen3": {"target_modules": ["o_proj", "up_proj"]},
}


def with_adapters(model, case, rank=4):
    """A model with PEFT adapters that have no zeros."""
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = peft.LoraConfig(task_type=task, r=rank, lora_alpha=6, **SETTINGS[case])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return adapted


def assert_equal_logits(run, model, plain):
    policy, params = load_policy(run, MESH)
    logits = np.asarray(our_logits(policy, params, PROMPTS, PROMPT_LENGTHS, RESPONSES))
    for row, column in np.ndindex(3, 2):
        arrays = PROMPTS[row, : PROMPT_LENGTHS[row]], RESPONSES[row, column]
        np.testing.assert_allclose(logits[row, column], their_logits(model, *arrays), rtol=0, atol=1e-4)
    assert np.abs(logits - plain).max() > 0.1


@pytest.mark.parametrize("case", SETTINGS)
def test_adapters_come_in_and_go_out_with_equal_logits(case, tmp_path):
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path / "base")
    import_checkpoint(tmp_path / "base", tmp_path / "base_run")
    policy, base = load_policy(tmp_path / "base_run", MESH)
    plain = np.asarray(our_logits(policy, base, PROMPTS, PROMPT_LENGTHS, RESPONSES))
    adapted = with_adapters(model, case)
    adapted.save_pretrained(tmp_path / "adapters")

    stored = import_checkpoint(tmp_path / "adapters", tmp_path / "run", base=tmp_path / "base_run")
    assert len(stored.tensors) < len(jax.tree.leaves(base)) * 2
    assert_equal_logits(tmp_path / "run", adapted, plain)

    export_checkpoint(tmp_path / "run", tmp_path / "again", "peft")
    again = peft.PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "again").eval()
    ours, theirs = again.state_dict(), adapted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    assert_equal_logits(tmp_path / "run", again, plain)

    export_checkpoint(tmp_path / "run", tmp_path / "merged", "huggingface")
    assert_equal_logits(tmp_path / "run", reload(tmp_path / "merged"), plain)


@pytest.mark.parametrize("base_is_a_reward_model", [False, True], ids=["of a policy", "of a reward model"])
@pytest.mark.parametrize("case", ["llama_pad_is_end", "qwen2", "t5"])
def test_adapters_of_reward_models_come_with_their_head(case, base_is_a_reward_model, tmp_path):
    family, settings = REWARD_MODELS[case]
    if base_is_a_reward_model:
        base = random_model(family, settings)
    else:
        policy = random_model(family.removesuffix("Classifier"), {**settings, "tie_word_embeddings": False})
        policy.save_pretrained(tmp_path / "policy")
        base = CLASSES[family][1].from_pretrained(tmp_path / "policy", attn_implementation="eager", num_labels=1).eval()
    base.save_pretrained(tmp_path / "base")
    import_checkpoint(tmp_path / ("base" if base_is_a_reward_model else "policy"), tmp_path / "base_run")
    heads = ["classification_head"] if family.startswith("T5") else None  # PEFT's default has "score" alone.
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["v_proj", "v"], modules_to_save=heads
    )
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapters")

    stored = import_checkpoint(tmp_path / "adapters", tmp_path / "run", base=tmp_path / "base_run")
    assert {name.partition(".")[0] for name in stored.tensors} >= {"decoder", "score"}
    theirs = np.array([their_rewards(adapted, [text], PAD)[0] for text in TEXTS])
    np.testing.assert_allclose(
        rewards_of(*load_preference_model(tmp_path / "run", MESH)).reshape(-1), theirs, rtol=0, atol=1e-5
    )
    assert theirs.std() > 0.02

    export_checkpoint(tmp_path / "run", tmp_path / "again", "peft")
    fresh = CLASSES[family][1].from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    np.testing.assert_allclose([their_rewards(again, [text], PAD)[0] for text in TEXTS], theirs, rtol=0, atol=1e-6)
    export_checkpoint(tmp_path / "run", tmp_path / "merged", "huggingface")
    merged = reload(tmp_path / "merged")
    np.testing.assert_allclose([their_rewards(merged, [text], PAD)[0] for text in TEXTS], theirs, rtol=0, atol=1e-5)


def test_a_run_trained_here_has_the_fresh_adapters_of_peft():
    """B is zero; A has the same distribution as PEFT's, with the same bound and variance."""
    adapted = peft.get_peft_model(
        random_model(*CASES["llama_grouped"]), peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["down_proj"])
    )
    theirs = np.concatenate([p.detach().numpy().ravel() for n, p in adapted.named_parameters() if "lora_A" in n])
    from alignment_gap.models import AdapterConfig, Adapters, DecoderConfig
    from alignment_gap.sharding import unbox

    config = DecoderConfig(vocabulary_size=8, width=24, layers=3, heads=4, kv_heads=2, head_size=10, mlp_width=20)
    adapters = Adapters(make_policy(config), AdapterConfig(8, targets=("down_proj",)))
    parts = unbox(adapters.init(jax.random.key(0)))["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    ours = np.asarray(parts["a"]).ravel()
    assert len(ours) == len(theirs) and not jnp.any(parts["b"])
    for sample in (ours, theirs):
        assert 0.95 * 20**-0.5 < np.abs(sample).max() <= 20**-0.5
        assert abs(sample.var() * 60 - 1) < 0.15
