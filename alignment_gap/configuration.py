"""Converts between the tree of frozen dataclasses and the plain dictionaries of ml_collections, gin and files."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from alignment_gap.checks import nearest
from alignment_gap.errors import UserError

Config = TypeVar("Config")
_ABSENT = object()


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a dataclass to nested dictionaries; tuples stay tuples."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def defaults(config: Any) -> dict[str, Any]:
    """The result of `to_dict` if every field with a default had its default; a group that was unset stays unset."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = _default(field, value)
        if dataclasses.is_dataclass(value):
            found[field.name] = defaults(value)
        else:
            found[field.name] = value if dataclasses.is_dataclass(default) else default
    return found


def differences(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of the dataclasses in it, that differ from their defaults.

    They distinguish a config from all others of its class. A field that a later version adds changes nothing until it
    is set.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field, _ABSENT)
        if dataclasses.is_dataclass(value):
            of_value = {} if type(value) is type(default) else {"type": type(value).__name__}
            of_value |= differences(value)
            if of_value:
                found[field.name] = of_value
        elif value != default:
            found[field.name] = value
    return found


def _default(field: Any, absent: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else absent


def from_dict(cls: type[Config], values: Mapping[str, Any], path: str = "config") -> Config:
    """Builds a dataclass, and the dataclasses in it, from nested dictionaries.

    If a field allows several dataclasses, its value is the one whose first field, the tag, has the given value; or else
    the one that has all the given fields.

    Raises:
      UserError: a key is unknown, or a value has another type or is refused by the dataclass. It names the key's path.
    """
    hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"unknown key {_below(path, key)}: {nearest(key, names)}")
    built = {name: _value(hints[name], value, _below(path, name)) for name, value in values.items()}
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(_below(path, str(error))) from error


def _below(path: str, name: str) -> str:
    """The path of a key; a command-line setting has "--" before it, and no group above it."""
    return f"{path}{name}" if path == "--" else f"{path}.{name}"


def _value(hint: Any, value: Any, path: str) -> Any:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    hints = [each for each in (typing.get_args(hint) if is_union else (hint,)) if each is not type(None)]
    if value is None and is_union and type(None) in typing.get_args(hint):
        return None
    if choices := [each for each in hints if dataclasses.is_dataclass(each)]:
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}: it must be a group of settings, given by their names")
        return from_dict(_choose(choices, value, path), value, path)
    if typing.get_origin(hints[0]) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{path} is {value!r}: it must be a tuple such as ({value!r},)")
        return tuple(_value(typing.get_args(hints[0])[0], item, path) for item in value)
    if float in hints and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = [each for each in hints if isinstance(each, type)]
    if plain and type(value) not in plain:
        raise UserError(f"{path} is {value!r}: it must be of type {' or '.join(each.__name__ for each in plain)}")
    return value


def _choose(choices: list[Any], value: Mapping[str, Any], path: str) -> Any:
    if len(choices) == 1:
        return choices[0]
    fields = {choice: dataclasses.fields(choice) for choice in choices}
    tags = {choice: (each[0].name, each[0].default) for choice, each in fields.items()}
    tagged = [choice for choice, (name, tag) in tags.items() if value.get(name, _ABSENT) == tag]
    fitting = [choice for choice, each in fields.items() if set(value) <= {field.name for field in each}]
    is_tag = len({name for name, _ in tags.values()}) == 1
    if is_tag and not tagged and tags[choices[0]][0] in value:
        fitting = []  # No choice has the given tag, so the other fields do not matter.
    found = [choice for choice in tagged if choice in fitting] or tagged or fitting
    if len(found) == 1:
        return found[0]
    name, given = next(((name, value[name]) for name, _ in tags.values() if name in value), (tags[choices[0]][0], None))
    valid = ", ".join(str(tag) for _, tag in tags.values())
    raise UserError(f"{path}.{name} is {given!r}: choose one of {valid}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts nested dictionaries to one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_named(name: str, what: str) -> Any:
    """The object with a name such as "my_package.judges:brevity"; raises UserError that names the missing part."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{what} {name!r}: cannot import {module} ({error}): check the name, or PYTHONPATH") from error
    except AttributeError:
        names = [each for each in vars(importlib.import_module(module)) if not each.startswith("_")]
        raise UserError(f"{what} {name!r}: {module} has no {attribute!r}: {nearest(attribute, names)}") from None
