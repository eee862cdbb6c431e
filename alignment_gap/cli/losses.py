"""`alignment-gap losses`: every loss by name, with its settings."""

from __future__ import annotations

import inspect

from alignment_gap import losses


def main(arguments: list[str]) -> None:
    """Prints a line for each name in the registry."""
    del arguments
    for name in losses.names():
        loss = losses.get(name)
        settings = [str(p) for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
        print(f"{name:24}{', '.join(settings)}")
