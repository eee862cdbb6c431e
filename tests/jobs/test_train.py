"""One training job: what it learns, how it resumes, and what it refuses."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from built_in import write_posts
from job_runs import (
    MODEL,
    Bar,
    Stopped,
    arrays,
    assert_equal_checkpoints,
    assert_equal_runs,
    metrics,
    run_and_stop,
    run_job,
    steps,
)

from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.text import load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, LossConfig, MonitorConfig, OnlineConfig
from alignment_gap.jobs.folder import Job, make
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.launch.local import LocalConfig, run_local
from alignment_gap.launch.tasks import Task
from alignment_gap.models import DecoderConfig
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.sharding.chips import DEVICE_KINDS
from alignment_gap.training import KeepConfig, OptimizerConfig, load_policy, load_preference_model
from alignment_gap.training.monitor import is_of_the_clock

BETA = 0.1


def at(folder):
    """The source of batches from a dataset."""
    return DatasetConfig(str(folder), batch_size=8)


def test_trains_and_leaves_its_folder(sft):
    losses = [line["loss"] for line in metrics(sft)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert steps(sft) == [2, 4, 6]
    assert arrays(sft)["optimizer.step"] == 6
    done = json.loads((sft / "done.json").read_text())
    assert done["settings"] == json.loads((sft / "job.json").read_text())


def test_continues_after_a_stop_bit_for_bit(sft, sft_config, tmp_path):
    run_and_stop(sft_config, tmp_path, after=5)
    assert not (tmp_path / "done.json").exists()
    bar = Bar()
    run_job(sft_config, tmp_path, bar)
    assert_equal_runs(tmp_path, sft)
    assert bar.updates == [4, 1, 1]


@pytest.mark.slow
def test_the_same_job_gives_the_same_bits_again_and_by_an_engine(sft, sft_config, tmp_path):
    """The engine runs the command of the job in its own process."""
    assert_equal_runs(run_job(sft_config, tmp_path / "again"), sft)
    job = Job("sft", TRAIN, sft_config, tmp_path / "started")
    run_local([Task(job.name, job.words, job.folder)], LocalConfig(), tmp_path / "logs", print)
    assert_equal_runs(job.folder, sft)


def test_a_batch_that_is_larger_than_its_dataset_is_told_before_training(sft_config, pairs, tmp_path):
    count = len(open_dataset(pairs))
    for size, said in ((count, False), (4 * count, True)):
        bar = Bar(stop_at=-1)
        source = dataclasses.replace(sft_config.source, batch_size=size)
        with pytest.raises(Stopped):
            run_job(dataclasses.replace(sft_config, source=source), tmp_path / str(size), bar)
        line = f"batch_size is {size}, but {pairs} has {count} examples: each comes 4.0 times in a batch on average; "
        assert any(each.startswith(line) for each in bar.lines) == said == any("comes" in each for each in bar.lines)


def test_a_finished_job_is_not_run_again(sft, sft_config):
    before = {path: path.stat().st_mtime_ns for path in sft.rglob("*") if path.is_file() and path.name != ".lock"}
    assert not make(TRAIN, sft_config, sft, Bar())
    written = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in written} <= {"job.json"}


@pytest.mark.slow
def test_a_mixture_in_buckets_continues_after_a_stop_bit_for_bit(sft_config, pairs, tmp_path):
    """Two weighted datasets, batches of several shapes, and prefetching; two epochs set the number of steps."""
    write_posts(tmp_path / "b", 16, seed=1)
    source = DatasetConfig(f"{pairs}, {tmp_path / 'b'}", weights=(1.0, 1.0), batch_size=16, buckets=2, epochs=2)
    config = dataclasses.replace(sft_config, source=source, steps=None)
    whole = run_job(config, tmp_path / "whole")
    assert steps(whole) == [2, 4, 6, 8]
    run_and_stop(dataclasses.replace(config, source=dataclasses.replace(source, epochs=3)), tmp_path / "stopped", 5)
    without_prefetch = dataclasses.replace(config, source=dataclasses.replace(source, prefetch=0))
    assert_equal_runs(run_job(without_prefetch, tmp_path / "stopped"), whole)


@pytest.mark.slow
def test_packed_rows_train_as_one_prompt_a_row_does(sft, sft_config, tmp_path):
    """With the reference in each step, and with stored log-probs. A killed run continues with the same bits.

    It began with the reference in each step, so it does not read the log-probs that another job has stored since: they
    are equal but for rounding.
    """
    source = dataclasses.replace(sft_config.source, batch_size=16, prompt_length=64, response_length=48)
    config = dataclasses.replace(sft_config, model=None, loss=LossConfig("ipo"), start=str(sft), source=source, steps=4)
    run_job(config, tmp_path / "plain")
    packed = dataclasses.replace(config, source=dataclasses.replace(source, packing=1))
    whole = run_job(packed, tmp_path / "packed")
    run_and_stop(packed, tmp_path / "stopped", after=3)
    stored = dataclasses.replace(packed, reference_log_probs="stored")
    run_job(stored, tmp_path / "stored")
    expected = metrics(tmp_path / "plain")
    for name in ("packed", "stored"):
        for line, other in zip(metrics(tmp_path / name), expected, strict=True):
            assert line["padding"] < other["padding"]
            for key in ("loss", "gradient_norm", "prompts", "margin", "log_prob", "length"):
                # The first margin is a difference of equal numbers, so it needs an absolute tolerance.
                np.testing.assert_allclose(line[key], other[key], rtol=1e-3, atol=2e-5, err_msg=key)
    assert_equal_runs(run_job(packed, tmp_path / "stopped"), whole)
    # It may continue with one prompt in each row.
    assert steps(run_job(dataclasses.replace(config, steps=5), tmp_path / "stopped"))[-1] == 5


def test_more_steps_go_on_from_the_last(sft_config, sft, tmp_path):
    run_job(dataclasses.replace(sft_config, steps=3), tmp_path)
    assert_equal_checkpoints(run_job(sft_config, tmp_path), sft)


@pytest.mark.slow
def test_a_learning_rate_that_falls_to_the_last_step_keeps_their_number(sft_config, tmp_path):
    optimizer = dataclasses.replace(sft_config.optimizer, schedule="linear")
    config = dataclasses.replace(sft_config, optimizer=optimizer)
    whole = run_job(config, tmp_path / "whole")
    rates = [line["learning_rate"] for line in metrics(whole)]
    assert rates == pytest.approx([1e-2 * (6 - step) / 6 for step in range(6)], rel=1e-5)
    run_and_stop(config, tmp_path / "stopped", after=3)
    with pytest.raises(UserError, match=r"optimizer\.steps was 6, now 8"):
        run_job(dataclasses.replace(config, steps=8), tmp_path / "stopped")
    assert_equal_runs(run_job(config, tmp_path / "stopped"), whole)


def test_checkpoints_at_given_steps(sft_config, tmp_path):
    config = dataclasses.replace(sft_config, checkpoint_every=100, checkpoint_steps=(1, 3, 5, 50))
    assert steps(run_job(config, tmp_path)) == [1, 3, 5, 6]


def test_a_run_is_start_and_reference(sft, sft_config, tmp_path, monkeypatch):
    monkeypatch.chdir(sft.parent)
    config = dataclasses.replace(sft_config, loss=LossConfig("ipo", {"beta": BETA}), start=sft.name, steps=2)
    run_job(config, tmp_path)
    first, second = metrics(tmp_path)
    # At the reference h = 0, so the loss is (1 / (2 beta))^2.
    np.testing.assert_allclose(first["loss"], 1 / (4 * BETA**2), rtol=1e-6)
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert second["loss"] < first["loss"]


def test_the_model_is_that_of_the_start(sft, sft_config, tmp_path):
    config = dataclasses.replace(sft_config, model=None, start=str(sft / "checkpoints" / "4"), steps=1)
    run_job(config, tmp_path)
    policy, params = load_policy(tmp_path, make_mesh(MeshConfig()))
    assert policy.config == MODEL
    table = arrays(tmp_path)["params.token_embedder.embedding"]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], table)


def test_run_time_settings_may_differ_from_the_start(sft, sft_config, tmp_path):
    model = dataclasses.replace(MODEL, scan_unroll=2)
    run_job(dataclasses.replace(sft_config, model=model, start=str(sft), steps=1), tmp_path)
    assert load_policy(tmp_path, make_mesh(MeshConfig()))[0].config == model


def test_reference_may_be_another_checkpoint(sft, sft_config, tmp_path):
    config = dataclasses.replace(
        sft_config, loss=LossConfig("dpo"), start=str(sft), reference=str(sft), reference_step=2, steps=1
    )
    run_job(config, tmp_path)
    assert metrics(tmp_path)[0]["chosen_log_ratio"] > 1.0


def test_reference_log_probs_of_the_dataset_are_used(pairs, sft_config, tmp_path):
    examples = [
        dataclasses.replace(e, reference_log_probs=tuple(np.full(len(r), -2.0, np.float32) for r in e.responses))
        for e in open_dataset(pairs)
    ]
    write_dataset(tmp_path / "scored", examples, vocabulary_digest="", provenance={})
    source = DatasetConfig(str(tmp_path / "scored"), batch_size=8)
    config = dataclasses.replace(sft_config, loss=LossConfig("dpo"), source=source, steps=1)
    run_job(config, tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    np.testing.assert_allclose(
        line["log_prob"] + 2 * line["length"], (line["chosen_log_ratio"] + line["rejected_log_ratio"]) / 2, rtol=1e-4
    )


BAD = {
    "no dataset": ({"source": DatasetConfig()}, "source.folder is not set"),
    "missing dataset": ({"source": at("nowhere")}, "nowhere is not a finished dataset"),
    "loss without its reference": ({"loss": LossConfig("ipo")}, "ipo needs a reference policy: set start or reference"),
    "loss that does not run": (
        {"loss": LossConfig("raft", {"keep": 3})},
        "the loss raft with {'keep': 3} does not run",
    ),
    "start that is no run": ({"start": "nowhere"}, "nowhere has no complete checkpoint"),
    "no model": ({"model": None}, "set MODEL, .* or START"),
    "reference of another model": (
        {"reference": "START", "loss": LossConfig("dpo"), "model": dataclasses.replace(MODEL, mlp_width=8)},
        r"of another model \(mlp_width is 8, but 16 in the checkpoint\)",
    ),
    "step without a checkpoint": (
        {"start": "START", "start_step": 3},
        "no checkpoint of step 3: choose one of 2, 4, 6",
    ),
    "start of another model": (
        {"start": "START", "model": dataclasses.replace(MODEL, width=32)},
        r"of another model \(width is 32, but 16 in the checkpoint\)",
    ),
    "start of another architecture": (
        {"start": "START", "model": DecoderConfig(vocabulary_size=136)},
        "architecture is decoder",
    ),
    "no steps": ({"steps": None}, "steps is not set: set it, or set epochs"),
    "mesh": ({"mesh": MeshConfig(data=3, model=5)}, "mesh data=3"),
    "sizes": ({"model": dataclasses.replace(MODEL, heads=0)}, "heads is 0"),
    "own samples": ({"loss": LossConfig("reinforce")}, "reinforce needs samples of the policy"),
    "sampler's log-probs": ({"loss": LossConfig("ppo_clip")}, "ppo_clip needs samples of the policy"),
    "no second source": ({"loss": LossConfig("hypo"), "start": "START"}, "hypo reads fresh samples beside the batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, sft, sft_config, tmp_path):
    changes, message = BAD[name]
    changes = {key: str(sft) if value == "START" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        run_job(dataclasses.replace(sft_config, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_wrong_loss_names_its_field():
    with pytest.raises(UserError, match=r"^name: loss: unknown 'ipoo'; did you mean 'ipo'"):
        LossConfig("ipoo")
    line = r"^settings is \{'beta': 0.1\}: setting of online_kl: unknown 'beta'; it has no settings$"
    with pytest.raises(UserError, match=line):
        LossConfig("online_kl", {"beta": 0.1})


def test_the_folder_above_a_dataset_is_refused_with_the_name_of_the_dataset(pairs, sft_config, tmp_path):
    shutil.copytree(pairs, tmp_path / "prepared" / "train")
    config = dataclasses.replace(sft_config, source=DatasetConfig(str(tmp_path / "prepared")))
    with pytest.raises(UserError, match=r"prepared is not a finished dataset .*: give .*/prepared/train, or run"):
        run_job(config, tmp_path / "run")


def test_a_loss_that_says_wrongly_what_it_reads():
    with pytest.raises(UserError, match="reads: unknown 'everything'; valid: other prompts, width"):
        LossConfig("job_runs:misread")


BAD_DATA = {
    "length": ({"response_length": 2}, "source.response_length is 2"),
    "second dataset": ({"folder": "PAIRS,nowhere"}, "nowhere is not a finished dataset"),
    "weights": ({"weights": (1.0, 2.0)}, "but there are 1 datasets: give one weight for each"),
    "too few epochs": ({"epochs": 1, "batch_size": 16}, "1 epochs of 48 examples have 3 batches of 16"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_dataset_settings(name, sft_config, tmp_path):
    changes, message = BAD_DATA[name]
    if "folder" in changes:
        changes = {"folder": changes["folder"].replace("PAIRS", sft_config.source.folder)}
    source = dataclasses.replace(sft_config.source, **changes)
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, source=source), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": LossConfig("kto"), "start": "START"}, "depends on the batch's other prompts"),
        ({"kind": "bradley_terry"}, "a preference model reads one prompt a row"),
    ],
)
def test_what_does_not_go_with_packing_is_told_at_once(changes, message, sft, sft_config, tmp_path):
    changes = {key: str(sft) if value == "START" else value for key, value in changes.items()}
    source = dataclasses.replace(sft_config.source, packing=2)
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, source=source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_mesh_does_not_divide(sft_config, tmp_path):
    if jax.device_count() == 1:
        pytest.skip("one device divides every batch")
    source = dataclasses.replace(sft_config.source, batch_size=jax.device_count() + 1)
    with pytest.raises(UserError, match="must be a multiple"):
        run_job(dataclasses.replace(sft_config, source=source), tmp_path)


def test_token_ids_beyond_the_model(sft_config, tmp_path):
    model = dataclasses.replace(MODEL, vocabulary_size=16)
    with pytest.raises(UserError, match=r"token id .* vocabulary_size=16"):
        run_job(dataclasses.replace(sft_config, model=model), tmp_path)


def test_the_folder_of_another_job(sft, sft_config):
    config = dataclasses.replace(sft_config, optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.01, now 0.5"):
        run_job(config, sft)
    with pytest.raises(UserError, match="beyond steps=4"):
        run_job(dataclasses.replace(sft_config, steps=4), sft)
    assert json.loads((sft / "job.json").read_text())["optimizer.learning_rate"] == 0.01


def test_a_dataset_that_was_damaged_or_exchanged(pairs, sft, sft_config, tmp_path, unchecked):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    config = dataclasses.replace(sft_config, source=at(folder))
    record_file = folder / "pairs.array_record"
    whole = record_file.read_bytes()
    record_file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(UserError, match=r"record \d+ of .*pairs.array_record cannot be read"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # The dataset is prepared again, and differs. A run on the old dataset cannot continue with it.
    record_file.write_bytes(whole)
    run_and_stop(config, tmp_path / "run", after=3)
    write_posts(folder, 40)
    with pytest.raises(UserError, match=r"source.digest was \w+, now \w+"):
        run_job(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "bradley_terry"])
def test_a_preference_model_starts_from_a_policy_and_says_what_it_is(kind, sft, sft_config, mesh, tmp_path):
    optimizer = OptimizerConfig(learning_rate=2e-2)
    config = dataclasses.replace(
        sft_config, kind=kind, start=str(sft), steps=36, checkpoint_every=36, optimizer=optimizer
    )
    run_job(config, tmp_path / "judge")
    values = [line["loss"] for line in metrics(tmp_path / "judge")]
    assert np.mean(values[-6:]) < np.mean(values[:6])
    model, _ = load_preference_model(tmp_path / "judge", mesh)
    size = load_vocabulary("posts").size
    assert (model.kind, model.policy.config) == (kind, MODEL)
    # T5's sentinels, from the last one down.
    assert model.markers == tuple(range(size - 1, size - 6, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "triple"}, "kind is 'triple': choose one of policy"),
        ({"kind": "pairwise", "reference": "x"}, "has none"),
        ({"kind": "pairwise", "source": OnlineConfig()}, "learns only from recorded examples"),
        ({"steps": 0}, "steps is 0: it must be from 1 to 2147483647"),
        ({"start_step": -1}, "start_step is -1"),
        ({"reference_log_probs": "cached"}, "choose one of auto, stored, each_step"),
        ({"checkpoint_steps": (0, 2)}, "steps count from 1"),
        ({"seed": 2**32}, "seed is 4294967296: it must be from 0"),
        (
            {"keep": KeepConfig(last=1, best=1)},
            "keep.best is 1, but monitor.validation is not set: set it to the folder",
        ),
    ],
)
def test_settings_out_of_range(changes, message, sft_config):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(sft_config, **changes)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ipoo", {}, "did you mean 'ipo'"),
        ("ipo", {"bta": 1.0}, "beta"),
        ("ipo", {"beta": math.nan}, "settings.beta is nan: it must be finite"),
        ("no.module:loss", {}, "no.module"),
    ],
)
def test_bad_losses(name, settings, message):
    with pytest.raises(UserError, match=message):
        LossConfig(name, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "sorted"}, "order is 'sorted': choose one of shuffle"),
        ({"buckets": 0}, "buckets is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"packing": 0}, "packing is 0"),
        ({"packing": 2, "buckets": 2}, "packing is 2 and buckets is 2: choose one"),
        ({"window": 3}, "window is 3 with order 'shuffle'"),
        ({"order": "window"}, "window is None with order 'window'"),
    ],
)
def test_bad_settings_of_a_dataset(settings, message):
    with pytest.raises(UserError, match=message):
        DatasetConfig("pairs", **settings)


def test_a_start_of_another_vocabulary_is_refused(pairs, sft, sft_config, tmp_path):
    write_dataset(tmp_path / "other", open_dataset(pairs)[:16], vocabulary_digest="another", provenance={})
    source = dataclasses.replace(sft_config.source, folder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other was prepared with .* another, .*sft was trained with \w{12}:"):
        run_job(dataclasses.replace(sft_config, source=source, start=str(sft)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What a job reports while it trains.


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two batches of 8, and three more examples that do not fill a batch."""
    folder = tmp_path_factory.mktemp("held-out") / "pairs"
    write_posts(folder, 19, seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("loss", [LossConfig("ipo"), LossConfig("kto", {"undesirable_weight": 0.0})])
def test_validation_is_what_training_on_it_would_report_and_changes_nothing(loss, sft, sft_config, held_out, tmp_path):
    config = dataclasses.replace(sft_config, model=None, start=str(sft), loss=loss, steps=3, checkpoint_every=3)
    plain = run_job(config, tmp_path / "plain")
    monitor = MonitorConfig(str(held_out), validate_every=2, tensorboard=True)
    watched = run_job(dataclasses.replace(config, monitor=monitor), tmp_path / "watched")
    assert_equal_runs(watched, plain)
    found = [json.loads(line) for line in (watched / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [2, 3]

    # A job with the same reference and the same parameters trains on each of the two batches, with a rate of almost 0.
    source = DatasetConfig(str(held_out), batch_size=8, order="recorded")
    trained = dataclasses.replace(config, start=str(watched), reference=str(sft), source=source, steps=2, log_every=1)
    trained = dataclasses.replace(trained, optimizer=OptimizerConfig("sgd", learning_rate=1e-30))
    expected = metrics(run_job(trained, tmp_path / "trained"))
    for name in ("loss", "accuracy", "margin", "length", "log_prob"):
        mean = sum(line[name] for line in expected) / 2
        np.testing.assert_allclose(found[-1][name], mean, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def scored(held_out, tmp_path_factory):
    """The held-out pairs with hard labels, with soft ones, and with rewards that rank them as the hard labels do."""
    root, card = tmp_path_factory.mktemp("scored"), open_dataset(held_out).card

    def write(name, loser, winner, scores):
        examples = [
            dataclasses.replace(each, scores=np.where(each.scores > 0.5, winner, loser).astype(np.float32))
            for each in open_dataset(held_out)
        ]
        made = {"vocabulary_digest": card.vocabulary_digest, "provenance": card.provenance, "scores": scores}
        write_dataset(root / name, examples, **made)
        return str(root / name)

    return {
        "hard": write("hard", 0.0, 1.0, "probabilities"),
        "soft": write("soft", 0.25, 0.75, "probabilities"),
        "rewards": write("rewards", -3.0, 5.0, "rewards"),
    }


@pytest.mark.slow
def test_validation_reads_scores_as_its_own_card_says(scored, sft, sft_config, tmp_path):
    """Whatever the source's kind of scores. Rewards that rank pairs as hard labels do have the same loss."""

    def validated(source, held_out):
        config = dataclasses.replace(
            sft_config,
            model=None,
            start=str(sft),
            loss=LossConfig("dpo"),
            steps=1,
            source=DatasetConfig(scored[source], batch_size=8, order="recorded"),
            optimizer=OptimizerConfig("sgd", learning_rate=1e-30),
            reference=str(sft),
            reference_step=2,
            monitor=MonitorConfig(scored[held_out]),
        )
        folder = run_job(config, tmp_path / f"{source}-{held_out}")
        return json.loads((folder / "validation.jsonl").read_text())

    hard, soft = validated("hard", "hard"), validated("hard", "soft")
    assert validated("hard", "rewards") == validated("rewards", "hard") == hard
    assert validated("rewards", "soft") == soft
    assert soft["loss"] != pytest.approx(hard["loss"], rel=1e-3)


def test_a_loss_of_probabilities_refuses_held_out_rewards(scored, sft, sft_config, tmp_path):
    config = dataclasses.replace(sft_config, model=None, start=str(sft), loss=LossConfig("kto"))
    config = dataclasses.replace(config, monitor=MonitorConfig(scored["rewards"]))
    with pytest.raises(UserError, match=r"but the scores of monitor\.validation are rewards: label it anew"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_times_of_a_step_are_told(sft, sft_config, judge, tmp_path):
    source = OnlineConfig(sft_config.source, judge=JudgeConfig(str(judge)))
    config = dataclasses.replace(sft_config, model=None, start=str(sft), loss=LossConfig("ipo"), source=source, steps=2)
    folder = run_job(config, tmp_path)
    first, second = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert not [name for name in first if is_of_the_clock(name)]
    parts = {name for name in second if name.startswith("seconds_")}
    assert parts == {f"seconds_{name}" for name in ("data", "sampling", "judging", "reference", "update")}
    assert second["tokens_per_second"] > second["pairs_per_second"] > 0
    assert second["tokens"] == pytest.approx(second["tokens_per_second"] / second["pairs_per_second"] * 8)
    # The table of chips does not have a CPU.
    assert "mfu" not in second


@pytest.mark.slow
def test_mfu_is_three_forward_passes_by_hand_over_what_the_devices_could_do(sft_config, tmp_path, monkeypatch):
    """The table gets an entry for eight devices of 0.1 TFLOP/s each; width, heads and MLP have size 16."""
    monkeypatch.setitem(DEVICE_KINDS, jax.devices()[0].device_kind, "cpu")
    source = dataclasses.replace(sft_config.source, prompt_length=64, response_length=48)
    folder = run_job(dataclasses.replace(sft_config, source=source, steps=2), tmp_path)
    prompts, responses, matrix = 8 * 64, 8 * 2 * 48, 2 * 16 * 16
    # Four projections and three matrices of the MLP; the decoder also has the projections of its attention to the
    # prompt.
    encoder = prompts * (4 + 3) * matrix
    decoder = responses * (4 + 2 + 3) * matrix + prompts * 2 * matrix
    attention = 2 * 2 * 16 * (prompts * 64 + responses * (48 + 64))
    logits = responses * 2 * 16 * 136
    first, second = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert "mfu" not in first
    found = second["mfu"] * second["seconds_update"] * 8 * 0.1e12
    assert found == pytest.approx(3 * (encoder + decoder + attention + logits), rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last": 0}, "last is 0: it must be at least 1"),
        ({"every": 2}, "keep.every is 2, but keep.last is not set: set it to 1 or more"),
        ({"best": 2}, "keep.best is 2, but keep.last is not set: set it to 1 or more"),
        ({"last": 1, "best": 0}, "best is 0: it must be at least 1"),
        ({"last": 1, "best": 1, "metric": "acuracy"}, "metric is 'acuracy': did you mean accuracy"),
    ],
)
def test_checkpoints_that_cannot_be_kept(settings, message):
    with pytest.raises(UserError, match=message):
        KeepConfig(**settings)


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(sft_config, held_out, tmp_path):
    """The learning rate ruins the policy. Every checkpoint is validated, though only the last validation is due."""
    config = dataclasses.replace(
        sft_config,
        optimizer=OptimizerConfig(learning_rate=1.0),
        monitor=MonitorConfig(str(held_out)),
        keep=KeepConfig(last=1, best=1),
        checkpoint_every=1,
        steps=3,
    )
    folder = run_job(config, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    best = min(lines, key=lambda line: line["loss"])["step"]
    assert best < 3 and steps(folder) == [best, 3]
    with pytest.raises(UserError, match=r"keep\.metric is 'accuracy', but the validation of this job has no"):
        keep = KeepConfig(last=1, best=1, metric="accuracy")
        run_job(dataclasses.replace(config, keep=keep), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ({"validation": "nowhere"}, "nowhere is not a finished dataset"),
        ({"profile": (5, 2)}, r"profile is \(5, 2\): give the first and the last step"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"hang_after": 0.0}, "hang_after is 0.0"),
    ],
)
def test_what_cannot_be_seen_is_told_before_the_first_step(monitor, message, sft_config, tmp_path):
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(sft_config, monitor=MonitorConfig(**monitor)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_examples_that_do_not_go_with_the_job(sft, sft_config, held_out, tmp_path):
    few = dataclasses.replace(sft_config.source, batch_size=24)
    with pytest.raises(UserError, match=r"monitor\.validation has 19 examples, below batch_size=24: give more"):
        run_job(dataclasses.replace(sft_config, source=few, monitor=MonitorConfig(str(held_out))), tmp_path / "run")
    hypo = dataclasses.replace(
        sft_config,
        model=None,
        start=str(sft),
        loss=LossConfig("hypo"),
        fresh=OnlineConfig(sft_config.source, samples=1),
        monitor=MonitorConfig(str(held_out)),
    )
    with pytest.raises(UserError, match=r"monitor\.validation: the loss needs fresh_logps"):
        run_job(hypo, tmp_path / "run")
