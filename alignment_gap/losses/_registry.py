"""Losses by name, and what they read beyond the arrays of their own prompt."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from alignment_gap.losses._checks import check_choice, unknown

Loss = Callable[..., Any]
Settings = Mapping[str, Any]
Reads = Collection[str] | Callable[[Settings], Collection[str]]
_L = TypeVar("_L", bound=Loss)

# The loss of one prompt depends on the batch's other prompts.
OTHER_PROMPTS = "other prompts"
# The loss divides by the padded width of a row.
WIDTH = "width"
# Right on samples of another policy only with the log-probs under it.
SAMPLER_LOG_PROBS = "sampler log-probs"
# Right only on samples of the current policy.
OWN_SAMPLES = "own samples"
# Needs log sum_v pi(v)^2 at every token.
LOG_COLLISIONS = "log collisions"
_READS = (OTHER_PROMPTS, WIDTH, SAMPLER_LOG_PROBS, OWN_SAMPLES, LOG_COLLISIONS)

# Every name that `get` takes: the loss and the settings that the name stands for.
_REGISTRY: dict[str, tuple[Loss, Settings]] = {}


def register(*, aliases: Mapping[str, Settings] | None = None, reads: Reads = ()) -> Callable[[_L], _L]:
    """Makes a loss known by its name.

    Args:
      aliases: other names of the loss, each with the settings that it stands for.
      reads: what `losses.reads` says of it; or a function of its settings, defaults filled in, that gives this.

    Returns:
      A decorator that returns the loss itself.

    Raises:
      ValueError: another loss has one of the names.
    """

    def add(loss: _L) -> _L:
        entries = {name: (loss, preset) for name, preset in {loss.__name__: {}, **(aliases or {})}.items()}
        if taken := sorted(entries.keys() & _REGISTRY.keys()):
            raise ValueError(f"two losses are named {taken[0]!r}")
        _REGISTRY.update(entries)
        loss.reads = reads  # type: ignore[attr-defined]
        return loss

    return add


def names() -> tuple[str, ...]:
    """The names of this library's losses, aliases among them, sorted; `get` also takes "module:function"."""
    return tuple(sorted(_REGISTRY))


def aliases() -> dict[str, tuple[str, Settings]]:
    """The names under which other libraries know a loss: its name here, and the settings that the alias stands for."""
    return {name: (loss.__name__, preset) for name, (loss, preset) in _REGISTRY.items() if name != loss.__name__}


def get(loss: str | Loss, **settings: Any) -> Loss:
    """A configured loss: a callable that still names its array parameters.

    `get("ipo", beta=0.1)` is `ipo` with that setting, `get("my_package.module:function")` a loss of the user's own.
    The parameters are in `inspect.signature`: positional-or-keyword ones are arrays (optional where they have a
    default), keyword-only ones settings.

    Args:
      loss: one of `names()`, "module:function", or any callable of the user's own.
      **settings: keyword-only parameters of the loss.

    Returns:
      The loss with its settings bound.

    Raises:
      ValueError: no such loss, or the loss has no such setting. For a name the message gives the nearest valid one.
    """
    function, preset = _found(loss) if isinstance(loss, str) else (loss, {})
    settings = {**preset, **settings}
    _check_settings(function, settings)
    return functools.partial(function, **settings) if settings else function


def reads(loss: Loss) -> frozenset[str]:
    """What a loss reads beyond the arrays of its own prompt.

    Any of `OTHER_PROMPTS`, `WIDTH`, `SAMPLER_LOG_PROBS`, `OWN_SAMPLES` and `LOG_COLLISIONS`.

    Args:
      loss: from `get` or `combine`, also under `jax.jit`. A callable of the user's own says it by an attribute `reads`:
        a collection of these constants, or a function of its settings that gives one. Without it, nothing.

    Raises:
      ValueError: the attribute holds anything else.
    """
    layer: Any = loss
    settings: Settings = {}
    said = getattr(layer, "reads", None)
    while isinstance(layer, functools.partial) or hasattr(layer, "__wrapped__"):
        if isinstance(layer, functools.partial):
            layer, settings = layer.func, {**layer.keywords, **settings}
        else:
            layer = layer.__wrapped__
        said = getattr(layer, "reads", None) if said is None else said
    found = said({**_defaults(layer), **settings}) if callable(said) else said or ()
    for each in found:
        check_choice("reads", each, _READS)
    return frozenset(found)


def _found(name: str) -> tuple[Loss, Settings]:
    """The loss and the settings that a name stands for."""
    if ":" in name:
        return _imported(name), {}
    if name not in _REGISTRY:
        raise ValueError(f"loss: {unknown(name, names())}")
    return _REGISTRY[name]


def _imported(path: str) -> Loss:
    """The callable that "module:function" names."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"loss: {path!r} is not of the form 'module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module may be there and import another one that is not.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        remedy = "install it or add its folder to PYTHONPATH"
        raise ValueError(f"loss {path!r}: no module {error.name!r}; {remedy}") from None
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"loss {path!r}: the module {module_name!r} has no function {name!r}")
    return function


def _defaults(function: Loss) -> dict[str, Any]:
    """The settings of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _check_settings(function: Loss, settings: Settings) -> None:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    valid = _defaults(function)
    for name in settings:
        if name not in valid:
            raise ValueError(f"setting of {getattr(function, '__name__', 'the loss')}: {unknown(name, valid)}")
