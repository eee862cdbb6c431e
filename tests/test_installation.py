"""Requirements from metadata: names, versions, nested extras, and requirements that are not met."""

import importlib.metadata

import pytest

from alignment_gap import installation
from alignment_gap.installation import Package, needed

# The forms in which setuptools and others write them.
REQUIRES = {
    "app": [
        "plain>=1.2",
        "old>=2.10.1",
        'fast[gpu,io]>=3 ; extra == "gpu"',
        'absent[gpu]>=1; extra == "gpu"',
        "quoted==1.*; python_version >= '3.11' and extra == 'other'",
    ],
    "fast": ["core", 'driver<=4,>=4; sys_platform == "linux" and extra == "gpu"', 'files; extra == "io"'],
}
VERSIONS = {"app": "1.0", "plain": "1.2.0", "old": "2.9.7", "fast": "3.1rc1", "driver": "4"}


@pytest.fixture(autouse=True)
def distributions(monkeypatch):
    def version(name):
        if name not in VERSIONS:
            raise importlib.metadata.PackageNotFoundError(name)
        return VERSIONS[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", REQUIRES.get)


def test_what_is_always_needed_is_without_extras():
    assert needed(by="app") == [Package("plain", ">=1.2", "1.2.0"), Package("old", ">=2.10.1", "2.9.7")]


def test_an_extra_brings_those_of_its_packages_that_are_there():
    assert [(each.name, each.version) for each in needed("gpu", "app")] == [
        ("fast", "3.1rc1"),
        ("driver", "4"),
        ("files", None),
        ("absent", None),
    ]
    assert [(each.name, each.needs) for each in needed("other", "app")] == [("quoted", "==1.*")]


@pytest.mark.parametrize(
    ("needs", "version", "fault"),
    [
        (">=2.10.1", "2.9.7", "older than 2.10.1"),
        (">=2.10.1", "2.10.1", ""),
        (">=2", "2.0.0", ""),
        ("<=4,>=4", "3.9", "older than 4"),
        ("", "0.1", ""),
        ("", None, "missing"),
    ],
)
def test_what_will_not_do(needs, version, fault):
    assert Package("name", needs, version).fault == fault


def test_what_this_package_needs_is_in_its_own_metadata(monkeypatch):
    monkeypatch.undo()
    assert {"jax", "flax", "absl-py"} <= {package.name for package in installation.needed()}
    assert {"altair", "jinja2"} <= {package.name for package in installation.needed("study")}
