"""Preparing a source: what is in the datasets, that every run gives the same bytes, and what is refused."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from alignment_gap.data.records import open_dataset, verify_dataset, write_chunk
from alignment_gap.data.records.preview import visible_text
from alignment_gap.data.tasks.prepare import PrepareConfig, prepare
from alignment_gap.data.text import Limits, TextSourceConfig, load_vocabulary
from alignment_gap.errors import UserError

WORDS = [f"w{i}" for i in range(50)]
LIMITS = Limits(prompt_length=6, response_length=5)


def quiet(line):
    del line


def write_pairs(path, count, seed=0):
    """Explicit-prompt pairs of words; prompts of 1 to 8 words come again, responses have 1 to 5."""
    rng = np.random.default_rng(seed)

    def text(longest):
        return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))

    prompts = [text(8) for _ in range(count // 2)]
    rows = []
    while len(rows) < count:
        row = {"prompt": str(rng.choice(prompts)), "chosen": text(5), "rejected": text(5)}
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def config(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 120)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    return PrepareConfig(
        TextSourceConfig(str(tmp_path / "pairs.jsonl")),
        vocabulary=str(tmp_path / "words.txt"),
        limits=LIMITS,
        validation=0.2,
        records_per_file=25,
    )


def tree(folder):
    """Every file's bytes but the lock's."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_datasets_hold_the_pairs_within_the_limits_and_share_no_prompt(config, tmp_path):
    cards = prepare(config, tmp_path / "out", say=quiet)
    rows = [json.loads(line) for line in pathlib.Path(config.source.location).read_text().splitlines()]
    words = {word: index for index, word in enumerate(WORDS, start=2)}

    def ids(text, end=()):
        return (*(words[word] for word in text.split()), *end)

    wanted, long_prompts, long_responses = [], 0, 0
    for row in rows:
        prompt, chosen, rejected = ids(row["prompt"]), ids(row["chosen"], (1,)), ids(row["rejected"], (1,))
        if len(prompt) > 6:
            long_prompts += 1
        elif max(len(chosen), len(rejected)) > 5:
            long_responses += 1
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
        assert card.provenance["dropped"] == {"long prompt": long_prompts, "long response": long_responses}
        assert card.provenance["records"] == 120 and card.provenance["split"] == split
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    assert not {pair[0] for pair in found["train"]} & {pair[0] for pair in found["validation"]}
    # In the order of the source, part by part.
    assert found["train"] == [pair for pair in wanted if pair in found["train"]]
    assert len(cards["train"].files) == 5


def test_processes_do_not_change_a_byte_and_a_finished_folder_is_left_alone(config, tmp_path):
    prepare(config, tmp_path / "one", processes=1, say=quiet)
    prepare(config, tmp_path / "two", processes=2, say=quiet)
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two")
    assert {"preview.txt", "lengths.png", "settings.json", "train/card.json", "validation/card.json"} <= set(one)
    lines = []
    cards = prepare(config, tmp_path / "one", say=lines.append)
    assert lines == [f"{tmp_path / 'one'}: finished before"]
    (tmp_path / "two" / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is not JSON .*: give another folder, .* or remove it"):
        prepare(config, tmp_path / "two", say=quiet)
    assert tree(tmp_path / "one") == one and cards["train"].count == json.loads(one["train/card.json"])["count"]


def test_what_was_damaged_is_made_again_and_nothing_else(config, tmp_path):
    output, lines = tmp_path / "out", []
    prepare(config, output, say=quiet)
    whole = tree(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.array_record")}
    part = output / "train" / "part-00002.array_record"
    content = part.read_bytes()
    for damaged in (content[:100], bytes([content[0] ^ 1]) + content[1:], None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        prepare(config, output, say=lines.append)
        assert lines.pop() == f"{output}: files of 1 of 5 parts were changed: making them again" and not lines
        assert tree(output) == whole
        kept = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
        assert kept == {path for path in times if path.stem != "part-00002"}
    card = output / "validation" / "card.json"
    card.write_text(card.read_text().replace('"count"', '"counts"'))
    prepare(config, output, say=lines.append)
    assert "is not a dataset's card" in lines.pop() and tree(output) == whole
    (output / "parts.json").unlink()
    prepare(config, output, say=lines.append)
    assert lines == [f"{output}: files of 5 of 5 parts were changed: making them again"] and tree(output) == whole


def test_nothing_of_an_unfinished_part_is_left_where_other_settings_start_anew(config, tmp_path):
    output = tmp_path / "out"

    def stop(path, content):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignment_gap.data.tasks.prepare.write_json", stop)
        # Its first part is the third of the other's: it is written, but not known as finished.
        patch.setattr("alignment_gap.data.tasks.prepare._known", lambda work, part: output / f".parts/{part}")
        for name in ("0", "1"):
            (output / ".parts").mkdir(parents=True, exist_ok=True)
            (output / ".parts" / name).write_text("")
        prepare(dataclasses.replace(config, records_per_file=10), output, say=quiet)
    assert (output / "train" / "part-00002.array_record").exists()
    larger = dataclasses.replace(config, records_per_file=60)
    prepare(larger, output, say=quiet)
    prepare(larger, tmp_path / "fresh", say=quiet)
    assert tree(output) == tree(tmp_path / "fresh")


def test_killed_with_signal_9_it_goes_on_from_the_finished_parts(config, tmp_path):
    config = dataclasses.replace(config, records_per_file=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(config, whole, say=quiet)
    script = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[3])!r})
from alignment_gap.data.tasks.prepare import *
if __name__ == "__main__":
    prepare({config!r}, Path({str(killed)!r}), processes=2)
"""
    (tmp_path / "run.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((killed / ".parts").glob("0*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = {path.stem for path in (killed / ".parts").glob("0*.json")}
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*/*.array_record") if path.stem[-5:] in parts}
    assert before and len(parts) < 120
    prepare(config, killed, say=quiet)
    assert tree(killed) == tree(whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_ctrl_c_while_processes_start_is_one_line(wait, config, tmp_path):
    """When the first of them has just been made, and when they import."""
    source, output = pathlib.Path(config.source.location), tmp_path / "out"
    source.write_text(200 * source.read_text())  # Too many to be done before the interrupt.
    words = ["data", "prepare", f"--source={source}", f"--vocabulary={config.vocabulary}", f"--output={output}"]
    # A shell's background jobs, of which this may be one, ignore the signal, and so do their children.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{listen}; from alignment_gap.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", run, *words, "--processes=2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=pathlib.Path(__file__).parents[3],
    )
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while not ((output / ".parts").exists() and children.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error, error
    assert error.endswith("interrupted: the same command goes on from here\n")


def test_other_settings_are_refused_and_what_was_refused_may_be_dropped(config, tmp_path):
    lines = pathlib.Path(config.source.location).read_text().splitlines()
    lines[60] = json.dumps({"prompt": " ".join(["w1"] * 9), "chosen": "w1", "rejected": "w2"})
    pathlib.Path(config.source.location).write_text("\n".join(lines))
    strict = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="refuse", prompt_length=8))
    output = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"pairs.jsonl:61: long prompt \(\d+ tokens in the field 'prompt', over prompt_length=8\)"
    ):
        prepare(strict, output, say=quiet)
    mended = dataclasses.replace(strict, limits=dataclasses.replace(strict.limits, long_prompts="drop"))
    with pytest.raises(UserError, match=r"seed was 0, now 3\): give another folder"):
        prepare(dataclasses.replace(mended, seed=3), output, say=quiet)
    assert prepare(mended, output, say=quiet)["train"].provenance["dropped"]["long prompt"] == 1
    prepare(mended, tmp_path / "fresh", say=quiet)
    assert tree(output) == tree(tmp_path / "fresh")
    with pytest.raises(UserError, match=r"source_sha256 was \w+, now \w+"):
        write_pairs(pathlib.Path(config.source.location), 120, seed=5)
        prepare(mended, output, say=quiet)


def test_where_no_part_is_finished_other_settings_start_anew(config, tmp_path):
    whole = pathlib.Path(config.source.location).read_text()
    pathlib.Path(config.source.location).write_text(whole + "{\n")
    with pytest.raises(UserError, match=r"pairs.jsonl:121: not JSON"):
        prepare(config, tmp_path / "out", say=quiet)
    pathlib.Path(config.source.location).write_text(whole)
    changed = dataclasses.replace(config, records_per_file=50, seed=3)
    prepare(changed, tmp_path / "out", say=quiet)
    prepare(changed, tmp_path / "fresh", say=quiet)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_refusal_in_a_later_part_keeps_the_finished_ones(config, tmp_path):
    lines = pathlib.Path(config.source.location).read_text().splitlines()
    short = [line for line in lines if len(json.loads(line)["prompt"].split()) <= 6]
    long = json.dumps({"prompt": "w1 w2 w3 w4 w5 w6 w7", "chosen": "w1", "rejected": "w2"})
    pathlib.Path(config.source.location).write_text("\n".join([*short[:40], long, *short[40:]]))
    strict = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="refuse"))
    with pytest.raises(UserError, match=r"pairs.jsonl:41: long prompt \(7 tokens in the field 'prompt', over .*=6\)"):
        prepare(strict, tmp_path / "out", say=quiet)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.array_record")}
    assert kept
    cut = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="keep_end"))
    cards = prepare(cut, tmp_path / "out", say=quiet)
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
    cards = prepare(config, tmp_path / "out", say=quiet)
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
    cards = prepare(config, tmp_path / "out", say=quiet)
    prompts = {split: [int(e.prompt[0]) - 2 for e in open_dataset(tmp_path / "out" / split)] for split in cards}
    assert prompts == {"train": [0, 1, 2, 4, 5, 6, 7, 8, 9], "validation": [3, 20, 21]}
    assert cards["train"].provenance["dropped"] == {"prompt of the validation split": 1}


def test_the_preview_shows_boundaries_and_special_ids(config, tmp_path):
    prepare(config, tmp_path / "out", say=quiet)
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
        ({"vocabulary": ""}, "vocabulary is not set"),
        ({"validation": 1.0}, "validation=1.0 is out of range"),
        ({"records_per_file": -1}, "records_per_file=-1 is out of range"),
        ({"limits": Limits(0, 5)}, "prompt_length=0 is out of range"),
        ({"limits": Limits(1, 1)}, r"no pair of 120 records is left for training \(\d+ long"),
        ({"limits": Limits(8, 6), "validation": 1 - 1e-12}, r"is left for training \(120 for validation or blank\)"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(config, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(dataclasses.replace(config, **change), tmp_path / "out", say=quiet)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds train or validation of something else"):
        prepare(config, tmp_path / "out", say=quiet)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which is always full")
def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path):
    output = tmp_path / "out"
    prepare(config, tmp_path / "whole", say=quiet)

    def fill(folder, name, examples):
        if name == "part-00002":
            (folder / f"{name}.partial").unlink(missing_ok=True)
            (folder / f"{name}.partial").symlink_to("/dev/full")
        return write_chunk(folder, name, examples)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"No space left .*free space"):
        patch.setattr("alignment_gap.data.tasks.prepare.write_chunk", fill)
        prepare(config, output, say=quiet)
    assert (output / "train" / "part-00001.array_record").exists()
    prepare(config, output, say=quiet)
    assert tree(output) == tree(tmp_path / "whole")
