"""Finds which requirements of this package are installed, from its metadata; imports only the standard library."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator

DISTRIBUTION = "alignment-gap"
# The default folder for compiled functions, relative to the working folder.
COMPILATION_CACHE = ".cache/jax"
# A requirement in setuptools' format: name, extras, versions, and the extra that it belongs to.
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*([^;]*?)\s*(?:;.*?extra == ['\"]([\w-]+)['\"].*)?(?:;.*)?")


@dataclasses.dataclass(frozen=True)
class Package:
    """A required package.

    Attributes:
      name: name on the package index.
      needs: accepted versions, such as ">=0.10.2".
      version: the installed version, or None.
    """

    name: str
    needs: str
    version: str | None

    @property
    def fault(self) -> str:
        """The problem with it: "missing", "older than VERSION", or empty. Upper limits are left to pip."""
        if self.version is None:
            return "missing"
        least = re.search(r">=\s*([\d.]+)", self.needs)
        return f"older than {least[1]}" if least and _numbers(self.version) < _numbers(least[1]) else ""


def version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed(extra: str = "", by: str = DISTRIBUTION) -> list[Package]:
    """The packages that a distribution or one of its extras needs, including the extras of these packages.

    Args:
      extra: name of the extra; empty for packages that are always needed.
      by: the distribution; it must be installed.

    Raises:
      PackageNotFoundError: the distribution is not installed.
    """
    return [*_needed(extra, by)]


def _needed(extra: str, by: str) -> Iterator[Package]:
    for line in importlib.metadata.requires(by) or []:
        found = _REQUIREMENT.fullmatch(line)
        if found is None or (found[4] or "") != extra:
            continue
        package = Package(found[1], found[3], version(found[1]))
        yield package
        for inner in (found[2] or "").split(",") if package.version else []:
            yield from _needed(inner, package.name) if inner else ()


def _numbers(text: str) -> list[int]:
    """The release numbers of a version: [0, 10, 2] for "0.10.2rc1"."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return [*map(int, found[0].split("."))] if found else []
