"""Losses by name, and what they read beyond the arrays of their own prompt."""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from alignment_gap.losses._checks import check_choice, unknown

Loss = Callable[..., Any]
Settings = Mapping[str, Any]
Reads = Collection[str] | Callable[[Settings], Collection[str]]
_L = TypeVar("_L", bound=Loss)

# The loss of one prompt depends on the other prompts of the batch.
OTHER_PROMPTS = "other prompts"
# The loss divides by the padded width of a row.
WIDTH = "width"
# On samples of another policy, the loss is correct only with the log-probs under that policy.
SAMPLER_LOG_PROBS = "sampler log-probs"
# The loss is correct only on samples of the current policy.
OWN_SAMPLES = "own samples"
# The loss needs log sum_v pi(v)^2 at every token.
LOG_COLLISIONS = "log collisions"
# The loss reads scores as probabilities, not as rewards.
PROBABILITIES = "probabilities"
_READS = (OTHER_PROMPTS, WIDTH, SAMPLER_LOG_PROBS, OWN_SAMPLES, LOG_COLLISIONS, PROBABILITIES)

# The names that `get` accepts; each maps to its loss and its preset settings.
_REGISTRY: dict[str, tuple[Loss, Settings]] = {}


def register(*, aliases: Mapping[str, Settings] | None = None, reads: Reads = ()) -> Callable[[_L], _L]:
    """Registers a loss under its name.

    Args:
      aliases: other names of the loss, each with its preset settings.
      reads: the constants that `losses.reads` returns for this loss. Or a function that takes all settings of the loss,
        defaults included, and returns the constants.

    Returns:
      A decorator that returns the loss unchanged.

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
    """The sorted names of this library's losses, including aliases; `get` also takes "module:function"."""
    return tuple(sorted(_REGISTRY))


def aliases() -> dict[str, tuple[str, Settings]]:
    """Maps each alias, a loss's name in another library, to the loss's name here and the preset settings."""
    return {name: (loss.__name__, preset) for name, (loss, preset) in _REGISTRY.items() if name != loss.__name__}


def get(loss: str | Loss, **settings: Any) -> Loss:
    """A configured loss: a callable whose signature names its arrays.

    `get("ipo", beta=0.1)` is `ipo` with that setting. `get("my_package.module:function")` is a loss of your own.
    `inspect.signature` gives the parameters: positional-or-keyword parameters are arrays, optional if they have a
    default; keyword-only parameters are settings.

    Args:
      loss: one of `names()`, "module:function", or any callable of your own.
      **settings: keyword-only parameters of the loss.

    Returns:
      The loss with its settings bound.

    Raises:
      ValueError: there is no such loss, the loss has no such setting, or a setting has no such choice. The message
        gives the nearest valid name.
    """
    function, preset = _found(loss)
    settings = {**preset, **settings}
    _check_settings(function, settings)
    return functools.partial(function, **settings) if settings else function


def arrays(loss: str | Loss) -> dict[str, bool]:
    """The names of a loss's arrays, and whether each is required: its positional-or-keyword parameters.

    Raises:
      ValueError: there is no such loss.
    """
    parameters = inspect.signature(_callable(loss)).parameters.values()
    return {each.name: each.default is each.empty for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}


def reads(loss: str | Loss) -> frozenset[str]:
    """What a loss reads beyond the arrays of its own prompt.

    The result holds any of `OTHER_PROMPTS`, `WIDTH`, `SAMPLER_LOG_PROBS`, `OWN_SAMPLES`, `LOG_COLLISIONS` and
    `PROBABILITIES`.

    Args:
      loss: a name, or a loss from `get` or `combine`, also wrapped in `jax.jit`. A callable of your own declares it in
        an attribute `reads`: a collection of these constants, or a function that takes its settings and returns such a
        collection. Without the attribute, the result is empty.

    Raises:
      ValueError: there is no such loss, or the attribute holds something else.
    """
    layer: Any = _callable(loss)
    settings: Settings = {}
    said = getattr(layer, "reads", None)
    while isinstance(layer, functools.partial) or hasattr(layer, "__wrapped__"):
        if isinstance(layer, functools.partial):
            layer, settings = layer.func, {**layer.keywords, **settings}
        else:
            layer = layer.__wrapped__
        said = getattr(layer, "reads", None) if said is None else said
    found = said({**_defaults(layer), **settings}) if callable(said) else said or ()
    if isinstance(found, str):
        raise ValueError(f"reads is {found!r}: give a collection, such as ({found!r},)")
    for each in found:
        check_choice("reads", each, _READS)
    return frozenset(found)


def _callable(loss: str | Loss) -> Loss:
    """The loss that a name stands for; a callable as it is. Raises ValueError for anything else."""
    return get(loss) if isinstance(loss, str) else _found(loss)[0]


def _found(loss: str | Loss) -> tuple[Loss, Settings]:
    """The loss and the settings that a name stands for; a callable as it is. Raises ValueError for anything else."""
    if not isinstance(loss, str):
        if not callable(loss):
            raise ValueError(f"loss is {loss!r}: give a name, module:function, or a callable")
        return loss, {}
    if ":" in loss:
        return _imported(loss), {}
    if loss not in _REGISTRY:
        raise ValueError(f"loss: {unknown(loss, names())}")
    return _REGISTRY[loss]


def _imported(path: str) -> Loss:
    """The callable that "module:function" names."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"loss: {path!r} is not of the form 'module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module itself may exist, and fail because it imports a missing one.
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
            known = unknown(name, valid) if valid else f"unknown {name!r}; it has no settings"
            raise ValueError(f"setting of {getattr(function, '__name__', 'the loss')}: {known}")
    for name, choices in _choices(function).items():
        if isinstance(value := settings.get(name), str):
            check_choice(name, value, choices)


def _choices(function: Loss) -> dict[str, list[str]]:
    """The choices of the settings of one of this library's losses that take only some texts, from their type hints."""
    if not any(function is loss for loss, _ in _REGISTRY.values()):
        return {}  # The hints of a callable of the user's own may name what only a type checker imports.
    found = {}
    for name, hint in typing.get_type_hints(function).items():
        options = [each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is typing.Literal]
        if options:
            found[name] = [choice for option in options for choice in typing.get_args(option)]
    return found
