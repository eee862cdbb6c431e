"""Preparing a source: the contents of the datasets, the same bytes in every run, and what is refused."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from built_in import posts_examples, write_posts
from random_examples import plain
from word_pairs import LIMITS, WORDS, tree, words_config

from alignment_gap.data.batches import Examples, offline_source
from alignment_gap.data.records import derived, open_dataset, verify_dataset, write_chunk, write_dataset
from alignment_gap.data.records.card import ends_prompts, find_vocabulary
from alignment_gap.data.records.preview import visible_text
from alignment_gap.data.tasks.prepare import PrepareConfig, example_of, may_change, open_preparation, prompt_id
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.data.text import Encoded, Limits, PostsConfig, TextSourceConfig, held_out, load_vocabulary, posts
from alignment_gap.errors import UserError
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.progress import NO_BAR, progress_bar

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"


def prepare(config, output):
    """Prepares in this process, without others; returns the cards of the datasets."""
    output.mkdir(exist_ok=True)
    preparation = open_preparation(dataclasses.replace(config, workers=config.workers or 1))
    return preparation.write(output, open_bar=functools.partial(progress_bar, silent=True))


@pytest.fixture
def config(tmp_path):
    return words_config(tmp_path)


def test_the_datasets_hold_the_pairs_within_the_limits_and_share_no_prompt(config, tmp_path):
    cards = prepare(config, tmp_path / "out")
    rows = [json.loads(line) for line in pathlib.Path(config.source.location).read_text().splitlines()]
    words = {word: index for index, word in enumerate(WORDS, start=2)}

    def ids(text, end=()):
        return (*(words[word] for word in text.split()), *end)

    wanted, dropped = [], {split: collections.Counter() for split in cards}
    for row in rows:
        prompt, chosen, rejected = ids(row["prompt"]), ids(row["chosen"], (1,)), ids(row["rejected"], (1,))
        split = "validation" if held_out(np.array(prompt, np.int32).tobytes(), 0.2, 0) else "train"
        if len(prompt) > 6:
            dropped[split]["long prompt"] += 1
        elif max(len(chosen), len(rejected)) > 5:
            dropped[split]["long response"] += 1
        else:
            wanted.append((prompt, chosen, rejected))
    found = {}
    for split, card in cards.items():
        dataset = open_dataset(tmp_path / "out" / split)
        verify_dataset(dataset)
        assert dataset.card == card
        found[split] = [tuple(tuple(part.tolist()) for part in (e.prompt, *e.responses)) for e in dataset]
        assert all(e.scores.tolist() == [1, 0] for e in dataset)
        assert len({e.prompt_id for e in dataset}) == len({e.prompt.tobytes() for e in dataset})
        assert card.provenance["dropped"] == dropped[split] and sum(dropped[split].values()) > 1
        # This vocabulary has no unknown id, and its prompts have no end.
        assert not {"unknown", "end_prompts"} & card.provenance.keys()
        assert card.provenance["records"] == 120 and card.provenance["split"] == split
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    assert not {pair[0] for pair in found["train"]} & {pair[0] for pair in found["validation"]}
    # In the order of the source, part by part.
    assert found["train"] == [pair for pair in wanted if pair in found["train"]]
    assert len(cards["train"].files) == 5


def test_workers_do_not_change_a_byte_and_a_finished_folder_is_left_alone(config, tmp_path, capsys):
    cards = prepare(config, tmp_path / "one")
    prepare(dataclasses.replace(config, workers=2), tmp_path / "two")
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two")
    assert {"preview.txt", "lengths.png", "train/card.json", "validation/card.json"} <= set(one)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    assert prepare(config, tmp_path / "one") == cards
    assert capsys.readouterr().out == ""
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert cards["train"].count == json.loads(one["train/card.json"])["count"]


def test_what_was_damaged_is_made_again_and_nothing_else(config, tmp_path, capsys):
    output = tmp_path / "out"
    prepare(config, output)
    whole = tree(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.array_record")}
    part = output / "train" / "part-00002.array_record"
    content = part.read_bytes()
    for damaged in (content[:100], bytes([content[0] ^ 1]) + content[1:], None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        prepare(config, output)
        assert capsys.readouterr().out == f"{output}: files of 1 of 5 parts were changed: making them again\n"
        assert tree(output) == whole
        kept = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
        assert kept == {path for path in times if path.stem != "part-00002"}
    card = output / "validation" / "card.json"
    card.write_text(card.read_text().replace('"count"', '"counts"'))
    prepare(config, output)
    assert "is not a dataset's card" in capsys.readouterr().out and tree(output) == whole
    (output / "parts.json").unlink()
    prepare(config, output)
    assert tree(output) == whole


def test_a_refusal_in_a_later_part_keeps_the_finished_ones(config, tmp_path):
    lines = pathlib.Path(config.source.location).read_text().splitlines()
    short = [line for line in lines if len(json.loads(line)["prompt"].split()) <= 6]
    long = json.dumps({"prompt": "w1 w2 w3 w4 w5 w6 w7", "chosen": "w1", "rejected": "w2"})
    pathlib.Path(config.source.location).write_text("\n".join([*short[:40], long, *short[40:]]))
    strict = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="refuse"))
    with pytest.raises(UserError, match=r"pairs.jsonl:41: long prompt \(7 tokens in the field 'prompt', over .*=6\)"):
        prepare(strict, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.array_record")}
    assert kept
    cut = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="keep_end"))
    cards = prepare(cut, tmp_path / "out")
    assert cards["train"].provenance["cut_prompts"] == 1
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    words = json.loads(long)["prompt"].split()[-6:]
    prompts = [e.prompt.tolist() for split in cards for e in open_dataset(tmp_path / "out" / split)]
    assert [WORDS.index(word) + 2 for word in words] in prompts


def test_duplicates_are_found_across_parts_and_the_first_is_kept(config, tmp_path):
    rows = [{"prompt": f"w{i}", "chosen": "w1", "rejected": "w2"} for i in range(10)]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:4], *rows]))
    source = TextSourceConfig(str(path), duplicates="drop")
    config = dataclasses.replace(config, source=source, validation=0.0, records_per_file=3)
    cards = prepare(config, tmp_path / "out")
    assert cards.keys() == {"train"}
    assert cards["train"].provenance["dropped"] == {"duplicate": 14}
    assert [e.prompt.tolist() for e in open_dataset(tmp_path / "out" / "train")] == [[i + 2] for i in range(10)]


def test_a_source_s_own_splits_are_kept_and_a_prompt_of_both_is_held_out(config, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()

    def write(name, numbers):
        rows = ({"prompt": f"w{i}", "chosen": "w1", "rejected": "w2"} for i in numbers)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("train.jsonl", range(10))
    write("validation.jsonl", (3, 20, 21))
    config = dataclasses.replace(config, source=TextSourceConfig(str(folder)), validation=0.5, records_per_file=4)
    cards = prepare(config, tmp_path / "out")
    prompts = {split: [int(e.prompt[0]) - 2 for e in open_dataset(tmp_path / "out" / split)] for split in cards}
    assert prompts == {"train": [0, 1, 2, 4, 5, 6, 7, 8, 9], "validation": [3, 20, 21]}
    assert cards["train"].provenance["dropped"] == {"prompt of the validation split": 1}


def test_real_pairs_are_prepared_and_all_accounted_for(tmp_path):
    path, vocabulary = SHARED / "hh/helpful-base.test.jsonl.gz", SHARED / "vocab/t5.spiece.model"
    if not (path.exists() and vocabulary.exists()):
        pytest.skip(f"{path} and {vocabulary} are not here: human pairs are not shipped with the project")
    source, limits = TextSourceConfig(str(path), bad_pairs="drop"), Limits(prompt_length=128, response_length=64)
    config = PrepareConfig(source, vocabulary=str(vocabulary), limits=limits, validation=0.1, records_per_file=1000)
    cards = prepare(config, tmp_path / "out")
    counts = {split: card.count for split, card in cards.items()}
    dropped = sum((collections.Counter(card.provenance["dropped"]) for card in cards.values()), collections.Counter())
    assert sum(counts.values()) + dropped.total() == 2354
    assert cards["train"].provenance["dropped"] != cards["validation"].provenance["dropped"]
    assert 0.05 < counts["validation"] / sum(counts.values()) < 0.15
    assert max(card.max_prompt_length for card in cards.values()) == 128
    assert max(card.max_response_length for card in cards.values()) == 64
    train, validation = (open_dataset(tmp_path / "out" / split) for split in ("train", "validation"))
    assert not {e.prompt.tobytes() for e in train} & {e.prompt.tobytes() for e in validation}
    assert rubric_of(train) is None
    for dataset in (train, validation):
        assert all(e.prompt[-1] == 1 and 1 not in e.prompt[:-1] for e in dataset) and ends_prompts(dataset)
        unknown = [sum((part == 2).sum() for part in (e.prompt, *e.responses)) for e in dataset]
        assert dataset.card.provenance["unknown"] == {"examples": sum(map(bool, unknown)), "tokens": sum(unknown)}
        assert sum(unknown) > 0
    batch = offline_source(train, batch_size=8, seed=0, prompt_length=128, response_length=64)(0)
    assert batch.prompts.shape == (8, 128) and batch.responses.shape == (8, 2, 64)


POSTS = PrepareConfig(TextSourceConfig("posts", posts=PostsConfig(pairs=40, validation_pairs=10)))


def test_the_built_in_posts_are_prepared_like_any_other_source(tmp_path):
    cards = prepare(POSTS, tmp_path / "out")
    assert {split: card.count for split, card in cards.items()} == {"train": 40, "validation": 10}
    train, validation = (open_dataset(tmp_path / "out" / split) for split in ("train", "validation"))
    assert [*map(plain, train)] == [*map(plain, posts_examples(40))]
    assert not {e.prompt.tobytes() for e in train} & {e.prompt.tobytes() for e in validation}
    # Validation posts are numbered from a billion, whatever the number of training pairs.
    first = posts.pair(0, 1_000_000_000)
    assert find_vocabulary(validation).decode(validation[0].prompt) == " ".join(first.post.words)
    assert validation[0].scores.tolist() == [first.preferred == 0, first.preferred == 1]
    assert train.card.vocabulary_digest == load_vocabulary("posts").digest and train.card.scores == "probabilities"
    assert "summary:" in (tmp_path / "out" / "preview.txt").read_text()


def test_the_posts_provenance_has_all_their_settings_and_other_sources_have_none(config, tmp_path):
    about = prepare(POSTS, tmp_path / "posts")["train"].provenance
    assert about["vocabulary"] == "posts" and about["source"]["location"] == "posts"
    stated = about["source"]["posts"]
    assert stated == json.loads(json.dumps(dataclasses.asdict(POSTS.source.posts)))
    assert open_dataset(tmp_path / "posts" / "train").card.provenance == about
    assert len(stated["settings"]) == len(dataclasses.fields(posts.PostsSettings))
    assert about["command"].startswith("alignment-gap data prepare --source=posts --task=posts --posts.pairs=40 ")
    assert "posts" not in prepare(config, tmp_path / "words")["train"].provenance["source"]
    assert "source.posts" not in prepare(config, tmp_path / "words")["train"].provenance["command"]


def test_the_command_on_the_card_states_what_differs_from_the_defaults(tmp_path):
    settings = posts.PostsSettings(fact_weights=(1.0, 2.0, 1.0, 1.0, 1.0), order_weight=0.2)
    world = PostsConfig(pairs=12, validation_pairs=2, settings=settings)
    limits = Limits(prompt_length=64, long_prompts="refuse")
    config = PrepareConfig(TextSourceConfig("posts", posts=world), limits=limits, records_per_file=7)
    command = prepare(config, tmp_path / "out")["train"].provenance["command"]
    assert command == (
        "alignment-gap data prepare --source=posts --task=posts --posts.pairs=12 --posts.validation_pairs=2 "
        "--posts.settings.fact_weights=1.0,2.0,1.0,1.0,1.0 --posts.settings.order_weight=0.2 --prompt_length=64 "
        "--long_prompts=refuse --vocabulary=posts --records_per_file=7"
    )


def test_a_dataset_of_the_tests_has_the_provenance_that_prepare_gives(tmp_path):
    config = dataclasses.replace(POSTS, source=TextSourceConfig("posts", posts=PostsConfig(8, 1)))
    prepared = prepare(config, tmp_path / "out")["train"]
    written = write_posts(tmp_path / "pairs", 8)
    assert written.digest == prepared.digest
    shared = written.provenance.keys() & prepared.provenance.keys()
    assert shared == written.provenance.keys()
    for name in shared - {"source", "records_per_file"}:
        assert written.provenance[name] == prepared.provenance[name]


def test_a_drop_is_counted_with_the_split_that_its_prompt_would_be_in(config, tmp_path):
    """Duplicates and bad pairs count by their prompt. A record without a prompt counts with train."""
    held = [f"w{i}" for i in range(50) if held_out(np.array([i + 2], np.int32).tobytes(), 0.5, 0)]
    rest = [f"w{i}" for i in range(50) if f"w{i}" not in held]
    good = [{"prompt": word, "chosen": "w1", "rejected": "w2"} for word in (held[0], rest[0])]
    bad = [{"prompt": held[1], "chosen": "w1", "rejected": " w1"}, {"prompt": rest[1], "chosen": "w1", "rejected": ""}]
    strange = [{"prompt": "purple", "chosen": "w1", "rejected": "w2"}, {"prompt": " ", "chosen": "a", "rejected": "b"}]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *good, *bad, *strange]))
    source = TextSourceConfig(str(path), duplicates="drop", bad_pairs="drop")
    cards = prepare(dataclasses.replace(config, source=source, validation=0.5, records_per_file=3), tmp_path / "out")
    assert cards["validation"].provenance["dropped"] == {"duplicate": 1, "identical pair": 1}
    of_train = {"duplicate": 1, "empty prompt": 1, "empty response": 1, "text that the vocabulary cannot express": 1}
    assert cards["train"].provenance["dropped"] == of_train


def test_prompts_end_as_the_vocabularys_models_are_used_to_or_as_is_asked(config, tmp_path):
    """Datasets with and without ended prompts are distinguished, and cannot be mixed."""
    config = dataclasses.replace(config, vocabulary="bytes", limits=Limits(64, 64))
    found = {}
    for name, ends in (("usual", None), ("ended", True), ("plain", False)):
        cards = prepare(dataclasses.replace(config, end_prompts=ends), tmp_path / name)
        found[name] = open_dataset(tmp_path / name / "train")
        assert ("--end_prompts" in cards["train"].provenance["command"]) == (ends is not None)
        assert {bool(e.prompt[-1] == 1) for e in found[name]} == {ends is not False}
        assert ends_prompts(found[name]) == (ends is not False)
    assert found["usual"].card.digest == found["ended"].card.digest != found["plain"].card.digest
    assert ends_prompts(copy_of(found["usual"], tmp_path / "copy")) and not ends_prompts(
        copy_of(found["plain"], tmp_path / "plain_copy")
    )
    with pytest.raises(UserError, match=r"plain/train has end_prompts False, .*usual/train has True: use datasets"):
        Examples([found["usual"], found["plain"]])


def copy_of(dataset, folder):
    """A dataset derived from another one."""
    provenance = derived("compose", {"pairs": dataset})
    write_dataset(folder, dataset[:3], vocabulary_digest=dataset.card.vocabulary_digest, provenance=provenance)
    return open_dataset(folder)


def test_what_an_earlier_version_knew_of_its_parts_is_counted_anew(config, tmp_path, capsys):
    """The earlier version did not count by split. Its damaged folder is made again, with the same bytes."""
    output = tmp_path / "out"
    prepare(config, output)
    whole = tree(output)
    known = json.loads((output / "parts.json").read_text())
    old = [{"dropped": {}, "cut_prompts": 0, "files": one["files"]} for one in known]
    (output / "parts.json").write_text(json.dumps(old))
    (output / "train" / "part-00001.array_record").write_bytes(b"")
    prepare(config, output)
    assert tree(output) == whole and "making them again" in capsys.readouterr().out


def test_the_preview_shows_boundaries_and_special_ids(config, tmp_path):
    prepare(config, tmp_path / "out")
    text = (tmp_path / "out" / "preview.txt").read_text()
    example = open_dataset(tmp_path / "out" / "train")[0]
    words = [WORDS[i - 2] for i in example.responses[0].tolist()[:-1]]
    assert f"response, score 1, {len(words) + 1} tokens" in text
    assert f"    | {' '.join(words)} <eos:1>\n" in text
    assert text.count("example ") == 5
    assert visible_text([0, 2, 59, 1, 1, 3], load_vocabulary(config.vocabulary)) == (
        "<pad:0> w0 <extra_id_0:59> <eos:1> <eos:1> w1"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": None}, "vocabulary is not set: give a SentencePiece model, a tokenizer, or bytes"),
        ({"vocabulary": ""}, "holds no vocabulary: give a SentencePiece"),
        ({"source": TextSourceConfig()}, "there is no source: give the path"),
        ({"limits": Limits(1, 1)}, r"no pair of 120 records is left .* \(\d+ long .*\): raise --prompt_length"),
        ({"limits": Limits(8, 6), "validation": 1 - 1e-12}, r"\(120 for validation or blank\): fix the source"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(config, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(dataclasses.replace(config, **change), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_folder_in_which_nothing_was_left_takes_longer_lengths(config, tmp_path):
    with pytest.raises(UserError, match="is left for training"):
        make(PREPARE, dataclasses.replace(config, limits=Limits(1, 1)), tmp_path / "out", lambda *_: NO_BAR)
    make(PREPARE, config, tmp_path / "out", lambda *_: NO_BAR)
    assert open_dataset(tmp_path / "out" / "train").card.count > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrepareConfig(validation=1.0), "validation is 1.0: it must be from 0 to below 1"),
        (lambda: PrepareConfig(validation=float("nan")), "validation is nan: it must be from 0"),
        (lambda: PrepareConfig(records_per_file=0), "records_per_file is 0: it must be at least 1"),
        (lambda: Limits(prompt_length=0), "prompt_length is 0: it must be at least 1"),
        (lambda: Limits(response_length=-1), "response_length is -1: it must be at least 1"),
        (lambda: Limits(long_prompts="keep"), r"long_prompts is 'keep': did you mean keep_end\?"),
        (lambda: Limits(long_responses="keep_end"), "long_responses is 'keep_end': choose one of refuse, drop"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_may_change_in_a_folder_is_what_refused_nothing(tmp_path):
    """If no part is finished, the folder forgets its settings."""
    settings, parts = tmp_path / "job.json", tmp_path / ".parts"
    assert may_change(tmp_path, settings) == []
    stated = {"limits.long_prompts": "refuse", "source.bad_pairs": "refuse", "limits.long_responses": "drop", "seed": 0}
    for finished in (parts / "00003.json", tmp_path / "parts.json"):
        settings.write_text(json.dumps(stated))
        parts.mkdir(exist_ok=True)
        finished.write_text("{}")
        assert may_change(tmp_path, settings) == ["workers", "limits.long_prompts", "source.bad_pairs"]
        finished.unlink()
    (parts / "survey.npz").write_bytes(b"")
    (tmp_path / "train").mkdir()
    assert may_change(tmp_path, settings) == [] and list(tmp_path.iterdir()) == []
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="already holds train or validation: give another folder"):
        may_change(tmp_path, settings)


def test_ids_of_prompts_follow_from_their_tokens_alone():
    """They are 31 bits of SHA-256 of the tokens as int32, here by hand."""
    prompt = np.array([5, 1000, 7], np.int32)
    digest = hashlib.sha256(bytes([5, 0, 0, 0, 0xE8, 3, 0, 0, 7, 0, 0, 0])).digest()
    assert prompt_id(prompt) == int.from_bytes(digest[:8], "big") >> 33 < 2**31
    responses = (np.array([3, 1], np.int32), np.array([1], np.int32))
    example = example_of(Encoded(prompt, responses, np.array([0.25, 0.75], np.float32), prompt_was_cut=True))
    assert plain(example) == (prompt_id(prompt), [5, 1000, 7], [[3, 1], [1]], [0.25, 0.75], None, None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which is always full")
def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path):
    output = tmp_path / "out"
    prepare(config, tmp_path / "whole")

    def fill(folder, name, examples):
        if name == "part-00002":
            (folder / f"{name}.partial").unlink(missing_ok=True)
            (folder / f"{name}.partial").symlink_to("/dev/full")
        return write_chunk(folder, name, examples)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"No space left .*free space"):
        patch.setattr("alignment_gap.data.tasks.prepare.write_chunk", fill)
        prepare(config, output)
    assert (output / "train" / "part-00001.array_record").exists()
    prepare(config, output)
    assert tree(output) == tree(tmp_path / "whole")


def test_templates_that_write_the_date_write_the_day_of_the_card(tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}{% for each in messages %} {{ each.content }}{% endfor %}")
    turns = ("prompt", "user", "say"), ("chosen", "assistant", "good"), ("rejected", "assistant", "bad")
    row = {name: [{"role": role, "content": text}] for name, role, text in turns}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    source = TextSourceConfig(str(tmp_path / "pairs.jsonl"), template=str(template))
    for date, written in {"2024-07-26": "26 Jul 2024", "2026-12-01": "01 Dec 2026"}.items():
        config = PrepareConfig(dataclasses.replace(source, template_date=date), "bytes", validation=0)
        card = prepare(config, tmp_path / date)["train"]
        (example,) = open_dataset(tmp_path / date / "train")
        assert load_vocabulary("bytes").decode(example.prompt).startswith(f"{written} say")
        assert card.provenance["source"]["template_date"] == date
        assert ("--template_date=2026-12-01" in card.provenance["command"]) == (date == "2026-12-01")


def test_cards_of_texts_have_no_date(config, tmp_path):
    assert "template_date" not in prepare(config, tmp_path / "out")["train"].provenance["source"]
