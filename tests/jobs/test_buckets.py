"""Jobs with inputs and folders in a bucket write the same bytes as on a disk, despite cuts, kills and other writers."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from bucket_servers import Fault
from built_in import write_posts
from job_runs import Bar, arrays, assert_equal_runs, run_and_stop, run_job

from alignment_gap import storage
from alignment_gap.cli.main import guarded
from alignment_gap.data.records import open_dataset, verify_dataset
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import PostsConfig, TextSourceConfig
from alignment_gap.errors import StorageError, UserError
from alignment_gap.folders import locked
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import DONE, FAILED, finished_with, make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.train import TRAIN
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import Checkpoints, KeepConfig, TrainState

POSTS = PrepareConfig(TextSourceConfig(location="posts", posts=PostsConfig(pairs=64, validation_pairs=16)), workers=1)


@pytest.fixture
def s3_pairs(s3_folder):
    """The dataset of `pairs` in a bucket."""
    write_posts(s3_folder / "pairs", 48)
    return s3_folder / "pairs"


def files(folder):
    """The bytes of a folder's files, by name."""
    paths = folder.files() if isinstance(folder, storage.Url) else [p for p in folder.rglob("*") if p.is_file()]
    return {str(path)[len(str(folder)) + 1 :]: path.read_bytes() for path in paths}


def test_a_dataset_is_the_same_in_a_bucket(bucket, pairs):
    folder, proxy = bucket
    write_posts(folder / "pairs", 48)
    assert files(folder / "pairs") == {
        name: content for name, content in files(pairs).items() if "lengths-" not in name
    }
    dataset = open_dataset(str(folder / "pairs"))
    verify_dataset(dataset)
    assert str(dataset.folder) == str(folder / "pairs") and dataset.card == open_dataset(pairs).card
    np.testing.assert_array_equal(dataset[40].prompt, open_dataset(pairs)[40].prompt)
    proxy.requests = []
    open_dataset(folder / "pairs")
    assert not [path for _, path in proxy.requests if "array_record" in path]  # The file is in the cache.


def test_a_dataset_that_a_cut_left_half_way_is_none(s3_folder, s3):
    s3.faults = [Fault("cut upload", part="card.json", times=100)]
    with pytest.raises(StorageError, match=r"card\.json: the store does not answer"):
        write_posts(s3_folder / "pairs", 48)
    with pytest.raises(UserError, match=r"pairs is not a finished dataset \(card.json: No such file"):
        open_dataset(s3_folder / "pairs")
    s3.faults = []
    write_posts(s3_folder / "pairs", 48)
    assert len(open_dataset(s3_folder / "pairs")) == 48


@pytest.mark.slow
def test_preparing_into_a_bucket_gives_the_same_files(s3_folder, s3, tmp_path):
    make(PREPARE, POSTS, tmp_path / "here", Bar())
    s3.faults = [Fault("cut upload", part="train/part", times=100)]
    with pytest.raises(StorageError, match="the store does not answer"):
        make(PREPARE, POSTS, s3_folder / "there", Bar())
    assert json.loads((s3_folder / "there" / FAILED).read_text())["line"].startswith(f"{s3_folder}/there/train/part")
    assert finished_with(s3_folder / "there") is None
    s3.faults = []
    assert make(PREPARE, POSTS, s3_folder / "there", Bar())
    ours, theirs = files(tmp_path / "here"), files(s3_folder / "there")
    del ours[".lock"], ours[DONE], theirs[DONE]
    assert ours == theirs and len(open_dataset(s3_folder / "there" / "train")) > 0
    assert not make(PREPARE, POSTS, s3_folder / "there", Bar())
    assert "train" in PREPARE.summary(s3_folder / "there")
    (s3_folder / "there" / "preview.txt").unlink()
    (part,) = (s3_folder / "there" / "validation").glob("*.array_record")
    part.write_bytes(b"damaged")
    make(PREPARE, POSTS, s3_folder / "there", Bar())
    assert files(s3_folder / "there")[f"validation/{part.name}"] == ours[f"validation/{part.name}"]


def test_a_composed_dataset_goes_on_from_its_parts(s3_pairs, s3_folder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("alignment_gap.data.records.dataset._PART", 16)
    make(COMPOSE, ComposeConfig((str(pairs),)), tmp_path / "here", Bar())
    config = ComposeConfig((str(s3_pairs),))
    run_bar = Bar(stop_at=16)
    with pytest.raises(KeyboardInterrupt):
        make(COMPOSE, config, s3_folder / "there", run_bar)
    assert len([*(s3_folder / "there").glob("*.array_record")]) == 2
    assert make(COMPOSE, config, s3_folder / "there", Bar())
    name = "part-00002.array_record"
    assert (s3_folder / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    provenance = open_dataset(s3_folder / "there").card.provenance
    assert provenance["inputs"][0]["folder"] == str(s3_pairs)


@pytest.fixture
def s3_config(sft_config, s3_pairs):
    return dataclasses.replace(sft_config, source=DatasetConfig(str(s3_pairs), batch_size=8))


@pytest.mark.slow
def test_a_run_over_devices_goes_on_on_another_machine(s3_config, s3_folder, sft_config, tmp_path, monkeypatch):
    """The devices share the parameters. The cache of the other machine is empty."""
    mesh = MeshConfig(data=2, fsdp=4)
    here = run_job(dataclasses.replace(sft_config, mesh=mesh), tmp_path / "run")
    config = dataclasses.replace(s3_config, mesh=mesh)
    run_and_stop(config, s3_folder / "run", after=3)
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path / "other"))
    run_job(config, s3_folder / "run")
    assert_equal_runs(s3_folder / "run", here)
    (name, shape) = max(((n, v.shape) for n, v in arrays(here).items() if n.startswith("params")), key=lambda x: x[1])
    stored = s3_folder / "run" / "checkpoints" / "6" / "params" / name.removeprefix("params.")
    assert shape and len(stored.files()) > 2  # There is a chunk for the part of each device.


@pytest.mark.slow
def test_a_run_is_that_of_a_disk(s3_config, s3_folder, sft):
    run_job(s3_config, s3_folder / "run")
    assert_equal_runs(s3_folder / "run", sft)
    ours = json.loads((s3_folder / "run" / "job.json").read_text())
    theirs = json.loads((sft / "job.json").read_text())
    assert {name for name in ours if ours[name] != theirs[name]} == {"source.folder"}
    assert not make(TRAIN, s3_config, s3_folder / "run", Bar())
    assert not (s3_folder / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_cut_checkpoint_is_none(s3_config, s3_folder, s3, sft):
    s3.faults = [Fault("cut upload", part="checkpoints/4/optimizer", times=1000)]
    with pytest.raises(StorageError, match="the store does not answer: run the same command again"):
        run_job(s3_config, s3_folder / "run")
    with Checkpoints(s3_folder / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]
    s3.faults = [Fault("503", "PUT", "checkpoints/4", times=3), Fault("cut answer", "PUT", "_CHECKPOINT_METADATA")]
    run_job(s3_config, s3_folder / "run")
    assert_equal_runs(s3_folder / "run", sft)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_put_aside(s3_config, s3_folder, sft):
    run_and_stop(s3_config, s3_folder / "run", after=5)
    (chunk, *_) = [p for p in (s3_folder / "run/checkpoints/4/params").files() if p.name != ".zarray"]
    chunk.write_bytes(chunk.read_bytes()[:-3])
    bar = Bar()
    run_job(s3_config, s3_folder / "run", bar)
    assert any("put aside as _CHECKPOINT_METADATA.damaged, and training goes on from step 2" in li for li in bar.lines)
    assert_equal_runs(s3_folder / "run", sft)


@pytest.mark.slow
def test_retention_in_a_bucket(s3_config, s3_folder, sft):
    config = dataclasses.replace(s3_config, checkpoint_every=1, keep=KeepConfig(last=1, every=3))
    run_job(config, s3_folder / "run")
    with Checkpoints(s3_folder / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3, 6]
    assert {path.name for path in (s3_folder / "run" / "checkpoints").iterdir()} == {"3", "6"}
    np.testing.assert_array_equal(
        *(arrays(run, 6)["optimizer.step"] for run in (s3_folder / "run", sft)),
    )


def test_the_best_in_a_bucket_are_known_to_a_run_that_goes_on(s3_folder):
    """Step 2 has the lowest loss. One process saved it, another one continues the run."""
    keep, losses = KeepConfig(last=1, best=1), {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    for steps in ((1, 2), (3, 4)):
        with Checkpoints(s3_folder / "checkpoints", keep=keep) as checkpoints:
            for step in steps:
                state = TrainState(jnp.int32(step), {"w": jnp.full(3, step)}, {"m": jnp.zeros(3)})
                checkpoints.save(state, metrics={"loss": losses[step]})
    with Checkpoints(s3_folder / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4]
    assert {path.name for path in (s3_folder / "checkpoints").iterdir()} == {"2", "4"}


def test_a_second_writer_is_refused_in_one_line(s3_config, s3_folder, capsys):
    with locked(s3_folder / "run"):
        assert guarded(lambda: make(TRAIN, s3_config, s3_folder / "run", Bar())) == 1
    line = f"error: {s3_folder}/run is in use by another run: wait for it, or give another folder\n"
    assert capsys.readouterr().err == line


def test_a_store_that_does_not_answer_is_one_line_and_tried_again(s3_config, s3_folder, s3, capsys):
    s3.faults = [Fault("503", "GET", times=1000)]
    assert guarded(lambda: make(TRAIN, s3_config, s3_folder / "run", Bar())) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {s3_folder}/pairs/card.json: the store does not answer") and told.count("\n") == 1


@pytest.mark.slow
def test_starts_judges_and_evaluations_read_from_a_bucket(s3_config, s3_pairs, s3_folder, sft, sft_config, tmp_path):
    make(TRAIN, s3_config, s3_folder / "sft", Bar())
    results = []
    for root, start, pairs in (
        (tmp_path, sft, sft_config.source.folder),
        (s3_folder, s3_folder / "sft", str(s3_pairs)),
    ):
        source = DatasetConfig(pairs, batch_size=8)
        judge = dataclasses.replace(sft_config, kind="pairwise", model=None, start=str(start), steps=2, source=source)
        run_job(judge, root / "judge")
        config = EvaluateConfig(
            str(start),
            (6,),
            pairs,
            judges=(f"own={root / 'judge'}",),
            opponents=(f"start={start}",),
            reference=str(start),
            prompts=8,
            kl_prompts=4,
            pairs=8,
            response_length=4,
            batch_size=8,
        )
        make(EVALUATE, config, root / "evaluation", Bar())
        results.append((root / "evaluation" / "results.csv").read_text().replace(str(start), "RUN"))
        assert "own.start" in EVALUATE.summary(root / "evaluation")
    assert results[0] == results[1]
