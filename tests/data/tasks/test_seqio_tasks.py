"""The TFDS builder, seqio tasks on it, and TFDS as a source. Only the tests of this file import TensorFlow."""

import gzip
import json
import pathlib
import warnings

import numpy as np
import pytest

from alignment_gap.data.text import Encoded, Limits, TextSourceConfig, encode_pair, load_vocabulary, open_source
from alignment_gap.errors import UserError

LENGTHS = {"prompt": 40, "chosen": 8, "rejected": 8}


def dialogue(human: str, chosen: str, rejected: str) -> dict:
    return {name: f"\n\nHuman: {human}\n\nAssistant: {x}" for name, x in [("chosen", chosen), ("rejected", rejected)]}


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


TRAIN = [dialogue(f"question {i}", "yes", "no") for i in range(8)]
HELD_OUT = [dialogue("question 3", "good", "bad"), dialogue("other", "good", "bad")]
BATTLE = {
    "conversation_a": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "conversation_b": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """The data folder of TFDS, with `alignment_pairs` built from the publishers' formats."""
    manual = tmp_path_factory.mktemp("manual")
    long = dialogue("long", "y" * 9, "no")
    write_lines(manual / "harmlessness/train.jsonl.gz", [*TRAIN, TRAIN[0], dialogue("x", "same", "same"), long])
    write_lines(manual / "harmlessness/test.jsonl.gz", HELD_OUT)
    battles = [BATTLE | {"winner": winner} for winner in ("model_a", "model_b", "tie")]
    others = [json.loads(json.dumps(BATTLE).replace('"q"', f'"q{i}"')) | {"winner": "model_b"} for i in range(60)]
    write_lines(manual / "chat_arena/a.jsonl", battles + others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        from alignment_gap.data.tasks import tfds_pairs  # noqa: F401

        folder = tmp_path_factory.mktemp("tfds")
        config = tfds.download.DownloadConfig(manual_dir=manual)
        for task in ("harmlessness", "chat_arena"):
            builder = tfds.builder(f"alignment_pairs/{task}", data_dir=folder)
            builder.download_and_prepare(download_config=config)
    return folder


@pytest.fixture(scope="module")
def tasks(tfds_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import seqio

        from alignment_gap.data.tasks import seqio_tasks
    if "alignment_pairs_test" not in seqio.MixtureRegistry.names():
        seqio_tasks.register(seqio.ByteVocabulary(), "_test")
    seqio.set_tfds_data_dir_override(str(tfds_folder))
    yield seqio
    seqio.set_tfds_data_dir_override(None)


def rows(tfds_folder, task: str, split: str) -> list[dict]:
    import tensorflow_datasets as tfds

    dataset = tfds.builder(f"alignment_pairs/{task}", data_dir=tfds_folder).as_dataset(split=split)
    return sorted(dataset.as_numpy_iterator(), key=lambda row: row["prompt"])


def test_the_builder_keeps_the_publishers_split_without_a_shared_prompt(tfds_folder):
    import tensorflow_datasets as tfds

    train, validation = (rows(tfds_folder, "harmlessness", split) for split in ("train", "validation"))
    prompts = [row["prompt"].decode() for row in train]
    kept = ["long", *(f"question {i}" for i in range(8) if i != 3)]
    assert prompts == [f"\n\nHuman: {human}\n\nAssistant:" for human in kept]
    assert {row["chosen"] for row in validation} == {b"good"} and len(validation) == 2
    assert {row["preference"] for row in train} == {1.0}
    metadata = tfds.builder("alignment_pairs/harmlessness", data_dir=tfds_folder).info.metadata
    assert metadata["dropped"] == {"duplicate": 1, "identical pair": 1, "prompt of the validation split": 1}


@pytest.mark.parametrize("first", ["train", "validation"])
def test_a_pair_in_both_splits_stays_in_validation_whichever_is_read_first(tfds_folder, tmp_path, first):
    from alignment_gap.data.tasks.tfds_pairs import _survey

    for split in ("train", "validation"):
        number = "1" if split == first else "2"
        write_lines(tmp_path / number / f"{split}.jsonl", TRAIN[:4] if split == "train" else [TRAIN[3], *HELD_OUT[1:]])
    source = open_source(TextSourceConfig(f"{tmp_path}/1,{tmp_path}/2", task="harmlessness"))
    splits, dropped = _survey(source)
    assert (splits.count("train"), splits.count("validation")) == (3, 2)
    assert dropped == {"prompt of the validation split": 1}


def test_the_builder_splits_by_the_prompt_where_its_publisher_did_not(tfds_folder):
    train, validation = (rows(tfds_folder, "chat_arena", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 62 and 0 < len(validation) < 12
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    both = [row for row in train + validation if row["prompt"] == b"\n\nHuman: q\n\nAssistant:"]
    assert sorted((row["chosen"], row["rejected"]) for row in both) == [(b"a", b"b"), (b"b", b"a")]


def test_files_that_leave_a_split_empty_are_one_line(tfds_folder, tmp_path):
    import tensorflow_datasets as tfds

    write_lines(tmp_path / "manual/helpfulness/train.jsonl", TRAIN[:1])
    builder = tfds.builder("alignment_pairs/helpfulness", data_dir=tmp_path / "data")
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
    with pytest.raises(
        UserError, match=r"helpfulness gives no pair of the split '(train|validation)': add the publisher's"
    ):
        builder.download_and_prepare(download_config=config)


def test_tfds_is_a_source_like_any_other(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    source = open_source(TextSourceConfig("tfds:alignment_pairs/harmlessness:1.0.0:train"))
    assert source.config.task == "pairs" and len(source) == 8 and all(file.exists() for file in source.files)
    pairs = list(source.read())
    expected = [
        (row["prompt"].decode(), (row["chosen"].decode(), row["rejected"].decode()), (1.0, 0.0))
        for row in rows(tfds_folder, "harmlessness", "train")
    ]
    assert sorted((pair.prompt, pair.responses, pair.scores) for pair in pairs) == expected
    assert pairs == [*source.read(0, 3), *source.read(3, 4), *source.read(4)]
    assert {pair.split for pair in open_source(TextSourceConfig("tfds:alignment_pairs/harmlessness")).read()} == {
        "train",
        "validation",
    }


@pytest.mark.parametrize(
    "location, message",
    [
        ("tfds:alignment_pairs/harmlessness:dev", "has no split 'dev': choose one of train, validation"),
        (
            "tfds:alignment_pairs/helpfulness",
            "is not prepared here: call its builder's download_and_prepare, or set TFDS_DATA_DIR",
        ),
        ("tfds:no_such_dataset", "tfds:no_such_dataset is not known to TFDS"),
    ],
)
def test_what_tfds_does_not_have_is_one_line(tfds_folder, monkeypatch, location, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    with pytest.raises(UserError, match=message) as error:
        open_source(TextSourceConfig(location))
    assert "\n" not in str(error.value)


def test_importing_one_module_registers_the_four_tasks_and_their_mixtures(tasks):
    names = [f"alignment_pairs_{task}" for task in ("summarization", "helpfulness", "harmlessness", "chat_arena")]
    for kind in ("", "_sft"):
        assert {f"{name}{kind}" for name in names} <= set(tasks.TaskRegistry.names())
        assert f"alignment_pairs{kind}" in tasks.MixtureRegistry.names()
    features = tasks.TaskRegistry.get(names[0]).output_features
    assert set(features) == {"prompt", "chosen", "rejected", "preference"}


def test_a_preference_task_gives_our_own_tokens_and_leaves_out_long_pairs(tasks, tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    task = tasks.TaskRegistry.get("alignment_pairs_harmlessness_test")
    examples = list(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
    # The split has 8 pairs. One is too long: "y" * 9 and the end id.
    assert len(examples) == 7
    limits, vocabulary = Limits(LENGTHS["prompt"], LENGTHS["chosen"]), load_vocabulary("bytes")
    source = open_source(TextSourceConfig("tfds:alignment_pairs/harmlessness:train"))
    ours = [encode_pair(pair, vocabulary, limits) for pair in source.read()]
    expected = {(tuple(x.prompt), *map(tuple, x.responses)) for x in ours if isinstance(x, Encoded)}
    assert {tuple(tuple(e[name]) for name in LENGTHS) for e in examples} == expected
    assert {float(example["preference"]) for example in examples} == {1.0}


def test_the_converter_pads_and_counts(tasks):
    from alignment_gap.data.tasks import seqio_tasks

    dataset = tasks.get_dataset(
        "alignment_pairs_harmlessness_test",
        task_feature_lengths=LENGTHS,
        dataset_split="validation",
        shuffle=False,
        feature_converter=seqio_tasks.PreferenceFeatureConverter(),
    )
    features = next(iter(dataset.batch(2).as_numpy_iterator()))
    batch = seqio_tasks.preference_batch(features, first_prompt_id=5)
    assert batch.prompt_ids.tolist() == [5, 6] and batch.prompts.shape == (2, 40) and batch.responses.shape == (2, 2, 8)
    good, bad = ([byte + 3 for byte in text] + [1] for text in (b"good", b"bad"))
    assert batch.response_lengths.tolist() == [[5, 4]] * 2 and batch.scores.tolist() == [[1, 0]] * 2
    assert batch.responses[0].tolist() == [good + [0] * 3, bad + [0] * 4]
    decode = load_vocabulary("bytes").decode
    texts = {decode(batch.prompts[row, : batch.prompt_lengths[row]]) for row in range(2)}
    assert texts == {"\n\nHuman: question 3\n\nAssistant:", "\n\nHuman: other\n\nAssistant:"}
    assert not np.asarray(batch.prompts[0, batch.prompt_lengths[0] :]).any()
    with pytest.raises(ValueError, match="pass pack=False"):
        seqio_tasks.PreferenceFeatureConverter(pack=True)


def test_an_sft_task_goes_through_seqios_own_converter(tasks):
    lengths = {"inputs": 48, "targets": 8}
    dataset = tasks.get_dataset(
        "alignment_pairs_harmlessness_sft_test",
        task_feature_lengths=lengths,
        dataset_split="validation",
        shuffle=False,
        feature_converter=tasks.EncDecFeatureConverter(pack=False),
    )
    example = next(dataset.as_numpy_iterator())
    assert example["decoder_target_tokens"].tolist() == [*(byte + 3 for byte in b"good"), 1, 0, 0, 0]
    assert example["decoder_loss_weights"].tolist() == [1] * 5 + [0] * 3
    assert example["encoder_input_tokens"].shape == (48,)


def test_a_mixture_draws_from_its_tasks(tasks):
    parts = ["alignment_pairs_harmlessness_test", "alignment_pairs_chat_arena_test"]
    if "two" not in tasks.MixtureRegistry.names():
        tasks.MixtureRegistry.add("two", parts, default_rate=tasks.mixing_rate_num_examples)
    dataset = tasks.MixtureRegistry.get("two").get_dataset(LENGTHS, "train", shuffle=False, seed=0)
    drawn = [bytes((e["prompt"][:-1] - 3).astype(np.uint8)).decode() for e in dataset.take(200).as_numpy_iterator()]
    arena = sum(prompt.startswith("\n\nHuman: q") and "question" not in prompt for prompt in drawn)
    # About 59 of 67 examples come from the arena.
    assert 0.75 < arena / 200 < 0.97


def test_a_mixture_goes_through_the_converter(tasks):
    from alignment_gap.data.tasks import seqio_tasks

    if "one" not in tasks.MixtureRegistry.names():
        tasks.MixtureRegistry.add("one", ["alignment_pairs_harmlessness_test"], default_rate=1)
    converter = seqio_tasks.PreferenceFeatureConverter()
    dataset = tasks.get_dataset("one", LENGTHS, converter, "validation", shuffle=False)
    assert next(dataset.as_numpy_iterator())["scores"].tolist() == [1, 0]
