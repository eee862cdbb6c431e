"""Reference log-probs, computed once and stored, train like those of each step; anything else is refused."""

import dataclasses
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built_in import write_posts
from job_runs import MODEL, Bar, assert_equal_runs, run_job
from random_examples import make_random_examples
from tiny_models import EVEN_CONFIGS, MESHES, random_params, texts

from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.cli.main import main
from alignment_gap.data.batches import collate
from alignment_gap.data.records import lengths_of, open_dataset, write_dataset
from alignment_gap.data.records import log_probs as storage
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.reading import open_reading
from alignment_gap.jobs.reference import REFERENCE, ReferenceConfig, reference_identity, store_reference
from alignment_gap.jobs.sources import Parameters
from alignment_gap.models import make_policy, score
from alignment_gap.sharding import make_mesh, shardings_of
from alignment_gap.training import OptimizerConfig, load_policy


@pytest.fixture(scope="module")
def policy():
    return make_policy(dataclasses.replace(EVEN_CONFIGS["t5"], vocabulary_size=100))


@pytest.fixture(scope="module")
def params(policy):
    return random_params(policy)


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path, make_random_examples(20), vocabulary_digest="", provenance={})
    return open_dataset(tmp_path)


SHAPES = ((6, 5), (9, 5))


def store(dataset, policy, params, mesh, **changes):
    return store_reference(
        dataset, policy, Parameters(lambda: params), mesh, **{"batch_size": 8, "buckets": SHAPES} | changes
    )


def test_stored_log_probs_are_those_of_the_examples(dataset, policy, params, mesh):
    """Compares with other batches, which have other padding."""
    told = []
    stored = store(dataset, policy, params, mesh, progress=told.append)
    assert sum(told) == 20
    numbers = np.array([7, 19, 0])
    found = stored(numbers, 6)
    assert found.shape == (3, 2, 6) and found.dtype == np.float32
    batch = collate([dataset[number] for number in numbers], 12, 6)
    expected = jax.jit(partial(score, policy))(params, *texts(batch))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found == 0, np.arange(6) >= batch.response_lengths[..., None])
    (folder,) = (dataset.folder / "reference").iterdir()
    assert sorted(path.name for path in folder.glob("[a-z]*")) == ["log_probs.npy", "reference.json"]
    assert np.load(folder / "log_probs.npy").shape == (lengths_of(dataset)[:, 1:].sum(),)


def test_killed_half_way_it_goes_on_and_ends_the_same(dataset, policy, params, mesh, monkeypatch):
    identity = reference_identity(dataset, policy, params_digest(params), SHAPES)
    store(dataset, policy, params, mesh)
    values = storage.reference_folder(dataset, identity) / "log_probs.npy"
    whole = values.read_bytes()
    values.unlink()
    (values.parent / "reference.json").unlink()
    monkeypatch.setattr(storage, "SAVE_EVERY", 0.0)
    told = []

    def stop_in_batch_three(examples):
        told.append(examples)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(dataset, policy, params, mesh, progress=stop_in_batch_three)
    assert storage.open_reference(dataset, identity) is None
    told.clear()
    store(dataset, policy, params, mesh, progress=told.append)
    assert told == [16, 4]
    assert values.read_bytes() == whole


def test_they_are_found_by_what_they_are_of(dataset, policy, params, mesh):
    identity = reference_identity(dataset, policy, params_digest(params), SHAPES)
    assert storage.open_reference(dataset, identity) is None
    store(dataset, policy, params, mesh)
    assert storage.open_reference(dataset, identity) is not None
    others = {
        "checkpoint": reference_identity(dataset, policy, params_digest(random_params(policy, 1)), SHAPES),
        "lengths": reference_identity(dataset, policy, params_digest(params), SHAPES[1:]),
        "precision": reference_identity(
            dataset, make_policy(dataclasses.replace(policy.config, dtype="bfloat16")), params_digest(params), SHAPES
        ),
    }
    for name, other in others.items():
        assert other[name] != identity[name]
        assert storage.open_reference(dataset, other) is None


def test_another_version_of_the_dataset_is_refused(dataset, policy, params, mesh):
    store(dataset, policy, params, mesh)
    write_dataset(dataset.folder, make_random_examples(20, seed=1), vocabulary_digest="", provenance={})
    with pytest.raises(UserError, match="has the log-probs of another version of"):
        store(open_dataset(dataset.folder), policy, params, mesh)


def test_the_digest_of_parameters_is_of_their_bits_alone(policy, params):
    digest = params_digest(params)
    for name in ("model", "fsdp", "all"):
        shardings = shardings_of(jax.eval_shape(policy.init, jax.random.key(0)), make_mesh(MESHES[name]))
        assert params_digest(jax.device_put(params, shardings)) == digest
    leaves, tree = jax.tree.flatten(params)
    number = max(range(len(leaves)), key=lambda i: leaves[i].size)

    def changed(leaf):
        return params_digest(jax.tree.unflatten(tree, [*leaves[:number], leaf, *leaves[number + 1 :]]))

    flat = np.asarray(leaves[number]).reshape(-1)
    last_bit = flat.copy()
    last_bit.view(np.uint32)[3] ^= 1
    swapped = flat.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    digests = {changed(jnp.asarray(values.reshape(leaves[number].shape))) for values in (last_bit, swapped)}
    assert len(digests | {digest}) == 3
    assert changed(leaves[number].astype(jnp.bfloat16)) != digest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two datasets, and the run that is both start and reference."""
    root = tmp_path_factory.mktemp("reference")
    for name, count, seed in (("a", 32, 0), ("b", 16, 1)):
        write_posts(root / name, count, seed)
    config = JobConfig(
        model=MODEL,
        loss=LossConfig("sft"),
        source=DatasetConfig(f"{root / 'a'},{root / 'b'}", batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=2,
        log_every=1,
    )
    run_job(config, root / "sft")
    return root, dataclasses.replace(
        config,
        loss=LossConfig("ipo", {"beta": 0.1}),
        start=str(root / "sft"),
        steps=6,
        source=dataclasses.replace(config.source, order="recorded"),
    )


@pytest.mark.slow
def test_a_job_trains_the_same_with_stored_log_probs(runs):
    """Bit for bit on this machine. The rows were scored in other batches, but of the same shapes."""
    root, config = runs
    for way in ("each_step", "stored", "auto"):
        run_job(dataclasses.replace(config, reference_log_probs=way), root / way)
    assert len(list(root.glob("*/reference/*/log_probs.npy"))) == 2
    for way in ("stored", "auto"):
        assert_equal_runs(root / way, root / "each_step")


def test_the_command_stores_what_a_job_of_its_settings_looks_for(runs, mesh, monkeypatch, capsys):
    """The job uses bfloat16 and two buckets. Its rematerialisation and its batch size do not matter."""
    root, config = runs
    words = [f"--dataset={config.source.folder}", f"--checkpoint={root / 'sft'}", "--buckets=2", "--dtype=bfloat16"]
    words.append(f"--output={root / 'scored'}")
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "data", "reference", *words, "--compilation_cache="])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == ["log-probs of 32 examples", "log-probs of 16 examples"]
    job = make_policy(dataclasses.replace(MODEL, dtype="bfloat16", remat="full"))
    params = load_policy(root / "sft", mesh)[1]
    settings = dataclasses.replace(config.source, buckets=2)
    reading = open_reading(settings, "source")
    for dataset in reading.datasets:
        identity = reference_identity(dataset, job, params_digest(params), reading.shapes)
        assert storage.open_reference(dataset, identity) is not None


def test_a_finished_job_stores_again_what_was_removed(runs):
    """The log-probs lie outside the folder of the job, so it checks that they are still there."""
    root, config = runs
    settings = ReferenceConfig(config.source.folder, str(root / "sft"), buckets=3)
    before = {*root.glob("*/reference/*/log_probs.npy")}
    assert make(REFERENCE, settings, root / "scored_again", Bar())
    made = {*root.glob("*/reference/*/log_probs.npy")} - before
    values = [path.read_bytes() for path in sorted(made)]
    assert len(values) == 2
    for path in made:
        shutil.rmtree(path.parent)
    assert not make(REFERENCE, settings, root / "scored_again", Bar())
    assert [path.read_bytes() for path in sorted(made)] == values
    with pytest.raises(UserError, match="buckets"):
        make(REFERENCE, dataclasses.replace(settings, buckets=1), root / "scored_again", Bar())


def test_token_ids_beyond_the_vocabulary_are_refused(dataset, params, mesh):
    small = make_policy(dataclasses.replace(EVEN_CONFIGS["t5"], vocabulary_size=50))
    with pytest.raises(UserError, match=r"has the token id \d+, but the model has vocabulary_size=50"):
        store(dataset, small, params, mesh)


def test_batches_of_another_size_are_not_gone_on_with(dataset, monkeypatch):
    """Batch 1 of 16 examples has other examples than batch 1 of 8."""
    monkeypatch.setattr(storage, "SAVE_EVERY", 0.0)
    identity = {"dataset": dataset.card.digest}
    storage.ReferenceWriter(dataset, identity, 8).write(np.arange(8), np.zeros((8, 2, 5), np.float32))
    assert storage.ReferenceWriter(dataset, identity, 8).done == 1
    assert storage.ReferenceWriter(dataset, identity, 16).done == 0
