"""Losses by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from alignment_gap.losses import (
    _groupwise,
    _pairwise,
    _policy_gradient,
    _reference_free,
    _regularizers,
    _sides,
    _token_weighted,
)
from alignment_gap.losses._checks import unknown

Loss = Callable[..., Any]

_LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        _groupwise.best_of_n,
        _groupwise.raft,
        _groupwise.rebel,
        _groupwise.reward_weighted_regression,
        _groupwise.sft,
        _pairwise.chi_po,
        _pairwise.discopop,
        _pairwise.dpo,
        _pairwise.exo,
        _pairwise.f_dpo,
        _pairwise.gpo,
        _pairwise.ipo,
        _pairwise.ipo_md,
        _pairwise.r_dpo,
        _pairwise.slic,
        _policy_gradient.dr_grpo,
        _policy_gradient.grpo,
        _policy_gradient.nash_md,
        _policy_gradient.ppo_clip,
        _policy_gradient.reinforce,
        _policy_gradient.rloo,
        _reference_free.cpo,
        _reference_free.orpo,
        _reference_free.simpo,
        _reference_free.slic_hf,
        _regularizers.online_kl,
        _sides.aot,
        _sides.apo_down,
        _sides.apo_zero,
        _sides.bco,
        _sides.kto,
        _sides.nca,
        _sides.sppo,
        _token_weighted.ld_dpo,
        _token_weighted.wpo,
    )
}

# Names that others use, and what they are here.
_ALIASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "aot_unpaired": ("aot", {"coupling": "unpaired"}),
    "bco_pair": ("bco", {"shift": 0.0}),
    "dapo": ("grpo", {"over_tokens": "group", "clip_high": 0.28, "beta": 0.0}),
    "exo_pair": ("exo", {}),
    "hinge": ("slic", {}),
    "nca_pair": ("nca", {}),
    "robust": ("dpo", {"smoothing": "robust"}),
    "rwr": ("reward_weighted_regression", {}),
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("dpo", {"over_tokens": "mean"}),
    "sppo_hard": ("sppo", {}),
}


def names() -> tuple[str, ...]:
    """The names that `get` takes, sorted: every loss of this library and the aliases under which others know them."""
    return tuple(sorted((*_LOSSES, *_ALIASES)))


def get(loss: str | Loss, **settings: Any) -> Loss:
    """A configured loss: a callable that still names its array parameters.

    `get("ipo", beta=0.1)` is `ipo` with that setting. What a loss reads is in `inspect.signature`: its
    positional-or-keyword parameters are arrays (optional where they have a default), its keyword-only ones settings.

    Args:
      loss: one of `names()`, or any callable of the user's own.
      **settings: keyword-only parameters of the loss.

    Returns:
      The loss with its settings bound.

    Raises:
      ValueError: no such loss, or the loss has no such setting; the message names the nearest one.
    """
    if isinstance(loss, str):
        if loss not in (known := names()):
            raise ValueError(f"loss: {unknown(loss, known)}")
        name, preset = _ALIASES.get(loss, (loss, {}))
        function, settings = _LOSSES[name], {**preset, **settings}
    else:
        function = loss
    _check_settings(function, settings)
    return functools.partial(function, **settings) if settings else function


def reads_other_prompts(loss: Loss) -> bool:
    """Whether the loss of a prompt depends on the batch's other prompts.

    Args:
      loss: from `get` or `combine`. A callable of the user's own says so by an attribute of this name; without, False.
    """
    loss = inspect.unwrap(loss)
    function, settings = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    if function is _sides.bco:
        return isinstance(settings.get("shift", "batch_mean"), str)
    return getattr(function, "reads_other_prompts", function in (_sides.aot, _sides.kto))


def _check_settings(function: Loss, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    valid = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in settings:
        if name not in valid:
            raise ValueError(f"setting of {getattr(function, '__name__', 'the loss')}: {unknown(name, valid)}")
