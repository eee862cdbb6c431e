"""Online jobs with every kind of source and every loss; resumed and replayed bit for bit."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from job_runs import (
    Bar,
    Stopped,
    arrays,
    assert_equal_checkpoints,
    assert_equal_runs,
    changed,
    metrics,
    run_and_stop,
    run_job,
)

from alignment_gap import losses
from alignment_gap.checkpoints import read_digest
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.text import load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.jobs import record, train
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, LossConfig, MonitorConfig, OnlineConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.reading import open_reading
from alignment_gap.jobs.served import check_cards, holds_rewards
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig

IPO = LossConfig("ipo", {"beta": 0.1})


def replay(config, folder, batch_size=8):
    """The job on the recorded batches of a run, in order."""
    source = DatasetConfig(str(folder / "record"), batch_size=batch_size, order="recorded")
    return dataclasses.replace(config, source=source)


@pytest.fixture(scope="module")
def run(online, tmp_path_factory):
    return run_job(online, tmp_path_factory.mktemp("online") / "run")


def test_it_samples_its_own_policy_and_is_labelled_by_the_judge(run, online):
    record = open_dataset(run / "record")
    assert len(record) == 48 and set(record.card.fields) > {"sampler_log_probs", "reference_log_probs"}
    assert {tuple(example.scores.tolist()) for example in record} <= {(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)}
    made = record.card.provenance
    assert made["made_by"] == "online" and made["judge"] == online.source.judge.judge and made["inputs"]
    # At the start the policy is the reference, so both have the same log-probs.
    first = record[0]
    for sampled, reference in zip(first.sampler_log_probs, first.reference_log_probs, strict=True):
        np.testing.assert_allclose(sampled, reference, atol=1e-4)
    last = record[-1]
    assert (
        max(np.abs(a - b).max() for a, b in zip(last.sampler_log_probs, last.reference_log_probs, strict=True)) > 0.01
    )


def test_a_replay_of_the_record_is_the_run_bit_for_bit(run, online, tmp_path):
    replayed = run_job(replay(online, run), tmp_path)
    assert metrics(replayed) == metrics(run)
    assert_equal_checkpoints(replayed, run)


@pytest.mark.parametrize(("rows", "is_told"), [("fewer", True), ("as many", False)])
def test_the_judge_has_a_row_for_each_token_of_the_vocabulary(rows, is_told, online, tmp_path, monkeypatch):
    """The policy's embedding has 136 rows. The vocabulary has fewer tokens, and the judge needs rows for them alone."""
    size = load_vocabulary("posts").size
    assert size < 136
    known = size - 1 if rows == "fewer" else size
    opened = train.open_judge
    monkeypatch.setattr(train, "open_judge", lambda *asked: opened(*asked)._replace(vocabulary_size=known))
    if not is_told:
        assert train.open_training(online).facts["judge"] == online.source.judge.judge
        return
    with pytest.raises(
        UserError, match=rf"has vocabulary_size={known}, but the policy may draw {size} token ids: give"
    ):
        run_job(online, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_replay_pads_to_the_lengths_of_the_run(online, tmp_path):
    """Padding changes the bits of sums, and no prompt of this run is as long as its padding."""
    padded = changed(online, prompts=dataclasses.replace(online.source.prompts, prompt_length=50))
    run = run_job(padded, tmp_path / "run")
    source = replay(padded, run).source
    card = open_dataset(run / "record").card
    assert card.max_prompt_length < 50
    for order, length in (("recorded", 50), ("shuffle", card.max_prompt_length)):
        reading = open_reading(dataclasses.replace(source, order=order), "source")
        assert reading.shapes == ((length, card.max_response_length),)
    replayed = run_job(replay(padded, run), tmp_path / "replayed")
    assert metrics(replayed) == metrics(run)
    assert_equal_checkpoints(replayed, run)


# Before the first checkpoint and after the second one; the tests of the loop stop at a checkpoint.
@pytest.mark.parametrize("after", [1, 5])
def test_killed_it_goes_on_with_the_same_bits(after, run, online, tmp_path):
    run_and_stop(online, tmp_path, after)
    assert_equal_runs(run_job(online, tmp_path), run)
    same_record(tmp_path, run)


@pytest.mark.slow
def test_prompts_alone_choose_the_buckets(online, tmp_path):
    """Recorded responses do not matter. A run whose batches have two shapes continues with the same bits."""
    prompts = dataclasses.replace(online.source.prompts, buckets=2)
    shorter, longer = open_reading(prompts, "prompts", prompts_only=True).shapes
    assert shorter[0] < longer[0] and shorter[1] == longer[1]
    config, bar = changed(online, prompts=prompts), Bar()
    whole = run_job(config, tmp_path / "whole", bar)
    lengths = [len(example.prompt) for example in open_dataset(whole / "record")]
    batches = np.reshape(lengths, (6, 8)).max(axis=1)
    assert (batches <= shorter[0]).any() and (batches > shorter[0]).any()
    assert any("of the prompts' token slots hold padding" in line for line in bar.lines)
    run_and_stop(config, tmp_path / "stopped", after=3)
    assert_equal_runs(run_job(config, tmp_path / "stopped"), whole)


def test_a_job_says_at_its_start_what_four_buckets_would_leave(online, tmp_path):
    """With four buckets the job says the same share. Steps that share a draw cannot have buckets."""
    bar = Bar(stop_at=-1)
    for name, settings in (
        ("one", {}),
        ("four", {"prompts": dataclasses.replace(online.source.prompts, buckets=4)}),
        ("draws", {"steps_per_draw": 2, "refresh_every": 2}),
    ):
        with pytest.raises(Stopped):
            run_job(changed(online, **settings), tmp_path / name, bar)
    one, four, draws = (
        re.findall(r"[\d.]+%", line) for line in bar.lines if "of the prompts' token slots hold padding" in line
    )
    assert one == [*draws, *four] and float(four[0][:-1]) < float(draws[0][:-1])


@pytest.mark.slow
def test_other_checkpoints_when_it_goes_on_lose_no_batch_of_the_record(run, online, tmp_path):
    """The run stops after it has written a chunk of the record. The new checkpoints do not match this chunk."""
    run_and_stop(dataclasses.replace(online, checkpoint_every=3), tmp_path, after=5)
    run_job(online, tmp_path)
    same_record(tmp_path, run)
    # A longer run continues the record too.
    longer = run_job(dataclasses.replace(online, steps=8), tmp_path)
    assert len(open_dataset(longer / "record")) == 64


@pytest.mark.slow
def test_the_digest_of_the_record_follows_from_its_samples_alone(run, online, tmp_path, monkeypatch):
    """The digest does not depend on checkpoints, on stops within a file or after it, or on a longer run."""

    def saved(name, **settings):
        return run_job(dataclasses.replace(online, **settings), tmp_path / name)

    digest = open_dataset(run / "record").card.digest
    assert open_dataset(saved("three", checkpoint_every=3) / "record").card.digest == digest
    # Each file has four steps.
    monkeypatch.setattr(record, "_CHUNK_STEPS", 4)
    whole = saved("whole")
    assert [chunk.name for chunk in open_dataset(whole / "record").card.files] == [
        "until-00000004.array_record",
        "until-00000006.array_record",
    ]
    # The last one has written a full file after its last checkpoint.
    for every, after in ((1, 3), (1, 5), (3, 5)):
        name = f"stopped_{every}_{after}"
        run_and_stop(dataclasses.replace(online, checkpoint_every=every), tmp_path / name, after)
        assert_same_files(saved(name, checkpoint_every=5), whole)
    saved("longer", steps=2)
    assert_same_files(saved("longer", checkpoint_every=6), whole)


def assert_same_files(first, second):
    """Asserts that both records have equal files, including their cards."""
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / "record").iterdir()} for folder in (first, second)
    )
    assert ours == theirs


def test_a_record_that_lost_a_file_is_not_gone_on_with(online, tmp_path):
    run_and_stop(online, tmp_path, after=3)
    (tmp_path / "record" / "until-00000002.array_record").unlink()
    with pytest.raises(UserError, match="record lacks samples before step 2: give another folder"):
        run_job(online, tmp_path)


def same_record(first, second):
    ours, theirs = open_dataset(first / "record"), open_dataset(second / "record")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.concatenate(a.responses), np.concatenate(b.responses))
        np.testing.assert_array_equal(np.concatenate(a.sampler_log_probs), np.concatenate(b.sampler_log_probs))
        np.testing.assert_array_equal(a.scores, b.scores)


def test_no_record_where_none_is_asked_for(run, online, tmp_path):
    config = changed(dataclasses.replace(online, steps=1), record=False)
    assert not (run_job(config, tmp_path) / "record").exists()


@pytest.fixture(scope="module")
def semi_online(online, tmp_path_factory):
    return run_job(changed(online, refresh_every=3), tmp_path_factory.mktemp("semi") / "run")


@pytest.mark.slow
def test_a_sampler_that_lags_draws_from_the_policy_of_the_last_refresh(run, semi_online):
    """Its step 0 is that of the online run. The samples of steps 0 to 2 come from the start, later ones do not."""
    ours, online = open_dataset(semi_online / "record"), open_dataset(run / "record")
    drawn = [np.concatenate([np.concatenate(e.responses) for e in each[:8]]) for each in (ours, online)]
    np.testing.assert_array_equal(*drawn)
    gap = [
        max(
            np.abs(a - b).max()
            for e in ours[8 * step : 8 * step + 8]
            for a, b in zip(e.sampler_log_probs, e.reference_log_probs, strict=True)
        )
        for step in range(6)
    ]
    assert max(gap[:3]) < 1e-4 and min(gap[3:]) > 1e-3


@pytest.mark.slow
def test_a_sampler_that_lags_goes_on_bit_for_bit_between_two_refreshes(online, semi_online, tmp_path):
    config = changed(online, refresh_every=3)
    run_and_stop(config, tmp_path, after=5)
    assert any(name.startswith("copies.sampler") for name in arrays(tmp_path))
    assert_equal_runs(run_job(config, tmp_path), semi_online)


@pytest.mark.slow
def test_three_steps_in_one_draw_train_on_the_samples_of_three_draws(online, semi_online, tmp_path):
    """And a job that stops between the steps of a draw goes on bit for bit."""
    config = changed(online, refresh_every=3, steps_per_draw=3)
    folder = run_job(config, tmp_path / "whole")
    for ours, theirs in zip(open_dataset(folder / "record"), open_dataset(semi_online / "record"), strict=True):
        np.testing.assert_array_equal(np.concatenate(ours.responses), np.concatenate(theirs.responses))
        np.testing.assert_array_equal(ours.scores, theirs.scores)
    losses = ([line["loss"] for line in metrics(each)] for each in (folder, semi_online))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    run_and_stop(config, tmp_path / "stopped", after=5)
    assert_equal_runs(run_job(config, tmp_path / "stopped"), folder)


@pytest.mark.slow
def test_a_sampler_that_never_refreshes_stays_at_the_start(online, tmp_path):
    folder = run_job(changed(online, refresh_every=0), tmp_path)
    for example in open_dataset(folder / "record"):
        for sampled, reference in zip(example.sampler_log_probs, example.reference_log_probs, strict=True):
            np.testing.assert_allclose(sampled, reference, atol=1e-4)
    assert not any(name.startswith("copies") for name in arrays(folder))


@pytest.mark.slow
def test_the_best_and_the_worst_of_four(online, tmp_path):
    """Labels are win fractions among all four samples; the best and the worst sample keep theirs."""
    config = changed(dataclasses.replace(online, steps=2), samples=4, keep="best_and_worst")
    record = open_dataset(run_job(config, tmp_path) / "record")
    assert record.card.responses_per_prompt == 2 and record.card.scores == "rewards"
    assert all(example.scores[0] >= example.scores[1] for example in record)
    assert any(example.scores[0] > example.scores[1] for example in record)
    replayed = run_job(replay(config, tmp_path), tmp_path / "replay")
    assert_equal_checkpoints(replayed, tmp_path)


@pytest.mark.slow
def test_the_best_of_four_is_trained_on_alone(online, tmp_path):
    config = changed(dataclasses.replace(online, loss=LossConfig("sft"), steps=2), samples=4, keep="best")
    record = open_dataset(run_job(config, tmp_path) / "record")
    assert record.card.responses_per_prompt == 1


@pytest.mark.slow
def test_rewards_of_the_rubric_reach_the_loss(online, tmp_path):
    """GRPO's loss is zero if all rewards are equal. Here the rewards come from the rubric."""
    config = dataclasses.replace(online, loss=LossConfig("grpo", {"beta": 0.0}), steps=2)
    config = changed(config, samples=4, judge=JudgeConfig("rubric", labels="rewards"))
    record = open_dataset(run_job(config, tmp_path) / "record")
    assert record.card.scores == "rewards"
    assert all(0.0 <= score <= 1.0 for example in record for score in example.scores)


@pytest.mark.slow
def test_a_mixture_is_between_the_policy_and_the_reference(online, reward_model, tmp_path):
    """With weight 1 the samples come from the reference. Labels are probabilities that add up to one."""
    judge = JudgeConfig(str(reward_model), labels="soft")
    config = dataclasses.replace(online, loss=LossConfig("ipo_md"), steps=4)
    record = open_dataset(run_job(changed(config, judge=judge, mixture=1.0), tmp_path) / "record")
    for example in record:
        assert example.scores.sum() == pytest.approx(1.0) and 0 < example.scores[0] < 1
        for sampled, reference in zip(example.sampler_log_probs, example.reference_log_probs, strict=True):
            np.testing.assert_allclose(sampled, reference, atol=1e-4)


@pytest.mark.slow
def test_nash_md_scores_samples_against_the_mixture(online, judge, tmp_path):
    config = dataclasses.replace(online, loss=LossConfig("nash_md"), steps=2)
    config = changed(config, judge=JudgeConfig(str(judge), labels="soft"), mixture=0.125, against="mixture", samples=1)
    record = open_dataset(run_job(config, tmp_path) / "record")
    assert record.card.responses_per_prompt == 1
    scores = [float(example.scores[0]) for example in record]
    assert all(0 < score < 1 for score in scores) and len(set(scores)) > 4


@pytest.fixture(scope="module")
def hypo(online, pairs, prompts):
    fresh = OnlineConfig(DatasetConfig(str(pairs), batch_size=8), samples=1)
    return dataclasses.replace(online, loss=LossConfig("hypo"), source=prompts, fresh=fresh)


@pytest.mark.slow
def test_recorded_pairs_and_fresh_samples_in_one_step(hypo, tmp_path):
    """The fresh samples are recorded. A replay of this record with the pairs equals the run."""
    run = run_job(hypo, tmp_path / "run")
    record = open_dataset(run / "record")
    assert len(record) == 6 * 8 and record.card.responses_per_prompt == 1
    run_and_stop(hypo, tmp_path / "stopped", after=3)
    assert_equal_runs(run_job(hypo, tmp_path / "stopped"), run)
    recorded = DatasetConfig(str(run / "record"), batch_size=8, order="recorded")
    replayed = run_job(dataclasses.replace(hypo, fresh=recorded), tmp_path / "replay")
    assert_equal_checkpoints(replayed, run)


def test_fresh_samples_do_not_stand_beside_packed_rows(hypo, tmp_path):
    source = dataclasses.replace(hypo.source, packing=2)
    with pytest.raises(UserError, match="needs fresh samples for every prompt, but packed rows have empty slots"):
        run_job(dataclasses.replace(hypo, source=source), tmp_path / "run")


def test_both_sources_have_as_many_prompts(hypo):
    fresh = OnlineConfig(DatasetConfig(hypo.source.folder, batch_size=16), samples=1)
    with pytest.raises(UserError, match="fresh has batch_size=16, but source has 8: give both the same"):
        dataclasses.replace(hypo, fresh=fresh)


def test_a_second_source_in_vain_is_refused(hypo, tmp_path):
    with pytest.raises(UserError, match="the loss ipo reads no second source"):
        run_job(dataclasses.replace(hypo, loss=IPO), tmp_path / "run")


# The settings that a loss needs in addition to two samples with hard labels. The numbers of samples are those of tests
# above, whose functions are compiled already.
SOURCES = {
    "nash_md": {"mixture": 0.125, "against": "mixture"},
    "ipo_md": {"mixture": 0.125},
    **{name: {"samples": 4} for name in ("grpo", "dapo", "dr_grpo", "rloo", "ppo_clip", "raft", "rebel")},
}


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_of_the_registry_is_served_by_some_source(name, online, hypo, monkeypatch):
    """An opened job traces the loss on batches of the source. The tests of the objective check its gradient."""
    # Shapes suffice here, so the parameters of the start and of the judge are not read.
    monkeypatch.setattr(train, "_start", lambda *assembly: None)
    monkeypatch.setattr(train, "open_judge", lambda *judge: None)
    monkeypatch.setattr(train, "_check_judge", lambda *judge: None)
    served = hypo if name == "hypo" else changed(online, **SOURCES.get(name, {}))
    opened = TRAIN.open(dataclasses.replace(served, loss=LossConfig(name)))
    assert opened.facts["source.digest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "kto", "rebel"])
def test_a_loss_trains_on_fresh_samples(name, online, tmp_path):
    """One loss for each further input: the sampler's log-probs, other examples of the batch, all pairs of a prompt."""
    config = changed(dataclasses.replace(online, loss=LossConfig(name), steps=1), **SOURCES.get(name, {}))
    (line,) = metrics(run_job(config, tmp_path))
    assert np.isfinite(line["loss"]) and line["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("reinforce", {"refresh_every": 2}, "refresh_every is 2: set it to 1"),
        ("nash_md", {"mixture": 0.5}, "leave mixture=0.5 out, or set against to 'mixture'"),
        (
            "reinforce",
            {"sampler": SamplerConfig(top_p=0.9)},
            "the sampler has a temperature, top_k or top_p: leave them",
        ),
        (
            "kto",
            {"judge": JudgeConfig("rubric", labels="rewards")},
            "kto reads scores as probabilities, but judge.labels",
        ),
        *(
            (loss, {"samples": 4, "keep": keep}, f"the loss {loss} is a mean .* keep is '{keep}', .* set it to 'all'")
            for loss in ("reinforce", "rloo", "grpo", "online_kl")
            for keep in ("best_and_worst", "best")
        ),
        ("ipo", {"keep": "best"}, "needs chosen_logps, .* which a batch of one response a prompt does not have"),
    ],
)
def test_what_a_source_cannot_serve_is_told_before_the_first_step(loss, settings, message, online, tmp_path):
    config = changed(dataclasses.replace(online, loss=LossConfig(loss)), **settings)
    with pytest.raises(UserError, match=message):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_card(dataset, folder, **changes):
    """The examples of a dataset with another card."""
    card = dataset.card
    kept = {name: getattr(card, name) for name in ("vocabulary_digest", "provenance", "scores")}
    write_dataset(folder, dataset, **kept | changes)
    return DatasetConfig(str(folder), batch_size=8)


def test_a_loss_of_probabilities_refuses_recorded_rewards(online, pairs, tmp_path):
    source = with_card(open_dataset(pairs), tmp_path / "rewards", scores="rewards")
    config = dataclasses.replace(online, loss=LossConfig("kto"), source=source)
    with pytest.raises(UserError, match=r"kto reads scores as probabilities, but the scores of .*rewards are rewards"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_win_rates_among_several_samples_are_probabilities_each(run):
    """Two of them say only which response is better, so the card of a record calls them rewards."""
    card = dataclasses.replace(open_dataset(run / "record").card, scores="rewards")
    assert not holds_rewards(card)
    for labels in ({"labels": "rewards"}, {"labels": None}, {"made_by": "label"}):
        assert holds_rewards(dataclasses.replace(card, provenance={**card.provenance, **labels}))


OF_ITS_OWN = {"loss": "reinforce", "batch_size": 8, "refresh_every": 1, "keep": "all", "against": "each_other"}
OF_ITS_OWN |= {"mixture": None, "temperature": 1.0, "top_k": None, "top_p": None}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"made_by": "generate"}, "is not the record of an online run: train online, or on the record of"),
        ({"top_p": ...}, "does not say how they were drawn, because an earlier version"),
        ({"refresh_every": 0}, "was recorded with refresh_every=0, not 1"),
        ({"temperature": 3.0}, r"was recorded with temperature=3\.0, not 1\.0"),
        ({"top_k": 4}, "was recorded with top_k=4, not None"),
        ({"keep": "best_and_worst"}, "was recorded with keep='best_and_worst', not 'all'"),
        ({"mixture": 0.5}, r"was recorded with mixture=0\.5, not None"),
        ({"batch_size": 4}, "was recorded with batch_size=4, not 8"),
        ({"loss": "ipo"}, "was recorded with loss='ipo', not 'reinforce': train online"),
        ({"mixture": 0.5, "against": "mixture"}, None),
        ({"top_p": 1.0}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("place", ["source", "fresh"])
def test_a_loss_on_its_own_samples_reads_only_a_record_of_such_a_run(place, made, message, run, online, hypo, tmp_path):
    card = open_dataset(run / "record").card
    facts = {**card.provenance, **OF_ITS_OWN, **({"loss": "hypo"} if place == "fresh" else {}), **made}
    card = dataclasses.replace(card, provenance={name: value for name, value in facts.items() if value is not ...})
    record = DatasetConfig(str(run / "record"), batch_size=8, order="recorded")
    if place == "fresh":
        config, cards = dataclasses.replace(hypo, fresh=record), ([], [card])
        message = message and message.replace("reinforce", "hypo")
    else:
        config, cards = dataclasses.replace(online, loss=LossConfig("reinforce"), source=record), ([card],)
    if message is None:
        check_cards(config, config.loss.function(), *cards)
        return
    with pytest.raises(UserError, match=message):
        check_cards(config, config.loss.function(), *cards)


def test_pairs_are_no_fresh_samples(hypo, pairs, tmp_path):
    with pytest.raises(UserError, match=r"hypo is only right for .*, but the order of .* is 'shuffle': give"):
        run_job(dataclasses.replace(hypo, fresh=DatasetConfig(str(pairs), batch_size=8)), tmp_path / "run")
    fresh = DatasetConfig(str(pairs), batch_size=8, order="recorded")
    with pytest.raises(UserError, match=r"hypo is only right for .* is not the record of an online run"):
        run_job(dataclasses.replace(hypo, fresh=fresh), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_selected_samples_are_refused_on_a_record_too(run, online):
    card = open_dataset(run / "record").card
    selected = dataclasses.replace(card, provenance={**card.provenance, "keep": "best_and_worst"})
    config = dataclasses.replace(replay(online, run), loss=LossConfig("grpo"))
    check_cards(config, config.loss.function(), [card])
    shuffled = {"made_by": "compose", "inputs": [{"provenance": selected.provenance}]}
    for each in (selected, dataclasses.replace(card, provenance=shuffled)):
        with pytest.raises(UserError, match="was recorded with keep='best_and_worst', and training on sel"):
            check_cards(config, config.loss.function(), [each])
    # Losses of pairs read both, in any order; and cards of earlier versions, which say less.
    for loss in ("ipo", "dpo"):
        config = dataclasses.replace(config, loss=LossConfig(loss))
        check_cards(config, config.loss.function(), [selected, dataclasses.replace(card, provenance={})])


def test_the_reference_of_a_record_is_the_jobs(run, sft, online, tmp_path):
    """Or the job is refused. A dataset that is made from the record names its reference too."""
    made = open_dataset(run / "record").card.provenance
    assert made["reference"] == str(sft) and made["reference_digest"] == read_digest(sft / "checkpoints" / "6")
    message = r" has the log-probs of the reference .*sft \(\w{12}\), but this job's reference is .*: set reference"
    shuffled = tmp_path / "shuffled"
    make(COMPOSE, ComposeConfig((str(run / "record"),)), shuffled, Bar())
    for source in (replay(online, run).source, DatasetConfig(str(shuffled), batch_size=8)):
        other = dataclasses.replace(online, source=source, start_step=2)
        with pytest.raises(UserError, match=message):
            TRAIN.open(other)
        assert TRAIN.open(dataclasses.replace(other, reference=str(sft)))
        # A loss without a reference reads none of this.
        assert TRAIN.open(dataclasses.replace(other, loss=LossConfig("sft")))


def test_a_dataset_that_does_not_name_its_reference_is_the_reference(run, online, sft, tmp_path):
    source = with_card(open_dataset(run / "record"), tmp_path / "old", provenance={"made_by": "online"})
    config = dataclasses.replace(online, source=source, start_step=2)
    assert TRAIN.open(config)
    with pytest.raises(UserError, match=r"old has reference log-probs of its own: leave reference='.*sft' out"):
        TRAIN.open(dataclasses.replace(config, reference=str(sft)))


@pytest.mark.slow
def test_validation_measures_against_the_jobs_own_reference(run, online, pairs, tmp_path):
    """The record has the log-probs of step 6 of the start; this job's reference is step 2."""
    held_out = with_card(open_dataset(run / "record"), tmp_path / "held_out", provenance={}).folder
    plain = [dataclasses.replace(each, reference_log_probs=None) for each in open_dataset(held_out)]
    card = open_dataset(held_out).card
    write_dataset(tmp_path / "plain", plain, vocabulary_digest=card.vocabulary_digest, provenance={})
    lines = []
    for name, folder in (("with", held_out), ("without", tmp_path / "plain")):
        monitor = MonitorConfig(str(folder))
        source = DatasetConfig(str(pairs), batch_size=8)
        config = dataclasses.replace(online, source=source, start_step=2, steps=1, monitor=monitor)
        lines.append((run_job(config, tmp_path / name) / "validation.jsonl").read_text())
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_replay_of_reinforce_is_the_run_bit_for_bit(online, tmp_path):
    config = dataclasses.replace(online, loss=LossConfig("reinforce"), steps=3)
    run = run_job(config, tmp_path / "run")
    assert open_dataset(run / "record").card.provenance.items() >= OF_ITS_OWN.items()
    assert_equal_checkpoints(run_job(replay(config, run), tmp_path / "replayed"), run)


@pytest.mark.slow
def test_a_policy_gradient_runs_on_the_record_of_samples(run, online, tmp_path):
    """It reads the sampler's log-probs from the record. In packed rows the width of a batch has another meaning."""
    config = dataclasses.replace(replay(online, run), loss=LossConfig("ppo_clip"), steps=2)
    assert len(metrics(run_job(config, tmp_path / "ppo"))) == 2
    packed = dataclasses.replace(config.source, order="shuffle", packing=2)
    with pytest.raises(UserError, match="dr_grpo divides by the width of a batch's rows"):
        run_job(dataclasses.replace(config, loss=LossConfig("dr_grpo"), source=packed), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0: it must be at least 1"),
        ({"samples": 1, "judge": JudgeConfig("rubric")}, "there is nothing to compare, draw 2 or more"),
        ({"keep": "worst"}, "keep is 'worst': choose one of all"),
        ({"keep": "best"}, "there is no judge"),
        ({"mixture": 1.5}, "mixture is 1.5: it must be from 0 to 1"),
        ({"against": "mixture"}, "mixture or judge is not set"),
        ({"refresh_every": -1}, "refresh_every is -1"),
        ({"steps_per_draw": 0}, "steps_per_draw is 0: it must be at least 1"),
        ({"steps_per_draw": 2}, "steps_per_draw is 2 and refresh_every is 1: the steps of a draw share"),
        ({"steps_per_draw": 4, "refresh_every": 6}, "steps_per_draw is 4 and refresh_every is 6"),
        (
            {"steps_per_draw": 2, "refresh_every": 2, "prompts": DatasetConfig(buckets=3)},
            "steps_per_draw is 2 and prompts.buckets is 3: the steps of a draw need prompts of one shape",
        ),
        ({"prompts": DatasetConfig(packing=1)}, "prompts.packing is 1"),
    ],
)
def test_bad_settings_of_an_online_source(settings, message):
    with pytest.raises(UserError, match=message):
        OnlineConfig(**settings)


@pytest.mark.slow
def test_another_layout_draws_the_same_and_trains_alike(run, online, tmp_path):
    """The samples of step 0 are the same tokens; losses agree up to the rounding of sums over devices.

    This layout splits everything that the others split, and positions. The tests of sampler and update step have all
    layouts.
    """
    assert jax.device_count() == 8
    mesh = MeshConfig(data=-1, fsdp=2, model=2, layout="sequence")
    folder = run_job(dataclasses.replace(online, mesh=mesh, steps=2), tmp_path)
    for ours, theirs in zip(open_dataset(folder / "record")[:8], open_dataset(run / "record")[:8], strict=True):
        np.testing.assert_array_equal(np.concatenate(ours.responses), np.concatenate(theirs.responses))
    np.testing.assert_allclose(metrics(folder)[0]["loss"], metrics(run)[0]["loss"], rtol=1e-4)
