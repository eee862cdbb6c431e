"""The git commit in a report is that of the package's own checkout, never that of another one."""

import subprocess

import pytest

from alignment_gap.study.versions import COMMIT, git_commit, versions


def git(folder, *words):
    settings = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", folder, *settings, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one committed file."""
    git(tmp_path, "init")
    (tmp_path / "package.py").write_text("x = 1\n")
    git(tmp_path, "add", "package.py")
    git(tmp_path, "commit", "-m", "a package")
    return tmp_path


def test_the_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert len(head) == 40 and git_commit(checkout / "package.py") == head
    (checkout / "untracked.txt").write_text("notes")
    assert git_commit(checkout / "package.py") == head


def test_changes_are_told(checkout):
    (checkout / "package.py").write_text("x = 2\n")
    head = git(checkout, "rev-parse", "HEAD")
    assert git_commit(checkout / "package.py") == f"{head}, with changes that are not committed"


def test_an_installation_inside_of_another_checkout_has_none(checkout):
    installed = checkout / "site-packages"
    installed.mkdir()
    (installed / "package.py").write_text("x = 1\n")
    assert git_commit(installed / "package.py") == ""


def test_outside_of_a_checkout_or_without_git_there_is_none(checkout, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "package.py").write_text("x = 1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(elsewhere.parent))
    assert git_commit(elsewhere / "package.py") == ""
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout / "package.py") == ""


def test_the_versions_of_a_report(monkeypatch):
    monkeypatch.setattr("alignment_gap.study.versions.git_commit", lambda file: "")
    assert {"alignment-gap", "jax", "python"} <= versions().keys() and COMMIT not in versions()
    monkeypatch.setattr("alignment_gap.study.versions.git_commit", lambda file: f"of {file.name}")
    assert versions()[COMMIT] == "of __init__.py"
