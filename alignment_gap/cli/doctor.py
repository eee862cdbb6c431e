"""Show versions, devices, disk space, and what each command lacks. Changes nothing.

alignment-gap doctor

The exit status is 1 if a package that every command needs is missing or too old.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import alignment_gap
from alignment_gap.cli.packaged import FILES
from alignment_gap.errors import UserError
from alignment_gap.installation import COMPILATION_CACHE, DISTRIBUTION, Package, needed, version
from alignment_gap.study.versions import COMMIT, git_commit

# Commands that need more than the core packages: for what, and the extra to install.
EXTRAS = (
    ("study", "all of it", "study"),
    ("report", "all of it", "study"),
    ("train", "on TPUs", "tpu"),
    ("train", "on NVIDIA GPUs", "cuda"),
    ("train", "files for TensorBoard", "tensorboard"),
    ("evaluate", "figure.png", "study"),
    ("data prepare", "lengths.png", "study"),
    ("data prepare", "from Parquet and Hugging Face", "huggingface"),
    ("data prepare", "from TFDS and seqio", "data"),
    ("plan", "for TPUs", "tpu"),
    ("plan", "for NVIDIA GPUs", "plan-gpus"),
    ("checkpoint", "Hugging Face's format", "huggingface"),
)
# Engines of `launch`, and the program that each engine calls.
ENGINES = {"slurm": "sbatch", "jobset": "kubectl", "queued": "gcloud"}
# Devices are opened in another process, because a driver may hang or end its process.
DEVICES = """
import json, jax
from alignment_gap.sharding.chips import device_lines
print(json.dumps([jax.default_backend(), device_lines(jax.local_devices())]))
"""
LONGEST = 60
GIB = 2.0**30


def main(arguments: list[str]) -> None:
    """Prints its findings; raises SystemExit(1) if a package that every command needs is missing or too old."""
    if arguments[1:]:
        from alignment_gap.cli.flags import parse  # Needs absl, which may be missing.

        if parse(arguments, lambda values: None, __doc__) is None:
            return
    if version(DISTRIBUTION) is None:
        raise UserError(f"{DISTRIBUTION} is not installed, so its requirements are not known: pip install it")
    core, extras = needed(), {extra: needed(extra) for _, _, extra in EXTRAS}
    for title, rows in (
        ("software", _software()),
        ("packages", _packages(core, extras)),
        ("devices", _devices()),
        ("this folder", _folder()),
        ("commands", _commands(core, extras)),
    ):
        print(title, *(f"  {name:20}{text}" for name, text in rows), "", sep="\n", flush=True)
    if any(package.fault for package in core):
        sys.exit(1)


def _software() -> Iterator[tuple[str, str]]:
    yield DISTRIBUTION, f"{alignment_gap.__version__}, in {Path(alignment_gap.__file__).parent}"
    if commit := git_commit(Path(alignment_gap.__file__)):
        yield COMMIT, commit
    yield "gin/ and configs/", f"in {FILES}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.platform()}, {os.cpu_count()} CPU cores"


def _packages(core: Sequence[Package], extras: Mapping[str, Sequence[Package]]) -> Iterator[tuple[str, str]]:
    """The packages that every command needs, then the installed packages of the extras."""
    for package in core:
        fault = f"{package.fault}: {_install([package])}" if package.fault else ""
        yield package.name, f"{package.version or ''} {fault}".strip()
    names = {package.name for package in core}
    more = {each.name: each.version for packages in extras.values() for each in packages if each.version}
    yield from sorted((name, found) for name, found in more.items() if name not in names)


def _devices() -> Iterator[tuple[str, str]]:
    try:
        done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        yield "backend", f"jax opened no device in {LONGEST} s: another process may hold them"
        return
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        yield "backend", f"cannot be opened: {reason}"
        return
    backend, lines = json.loads(done.stdout.splitlines()[-1])
    yield "backend", backend
    for line in lines:
        yield "", line


def _folder() -> Iterator[tuple[str, str]]:
    disk = shutil.disk_usage(".")
    writable = "" if os.access(".", os.W_OK) else "; not writable"
    yield "free disk", f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB{writable}"
    cache = Path(COMPILATION_CACHE)
    held = [file.stat().st_size for file in cache.glob("*")] if cache.is_dir() else []
    yield "compilation cache", f"{cache}, {len(held)} files, {sum(held) / GIB:.2f} GiB" if held else f"{cache}, empty"


def _commands(core: Sequence[Package], extras: Mapping[str, Sequence[Package]]) -> Iterator[tuple[str, str]]:
    broken = [package for package in core if package.fault]
    yield "every command", f"{_lacking(broken)}: {_install(broken)}" if broken else "ready"
    for command, use, extra in EXTRAS:
        faulty = [package for package in extras.get(extra, ()) if package.fault]
        state = f'{_lacking(faulty)}: pip install "{DISTRIBUTION}[{extra}]"' if faulty else "ready"
        yield command, f"{use}: {state}"
    for engine, program in ENGINES.items():
        yield "launch", f"--engine={engine}: {'ready' if shutil.which(program) else f'this machine has no {program}'}"


def _lacking(packages: Sequence[Package]) -> str:
    return "lacks " + ", ".join(each.name if each.version is None else f"{each.name}{each.needs}" for each in packages)


def _install(packages: Sequence[Package]) -> str:
    return "pip install " + " ".join(f'"{package.name}{package.needs}"' for package in packages)
