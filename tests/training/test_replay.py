"""One compiled update step, two sources: the replay of a recorded online run equals that run, bit for bit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import EVEN_CONFIGS, MESHES, make_batch, random_params

from alignment_gap import losses
from alignment_gap.data.batches import examples_of, offline_source
from alignment_gap.data.records import close_dataset, open_dataset, write_chunk
from alignment_gap.judges.preference_model import make_scores
from alignment_gap.models import PreferenceModel, make_policy
from alignment_gap.models.preference import Markers
from alignment_gap.sampling import SamplerConfig, against_each_other, make_generate, online_source
from alignment_gap.sharding import batch_sharding, make_mesh, replicated
from alignment_gap.training import (
    Checkpoints,
    Monitor,
    OptimizerConfig,
    abstract_state,
    make_optimizer,
    make_refresh,
    make_score,
    make_update_step,
    policy_objective,
    state_from_params,
    train,
    with_fresh,
    with_mismatched,
    with_reference,
)
from alignment_gap.training.monitor import is_of_the_clock

STEPS, CHECKPOINTS, BATCH_SIZE, PROMPT, RESPONSE = 6, (2, 4, 6), 8, 6, 5
SAMPLER = "sampler"


class Killed(Exception):
    """Replaces a kill between two steps."""


def host_batch(seed=0):
    return jax.tree.map(np.asarray, make_batch(BATCH_SIZE, vocabulary_size=11, seed=seed))


class Rig:
    """A policy, its update step and all sources. All runs share the compiled functions."""

    def __init__(self, architecture):
        self.mesh = make_mesh(MESHES["all"])
        self.policy = make_policy(EVEN_CONFIGS[architecture])
        self.optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
        self.abstract = abstract_state(self.policy.init, self.optimizer, self.mesh, copies=(SAMPLER,))
        self.refresh = make_refresh(SAMPLER, 4, self.abstract)
        objective = policy_objective(self.policy, losses.get("ipo", beta=0.1))
        self.update_step = make_update_step(objective, self.optimizer, self.mesh, self.abstract)
        self.reference = self.state().params
        self.score = make_score(self.policy, self.mesh)
        self.generate = make_generate(
            self.policy, self.mesh, samples=2, max_length=RESPONSE, eos_id=1, config=SamplerConfig()
        )
        judge = PreferenceModel(make_policy(EVEN_CONFIGS["decoder"]), Markers(11, 12, 13, 14, 15))
        judge_params = jax.device_put(random_params(judge.policy, 9), replicated(self.mesh))
        self.scores = functools.partial(make_scores(judge, "hard", self.mesh), judge_params)
        self.prompts = [host_batch(seed=step) for step in range(STEPS)]
        self.key = jax.device_put(jax.random.key(4), replicated(self.mesh))

    def state(self):
        return state_from_params(random_params(self.policy), self.abstract, self.optimizer)

    def online(self, params_of=lambda state: state.params):
        """Two samples from parameters of the state; the judge labels them."""

        def prompts(step):
            return jax.device_put(self.prompts[step], batch_sharding(self.mesh))

        def draw(state, batch):
            texts = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
            return self.generate(params_of(state), self.key, state.step, *texts)

        source = online_source(prompts, draw, against_each_other(self.scores), "all", self.mesh)
        return with_reference(source, self.score, lambda state: self.reference)

    def lagging(self):
        """Samples from a copy that is refreshed every four steps."""
        return self.online(lambda state: state.copies[SAMPLER])

    def offline(self, folder):
        batches = offline_source(
            open_dataset(folder),
            batch_size=BATCH_SIZE,
            seed=0,
            prompt_length=PROMPT,
            response_length=RESPONSE,
            order="recorded",
        )
        return lambda step, _: jax.device_put(batches(step), batch_sharding(self.mesh))

    def run(self, folder, source, *, update_step=None, recorder=None, refresh=lambda step, state: state):
        folder.mkdir(exist_ok=True)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state = train(
                checkpoints.restore_last(self.abstract, print) or self.state(),
                update_step or self.update_step,
                source,
                checkpoint_steps=CHECKPOINTS,
                checkpoints=checkpoints,
                monitor=Monitor(folder),
                log_every=2,
                recorder=recorder,
                refresh=refresh,
            )
        return jax.device_get(state)

    def watched(self, log):
        """The update step; it also logs the new parameters."""

        def update_step(state, batch):
            state, metrics = self.update_step(state, batch)
            log.append(jax.device_get(state.params))
            return state, metrics

        return update_step


class Recorder:
    """Writes the batches of each checkpoint as a file."""

    def __init__(self, folder):
        self.folder, self.added = folder, []

    def add(self, step, batch):
        self.step, self.added = step, [*self.added, *examples_of(batch)]

    def save(self):
        write_chunk(self.folder, f"until-{self.step:08d}", self.added)
        self.added = []


def close(folder):
    close_dataset(folder, vocabulary_digest="none", provenance={})


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_of_the_clock(name)} for line in lines]


def assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


rig_of = functools.cache(Rig)


@pytest.fixture(scope="module")
def online_of(tmp_path_factory):
    """An architecture's online run, without a stop: its folder, its last state, its parameters after every step."""

    @functools.cache
    def run(architecture):
        rig, folder, log = rig_of(architecture), tmp_path_factory.mktemp("online") / "run", []
        state = rig.run(folder, rig.online(), update_step=rig.watched(log), recorder=Recorder(folder / "record"))
        close(folder / "record")
        return folder, state, log

    return run


# Two tests cover both architectures. Resuming, lagging and restoring do not depend on the architecture.
@pytest.fixture(scope="module")
def rig():
    return rig_of("decoder")


@pytest.fixture(scope="module")
def online(online_of):
    return online_of("decoder")


@pytest.mark.slow
def test_a_replay_is_the_online_run_bit_for_bit(architecture, online_of, tmp_path):
    rig, (folder, state, log) = rig_of(architecture), online_of(architecture)
    replayed = []
    last = rig.run(tmp_path / "replay", rig.offline(folder / "record"), update_step=rig.watched(replayed))
    assert len(log) == len(replayed) == STEPS
    for before, after in zip(log, replayed, strict=True):
        assert_identical(before, after)
    assert_identical(state, last)
    assert metrics(tmp_path / "replay") == metrics(folder)
    # Both sources used one compiled function.
    assert rig.update_step._cache_size() == 1


def test_the_stream_is_on_policy_and_labelled(architecture, online_of):
    """Otherwise the replay would prove nothing: parameters change, so the samples do, and both labels occur."""
    folder, _, log = online_of(architecture)
    record = open_dataset(folder / "record")
    assert len(record) == STEPS * BATCH_SIZE
    assert {tuple(example.scores.tolist()) for example in record} >= {(0.0, 1.0), (1.0, 0.0)}
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(log[0]), jax.tree.leaves(log[-1]), strict=True)]
    assert min(moved) > 1e-3


def test_another_order_is_another_run(rig, online, tmp_path):
    folder, state, _ = online
    source = rig.offline(folder / "record")
    other = rig.run(tmp_path / "reversed", lambda step, state: source(STEPS - 1 - step, state))
    assert not np.array_equal(other.params["token_embedder"]["embedding"], state.params["token_embedder"]["embedding"])


def stopped(source, at):
    def killing(step, state):
        if step == at:
            raise Killed
        return source(step, state)

    return killing


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_online_run_goes_on_where_it_was_stopped(at, rig, online, tmp_path):
    folder, state, _ = online
    run = tmp_path / "run"
    with pytest.raises(Killed):
        rig.run(run, stopped(rig.online(), at), recorder=Recorder(run / "record"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    resumed = rig.run(run, rig.online(), recorder=Recorder(run / "record"))
    assert_identical(resumed, state)
    assert metrics(run) == metrics(folder)
    close(run / "record")
    for first, second in zip(open_dataset(run / "record"), open_dataset(folder / "record"), strict=True):
        assert_identical(first.responses, second.responses)
        np.testing.assert_array_equal(first.scores, second.scores)


@pytest.fixture(scope="module")
def lagging(rig, tmp_path_factory):
    """The run with a lagging sampler, without a stop: its folder, its last state, its parameters."""
    folder, log = tmp_path_factory.mktemp("lagging") / "run", []
    settings = {"update_step": rig.watched(log), "refresh": rig.refresh, "recorder": Recorder(folder / "record")}
    return folder, rig.run(folder, rig.lagging(), **settings), log


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 5])
def test_a_run_with_a_lagging_sampler_goes_on_with_the_same_copy(at, rig, lagging, tmp_path):
    """Refreshes come before steps 0 and 4. So from the checkpoint of step 2 it continues with the copy of step 0."""
    folder, state, log = lagging
    with pytest.raises(Killed):
        rig.run(tmp_path, stopped(rig.lagging(), at), refresh=rig.refresh)
    resumed = rig.run(tmp_path, rig.lagging(), refresh=rig.refresh)
    assert_identical(resumed, state)
    assert metrics(tmp_path) == metrics(folder)
    assert_identical(state.copies[SAMPLER], log[3])
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert_identical(
            jax.device_get(checkpoints.restore(rig.abstract, 2)).copies[SAMPLER], jax.device_get(rig.reference)
        )


def test_a_lagging_sampler_is_another_run_from_the_first_update_on(online, lagging):
    """The first step is equal: both runs draw their first samples from the start."""
    ours, theirs = online[2], lagging[2]
    assert_identical(ours[0], theirs[0])
    assert not np.array_equal(ours[1]["token_embedder"]["embedding"], theirs[1]["token_embedder"]["embedding"])


def test_an_offline_run_goes_on_where_it_was_stopped(rig, online, tmp_path):
    folder, state, _ = online
    with pytest.raises(Killed):
        rig.run(tmp_path / "run", stopped(rig.offline(folder / "record"), 4))
    resumed = rig.run(tmp_path / "run", rig.offline(folder / "record"))
    assert_identical(resumed, state)
    assert metrics(tmp_path / "run") == metrics(folder)
    finished = rig.run(tmp_path / "run", stopped(rig.offline(folder / "record"), 0))
    assert_identical(finished, state)


def test_a_checkpoint_gives_its_parameters_on_their_own(rig, online):
    folder, _, log = online
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps() == list(CHECKPOINTS)
        for step in CHECKPOINTS:
            assert_identical(jax.device_get(checkpoints.restore_params(rig.abstract.params, step)), log[step - 1])
        assert_identical(jax.device_get(checkpoints.restore_params(rig.abstract.params)), log[-1])


def test_a_checkpoint_is_laid_out_as_asked(rig, online):
    folder, _, log = online
    other = abstract_state(rig.policy.init, rig.optimizer, make_mesh(MESHES["data"]))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(other, 4)
    table = state.params["token_embedder"]["embedding"]
    assert table.sharding.is_fully_replicated
    assert_identical(jax.device_get(state.params), log[3])
    assert int(state.step) == 4


def test_batches_that_are_still_on_the_host_are_refused(rig, tmp_path):
    reference = np.zeros((BATCH_SIZE, 2, RESPONSE), np.float32)
    batch = dataclasses.replace(host_batch(), reference_log_probs=reference)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        rig.run(tmp_path / "run", lambda step, state: batch)


def test_reference_log_probs_are_attached_only_where_there_are_none(rig):
    batch = jax.device_put(host_batch(), batch_sharding(rig.mesh))
    calls = []

    def score(params, *arrays):
        calls.append((params, arrays[2].shape))
        return jnp.full(arrays[2].shape, -3.0)

    source = with_reference(lambda step, state: batch, score, lambda state: "reference")
    attached = source(0, rig.state())
    np.testing.assert_array_equal(attached.reference_log_probs, -3.0)
    again = with_reference(lambda step, state: attached, score, lambda state: "reference")(0, rig.state())
    np.testing.assert_array_equal(again.reference_log_probs, -3.0)
    assert calls == [("reference", batch.responses.shape)]


def test_what_is_beside_a_batch_has_the_references_log_probs_too(rig):
    """The batches beside it: a second source of single responses, and each prompt with the next prompt's responses."""
    batch = jax.device_put(host_batch(), batch_sharding(rig.mesh))
    second = dataclasses.replace(
        batch, responses=batch.responses[:, :1], response_lengths=batch.response_lengths[:, :1]
    )
    both = with_mismatched(with_fresh(lambda step, state: batch, lambda step, state: second), rig.mesh)

    def score(params, prompts, prompt_lengths, responses, lengths):
        return -jnp.asarray(responses, jnp.float32) - prompts[:, :1, None].astype(jnp.float32)

    found = with_reference(both, score, lambda state: None)(0, rig.state())
    for each, responses in ((found, batch.responses), (found.fresh, second.responses)):
        expected = -np.asarray(responses, np.float32) - np.asarray(batch.prompts)[:, :1, None]
        np.testing.assert_array_equal(each.reference_log_probs, expected)
    np.testing.assert_array_equal(found.mismatched.prompts, batch.prompts)
    np.testing.assert_array_equal(found.mismatched.prompt_ids, batch.prompt_ids)
    np.testing.assert_array_equal(found.mismatched.responses, np.roll(batch.responses, -1, axis=0))
    np.testing.assert_array_equal(found.mismatched.response_lengths, np.roll(batch.response_lengths, -1, axis=0))
    expected = -np.roll(batch.responses, -1, axis=0).astype(np.float32) - np.asarray(batch.prompts)[:, :1, None]
    np.testing.assert_array_equal(found.mismatched.reference_log_probs, expected)
    # The batch itself does not change.
    np.testing.assert_array_equal(found.responses, batch.responses)


def test_what_is_beside_a_batch_follows_step_and_state(rig):
    seen = []
    batch = jax.device_put(host_batch(), batch_sharding(rig.mesh))

    def watched(name):
        def source(step, state):
            seen.append((name, step, state))
            return batch

        return source

    state = rig.state()
    with_fresh(watched("first"), watched("second"))(4, state)
    assert [(name, step) for name, step, _ in seen] == [("first", 4), ("second", 4)]
    assert all(each is state for *_, each in seen)
