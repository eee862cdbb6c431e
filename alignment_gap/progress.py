"""The progress bar of all that takes long."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int | None, title: str, unit: str = "it", *, silent: bool = False) -> tqdm:
    """A bar on standard error, with rate and time to go; without a terminal a line now and then is enough."""
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=title, unit=unit, mininterval=every, maxinterval=max(every, 10.0), disable=silent)
