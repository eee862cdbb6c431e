"""Reward models of Hugging Face folders in jobs: they label, score online samples, give win rates, and are trained."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from byte_tokenizer import make_tokenizer
from job_runs import Bar, assert_equal_runs, metrics, run_and_stop, run_job

from alignment_gap.checkpoints import Network, open_checkpoint, read_digest, write_checkpoint
from alignment_gap.checkpoints.formats import export_checkpoint, import_checkpoint, model_shapes
from alignment_gap.checkpoints.huggingface import write
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.data.records import open_dataset
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, TextSourceConfig, load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import at
from alignment_gap.jobs.config import DatasetConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.reference import REFERENCE, ReferenceConfig
from alignment_gap.jobs.train import open_training
from alignment_gap.judges import JudgeConfig, by_itself
from alignment_gap.models import AdapterConfig, DecoderConfig, RewardHead, T5Config
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import OptimizerConfig, load_policy, load_preference_model

SIZES = {"vocabulary_size": 136, "width": 16, "heads": 2, "head_size": 8, "mlp_width": 16, "tied_embeddings": True}
MODELS = {
    "llama": DecoderConfig(**SIZES, layers=2, block="serial", logits_scale="one"),
    "t5": T5Config(**SIZES, encoder_layers=1, decoder_layers=1),
}


def imported(folder, name, digest=None):
    """The run of an imported reward model with random parameters."""
    rng = np.random.default_rng(0)
    tensors = {
        each: from_array(rng.normal(scale=0.3, size=shape).astype(np.float32), stacked="layers" in each.split("."))
        for each, shape in model_shapes(MODELS[name], RewardHead()).items()
    }
    write(folder / "theirs", MODELS[name], tensors, head=RewardHead(pad_id=0))
    import_checkpoint(folder / "theirs", folder / "run", tokenizer_digest=lambda _: digest)
    return folder / "run"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """The folders of reward models, by architecture."""
    folder = tmp_path_factory.mktemp("rewards")
    return {name: imported(folder / name, name) for name in MODELS}


@pytest.fixture(scope="module")
def trained(rewards, sft_config, tmp_path_factory):
    """A run that starts from the Llama reward model."""
    config = dataclasses.replace(sft_config, kind="bradley_terry", model=None, start=str(rewards["llama"]), steps=2)
    return run_job(config, tmp_path_factory.mktemp("rewards") / "trained")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_labels_a_dataset_with_its_rewards(name, rewards, pairs, tmp_path):
    config = LabelConfig(str(pairs), by_itself(str(rewards[name])), batch_size=16)
    assert config.judge.labels == "rewards"
    make(LABEL, config, tmp_path / "labelled", Bar())
    found = open_dataset(tmp_path / "labelled")
    assert found.card.scores == "rewards"
    model, params = load_preference_model(rewards[name], make_mesh(MeshConfig(), jax.devices()[:1]))
    scores = jax.jit(lambda *texts: model.scores(params, *texts, labels="rewards"))
    longest = (found.card.max_prompt_length, found.card.max_response_length)
    for example in found[:3]:
        for response, score in zip(example.responses, example.scores, strict=True):
            prompt = np.pad(example.prompt, (0, longest[0] - len(example.prompt)))[None]
            padded = np.pad(response, (0, longest[1] - len(response)))[None, None]
            alone = scores(prompt, np.array([len(example.prompt)]), padded, np.array([[len(response)]]))
            np.testing.assert_allclose(score, alone[0, 0], rtol=0, atol=1e-5)
    assert np.std([example.scores for example in found]) > 0.1


@pytest.mark.slow
def test_it_scores_the_samples_of_an_online_run(rewards, online, tmp_path):
    judge = JudgeConfig(str(rewards["llama"]), labels="rewards")
    source = dataclasses.replace(online.source, judge=judge, response_length=6)
    run = run_job(dataclasses.replace(online, source=source, steps=2), tmp_path / "online")
    assert all(np.isfinite(line["loss"]) for line in metrics(run))
    assert np.std([example.scores for example in open_dataset(run / "record")]) > 0.1


@pytest.mark.slow
def test_it_gives_win_rates_and_is_classified_itself(rewards, sft, pairs, tmp_path):
    sizes = {"prompts": 8, "kl_prompts": 8, "pairs": 8, "batch_size": 8, "steps": (6,), "response_length": 4}
    judges, opponents = (f"theirs={rewards['llama']}",), (f"start={sft}",)
    config = EvaluateConfig(
        run=str(sft), dataset=str(pairs), judges=judges, opponents=opponents, reference=str(sft), **sizes
    )
    make(EVALUATE, config, tmp_path / "policy", Bar())
    with (tmp_path / "policy" / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 <= float(row["win_rate.theirs.start"]) <= 1
    assert np.isfinite(float(row["reward.theirs"]))
    config = EvaluateConfig(run=str(rewards["llama"]), dataset=str(pairs), pairs=16, batch_size=8)
    make(EVALUATE, config, tmp_path / "judge", Bar())
    with (tmp_path / "judge" / "results.csv").open(newline="") as file:
        assert 0 <= float(next(csv.DictReader(file))["accuracy"]) <= 1


@pytest.mark.slow
def test_it_is_trained_further_and_goes_out_again(trained, rewards, tmp_path):
    start, stored = (open_checkpoint(folder) for folder in (rewards["llama"], trained))
    assert stored.network.head == start.network.head == RewardHead(pad_id=0)
    assert stored.tensors.keys() == start.tensors.keys()
    head = stored.tensors["score.kernel"].read(None)
    assert np.abs(head - start.tensors["score.kernel"].read(None)).max() > 1e-3
    export_checkpoint(trained, tmp_path / "out", "huggingface")
    again = import_checkpoint(tmp_path / "out", tmp_path / "again")
    np.testing.assert_array_equal(again.tensors["score.kernel"].read(None), head)


@pytest.mark.slow
def test_adapters_are_trained_on_it(rewards, sft_config, tmp_path):
    """The head is trained too, from that of the base. The run can judge, and its export is merged."""
    config = dataclasses.replace(sft_config, kind="bradley_terry", model=None, start=str(rewards["llama"]), steps=2)
    config = dataclasses.replace(config, adapter=AdapterConfig(2, targets=("query",)))
    still = dataclasses.replace(config, steps=1, optimizer=OptimizerConfig(learning_rate=1e-9))
    base, head, query = open_checkpoint(rewards["llama"]), "score.kernel", "decoder.layers.query.kernel"
    first = open_checkpoint(run_job(still, tmp_path / "still")).tensors[head].read(None)
    np.testing.assert_allclose(first, base.tensors[head].read(None), rtol=0, atol=1e-7)
    run = run_job(config, tmp_path / "run")
    stored = open_checkpoint(run)
    assert sorted(stored.tensors) == [f"{query}.{part}" for part in "ab"] + [head]
    trained = stored.tensors[head].read(None)
    assert np.abs(trained - first).max() > 1e-3
    _, params = load_preference_model(run, make_mesh(MeshConfig()))
    np.testing.assert_array_equal(params["score"]["kernel"], trained)
    export_checkpoint(run, tmp_path / "out", "huggingface")
    merged = import_checkpoint(tmp_path / "out", tmp_path / "again").tensors
    np.testing.assert_array_equal(merged[head].read(None), trained)
    assert np.abs(merged[query].read(None) - base.tensors[query].read(None)).max() > 1e-4


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Pairs of a tokenizer without sentinels, as imported decoders have, and the folder of the tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    make_tokenizer(folder / "tokenizer")
    lines = [{"prompt": f"Say {n}.", "chosen": f"Yes, {n}.", "rejected": f"No {n * 7}!"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = TextSourceConfig(location=str(folder / "pairs.jsonl"))
    limits = Limits(prompt_length=16, response_length=12)
    task = PrepareConfig(source, vocabulary=str(folder / "tokenizer"), limits=limits)
    make(PREPARE, task, folder / "prepared", Bar())
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def without_sentinels(request, chats, sft_config, tmp_path_factory):
    """The settings of a Bradley-Terry model that starts from a policy with this tokenizer.

    The second policy came from transformers, where its padding is the end id, which the head then skips.
    """
    vocabulary = load_vocabulary(chats / "tokenizer")
    model = dataclasses.replace(MODELS["llama"], vocabulary_size=vocabulary.size, tied_embeddings=request.param)
    rng = np.random.default_rng(1)
    tensors = {
        each: from_array(rng.normal(scale=0.3, size=shape).astype(np.float32), stacked="layers" in each.split("."))
        for each, shape in model_shapes(model).items()
    }
    network = Network(model=model, vocabulary=str(chats / "tokenizer"), vocabulary_digest=vocabulary.digest)
    policy = tmp_path_factory.mktemp("policies") / "policy"
    write_checkpoint(policy, 0, network, tensors)
    if not request.param:
        (policy / "tokenizer").mkdir()
        (policy / "tokenizer" / "config.json").write_text(json.dumps({"pad_token_id": vocabulary.eos_id}))
    source = DatasetConfig(str(chats / "prepared" / "train"), batch_size=8)
    return dataclasses.replace(sft_config, kind="bradley_terry", model=None, start=str(policy), source=source, steps=30)


def check_that_it_judges(run, config, folder):
    """It has learned the labels, gives rewards, and has the same ones after an export, merged or as adapters."""
    assert metrics(run)[-1]["accuracy"] == 1 and metrics(run)[-1]["loss"] < 0.1
    export_checkpoint(run, folder / "out", "huggingface")
    import_checkpoint(folder / "out", folder / "again")
    judges = [run, folder / "again"]
    if config.adapter.rank is not None and config.adapter.base_dtype is None:
        export_checkpoint(run, folder / "lora", "peft")
        import_checkpoint(folder / "lora", folder / "from_lora", base=at(config.start))
        judges.append(folder / "from_lora")
    found = []
    for judge in judges:
        label = LabelConfig(config.source.folder, by_itself(str(judge)), batch_size=8)
        make(LABEL, label, folder / f"by_{judge.name}", Bar())
        labelled = open_dataset(folder / f"by_{judge.name}")
        assert labelled.card.scores == "rewards"
        found.append([example.scores for example in labelled])
    assert all(chosen > rejected for chosen, rejected in found[0])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_policy_without_sentinels_becomes_a_reward_model_with_a_head_of_its_own(without_sentinels, tmp_path):
    """It starts from all the policy's parameters but the output embedding."""
    config, policy = without_sentinels, open_checkpoint(at(without_sentinels.start))
    still = dataclasses.replace(config, steps=1, optimizer=OptimizerConfig(learning_rate=1e-9))
    stored = open_checkpoint(run_job(still, tmp_path / "still"))
    assert stored.network.head == RewardHead(pad_id=0 if stored.network.model == policy.network.model else 1)
    assert stored.tensors.keys() == policy.tensors.keys() - {"output_embedder.embedding"} | {"score.kernel"}
    for name, tensor in stored.tensors.items():
        if name != "score.kernel":
            np.testing.assert_allclose(tensor.read(None), policy.tensors[name].read(None), rtol=0, atol=1e-6)
    check_that_it_judges(run_job(config, tmp_path / "run"), config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_its_adapters_come_with_a_fresh_head(base_dtype, without_sentinels, tmp_path):
    """A resumed run goes on with the same head, and the policy's adapters have the same base."""
    adapter = AdapterConfig(4, targets=("attention",), base_dtype=base_dtype)
    config = dataclasses.replace(without_sentinels, adapter=adapter)
    run = run_job(config, tmp_path / "run")
    names = {name.partition(".")[0] for name in open_checkpoint(run).tensors}
    assert names == {"decoder", "score"}
    check_that_it_judges(run, config, tmp_path)
    run_and_stop(config, tmp_path / "stopped", 9)
    run_job(config, tmp_path / "stopped")
    assert_equal_runs(run, tmp_path / "stopped")


@pytest.mark.slow
def test_a_policy_and_its_judge_share_one_base(without_sentinels, tmp_path):
    """Both are adapters of one imported policy, so its parameters are in memory once."""
    adapter = AdapterConfig(2, targets=("query",))
    config = dataclasses.replace(without_sentinels, adapter=adapter, steps=2)
    judge = JudgeConfig(str(run_job(config, tmp_path / "judge")), labels="rewards")
    online = OnlineConfig(config.source, judge=judge, response_length=4)
    policy = dataclasses.replace(config, kind="policy", loss=LossConfig("ipo"), source=online)
    _, inputs = open_training(policy).run.args
    (params,), base = inputs.judge.scores.args, inputs.start.read()
    assert params["token_embedder"]["embedding"] is base["token_embedder"]["embedding"]
    assert params["decoder"]["layers"]["query"]["kernel"].kernel is base["decoder"]["layers"]["query"]["kernel"]
    assert "output_embedder" not in params
    run = run_job(policy, tmp_path / "policy")
    assert all(np.isfinite(line["loss"]) for line in metrics(run))


NO_POLICY = "is a reward model, whose head replaces the output embedding: give a policy, or set KIND='bradley_terry'"


def test_it_is_no_policy(rewards, sft_config, pairs):
    """Not as a start, not as a reference, and not as a pairwise model. One line, before anything is loaded."""
    folder = str(rewards["t5"])
    starts = {"model": None, "start": folder}
    ipo = {"loss": LossConfig("ipo"), "reference": folder, "model": MODELS["t5"]}
    for changes in (starts, {**starts, "kind": "pairwise"}, ipo):
        with pytest.raises(UserError, match=NO_POLICY):
            run_job(dataclasses.replace(sft_config, **changes), rewards["t5"].parent / "never")
    with pytest.raises(UserError, match=NO_POLICY):
        load_policy(folder, make_mesh(MeshConfig()))
    with pytest.raises(UserError, match=NO_POLICY):
        make(REFERENCE, ReferenceConfig(str(pairs), folder), rewards["t5"].parent / "never", Bar())
    assert not (rewards["t5"].parent / "never").exists()


def test_a_dataset_of_another_tokenizer_is_refused(pairs, online, sft, tmp_path):
    """In one line, before the parameters are read, in every job in which it judges."""
    run = imported(tmp_path, "llama", digest="f" * 64)
    assert read_digest(open_checkpoint(run).folder)
    message = "was prepared with the vocabulary .*, .* was trained with ffffffffffff: prepare the dataset with the"
    judge = JudgeConfig(str(run), labels="rewards")
    evaluation = EvaluateConfig(run=str(sft), dataset=str(pairs), judges=(str(run),))
    for kind, config in (
        (LABEL, LabelConfig(str(pairs), judge)),
        (EVALUATE, evaluation),
    ):
        with pytest.raises(UserError, match=message) as error:
            make(kind, config, tmp_path / "out", Bar())
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        run_job(dataclasses.replace(online, source=dataclasses.replace(online.source, judge=judge)), tmp_path / "out")
