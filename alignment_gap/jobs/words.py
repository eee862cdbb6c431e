"""Converts a job's settings to command-line words; settings with their default value are left out."""

from __future__ import annotations

import ast
import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def flag_words(config: Any, short: Mapping[str, str]) -> list[str]:
    """`--NAME=VALUE` for every setting that differs from its default; `flag_name` gives the name."""
    return [f"--{flag_name(path, short)}={_text(value)}" for path, value in _differing(config, type(config)(), "")]


def flag_name(path: str, short: Mapping[str, str]) -> str:
    """The flag of a setting: its dotted path, or a shorter name.

    Args:
      path: path of the setting, such as "source.location".
      short: shorter flags for some paths. A path that ends in a dot is a prefix, and its value replaces this prefix.
    """
    if path in short:
        return short[path]
    groups = [group for group in short if group.endswith(".") and path.startswith(group)]
    longest = max(groups, key=len, default="")
    return short.get(longest, "") + path.removeprefix(longest)


def gin_words(config: Any) -> list[str]:
    """`--gin.CLASS.FIELD=VALUE` for every setting that differs from its default.

    If a dataclass occurs more than once in the tree, the path of its field is its gin scope.
    """
    counts = collections.Counter(type(part).__name__ for part in _parts(config))
    return [f"--gin.{binding}" for binding in _bindings(config, "", counts)]


def is_notation(value: str) -> bool:
    """Whether gin would parse a text as a value; such a text needs quotes to stay a string.

    Gin parses references, macros, containers and Python literals.
    """
    if value.strip().startswith(("@", "%", "{", "[", "(", "'", '"')):
        return True
    try:
        ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return False
    return True


def _differing(config: Any, default: Any, path: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        usual = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            made: Any = type(value)
            usual = usual if type(usual) is made else made()
            yield from _differing(value, usual, f"{path}{field.name}.")
        elif value != usual:
            yield f"{path}{field.name}", value


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parts(config: Any) -> Iterator[Any]:
    """All dataclasses in a tree."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value)


def _bindings(config: Any, path: str, counts: Mapping[str, int]) -> Iterator[str]:
    default, name = type(config)(), _scoped(config, path, counts)
    for field in dataclasses.fields(config):
        value, below = getattr(config, field.name), f"{path}.{field.name}".strip(".")
        if value == getattr(default, field.name):
            continue
        if dataclasses.is_dataclass(value):
            yield f"{name}.{field.name}=@{_scoped(value, below, counts)}()"
            yield from _bindings(value, below, counts)
        else:
            plain = isinstance(value, str) and not is_notation(value)
            yield f"{name}.{field.name}={value if plain else repr(value)}"


def _scoped(config: Any, path: str, counts: Mapping[str, int]) -> str:
    name = type(config).__name__
    return f"{path.replace('.', '_')}/{name}" if counts[name] > 1 else name
