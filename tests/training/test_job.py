"""One training job: what it learns, what it resumes, what it refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.tasks.task import PostsTaskConfig, posts_task
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import Checkpoints, OptimizerConfig, load_policy, load_preference_model
from alignment_gap.training.job import DatasetConfig, JobConfig, LossConfig, run_job

MODEL = T5Config(vocabulary_size=136, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=8, mlp_width=16)
BETA = 0.1


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job") / "pairs"
    task = posts_task(PostsTaskConfig(pairs=48, validation_pairs=1))
    write_dataset(folder, task.pairs, vocabulary_digest=task.vocabulary.digest, provenance=task.provenance)
    return folder


@pytest.fixture(scope="module")
def sft_config(pairs):
    return JobConfig(
        model=MODEL,
        loss=LossConfig("sft"),
        dataset=DatasetConfig(str(pairs), batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=6,
        checkpoint_every=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def sft(sft_config, tmp_path_factory):
    """The folder of a finished run and its last state."""
    folder = tmp_path_factory.mktemp("job") / "sft"
    return folder, run_job(sft_config, folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_states(first, second):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_trains_and_leaves_its_folder(sft):
    folder, state = sft
    assert int(state.step) == 6
    losses = [line["loss"] for line in metrics(folder)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]


def test_continues_after_a_stop_bit_for_bit(sft, sft_config, tmp_path):
    told = []

    def stop_in_step_five(steps):
        told.append(steps)
        if len(told) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(sft_config, tmp_path, stop_in_step_five)
    told.clear()
    assert_equal_states(run_job(sft_config, tmp_path, told.append), sft[1])
    assert told == [4, 1, 1]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_mixture_in_buckets_continues_after_a_stop_bit_for_bit(sft_config, pairs, tmp_path):
    """Two datasets by weight, batches of several shapes, read ahead, for as many steps as two epochs have."""
    task = posts_task(PostsTaskConfig(pairs=16, validation_pairs=1, seed=1))
    write_dataset(tmp_path / "b", task.pairs, vocabulary_digest=task.vocabulary.digest, provenance=task.provenance)
    dataset = DatasetConfig(f"{pairs}, {tmp_path / 'b'}", weights=(1.0, 1.0), batch_size=16, buckets=2, epochs=2)
    config = dataclasses.replace(sft_config, dataset=dataset, steps=0)
    whole = run_job(config, tmp_path / "whole")
    assert int(whole.step) == 8
    told = []

    def stop_in_step_five(steps):
        told.append(steps)
        if len(told) > 5:
            raise KeyboardInterrupt

    longer = dataclasses.replace(config, dataset=dataclasses.replace(dataset, epochs=3))
    with pytest.raises(KeyboardInterrupt):
        run_job(longer, tmp_path / "stopped", stop_in_step_five)
    without_prefetch = dataclasses.replace(config, dataset=dataclasses.replace(dataset, prefetch=0))
    assert_equal_states(run_job(without_prefetch, tmp_path / "stopped"), whole)


def test_packed_rows_train_as_one_prompt_a_row_does(sft, sft_config, tmp_path):
    """With the reference in each step, and with what is stored of it; killed and continued with the same bits."""
    folder, _ = sft
    dataset = dataclasses.replace(sft_config.dataset, batch_size=16, prompt_length=64, response_length=48)
    config = dataclasses.replace(
        sft_config, model=None, loss=LossConfig("ipo"), start=str(folder), dataset=dataset, steps=4
    )
    run_job(config, tmp_path / "plain")
    packed = dataclasses.replace(config, dataset=dataclasses.replace(dataset, packing=1))
    whole = run_job(packed, tmp_path / "packed")
    stored = dataclasses.replace(packed, reference_log_probs="stored")
    run_job(stored, tmp_path / "stored")
    expected = metrics(tmp_path / "plain")
    for name in ("packed", "stored"):
        for line, other in zip(metrics(tmp_path / name), expected, strict=True):
            assert line["padding"] < other["padding"]
            for key in ("loss", "gradient_norm", "prompts", "margin", "log_prob", "length"):
                # A margin of the first step is a difference of equal numbers.
                np.testing.assert_allclose(line[key], other[key], rtol=1e-3, atol=2e-5, err_msg=key)
    told = []

    def stop_in_step_three(steps):
        told.append(steps)
        if len(told) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(packed, tmp_path / "stopped", stop_in_step_three)
    assert_equal_states(run_job(packed, tmp_path / "stopped"), whole)
    # It may go on with one prompt a row.
    assert int(run_job(dataclasses.replace(config, steps=5), tmp_path / "stopped").step) == 5


def test_more_steps_go_on_from_the_last(sft_config, sft, tmp_path):
    run_job(dataclasses.replace(sft_config, steps=3), tmp_path)
    assert_equal_states(run_job(sft_config, tmp_path), sft[1])


def test_a_run_is_start_and_reference(sft, sft_config, tmp_path, monkeypatch):
    monkeypatch.chdir(sft[0].parent)
    config = dataclasses.replace(sft_config, loss=LossConfig("ipo", {"beta": BETA}), start=sft[0].name, steps=2)
    run_job(config, tmp_path)
    first, second = metrics(tmp_path)
    # At the reference h = 0, so the loss is (1 / (2 beta))^2.
    np.testing.assert_allclose(first["loss"], 1 / (4 * BETA**2), rtol=1e-6)
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert second["loss"] < first["loss"]


def test_the_model_is_that_of_the_start(sft, sft_config, tmp_path):
    config = dataclasses.replace(sft_config, model=None, start=str(sft[0] / "checkpoints" / "4"), steps=1)
    state = run_job(config, tmp_path)
    assert json.loads((tmp_path / "job.json").read_text())["model.mlp_width"] == 16
    policy, params = load_policy(tmp_path, make_mesh(MeshConfig()))
    assert policy.config == MODEL
    assert_equal_states(params, state.params)


def test_run_time_settings_may_differ_from_the_start(sft, sft_config, tmp_path):
    model = dataclasses.replace(MODEL, scan_unroll=2)
    run_job(dataclasses.replace(sft_config, model=model, start=str(sft[0]), steps=1), tmp_path)
    assert load_policy(tmp_path, make_mesh(MeshConfig()))[0].config == model


def test_reference_may_be_another_checkpoint(sft, sft_config, tmp_path):
    config = dataclasses.replace(
        sft_config, loss=LossConfig("dpo"), start=str(sft[0]), reference=str(sft[0]), reference_step=2, steps=1
    )
    run_job(config, tmp_path)
    assert metrics(tmp_path)[0]["chosen_log_ratio"] > 1.0


def test_reference_log_probs_of_the_dataset_are_used(pairs, sft_config, tmp_path):
    examples = [
        dataclasses.replace(e, reference_log_probs=tuple(np.full(len(r), -2.0, np.float32) for r in e.responses))
        for e in open_dataset(pairs)
    ]
    write_dataset(tmp_path / "scored", examples, vocabulary_digest="", provenance={})
    dataset = DatasetConfig(str(tmp_path / "scored"), batch_size=8)
    config = dataclasses.replace(sft_config, loss=LossConfig("dpo"), dataset=dataset, steps=1)
    run_job(config, tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    np.testing.assert_allclose(
        line["log_prob"] + 2 * line["length"], (line["chosen_log_ratio"] + line["rejected_log_ratio"]) / 2, rtol=1e-4
    )


BAD = {
    "no dataset": ({"dataset": DatasetConfig()}, "dataset.folder is empty"),
    "missing dataset": ({"dataset": DatasetConfig("nowhere", batch_size=8)}, "nowhere is no finished dataset"),
    "unknown loss": ({"loss": LossConfig("ipoo")}, "ipo"),
    "unknown setting": ({"loss": LossConfig("ipo", {"bta": 1.0})}, "beta"),
    "setting of another type": ({"loss": LossConfig("sft", {"over_tokens": "median"})}, "median"),
    "loss without its reference": ({"loss": LossConfig("ipo")}, "ipo needs a reference policy: set start or reference"),
    "loss with a beta and no reference": ({"loss": LossConfig("grpo")}, "the loss grpo with {} does not run"),
    "start that is no run": ({"start": "nowhere"}, "nowhere has no complete checkpoint"),
    "no model": ({"model": None}, "set MODEL, .* or START"),
    "reference of another model": (
        {"reference": "START", "loss": LossConfig("dpo"), "model": dataclasses.replace(MODEL, mlp_width=8)},
        r"of another model \(mlp_width is 8, there 16\)",
    ),
    "step without a checkpoint": (
        {"start": "START", "start_step": 3},
        "no checkpoint of step 3: choose one of 2, 4, 6",
    ),
    "start of another model": (
        {"start": "START", "model": dataclasses.replace(MODEL, width=32)},
        r"of another model \(width is 32, there 16\)",
    ),
    "start of another architecture": (
        {"start": "START", "model": DecoderConfig(vocabulary_size=136)},
        "architecture is decoder",
    ),
    "no steps": ({"steps": 0}, "steps is 0: it must be at least 1, or set dataset.epochs"),
    "negative steps": ({"steps": -1}, "steps is -1"),
    "reference log-probs": ({"reference_log_probs": "cached"}, "choose one of auto, stored, each_step"),
    "negative step": ({"start_step": -1}, "start_step is -1"),
    "mesh": ({"mesh": MeshConfig(data=3, model=5)}, "mesh data=3"),
    "sizes": ({"model": dataclasses.replace(MODEL, heads=0)}, "heads is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, sft, sft_config, tmp_path):
    changes, message = BAD[name]
    changes = {key: str(sft[0]) if value == "START" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        run_job(dataclasses.replace(sft_config, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


BAD_DATA = {
    "order": ({"order": "sorted"}, "choose one of shuffle"),
    "length": ({"response_length": 2}, "dataset.response_length is 2"),
    "second dataset": ({"folder": "PAIRS,nowhere"}, "nowhere is no finished dataset"),
    "weights": ({"weights": (1.0, 2.0)}, "are 2 for 1 datasets"),
    "buckets": ({"buckets": 0}, "buckets=0"),
    "prefetch": ({"prefetch": -1}, "prefetch=-1"),
    "epochs": ({"epochs": -1}, "dataset.epochs is -1"),
    "too few epochs": ({"epochs": 1, "batch_size": 16}, "dataset.epochs=1 of 48 examples have 3 batches of 16"),
    "batch": ({"batch_size": 0}, "batch_size"),
    "negative packing": ({"packing": -1}, "packing=-1 is out of range"),
    "packing and buckets": ({"packing": 2, "buckets": 2}, "dataset.packing=2 does not go with buckets=2: choose one"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_dataset_settings(name, sft_config, tmp_path):
    changes, message = BAD_DATA[name]
    if "folder" in changes:
        changes = {"folder": changes["folder"].replace("PAIRS", sft_config.dataset.folder)}
    dataset = dataclasses.replace(sft_config.dataset, **changes)
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, dataset=dataset), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "dataset", "message"),
    [
        (
            {"loss": LossConfig("dr_grpo")},
            {"packing": 2},
            "dr_grpo divides by the width of a batch's rows, which packing and buckets change: set its max_length",
        ),
        ({"loss": LossConfig("dr_grpo")}, {"buckets": 2}, "set its max_length"),
        ({"loss": LossConfig("kto"), "start": "START"}, {"packing": 2}, "depends on the batch's other prompts"),
        ({"kind": "bradley_terry"}, {"packing": 2}, "a preference model reads one prompt a row"),
    ],
)
def test_what_does_not_go_with_packing_is_told_at_once(changes, dataset, message, sft, sft_config, tmp_path):
    changes = {key: str(sft[0]) if value == "START" else value for key, value in changes.items()}
    dataset = dataclasses.replace(sft_config.dataset, **dataset)
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, dataset=dataset, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_mesh_does_not_divide(sft_config, tmp_path):
    if jax.device_count() == 1:
        pytest.skip("one device divides every batch")
    dataset = dataclasses.replace(sft_config.dataset, batch_size=jax.device_count() + 1)
    with pytest.raises(UserError, match="must be a multiple"):
        run_job(dataclasses.replace(sft_config, dataset=dataset), tmp_path)


def test_token_ids_beyond_the_model(sft_config, tmp_path):
    model = dataclasses.replace(MODEL, vocabulary_size=16)
    with pytest.raises(UserError, match=r"token id .* vocabulary_size=16"):
        run_job(dataclasses.replace(sft_config, model=model), tmp_path)


def test_the_folder_of_another_job(sft, sft_config):
    config = dataclasses.replace(sft_config, optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.01, now 0.5"):
        run_job(config, sft[0])
    with pytest.raises(UserError, match="beyond steps=4"):
        run_job(dataclasses.replace(sft_config, steps=4), sft[0])
    assert json.loads((sft[0] / "job.json").read_text())["optimizer.learning_rate"] == 0.01


def test_a_dataset_that_was_damaged_or_exchanged(pairs, sft, sft_config, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    config = dataclasses.replace(sft_config, dataset=dataclasses.replace(sft_config.dataset, folder=str(folder)))
    record_file = folder / "pairs.array_record"
    whole = record_file.read_bytes()
    record_file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # The dataset is prepared anew, and differs: a run on the earlier one does not go on with it.
    run = tmp_path / "sft"
    shutil.copytree(sft[0], run)
    dataset = open_dataset(pairs)
    write_dataset(pairs.parent / "fewer", dataset[:40], vocabulary_digest="", provenance={})
    settings = json.loads((run / "job.json").read_text()) | {"dataset.folder": str(pairs.parent / "fewer")}
    (run / "job.json").write_text(json.dumps(settings))
    fewer = dataclasses.replace(sft_config.dataset, folder=str(pairs.parent / "fewer"))
    with pytest.raises(UserError, match=r"dataset.digest was \w+, now \w+"):
        run_job(dataclasses.replace(sft_config, dataset=fewer), run)


@pytest.mark.parametrize("kind", ["pairwise", "bradley_terry"])
def test_a_preference_model_starts_from_a_policy_and_says_what_it_is(kind, sft, sft_config, mesh, tmp_path):
    config = dataclasses.replace(
        sft_config, kind=kind, start=str(sft[0]), steps=12, optimizer=OptimizerConfig(learning_rate=2e-2)
    )
    run_job(config, tmp_path / "judge")
    values = [line["loss"] for line in metrics(tmp_path / "judge")]
    assert np.mean(values[-3:]) < np.mean(values[:3])
    model, _ = load_preference_model(tmp_path / "judge", mesh)
    size = posts_task(PostsTaskConfig(pairs=1, validation_pairs=1)).vocabulary.size
    assert (model.kind, model.policy.config) == (kind, MODEL)
    # T5's sentinels, counted from the end.
    assert model.markers == tuple(range(size - 1, size - 6, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "triple"}, "kind is 'triple': choose one of policy"),
        ({"kind": "pairwise", "reference": "x"}, "has none"),
    ],
)
def test_bad_settings_of_a_preference_model(changes, message, sft_config, tmp_path):
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_vocabulary_is_refused(pairs, sft, sft_config, tmp_path):
    write_dataset(tmp_path / "other", open_dataset(pairs)[:16], vocabulary_digest="another", provenance={})
    dataset = dataclasses.replace(sft_config.dataset, folder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other was prepared with .* another, .*sft was trained with \w{12}:"):
        run_job(dataclasses.replace(sft_config, dataset=dataset, start=str(sft[0])), tmp_path / "run")
    assert not (tmp_path / "run").exists()
