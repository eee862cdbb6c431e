"""Reads and writes PEFT folders of LoRA adapters (adapter_config.json, adapter_model.safetensors), without torch.

A folder holds only the adapters. Whoever imports it names the run with their base.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignment_gap.checkpoints.huggingface.configs import write_config
from alignment_gap.checkpoints.huggingface.entries import entries_of, from_linear, is_gpt_neox, to_linear
from alignment_gap.checkpoints.huggingface.folder import installed, read_json, tensors_of, write_json
from alignment_gap.checkpoints.tensors import Entry, Tensor, check_entries, exported, imported
from alignment_gap.errors import UserError
from alignment_gap.models import AdapterConfig, ModelConfig, RewardHead, T5Config, make_policy
from alignment_gap.models.adapters import kernel_name, projections, split_axes
from alignment_gap.models.policy import HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The prefix of every tensor's name: the model inside PEFT's two wrappers.
_WRAPPED = "base_model.model."
# The task of a reward model, whose head PEFT stores whole, and the names of heads.
_REWARDS, _HEADS = "SEQ_CLS", ("score", "classification_head", "classifier")
# Fields that change the computation, and the supported values; the first value is PEFT's default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    # Adapters that are on only after certain tokens, and initial values for which PEFT changes the base's weights again
    # when it loads them, such as pissa and olora.
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class ForeignAdapters(NamedTuple):
    """The adapters in a folder; no tensor is read yet.

    Attributes:
      config: their settings.
      tensors: their tensors by our names.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with an adapter_config.json."""
    return (path / CONFIG).is_file()


def has_head(path: Path) -> bool:
    """Whether the adapters in a folder come with the head of a reward model."""
    return read_json(path / CONFIG).get("task_type") == _REWARDS


def open_adapters(path: Path, model: ModelConfig, head: RewardHead | None = None) -> ForeignAdapters:
    """Opens a folder of adapters for a policy or a reward model; loads nothing.

    Args:
      path: the folder.
      model: the policy, or the policy inside the reward model.
      head: how the reward model reads a response; None for a policy.

    Raises:
      UserError: the adapters are of an unsupported kind or for another model, or tensors are missing.
    """
    values = read_json(path / CONFIG)
    if head is not None:
        values["modules_to_save"] = [name for name in values.get("modules_to_save") or () if name not in _HEADS]
    for name, allowed in _ONLY.items():
        if values.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{path / CONFIG}: {name} is {values[name]!r}, which is not supported: it must be {allowed[0]!r}"
            )
    try:
        rank, alpha, dropout = int(values["r"]), float(values["lora_alpha"]), float(values.get("lora_dropout", 0.0))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path / CONFIG}: r, lora_alpha and lora_dropout must be numbers ({error}): save the adapters again"
        ) from error
    if rank < 1:
        raise UserError(f"{path / CONFIG}: r is {rank}: it must be at least 1, save the adapters again")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} has no {WEIGHTS}: save the adapters again, as safetensors")
    found, modules = tensors_of(path / WEIGHTS), _modules(model, head)
    targets = [name for name, each in modules.items() if any(_names(module)[0] in found for module in each)]
    entries = _entries(model, targets, rank, head)
    check_entries(f"{path / WEIGHTS}", found, entries)
    scale = math.sqrt(rank) if values.get("use_rslora") else 1.0
    return ForeignAdapters(AdapterConfig(rank, alpha * scale, tuple(targets), dropout), imported(found, entries))


def write(
    output: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    ours: Mapping[str, Tensor],
    head: RewardHead | None = None,
) -> None:
    """Writes a folder that PEFT loads on top of the base in transformers, in float32.

    Args:
      output: the new folder.
      model: the policy's config.
      adapter: the adapters' settings.
      ours: the adapters by dotted names, and the head's parameters if there is one.
      head: the reward model's head; None for a policy.

    Raises:
      UserError: transformers has no architecture that computes the same as the policy.
    """
    save_file, rank = installed("safetensors.numpy").save_file, adapter.rank or 0
    modules = _modules(model, head)
    targets = [name for name in modules if f"{kernel_name(name)}.a" in ours]
    tensors = exported(ours, _entries(model, targets, rank, head))
    output.mkdir(parents=True)
    arrays = {name: tensor.read(None).astype(np.float32, copy=False) for name, tensor in tensors.items()}
    save_file(arrays, output / WEIGHTS, metadata={"format": "pt"})
    task, name = ("SEQ_2_SEQ_LM", "classification_head") if isinstance(model, T5Config) else ("CAUSAL_LM", "score")
    config = {
        "peft_type": "LORA",
        "task_type": task if head is None else _REWARDS,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": _target_modules(modules, targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    } | ({} if head is None else {"modules_to_save": [name]})
    write_json(output / CONFIG, config)


def _modules(model: ModelConfig, head: RewardHead | None) -> dict[str, list[str]]:
    """Hugging Face's modules for every projection, one for each layer; raises UserError if it has no such model."""
    if is_gpt_neox(model):
        raise UserError(
            "peft has no place for adapters of GPT-NeoX, which has one matrix for query, key and value and so one "
            "adapter where this policy has three: export the merged policy to the format huggingface"
        )
    write_config(model, head=head)
    entries = entries_of(model, head)
    return {
        name: [weight.removesuffix(".weight") for weight in entries[kernel_name(name)].names]
        for name in projections(make_policy(model))
    }


def _target_modules(modules: Mapping[str, list[str]], targets: Collection[str]) -> list[str]:
    """The names by which PEFT finds the targets: the last part of each name, or the whole name if others share it."""
    targeted = {module for name in targets for module in modules[name]}
    last = {module.rpartition(".")[2] for module in targeted}
    sharing = {module for each in modules.values() for module in each if module.rpartition(".")[2] in last}
    return sorted(last if sharing == targeted else targeted)


def _names(module: str) -> tuple[str, str]:
    return f"{_WRAPPED}{module}.lora_A.weight", f"{_WRAPPED}{module}.lora_B.weight"


def _entries(model: ModelConfig, targets: Collection[str], rank: int, head: RewardHead | None) -> dict[str, Entry]:
    """How PEFT stores our adapters: its A is [r, inputs] and its B is [outputs, r]. A head is stored as it is."""
    modules, kernels = _modules(model, head), projections(make_policy(model))
    found = {
        name: entry._replace(names=tuple(_WRAPPED + each for each in entry.names))
        for name, entry in entries_of(model, head).items()
        if name.partition(".")[0] == HEAD
    }
    for name in targets:
        box = kernels[name]
        inputs, outputs = split_axes(box.names[1:], box.value.shape[1:])
        pairs = [_names(module) for module in modules[name]]
        for part, number, shape in (("a", 0, (*inputs, rank)), ("b", 1, (rank, *outputs))):
            size = math.prod(shape) // rank
            there = (rank, size) if part == "a" else (size, rank)
            found[f"{kernel_name(name)}.{part}"] = Entry(
                tuple(pair[number] for pair in pairs),
                there,
                partial(from_linear, shape),
                partial(to_linear, there),
                per_layer=True,
            )
    return found
