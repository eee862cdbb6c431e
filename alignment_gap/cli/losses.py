"""List all losses with their settings and their further needs, and all aliases.

alignment-gap losses
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from alignment_gap import losses
from alignment_gap.cli.flags import parse
from alignment_gap.tables import text_table


def main(arguments: list[str]) -> None:
    """Prints a table of the losses, and one of the aliases."""
    if parse(arguments, lambda values: None, __doc__) is None:
        return
    aliases = losses.aliases()
    names = [name for name in losses.names() if name not in aliases]
    print(text_table(("loss", "settings", "reads beyond its arrays"), [_row(name) for name in names]))
    print()
    print(text_table(("alias", "stands for"), [(name, _call(*aliases[name])) for name in sorted(aliases)]))


def _row(name: str) -> tuple[str, str, str]:
    loss = losses.get(name)
    parameters = inspect.signature(loss).parameters.values()
    settings = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    return name, _shown(settings), ", ".join(sorted(losses.reads(loss)))


def _call(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name}, {_shown(settings)}" if settings else name


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
