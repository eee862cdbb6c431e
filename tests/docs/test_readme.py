"""The README's Python runs, and its files exist. Its commands run at a tiny size.

The commands of pages that use its folders run too: docs/jobs.md, docs/choose.md and docs/coming_from.md. Every training
job is opened, which finds any mistake in it; two of them run.
"""

import collections
import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import shlex
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap.checkpoints import find_checkpoint, read_network
from alignment_gap.checkpoints.layout import open_store
from alignment_gap.cli import gin_files, plan
from alignment_gap.cli.main import COMMANDS, main
from alignment_gap.data.records import open_dataset
from alignment_gap.data.text import posts
from alignment_gap.data.text.vocabulary_training import train_vocabulary
from alignment_gap.jobs.train import TRAIN

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS, CHOOSE, COMING = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("jobs", "choose", "coming_from")
)
SIZE = {"TRAIN_STEPS": 2, "CHECKPOINT_EVERY": 1, "BATCH_SIZE": 8}
MODEL = {"VOCABULARY_SIZE": 512, "T5Config.width": 16, "T5Config.heads": 2, "T5Config.head_size": 8}
MODEL |= {"T5Config.mlp_width": 16, "T5Config.encoder_layers": 1, "T5Config.decoder_layers": 1}
# Flags that make each command small. Of equal flags the last one counts.
SMALL = {
    "train": [f"--gin.{name}={value}" for name, value in SIZE.items()],
    "data prepare": ["--workers=1", "--posts.pairs=32", "--posts.validation_pairs=8"],
    "data label": ["--batch_size=8", "--buckets=1"],
    "data generate": ["--batch_size=8", "--buckets=1", "--limit=16"],
    "data compose": [],
    "data reference": ["--batch_size=8"],
    "evaluate": ["--batch_size=8", "--prompts=16", "--kl_prompts=8", "--pairs=8"],
    "sample": ["--response_length=4"],
    "study": [],
    "report": [],
}
RUN = ("runs/built_in_sft", "runs/replayed")


def commands(text):
    """The words of every command of a page, without environment variables."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    words = (shlex.split(line, comments=True) for line in lines)
    return [each[each.index("alignment-gap") :] for each in words if "alignment-gap" in each]


def make_sources(folder):
    """Dialogues of few words, a SentencePiece model of them, and the judge of the page."""
    rng, words = np.random.default_rng(0), posts.vocabulary().words[:30]

    def say(longest=5):
        return " ".join(rng.choice(words, rng.integers(1, longest + 1)))

    prompts = [f"\n\nHuman: {say()}\n\nAssistant:" for _ in range(120)]
    rows = [{"chosen": f"{prompt} {say()}", "rejected": f"{prompt} {say()} no"} for prompt in prompts]
    with gzip.open(folder / "harmless-base.train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    train_vocabulary([text for row in rows for text in row.values()], folder / "t5.spiece.model", 320)
    judge, _ = re.findall(r"```python\n(.*?)```", JOBS, flags=re.DOTALL)
    (folder / "my_judges.py").write_text(judge)
    for name in ("gin", "configs"):
        (folder / name).symlink_to(ROOT / name)


def small(words):
    """The words of a command, and the flags that make it small."""
    name = next(name for name in SMALL if " ".join(words[1:]).startswith(name))
    more = [flag for flag in SMALL[name] if not flag.startswith("--posts") or "--source=posts" in words]
    if "--gin_file=gin/runs/sft.gin" in words:
        more += [f"--gin.{name}={value}" for name, value in MODEL.items()]
    if workdir(words) == "runs/replayed":
        # The online run padded to the longest prompt of its dataset. The record of so few steps does not have this
        # prompt.
        more.append(f"--gin.DatasetConfig.prompt_length={open_dataset('runs/golden_pairs').card.max_prompt_length}")
    return [*words, *more]


def run(words):
    """What a command prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", small(words))
        patch.setattr(sys, "stdin", io.StringIO("Human: a question\nHuman: another\n"))
        main()
    assert ended.value.code == 0, words
    return said.getvalue()


def opened(words):
    """The config of a training job. The job is opened, but takes no steps."""
    rest, overrides = gin_files.split_overrides(small(words))
    files = [word.removeprefix("--gin_file=") for word in rest if word.startswith("--gin_file=")]
    config = gin_files.read_config(files, overrides)
    TRAIN.open(config)
    return config


def workdir(words):
    return next((word.removeprefix("--workdir=") for word in words if word.startswith("--workdir=")), None)


def is_opened(words):
    return words[1] == "train" and workdir(words) not in RUN


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder after the commands of all pages, and the output of each command, by its words.

    Jobs go by their folders.
    """
    folder, said, jobs = tmp_path_factory.mktemp("readme"), {}, {}
    make_sources(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        said |= {" ".join(words): run(words) for words in commands(TEXT) if words[1] != "plan"}
        for words in commands(JOBS + CHOOSE + COMING):
            if is_opened(words):
                jobs[workdir(words)] = opened(words)
            else:
                said[" ".join(words)] = run(words)
        yield folder, said, jobs


def metrics_of(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["step"] for row in rows], {name for name in rows[0] if f"{name}_low" in rows[0]}


def test_the_python_snippet_trains():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    # Each pair pulls its margin to 1 / (2 beta) = 1 nat.
    policy = scope["policy"]
    np.testing.assert_allclose(policy[jnp.array([3, 3, 2])] - policy[jnp.array([0, 1, 1])], 1.0, atol=0.05)


def headings(document):
    """The anchors of a page."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_lead_to_files_and_headings():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), (document.name, link)
            assert not anchor or anchor in headings(target), (document.name, link)


def test_no_folder_is_filled_by_two_jobs():
    made = collections.defaultdict(set)
    for document in DOCUMENTS:
        for words in commands(document.read_text(encoding="utf-8")):
            if "--status" in words or words[1] == "plan":
                continue
            words = words[next(i for i, word in enumerate(words) if word in COMMANDS and word != "launch") :]
            settings = tuple(word for word in words if not word.startswith(("--list", "--job=")))
            for folder in (word.partition("=")[2] for word in words if word.startswith(("--workdir=", "--output="))):
                made[folder].add(settings)
    assert {folder: jobs for folder, jobs in made.items() if len(jobs) > 1} == {}


def test_commands_and_config_files_exist():
    assert {words[1] for words in commands(TEXT)} <= set(COMMANDS)
    paths = re.findall(r"(?:--config|--gin_file)=([\w/]+\.\w+)", TEXT)
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_folder_of_the_table_is_there():
    for folder in re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE):
        assert folder == "runs" or (ROOT / folder).is_dir()


@pytest.mark.slow
def test_every_run_has_its_checkpoints(ran):
    folders = {workdir(words) for words in commands(TEXT) if words[1] == "train"}
    for folder in {*folders, *RUN}:
        assert find_checkpoint(ran[0] / folder).name == "2", folder
    assert read_network(find_checkpoint(ran[0] / "runs" / "golden")).kind == "pairwise"


@pytest.mark.slow
def test_the_jobs_are_what_docs_jobs_says(ran):
    jobs = {folder.removeprefix("runs/"): job for folder, job in ran[2].items()}
    assert jobs["dpo"].loss.name == "dpo" and jobs["dpo"].start == "runs/sft"
    assert (jobs["grpo"].source.samples, jobs["grpo"].source.judge.labels) == (8, "rewards")
    assert (jobs["best_and_worst"].source.samples, jobs["best_and_worst"].source.keep) == (4, "best_and_worst")
    assert jobs["semi_online"].source.refresh_every == 16
    assert (jobs["ipo_md"].source.mixture, jobs["ipo_md"].source.against) == (0.25, "each_other")
    assert jobs["nash_md"].source.against == "mixture"
    watched = jobs["watched"].monitor
    assert (watched.validation, watched.profile) == ("runs/prepared/validation", (10, 12))
    assert jobs["hypo"].fresh.samples == 1 and jobs["hypo"].source.folder == "runs/golden_pairs"


@pytest.mark.slow
def test_the_jobs_of_the_other_pages_are_what_they_say(ran):
    jobs = {folder.removeprefix("runs/"): job for folder, job in ran[2].items()}
    assert jobs["choose/own_pairs"].source.folder == "runs/choose/sft_pairs"
    assert jobs["choose/online"].source.refresh_every == 1 and jobs["choose/semi_online"].source.refresh_every == 16
    assert jobs["choose/best_and_worst"].source.keep == "best_and_worst"
    assert (jobs["coming/dpo"].loss.name, jobs["coming/dpo"].loss.settings["beta"]) == ("dpo", 0.1)
    assert jobs["coming/simpo"].loss.settings == {"beta": 2.0, "gamma": 1.0}
    assert (jobs["coming/t5x"].optimizer.name, jobs["coming/t5x"].model.width) == ("adafactor", 16)
    assert (jobs["coming/grpo"].loss.name, jobs["coming/grpo"].source.samples) == ("grpo", 8)


@pytest.mark.slow
def test_the_chain_is_labelled_by_golden_and_measured_by_both(ran):
    folder, said, _ = ran
    card = open_dataset(folder / "runs" / "golden_pairs").card
    assert card.provenance["judge"] == "runs/golden" and card.scores == "probabilities"
    for run_name, other in (("online", "offline"), ("offline", "online")):
        steps, metrics = metrics_of(folder / "runs" / f"{run_name}_measured" / "results.csv")
        assert steps == ["1", "2"]
        assert {f"win_rate.{judge}.{name}" for judge in ("golden", "proxy") for name in (other, "sft")} < metrics
        assert {"kl", "accuracy", "chosen_log_ratio", "rejected_log_ratio", "length"} < metrics
        assert (folder / "runs" / f"{run_name}_measured" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert metrics_of(folder / "runs" / "proxy_measured" / "results.csv")[1] == {"accuracy", "agreement.golden"}
    (listed,) = (text for words, text in said.items() if words.endswith("--list"))
    assert "alignment-gap train" in listed and "--gin.DatasetConfig.folder=runs/prepared/train" in listed


@pytest.mark.slow
def test_runs_are_put_side_by_side(ran):
    page = (ran[0] / "runs" / "curves" / "report.html").read_text(encoding="utf-8")
    assert "2 training jobs side by side" in page and "seconds_" not in page
    assert (ran[0] / "runs" / "curves" / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_samples_are_printed_for_typed_and_for_recorded_prompts(ran):
    typed, recorded, warm = (text for words, text in ran[1].items() if words.startswith("alignment-gap sample"))
    assert typed.count("another") == 1 and len(typed.strip().splitlines()) >= 2 * (1 + 2)
    records = [json.loads(line) for line in recorded.splitlines()]
    assert len(records) == 3 and all(len(record["responses"]) == 1 for record in records)
    assert len(warm.strip().splitlines()) >= 2 * (1 + 4)


@pytest.mark.slow
def test_the_replayed_record_is_the_online_run(ran):
    runs = ran[0] / "runs"
    ours, theirs = (open_store(runs / name / "checkpoints" / "2" / "params") for name in ("online", "replayed"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(None), theirs[name].read(None), err_msg=name)
    assert "sampler_log_probs" in open_dataset(runs / "online" / "record").card.fields


@pytest.mark.slow
def test_the_datasets_hold_what_docs_jobs_says(ran):
    runs = ran[0] / "runs"
    soft, shorter = open_dataset(runs / "soft_pairs"), open_dataset(runs / "shorter")
    assert any(0 < example.scores[0] < 1 and example.scores[0] != 0.5 for example in soft)
    assert {float(score) for example in shorter for score in example.scores} <= {0.0, 0.5, 1.0}
    mixed = open_dataset(runs / "mixed")
    assert len(mixed) == len(open_dataset(runs / "golden_pairs")) + len(open_dataset(runs / "online_vs_offline"))
    assert list((runs / "mixed").glob("reference/*/log_probs.npy"))


@pytest.mark.slow
def test_the_python_of_docs_jobs_trains(ran):
    _, code = re.findall(r"```python\n(.*?)```", JOBS, flags=re.DOTALL)
    with contextlib.chdir(ran[0]):
        exec(code.replace("steps=20", "steps=2"), {})
    assert find_checkpoint(ran[0] / "runs" / "slic").name == "2"


def test_the_plan_of_the_readme_can_be_made():
    (words,) = (words for words in commands(TEXT) if words[1] == "plan")
    parsed = plan.read_config(["alignment-gap plan", *words[2:]])
    assert parsed is not None and parsed[1].json == "plan.json"
