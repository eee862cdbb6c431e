"""`data prepare` as a job: kills, Ctrl-c, other settings in the same folder, and the terminal's output."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import sentencepiece
from job_runs import Bar
from word_pairs import LIMITS, tree, words_config, write_pairs

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import card_text
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, PostsConfig, TextSourceConfig
from alignment_gap.errors import UserError
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE


def prepare(config, output):
    """Runs the job in this process, without others; returns the cards of its datasets."""
    make(PREPARE, dataclasses.replace(config, workers=config.workers or 1), output, Bar())
    return {path.parent.name: open_dataset(path.parent).card for path in output.glob("*/card.json")}


@pytest.fixture
def config(tmp_path):
    return words_config(tmp_path)


def test_nothing_of_an_unfinished_part_is_left_where_other_settings_start_anew(config, tmp_path):
    output = tmp_path / "out"

    def stop(path, content):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignment_gap.data.tasks.prepare.write_json", stop)
        # The first part of the other job is the third part of this one: its file is written, but not recorded as
        # finished.
        patch.setattr("alignment_gap.data.tasks.prepare._known", lambda work, part: output / f".parts/{part}")
        for name in ("0", "1"):
            (output / ".parts").mkdir(parents=True, exist_ok=True)
            (output / ".parts" / name).write_text("")
        prepare(dataclasses.replace(config, records_per_file=10), output)
    assert (output / "train" / "part-00002.array_record").exists()
    larger = dataclasses.replace(config, records_per_file=60)
    prepare(larger, output)
    prepare(larger, tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")


@pytest.mark.slow
def test_killed_with_signal_9_it_goes_on_from_the_finished_parts(config, tmp_path):
    config = dataclasses.replace(config, records_per_file=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(config, whole)
    script = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
from pathlib import Path
from alignment_gap.data.tasks.prepare import *
from alignment_gap.data.text import *
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE
if __name__ == "__main__":
    make(PREPARE, {dataclasses.replace(config, workers=2)!r}, Path({str(killed)!r}))
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
    prepare(config, killed)
    assert tree(killed) == tree(whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}


# Background jobs of a shell ignore the signal, and so do their children; this test may be one.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
# Ctrl-c comes when the first semaphore of the pool is known to the process that cleans up, and not yet to its owner.
AT_FIRST_SEMAPHORE = """
import multiprocessing.resource_tracker as tracker, os
def register(*resource, first=tracker.register):
    first(*resource)
    tracker.register = first
    os.kill(os.getpid(), signal.SIGINT)
tracker.register = register
"""


def start_prepare(config, output, first=""):
    """The command `data prepare` with two workers, in a process group of its own, after the code `first`."""
    source = pathlib.Path(config.source.location)
    source.write_text(200 * source.read_text())  # There is too much work to finish before the interrupt.
    words = ["data", "prepare", f"--source={source}", f"--vocabulary={config.vocabulary}", f"--output={output}"]
    run = f"{LISTEN}\n{first}\nfrom alignment_gap.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", run, *words, "--workers=2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=pathlib.Path(__file__).parents[2],
    )


def assert_interrupted_in_one_line(process):
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error, error
    assert error.endswith("interrupted: the same command continues from here\n"), error


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_ctrl_c_while_processes_start_is_one_line(wait, config, tmp_path):
    """Just after the first process has started, and while processes import modules."""
    process = start_prepare(config, tmp_path / "out")
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while not ((tmp_path / "out" / ".parts").exists() and children.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    assert_interrupted_in_one_line(process)


def test_ctrl_c_while_the_pool_is_made_leaves_no_semaphore(config, tmp_path):
    assert_interrupted_in_one_line(start_prepare(config, tmp_path / "out", AT_FIRST_SEMAPHORE))


def test_other_settings_are_refused_and_what_was_refused_may_be_dropped(config, tmp_path):
    lines = pathlib.Path(config.source.location).read_text().splitlines()
    lines[60] = json.dumps({"prompt": " ".join(["w1"] * 9), "chosen": "w1", "rejected": "w2"})
    pathlib.Path(config.source.location).write_text("\n".join(lines))
    strict = dataclasses.replace(config, limits=dataclasses.replace(LIMITS, long_prompts="refuse", prompt_length=8))
    output = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"pairs.jsonl:61: long prompt \(\d+ tokens in the field 'prompt', over prompt_length=8\)"
    ):
        prepare(strict, output)
    mended = dataclasses.replace(strict, limits=dataclasses.replace(strict.limits, long_prompts="drop"))
    with pytest.raises(UserError, match=r"seed was 0, now 3\): give another folder"):
        prepare(dataclasses.replace(mended, seed=3), output)
    cards = prepare(mended, output).values()
    assert sum(card.provenance["dropped"].get("long prompt", 0) for card in cards) == 1
    prepare(mended, tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")
    with pytest.raises(UserError, match=r"source_sha256 was \w+, now \w+"):
        write_pairs(pathlib.Path(config.source.location), 120, seed=5)
        prepare(mended, output)


def test_where_no_part_is_finished_other_settings_start_anew(config, tmp_path):
    whole = pathlib.Path(config.source.location).read_text()
    pathlib.Path(config.source.location).write_text(whole + "{\n")
    with pytest.raises(UserError, match=r"pairs.jsonl:121: not JSON"):
        prepare(config, tmp_path / "out")
    pathlib.Path(config.source.location).write_text(whole)
    changed = dataclasses.replace(config, records_per_file=50, seed=3)
    prepare(changed, tmp_path / "out")
    prepare(changed, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_other_posts_are_refused_in_the_same_folder(tmp_path):
    posts = PrepareConfig(TextSourceConfig("posts", posts=PostsConfig(pairs=40, validation_pairs=10)))
    prepare(posts, tmp_path / "out")
    source = dataclasses.replace(posts.source, posts=PostsConfig(pairs=40, validation_pairs=10, seed=1))
    with pytest.raises(UserError, match=r"source\.posts\.seed was 0, now 1; source_sha256 was"):
        prepare(dataclasses.replace(posts, source=source), tmp_path / "out")


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds train or validation"):
        prepare(config, tmp_path / "out")


def test_the_folder_of_another_kind_of_job_stays_as_it_is(config, tmp_path):
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "job.json").write_text('{"kind": "train"}')
    with pytest.raises(UserError, match="kind"):
        prepare(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "job.json").read_text()) == {"kind": "train"}
    assert (tmp_path / "run" / "train").exists()


def test_a_finished_folder_is_looked_through_and_told_in_a_few_lines(config, tmp_path):
    """A damaged part is made again. A folder with unreadable settings is refused, and none of its files changes."""
    output = tmp_path / "out"
    cards = prepare(config, output)
    whole = tree(output)
    first, lengths, _, reasons, second, *_, preview = PREPARE.summary(output).splitlines()
    dropped = cards["train"].provenance["dropped"]
    assert second == f"{output}/validation: {cards['validation'].count:,} examples"
    assert first == f"{output}/train: {cards['train'].count:,} examples"
    longest = cards["train"].max_prompt_length
    assert lengths.startswith("  prompts: median ") and lengths.endswith(f"longest {longest} tokens")
    assert reasons == f"  dropped: {dropped['long prompt']} long prompt, {dropped['long response']} long response"
    assert preview == f"preview: {output}/preview.txt"
    part = output / "train" / "part-00001.array_record"
    part.write_bytes(part.read_bytes()[:50])
    prepare(config, output)
    assert tree(output) == whole
    (output / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job\.json is not JSON .*: give another folder, .* or remove it"):
        prepare(config, output)
    assert tree(output) == whole


def test_prompts_that_were_cut_are_counted_in_the_summary(config, tmp_path):
    limits = dataclasses.replace(LIMITS, long_prompts="keep_end")
    cards = prepare(dataclasses.replace(config, limits=limits), tmp_path / "out")
    for about in (card.provenance for card in cards.values()):
        assert "long prompt" not in about["dropped"]
        assert f"cut to their last tokens: {about['cut_prompts']:,} prompts" in PREPARE.summary(tmp_path / "out")


def test_how_prompts_end_and_what_is_unknown_is_told(tmp_path):
    """A piece is unknown if no text of the vocabulary had it."""
    model = io.BytesIO()
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 40, "hard_vocab_limit": False}
    texts = iter(["the cat sat on the mat", "a dog ran to the hat"] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, minloglevel=2, **settings)
    (tmp_path / "own.model").write_bytes(model.getvalue())
    rows = [{"prompt": "the cat", "chosen": "sat {", "rejected": "ran { } on"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSourceConfig(str(tmp_path / "a.jsonl"), duplicates="keep")
    config = PrepareConfig(source, str(tmp_path / "own.model"), validation=0.0)
    about = prepare(config, tmp_path / "out")["train"].provenance
    assert about["unknown"] == {"examples": 2, "tokens": 6} and about["end_prompts"] is True
    lines = PREPARE.summary(tmp_path / "out").splitlines()
    assert "  unknown: 6 tokens in 2 examples" in lines and "every prompt ends with the end id" in lines
    assert "unknown: 6 tokens in 2 examples" in card_text(open_dataset(tmp_path / "out" / "train"))


def test_a_folder_of_an_earlier_version_is_one_whose_prompts_have_no_end(config, tmp_path):
    """Its settings do not name end_prompts. The folder stays as it is; it is refused if prompts end now."""
    config = dataclasses.replace(config, vocabulary="bytes", end_prompts=False, limits=Limits(64, 64))
    output = tmp_path / "out"
    prepare(config, output)
    job, done = (json.loads((output / name).read_text()) for name in ("job.json", "done.json"))
    del job["end_prompts"], done["settings"]["end_prompts"]
    for name, content in (("job.json", job), ("done.json", done)):
        (output / name).write_text(json.dumps(content))
    whole = tree(output)
    prepare(config, output)
    assert tree(output) == whole
    with pytest.raises(UserError, match="end_prompts was None, now True"):
        prepare(dataclasses.replace(config, end_prompts=None), output)
