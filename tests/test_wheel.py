"""The contents of a built wheel; it finds its own gin files and configs."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a source distribution as installers do it: files that only a clone has are missing."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    clone, unpacked = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("unpacked")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("alignment_gap", "gin", "configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(clone, "import setuptools.build_meta as build; build.build_sdist('.')")
    shutil.unpack_archive(*clone.glob("*.tar.gz"), unpacked, filter="data")
    (source,) = unpacked.iterdir()
    run(source, "import setuptools.build_meta as build; build.build_wheel('.')")
    (found,) = source.glob("*.whl")
    return found


def run(folder, program, **environment):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def files(folder, *suffixes):
    return {path for path in folder.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts}


def test_it_has_the_package_the_gin_files_and_the_configs_and_nothing_else(wheel):
    package = {str(path.relative_to(ROOT)) for path in files(ROOT / "alignment_gap", ".py", ".typed", ".jinja")}
    beside = {
        f"alignment_gap/_files/{path.relative_to(ROOT)}"
        for path in files(ROOT / "gin", ".gin") | files(ROOT / "configs", ".py")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == package | beside
    assert {"alignment_gap/py.typed", "alignment_gap/study/page.html.jinja"} <= held


def test_commands_read_its_own_files(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = """
from alignment_gap.cli import gin_files, study

print(gin_files.read_config(["gin/runs/online_ipo.gin"], ["PROMPTS=p", "START=s", "JUDGE=rubric"]).loss.name)
_, settings = study.read(["", "--config=configs/study/paper.py"], lambda values: None, "")
print(settings["name"])
"""
    done = run(elsewhere, program, PYTHONPATH=str(installed))
    assert done.stdout == "ipo\npaper\n"
    files = installed / "alignment_gap" / "_files"
    assert done.stderr.splitlines() == [
        f"--{flag}={file} is not in this folder: taken from {files / file}"
        for flag, file in (("gin_file", "gin/runs/online_ipo.gin"), ("config", "configs/study/paper.py"))
    ]
