"""Jobs that train adapters: their checkpoints, how they continue, the arrays that they share, and what they refuse."""

import csv
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from job_runs import MODEL, arrays, assert_equal_runs, metrics, run_and_stop, run_job

from alignment_gap.checkpoints import open_checkpoint, read_digest
from alignment_gap.checkpoints.adapters import plain_tensors
from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.train import open_training
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import AdapterConfig, merged, score
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import OptimizerConfig, load_plain, load_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def ipo_config(sft, pairs):
    return JobConfig(
        loss=LossConfig("ipo"),
        source=DatasetConfig(str(pairs), batch_size=8),
        adapter=AdapterConfig(4, targets=("query", "mlp"), dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        start=str(sft),
        steps=4,
        checkpoint_every=2,
        log_every=1,
    )


@pytest.fixture(scope="session")
def ipo(ipo_config, tmp_path_factory):
    """The folder of a finished run of adapters."""
    return run_job(ipo_config, tmp_path_factory.mktemp("adapters") / "ipo")


@pytest.fixture(scope="session")
def adapted_judge(ipo_config, tmp_path_factory):
    """A preference model with adapters on the same base."""
    config = dataclasses.replace(ipo_config, kind="pairwise", loss=LossConfig(), steps=2)
    return run_job(config, tmp_path_factory.mktemp("adapters") / "judge")


def inputs_of(config):
    """The inputs of a job after it is opened."""
    _, inputs = open_training(config).run.args
    return inputs


def kernels(params):
    return params["decoder"]["layers"]["mlp"]["wo"]["kernel"]


def test_a_checkpoint_holds_adapters_alone_and_names_its_base(ipo, ipo_config, sft):
    stored = open_checkpoint(ipo)
    base = open_checkpoint(sft)
    ends = ("query.kernel", "wi_0.kernel", "wi_1.kernel", "wo.kernel")
    targets = [name for name in base.tensors if name.endswith(ends)]
    assert sorted(stored.tensors) == sorted(f"{name}.{part}" for name in targets for part in "ab")
    moments = [name for name in arrays(ipo) if ".mu." in name]
    assert len(moments) == len(stored.tensors)
    assert stored.network.adapter == ipo_config.adapter
    assert stored.network.base == str(base.folder) and stored.network.base_digest == read_digest(base.folder)
    assert read_digest(stored.folder) not in (read_digest(base.folder), None)


def test_the_base_has_its_whole_path_for_readers_in_other_folders(ipo_config, sft, monkeypatch):
    monkeypatch.chdir(sft.parent)
    assembly, _ = open_training(dataclasses.replace(ipo_config, start=sft.name)).run.args
    assert assembly.facts.network.base == str(open_checkpoint(sft).folder)


def test_the_run_begins_as_its_reference_and_leaves_it(ipo):
    """Exactly: the reference is the base, and new adapters add zeros."""
    first, *_, last = metrics(ipo)
    assert first["chosen_log_ratio"] == first["rejected_log_ratio"] == first["margin"] == 0.0
    assert first["loss"] == 25.0
    assert last["loss"] < first["loss"] and abs(last["chosen_log_ratio"]) > 0.1


def test_killed_it_goes_on_with_the_same_bits(ipo, ipo_config, tmp_path):
    """The run has dropout; the masks depend only on the step."""
    run_and_stop(ipo_config, tmp_path / "run", 3)
    assert_equal_runs(ipo, run_job(ipo_config, tmp_path / "run"))


def test_its_policy_is_the_base_with_the_adapters(ipo, sft):
    mesh = make_mesh(MeshConfig())
    (_, params), (_, base) = load_policy(ipo, mesh), load_policy(sft, mesh)
    np.testing.assert_array_equal(kernels(params).kernel, kernels(base))
    found = jax.device_get(merged(params))
    for name, tensor in plain_tensors(open_checkpoint(ipo)).items():
        value = found
        for part in name.split("."):
            value = value[part]
        np.testing.assert_allclose(value, tensor.read(None), rtol=1e-6, atol=1e-7, err_msg=name)
    assert np.abs(kernels(found) - kernels(base)).max() > 1e-3


def test_reference_and_judge_share_the_arrays_of_the_base(ipo, ipo_config, adapted_judge, pairs):
    online = OnlineConfig(DatasetConfig(str(pairs), batch_size=8), judge=JudgeConfig(str(adapted_judge)))
    inputs = inputs_of(dataclasses.replace(ipo_config, source=online))
    base = inputs.start.read()
    assert inputs.reference.read() is base
    (judge,) = inputs.judge.scores.args
    assert kernels(judge).kernel is kernels(base)
    assert judge["token_embedder"]["embedding"] is base["token_embedder"]["embedding"]
    other = inputs_of(dataclasses.replace(ipo_config, reference=str(ipo))).reference.read()
    assert kernels(other).kernel.shape == kernels(base).shape


def test_online_its_own_samples_are_judged_and_trained_on(ipo_config, adapted_judge, pairs, tmp_path):
    """The sampler uses a copy of the adapters. In the first step its log-probs are those of the policy."""
    prompts = DatasetConfig(str(pairs), batch_size=8)
    source = OnlineConfig(prompts, judge=JudgeConfig(str(adapted_judge)), response_length=6, refresh_every=2)
    config = dataclasses.replace(
        ipo_config, source=source, adapter=dataclasses.replace(ipo_config.adapter, dropout=0.0), steps=2
    )
    run = run_job(config, tmp_path / "run")
    lines = metrics(run)
    record = open_dataset(run / "record")
    drawn = np.mean([sum(each.sampler_log_probs[0]) + sum(each.sampler_log_probs[1]) for each in record[:8]]) / 2
    np.testing.assert_allclose(drawn, lines[0]["log_prob"], rtol=1e-4)
    assert lines[0]["margin"] == 0.0 and lines[1]["margin"] != 0.0
    names = {name for name in arrays(run) if name.startswith("copies.sampler.")}
    assert len(names) == len(open_checkpoint(run).tensors)


@pytest.fixture(scope="module")
def rounded(ipo_config, tmp_path_factory):
    """The folder of a run of adapters on an int8 base."""
    adapter = dataclasses.replace(ipo_config.adapter, base_dtype="int8")
    return run_job(dataclasses.replace(ipo_config, adapter=adapter), tmp_path_factory.mktemp("adapters") / "int8")


def test_a_base_in_int8_is_the_reference_too(rounded, ipo, sft):
    first, *_, last = metrics(rounded)
    assert first["chosen_log_ratio"] == first["rejected_log_ratio"] == 0.0 and first["loss"] == 25.0
    assert last["loss"] < first["loss"]
    # The loss is close to that of the run on the float base, but not equal.
    other = metrics(ipo)[-1]["loss"]
    assert last["loss"] != other and last["loss"] == pytest.approx(other, rel=0.1)
    (_, params), (_, base) = (load_policy(folder, make_mesh(MeshConfig())) for folder in (rounded, sft))
    held = kernels(params).kernel
    assert held.values.dtype == np.int8
    largest = np.abs(kernels(base)).max(axis=1, keepdims=True)
    assert (np.abs(held.dequantized() - kernels(base)) <= largest / 254 + 1e-7).all()


def test_a_sum_with_a_base_in_int8_is_the_policy_that_was_trained(rounded):
    """Merging gives the same tensors for an export (tensor by tensor) and on the devices, and the same log-probs."""
    mesh, stored = make_mesh(MeshConfig()), open_checkpoint(rounded)
    policy, params = load_policy(rounded, mesh)
    plain = load_plain(stored.folder, stored.network, mesh)
    for name, tensor in plain_tensors(stored).items():
        value = plain
        for part in name.split("."):
            value = value[part]
        np.testing.assert_allclose(value, tensor.read(None), rtol=1e-6, atol=1e-7, err_msg=name)
    scored = jax.jit(functools.partial(score, policy))
    rng = np.random.default_rng(0)
    prompts, responses = (rng.integers(2, 100, shape).astype(np.int32) for shape in ((3, 6), (3, 2, 5)))
    texts = prompts, np.full(3, 6, np.int32), responses, np.full((3, 2), 5, np.int32)
    np.testing.assert_allclose(scored(params, *texts), scored(plain, *texts), atol=1e-4)


def test_stored_log_probs_of_the_base_itself_are_not_those_of_int8(ipo_config, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "pairs")
    source = dataclasses.replace(ipo_config.source, folder=str(tmp_path / "pairs"))
    config = dataclasses.replace(ipo_config, source=source, steps=1, reference_log_probs="stored")
    adapter = dataclasses.replace(config.adapter, base_dtype="int8")
    for number, each in enumerate((config, dataclasses.replace(config, adapter=adapter))):
        assert metrics(run_job(each, tmp_path / f"run{number}"))[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-5)


def test_it_is_evaluated_against_its_base(ipo, pairs, tmp_path):
    config = EvaluateConfig(run=str(ipo), dataset=str(pairs), prompts=8, kl_prompts=8, pairs=8, batch_size=8)
    make(EVALUATE, dataclasses.replace(config, response_length=4), tmp_path / "evaluation")
    with (tmp_path / "evaluation" / "results.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["step"] for row in rows] == ["2", "4"] and abs(float(rows[-1]["kl"])) > 1e-3


def test_all_parameters_or_new_adapters_are_trained_on_a_run_of_adapters(ipo, ipo_config):
    summed = plain_tensors(open_checkpoint(ipo))["decoder.layers.mlp.wo.kernel"].read(None)
    narrow = dataclasses.replace(MODEL, dtype="bfloat16")
    for adapter, model, dtype in (
        (AdapterConfig(2, targets=("value",)), None, "float32"),
        (AdapterConfig(2, targets=("value",)), narrow, "bfloat16"),
        (AdapterConfig(), narrow, "float32"),
    ):
        config = dataclasses.replace(ipo_config, start=str(ipo), adapter=adapter, model=model)
        start = inputs_of(config).start.read()
        assert kernels(start).dtype == dtype
        rounding = 1e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(kernels(start).astype(np.float32), summed, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": AdapterConfig(32)}, r"rank is 32, but \S+ is a matrix of 16 x 16: set it to 16 at most"),
        ({"adapter": AdapterConfig(2, targets=("valeu",))}, "names no projection of this model: did you mean value"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_written(changes, message, ipo_config, tmp_path):
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(ipo_config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_without_a_base_are_refused(ipo_config):
    with pytest.raises(UserError, match=r"adapter.rank is 4, but start is not set"):
        dataclasses.replace(ipo_config, start=None)


def test_a_run_does_not_go_on_with_another_base(ipo, ipo_config, judge, sft, tmp_path):
    """Refused in one line: a base with the same name but other parameters, and a base with another name."""
    shutil.copytree(sft, tmp_path / "sft")
    shutil.copytree(ipo, tmp_path / "run")
    with pytest.raises(UserError, match="start") as error:
        run_job(dataclasses.replace(ipo_config, start=str(judge)), tmp_path / "run")
    assert "\n" not in str(error.value)
    config = dataclasses.replace(ipo_config, start=str(tmp_path / "sft"), steps=2)
    run = run_job(config, tmp_path / "other")
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(UserError, match=r"holds adapters of the base .* cannot be read: put it back"):
        load_policy(run, make_mesh(MeshConfig()))
    shutil.copytree(judge, tmp_path / "sft")
    (tmp_path / "sft" / "checkpoints" / "4").rename(tmp_path / "sft" / "checkpoints" / "6")
    with pytest.raises(UserError, match=r"holds adapters of another base: .* put the base back"):
        load_policy(run, make_mesh(MeshConfig()))
    with pytest.raises(UserError, match=r"start\.digest"):
        run_job(config, run)
