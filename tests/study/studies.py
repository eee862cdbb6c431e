"""Functions for tests of whole studies: run them without output, read results, compare folders byte by byte."""

import base64
import contextlib
import csv
import json
import os
import shutil
import zlib

from job_runs import assert_equal_checkpoints, metrics, steps

from alignment_gap.folders import JOB
from alignment_gap.jobs.folder import DONE
from alignment_gap.jobs.train import TRAIN
from alignment_gap.study.run import open_studies, run_study

# The cache of compiled functions; commands choose their own, so they need this flag.
CACHE = f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"


def quiet(line):
    del line


def run(config, folder, **settings):
    """Runs a study; returns it and the lines that it printed."""
    (study,), lines = open_studies(config, folder), []
    run_study(study, say=lines.append, **settings)
    return study, lines


def copied(study, folder):
    """A copy of a study's folder with its finished jobs, for another study that shares them."""
    shutil.copytree(study.workdir, folder)
    return folder


def newly_run(lines):
    """The jobs that a study had to run. Its lines name the other ones."""
    done = {line.split("] ")[1].removesuffix(": finished before") for line in lines if line.endswith("finished before")}
    return lambda graph: [job.name.removeprefix("seed0-") for job in graph.jobs if job.name not in done]


def rows(study):
    """The rows of results.csv."""
    with (study.workdir / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def unpacked(specs):
    """The specifications of a page's figures, by name."""
    return json.loads(zlib.decompress(base64.b64decode(specs)))


def snapshot(folder):
    """The time of the last write of each file, except files that record who works on a job."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", JOB))
    return {path: path.stat().st_mtime_ns for path in files}


def contents(folder, root):
    """The bytes of a job's files, without the path of the study.

    Logs and checkpoints are left out; they are compared apart. Files of lengths are left out, because any reader of a
    dataset may write them.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_apart = path.name in (".lock", DONE, "metrics.jsonl") or "checkpoints/" in name
        if path.is_file() and not is_apart and not path.name.startswith("lengths-"):
            files[name] = path.read_bytes().replace(str(root).encode(), b"ROOT")
    return files


def assert_equal_jobs(ours, theirs):
    """Equal settings, datasets and results; of a training run also equal arrays in the same checkpoints."""
    roots = ours.folder.parent, theirs.folder.parent
    first, second = (contents(job.folder, root) for job, root in zip((ours, theirs), roots, strict=True))
    assert first.keys() == second.keys(), ours.name
    for name, content in first.items():
        assert content == second[name], f"{ours.name}: {name}"
    done = [
        (job.folder / DONE).read_text().replace(str(root), "ROOT")
        for job, root in zip((ours, theirs), roots, strict=True)
    ]
    assert json.loads(done[0])["settings"] == json.loads(done[1])["settings"]
    if ours.kind is TRAIN:
        assert steps(ours.folder) == steps(theirs.folder)
        assert metrics(ours.folder) == metrics(theirs.folder)
        for step in steps(ours.folder):
            assert_equal_checkpoints(ours.folder, theirs.folder, step)
    else:
        assert len(first) > 2 and JOB in first


@contextlib.contextmanager
def unwritten(folder):
    """Asserts that no file of the folder is written within the block."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before
