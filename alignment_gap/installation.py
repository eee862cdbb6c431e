"""What is installed of what this package needs, by its own metadata; imports the standard library alone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator

DISTRIBUTION = "alignment-gap"
# The default folder of compiled functions, in the working folder.
COMPILATION_CACHE = ".cache/jax"
# A requirement as setuptools writes it: name, extras, versions, and the extra that it belongs to.
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*([^;]*?)\s*(?:;.*?extra == ['\"]([\w-]+)['\"].*)?(?:;.*)?")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that is needed.

    Attributes:
      name: on the package index.
      needs: the versions that will do, such as ">=0.10.2".
      version: the one that is installed, or None.
    """

    name: str
    needs: str
    version: str | None

    @property
    def fault(self) -> str:
        """Why it will not do: "missing", or "older than VERSION"; else empty. Upper limits are pip's to keep."""
        if self.version is None:
            return "missing"
        least = re.search(r">=\s*([\d.]+)", self.needs)
        return f"older than {least[1]}" if least and _numbers(self.version) < _numbers(least[1]) else ""


def version(name: str) -> str | None:
    """The version of a distribution that is installed, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed(extra: str = "", by: str = DISTRIBUTION) -> list[Package]:
    """The packages that a distribution needs, or those that an extra of it adds, with what their own extras add.

    Args:
      extra: its name; empty for what is always needed.
      by: the distribution, which is installed.

    Raises:
      PackageNotFoundError: it is not.
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
    """The release of a version: of "0.10.2rc1" 0, 10, 2."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return [*map(int, found[0].split("."))] if found else []
