"""Reward models of Hugging Face folders in jobs: they label, score online samples, give win rates, and are trained."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from job_runs import Bar, metrics, run_job

from alignment_gap.checkpoints import open_checkpoint, read_digest
from alignment_gap.checkpoints.formats import export_checkpoint, import_checkpoint, model_shapes
from alignment_gap.checkpoints.huggingface import write
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import LossConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.reference import REFERENCE, ReferenceConfig
from alignment_gap.judges import JudgeConfig, by_itself
from alignment_gap.models import AdapterConfig, DecoderConfig, RewardHead, T5Config
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import load_policy, load_preference_model

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
    """The head belongs to the base. The run can judge, and its export is merged."""
    config = dataclasses.replace(sft_config, kind="bradley_terry", model=None, start=str(rewards["llama"]), steps=2)
    run = run_job(dataclasses.replace(config, adapter=AdapterConfig(2, targets=("query",))), tmp_path / "run")
    assert sorted(open_checkpoint(run).tensors) == [f"decoder.layers.query.kernel.{part}" for part in "ab"]
    base = open_checkpoint(rewards["llama"])
    _, params = load_preference_model(run, make_mesh(MeshConfig()))
    np.testing.assert_array_equal(params["score"]["kernel"], base.tensors["score.kernel"].read(None))
    export_checkpoint(run, tmp_path / "out", "huggingface")
    merged = import_checkpoint(tmp_path / "out", tmp_path / "again").tensors
    np.testing.assert_array_equal(merged["score.kernel"].read(None), base.tensors["score.kernel"].read(None))
    query = "decoder.layers.query.kernel"
    assert np.abs(merged[query].read(None) - base.tensors[query].read(None)).max() > 1e-4


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
