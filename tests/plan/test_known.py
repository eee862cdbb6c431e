"""Networks and lengths of folders: from the folder, from the job that will make it, or from the user."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from built_in import write_posts
from planning import DECODER, T5, write_run

from alignment_gap.checkpoints import Network
from alignment_gap.data.records import Example, write_dataset
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, PostsConfig, TextSourceConfig
from alignment_gap.errors import UserError
from alignment_gap.jobs.assembly import BatchShape
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.folder import Job
from alignment_gap.jobs.generate import GENERATE, GenerateConfig
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import RewardHead, sizes
from alignment_gap.plan.known import MARKERS, Contents, Known, Overrides
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import OptimizerConfig

LENGTHS = Overrides(prompt_length=40, response_length=20)
PREPARED = Job("data", PREPARE, PrepareConfig(limits=Limits(prompt_length=30, response_length=9)), Path("made/data"))


def trained(folder, needs=(), **settings):
    return Job(folder, TRAIN, JobConfig(**settings), Path("made") / folder, needs)


SFT = trained("sft", model=T5, source=DatasetConfig("made/data/train"))
GOLDEN = trained("golden", kind="pairwise", start="made/sft", source=DatasetConfig("made/data/train"))
ONLINE = trained("online", start="made/sft", source=OnlineConfig(DatasetConfig("made/data/train"), response_length=7))
GRAPH = Known((PREPARED, SFT, GOLDEN, ONLINE))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a policy, a Bradley-Terry model and an unfinished run, under these names."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "policy", Network(model=DECODER))
    write_run(folder / "rewards", Network("bradley_terry", T5, MARKERS))
    (folder / "begun").mkdir()
    return folder


def test_a_job_trains_its_model_or_that_of_its_start(runs):
    assert Known().trained(JobConfig(model=T5)) == Network(model=T5)
    assert Known().trained(JobConfig(start=str(runs / "policy"))) == Network(model=DECODER)
    judge = Known().trained(JobConfig(kind="pairwise", start=str(runs / "policy")))
    assert judge == Network("pairwise", DECODER, MARKERS)


def test_a_start_of_another_network_is_refused_as_train_does(runs):
    start, other = str(runs / "policy"), dataclasses.replace(DECODER, width=2 * DECODER.width)
    with pytest.raises(UserError, match=f"{start} is of another model .width is {other.width}, but {DECODER.width} in"):
        Known().trained(JobConfig(model=other, start=start))
    # What the user says about the folder or the policy, and settings of the run alone, go before.
    Known(given=Overrides(model="t5_small")).trained(JobConfig(model=other, start=start))
    named = Known(given=Overrides(networks=(f"{start}=t5_small",)))
    assert named.trained(JobConfig(model=other, start=start)).model == other
    remat = dataclasses.replace(DECODER, remat="full")
    assert Known().trained(JobConfig(model=remat, start=start)).model == remat


def test_a_reward_model_with_a_head_passes_its_head_on(tmp_path):
    network = Network("bradley_terry", T5, head=RewardHead(pad_id=3))
    write_run(tmp_path / "reward", network)
    assert Known().judge_of(JudgeConfig(str(tmp_path / "reward"))) == network
    assert Known().trained(JobConfig(kind="bradley_terry", start=str(tmp_path / "reward"))) == network
    with pytest.raises(UserError, match="is a reward model, whose head replaces the output embedding: give a policy"):
        Known().trained(JobConfig(start=str(tmp_path / "reward")))
    assert Known().trained(JobConfig(kind="bradley_terry", model=T5, start=str(tmp_path / "reward"))) == network


def test_a_job_of_the_graph_passes_its_model_on():
    assert GRAPH.run("made/online") == Network(model=T5)
    assert GRAPH.judge_of(JudgeConfig("made/golden")) == Network("pairwise", T5, MARKERS)


def test_the_users_sizes_go_before_folders_and_jobs(runs):
    given = Overrides(model="t5_small", judge="palm_10m", dtype="bfloat16", remat="dots")
    small, palm = (sizes.get(name, dtype="bfloat16", remat="dots") for name in ("t5_small", "palm_10m"))
    for known in (Known(given=given), dataclasses.replace(GRAPH, given=given)):
        assert known.trained(JobConfig(model=T5)).model == small
        assert known.run(str(runs / "policy")).model == small
        assert known.run("made/online").model == small
        assert known.judge_of(JudgeConfig("made/golden")) == Network("pairwise", palm, MARKERS)
    assert known.judge_of(JudgeConfig(str(runs / "rewards"))).model == palm


def test_precision_and_remat_change_every_network_and_nothing_else(runs):
    known = dataclasses.replace(GRAPH, given=Overrides(dtype="bfloat16", remat="full"))
    computed = {"dtype": "bfloat16", "remat": "full"}
    assert known.run(str(runs / "policy")).model == dataclasses.replace(DECODER, **computed)
    assert known.judge_of(JudgeConfig("made/golden")).model == dataclasses.replace(T5, **computed)


@pytest.mark.parametrize("judge", [None, "rubric", "my_package.judges:brevity"])
def test_a_judge_on_the_host_has_no_network(judge):
    assert Known(given=Overrides(judge="t5_small")).judge_of(JudgeConfig(judge)) is None


def test_a_judge_that_gives_rewards_is_a_bradley_terry_model(runs):
    rewards = Known(given=Overrides(judge="t5_small")).judge_of(JudgeConfig("there/later", labels="rewards"))
    assert rewards.kind == "bradley_terry"
    assert Known().judge_of(JudgeConfig(str(runs / "rewards"), labels="rewards")).model == T5


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda known, runs: known.run("there/later"), "there/later is not there yet.*give --model"),
        (lambda known, runs: known.judge_of(JudgeConfig("there/later")), "there/later is not there yet.*give --judge"),
        (lambda known, runs: known.trained(JobConfig(start="there/later")), "there/later is not there yet"),
        (lambda known, runs: known.trained(JobConfig()), "the command names no model: give --model"),
        (lambda known, runs: known.run(str(runs / "begun")), "begun has no complete checkpoint"),
        (lambda known, runs: known.run(str(runs / "policy"), 7), "no checkpoint of step 7"),
        (lambda known, runs: known.shape(DatasetConfig("there/later")), "there/later is not.*give --prompt_length"),
        (lambda known, runs: known.shape(DatasetConfig()), "the dataset is not there yet"),
    ],
)
def test_what_is_not_known_is_one_line_with_a_remedy(ask, says, runs):
    with pytest.raises(UserError, match=says) as caught:
        ask(Known(), runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "t5_xxxl"}, "'t5_xxxl' is unknown: did you mean t5_x"),
        ({"model": "t5_small", "remat": "ful"}, "'ful'.*full"),
        ({"model": "t5_small", "dtype": "float16"}, "'float16'.*bfloat16"),
    ],
)
def test_wrong_sizes_and_precisions_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        Known(given=Overrides(**given)).run("there/later")


@pytest.mark.parametrize("name", ["batch", "prompt_length", "response_length"])
def test_sizes_are_positive(name):
    with pytest.raises(UserError, match=f"{name} is 0: it must be at least 1"):
        Overrides(**{name: 0})


def test_overrides_change_what_they_name():
    job = JobConfig(mesh=MeshConfig(data=2), optimizer=OptimizerConfig("sgd", learning_rate=0.5), microbatches=3)
    assert Overrides().applied(job) == job
    changed = Overrides(layout="fsdp", slices=2, optimizer="adafactor", microbatches=4).applied(job)
    assert changed.mesh == MeshConfig(data=2, layout="fsdp", slices=2)
    assert changed.optimizer == OptimizerConfig("adafactor", learning_rate=0.5)
    assert changed.microbatches == 4
    with pytest.raises(UserError, match="'adam': did you mean adamw"):
        Overrides(optimizer="adam").applied(job)


def example(prompt, *responses, **fields):
    tokens = [np.arange(2, 2 + length, dtype=np.int32) for length in (prompt, *responses)]
    per_token = {name: tuple(np.zeros(length, np.float32) for length in responses) for name in fields}
    return Example(0, tokens[0], tuple(tokens[1:]), np.zeros(len(responses), np.float32), **per_token)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two datasets of pairs; the first has log-probs of the sampler."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, rows in {
        "recorded": [example(5, 3, 4, sampler_log_probs=True)],
        "pairs": [example(4, 6, 2), example(9, 2, 2)],
    }.items():
        write_dataset(folder / name, rows, vocabulary_digest="", provenance={})
    return folder


def test_a_dataset_says_what_it_holds(datasets):
    found = Known().contents(DatasetConfig(str(datasets / "recorded")))
    assert found[:3] == (5, 2, 4)
    assert "sampler_log_probs" in found.fields
    both = Known().contents(DatasetConfig(f"{datasets / 'recorded'}, {datasets / 'pairs'}"))
    assert both[:3] == (9, 2, 6)


def test_built_in_posts_are_as_long_as_their_longest(tmp_path):
    card = write_posts(tmp_path / "posts", 8)
    shape = Known().shape(DatasetConfig(str(tmp_path / "posts"), batch_size=4))
    assert shape == BatchShape(4, card.max_prompt_length, 2, card.max_response_length)


def test_lengths_of_a_source(datasets):
    folder = str(datasets / "pairs")
    assert Known().shape(DatasetConfig(folder, batch_size=4)) == BatchShape(4, 9, 2, 6)
    assert Known().shape(DatasetConfig(folder, prompt_length=11, response_length=8)) == BatchShape(32, 11, 2, 8)
    prompts = DatasetConfig(folder, batch_size=4)
    assert Known().shape(OnlineConfig(prompts, samples=8)) == BatchShape(4, 9, 8, 6)
    best = OnlineConfig(prompts, samples=8, judge=JudgeConfig("rubric"), keep="best_and_worst", response_length=5)
    assert Known().shape(best) == BatchShape(4, 9, 2, 5)


def test_the_users_lengths_go_before_all_others(datasets):
    known = Known(given=dataclasses.replace(LENGTHS, batch=16))
    assert known.shape(DatasetConfig(str(datasets / "pairs"), prompt_length=11)) == BatchShape(16, 40, 2, 20)
    assert known.shape(DatasetConfig("there/later")) == BatchShape(16, 40, 2, 20)
    assert known.shape(OnlineConfig(DatasetConfig("there/later"), samples=3)) == BatchShape(16, 40, 3, 20)


def test_datasets_that_jobs_will_make():
    labelled = Job("labelled", LABEL, LabelConfig("made/data/train"), Path("made/labelled"))
    policies = ("made/sft", "made/online")
    generate = GenerateConfig("made/data/train", policies, response_length=12)
    generated = Job("generated", GENERATE, generate, Path("made/generated"))
    known = Known((*GRAPH.jobs, labelled, generated))

    def contents(folder):
        return known.contents(DatasetConfig(folder))

    assert contents("made/data/train") == contents("made/data/validation") == Contents(30, 2, 9)
    assert contents("made/labelled") == Contents(30, 2, 9)
    assert contents("made/generated") == Contents(30, 2, 12)
    recorded = ("sampler_log_probs", "reference_log_probs")
    assert contents("made/online/record") == Contents(30, 2, 7, recorded, examples=1000 * 32)


def test_the_number_of_examples():
    """The record has an example for each prompt of each step. The built-in task says how many pairs it makes."""
    posts = TextSourceConfig(location="posts", posts=PostsConfig(pairs=500, validation_pairs=60))
    built_in = Job("posts", PREPARE, PrepareConfig(posts), Path("made/posts"))
    cut = Job("cut", COMPOSE, ComposeConfig(("made/posts/train", "made/online/record"), limit=400), Path("made/cut"))
    all_ = Job("all", COMPOSE, ComposeConfig(("made/posts/train", "made/online/record")), Path("made/all"))
    drawn = GenerateConfig("made/posts/train", ("made/sft",), limit=90)
    generated = Job("generated", GENERATE, drawn, Path("made/generated"))
    known = Known((*GRAPH.jobs, built_in, cut, all_, generated))

    def count(folder, known=known):
        return known.contents(DatasetConfig(folder)).examples

    assert (count("made/posts/train"), count("made/posts/validation")) == (500, 60)
    assert count("made/posts/train,made/posts/validation") == 560
    assert (count("made/all"), count("made/cut"), count("made/generated")) == (32_500, 400, 90)
    # A file that will be prepared has as many examples as the user says.
    assert count("made/data/train") is None
    assert count("made/data/train,made/posts/train") is None
    told = dataclasses.replace(known, given=Overrides(examples=7))
    assert (count("made/data/train", told), count("made/posts/train", told)) == (7, 500)
    lengths = dataclasses.replace(LENGTHS, examples=7)
    assert count("elsewhere", Known(given=lengths)) == 7


def test_networks_of_folders_that_are_not_there_yet(runs):
    given = Overrides(networks=(f"{runs}/policy=t5_small", "imported=t5_xl", "judge=t5_large"), judge="t5_small")
    known = Known((*GRAPH.jobs, trained("tuned", start="imported")), given)
    assert known.run("imported") == known.run("made/tuned") == Network(model=sizes.get("t5_xl"))
    assert known.run(str(runs / "policy")).model == sizes.get("t5_small")
    # They go before --judge, which still says what all other judges are.
    assert known.judge_of(JudgeConfig("judge")).model == sizes.get("t5_large")
    assert known.judge_of(JudgeConfig("another")).model == sizes.get("t5_small")
    assert known.run("made/sft").model == T5
    with pytest.raises(UserError, match=r"other is not there yet.*give --model, or --networks=other=SIZE"):
        known.run("other")


@pytest.mark.parametrize("wrong", ["imported", "=t5_xl", "imported="])
def test_networks_have_one_form(wrong):
    with pytest.raises(UserError, match=f"networks has {wrong!r}: give FOLDER=SIZE"):
        Overrides(networks=(wrong,))
    with pytest.raises(UserError, match=r"networks has imported=t5_lrge: .* is unknown: did you mean t5_large"):
        Overrides(networks=("imported=t5_lrge",))


def test_a_folder_that_no_job_names_is_refused():
    jobs = [trained("tuned", start="imported").config, LabelConfig(dataset="pairs, more", judge=JudgeConfig("judge"))]
    Overrides(networks=("imported=t5_xl", "judge=t5_large", "more=t5_large")).check_folders(jobs)
    with pytest.raises(UserError, match="networks has importd, which no job names: did you mean imported"):
        Overrides(networks=("judge=t5_large", "importd=t5_xl")).check_folders(jobs)
    with pytest.raises(UserError, match=r"networks has elsewhere.* give a folder as the job writes it"):
        Overrides(networks=("elsewhere=t5_xl",)).check_folders(jobs)


def test_a_folder_in_a_bucket():
    known = dataclasses.replace(GRAPH, given=Overrides(model="t5_small", networks=("gs://bucket/base=t5_large",)))
    assert known.run("gs://bucket/run").model == sizes.get("t5_small")
    assert known.run("gs://bucket/base").model == sizes.get("t5_large")


def test_a_checkpoint_in_the_folder_of_a_run_is_of_its_network():
    assert GRAPH.run("made/online/checkpoints/800") == GRAPH.run("made/online") == Network(model=T5)


def test_a_folder_whose_name_begins_like_anothers_is_not_that_one():
    with pytest.raises(UserError, match="made/data2/train is not there yet"):
        GRAPH.contents(DatasetConfig("made/data2/train"))


def test_a_stream_without_a_reference_records_none():
    free = trained("free", model=T5, source=OnlineConfig(DatasetConfig("made/data/train")), loss=LossConfig("simpo"))
    fields = Known((*GRAPH.jobs, free)).contents(DatasetConfig("made/free/record")).fields
    assert fields == ("sampler_log_probs",)
