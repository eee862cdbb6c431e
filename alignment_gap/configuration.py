"""Between the tree of frozen dataclasses and the plain dictionaries that ml_collections, gin and files hold."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from alignment_gap.errors import UserError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries; tuples stay tuples."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def from_dict(cls: type[Config], values: Mapping[str, Any], path: str = "config") -> Config:
    """Builds a dataclass, and those in it, from nested dictionaries.

    A field that allows several dataclasses takes the one whose first field, its tag, has the value that is given.

    Raises:
      UserError: for an unknown key or a value of another type, with the key's path and the nearest valid one.
    """
    hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(names)}"
            raise UserError(f"unknown key {path}.{key}: {remedy}")
    return cls(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if value is None and type(None) in typing.get_args(hint):
        return None
    choices = [choice for choice in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(choice)]
    if choices:
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}: it must be a group of settings, given by their names")
        return from_dict(_choose(choices, value, path), value, path)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{path} is {value!r}: it must be a tuple such as (1, 2)")
        return tuple(_value(typing.get_args(hint)[0], item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is not hint:
        raise UserError(f"{path} is {value!r}: it must be of type {hint.__name__}")
    return value


def _choose(choices: list[Any], value: Mapping[str, Any], path: str) -> Any:
    tags = [dataclasses.fields(choice)[0] for choice in choices]
    if len(choices) == 1:
        return choices[0]
    for choice, tag in zip(choices, tags, strict=True):
        if value.get(tag.name) == tag.default:
            return choice
    valid = ", ".join(str(tag.default) for tag in tags)
    raise UserError(f"{path}.{tags[0].name} is {value.get(tags[0].name)!r}: choose one of {valid}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
