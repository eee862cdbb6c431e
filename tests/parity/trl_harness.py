"""Calls TRL's own loss methods on given log-probs, without model, data or other processes."""

import collections
import contextlib
import types

import numpy as np
import torch

# Comparisons that passed: TRL's name, its settings, ours, and the largest relative differences of value and gradient.
ROWS: list[tuple[str, str, str, float, float]] = []


class Accelerator:
    """One process on the CPU."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = False

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction="sum"):
        return value

    def unwrap_model(self, model):
        return model

    def autocast(self):
        return contextlib.nullcontext()


class Outputs(types.SimpleNamespace):
    """The output of a model with a fused head. Only the log-probs matter; the rest feeds metrics."""

    def __init__(self, log_probs, log_sum_sq_probs=None):
        zeros = torch.zeros_like(log_probs)
        super().__init__(
            log_probs=log_probs,
            log_sum_sq_probs=zeros if log_sum_sq_probs is None else log_sum_sq_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def trainer(cls, **attributes):
    """An instance of a TRL trainer with these attributes; its constructor does not run."""
    instance = object.__new__(cls)
    common = {
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "model": types.SimpleNamespace(training=False, is_gradient_checkpointing=False, _modules={}),
        "_metrics": {mode: collections.defaultdict(list) for mode in ("train", "eval")},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **attributes}.items():
        object.__setattr__(instance, name, value)
    return instance


def tensor(array, gradient=False):
    """A torch copy."""
    array = np.array(array)
    return torch.tensor(array, requires_grad=gradient)


def with_prompt(mask):
    """TRL's completion mask, with one prompt token before the response."""
    return torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), tensor(mask).long()], dim=1)


def relative(ours, theirs):
    """The largest difference relative to the largest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


def agree(theirs, settings, ours, value, gradient):
    """Asserts agreement within 1e-5 for pairs (ours, theirs) of value and gradient, and records the row."""
    differences = relative(*value), relative(*gradient)
    assert max(differences) <= 1e-5, (theirs, ours, differences)
    ROWS.append((theirs, settings, ours, *differences))
