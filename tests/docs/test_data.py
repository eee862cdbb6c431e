"""The commands of docs/data.md run one after another, at a tiny size, on generated files."""

import contextlib
import gzip
import io
import json
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest

from alignment_gap.cli.main import main
from alignment_gap.data.records import open_dataset
from alignment_gap.data.text import posts
from alignment_gap.data.text.vocabulary_training import train_vocabulary

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text()
SIZE = {"TRAIN_STEPS": 2, "BATCH_SIZE": 8}
MODEL = {"VOCABULARY_SIZE": 512, "T5Config.width": 16, "T5Config.heads": 2, "T5Config.head_size": 8}
MODEL |= {"T5Config.mlp_width": 16, "T5Config.encoder_layers": 1, "T5Config.decoder_layers": 1}
# Any words will do; these are the built-in task's.
WORDS = posts.vocabulary().words[:30]


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def write(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_sources(folder):
    """Dialogues and posts of few words, and a SentencePiece model of them."""
    rng = np.random.default_rng(0)

    def say(longest=5):
        return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))

    prompts = [f"\n\nHuman: {say()}\n\nAssistant:" for _ in range(120)]
    dialogues = [{"chosen": f"{prompt} {say()}", "rejected": f"{prompt} {say()} no"} for prompt in prompts]
    dialogues[7]["rejected"] = dialogues[7]["chosen"]
    judged = [
        {"prompt": f"{say(9)} TL;DR:", "model": say(), "reference": f"{say()} no", "preferred": which}
        for which in ["ours", "reference", ""] * 12
    ]
    write(folder / "pairs.jsonl.gz", dialogues)
    write(folder / "posts.jsonl.gz", judged)
    texts = [text for row in [*dialogues, *judged] for text in row.values()]
    train_vocabulary(texts, folder / "t5.spiece.model", 320)
    (folder / "gin").symlink_to(ROOT / "gin")


def run(words):
    """What a command prints; training jobs are made tiny."""
    if words[1] == "train":
        settings = SIZE | (MODEL if "--gin_file=gin/runs/sft.gin" in words else {})
        settings = {name: value for name, value in settings.items() if f"--gin.{name}=None" not in words}
        words = [*words, *(f"--gin.{name}={value}" for name, value in settings.items())]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", words)
        main()
    assert ended.value.code == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder after every command, and what each printed."""
    folder = tmp_path_factory.mktemp("data")
    make_sources(folder)
    with contextlib.chdir(folder):
        return folder, [run(words) for words in commands()]


def test_every_command_of_the_page_ran(ran):
    folder, said = ran
    assert "1 identical pair" in said[0] and "dropped: 12 label dropped\n" in said[1]
    assert (folder / "runs" / "data" / "prepared" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "<eos:1>" in (folder / "runs" / "data" / "prepared" / "preview.txt").read_text()
    assert (folder / "runs" / "data" / "ipo_mixed" / "checkpoints" / "2").is_dir()


def test_the_chain_leads_back_to_both_sources(ran):
    shown = ran[1][-1]
    lines = [line.strip() for line in shown[shown.index("made by") :].splitlines()]
    steps = [line for line in lines if line in ("compose", "label", "generate", "prepare")]
    assert steps == ["compose", "compose", "label", "prepare", "generate", "prepare"]
    assert sum(line.startswith("source_sha256: ") for line in lines) == 2
    assert shown.count("example ") == 3


def test_the_datasets_are_what_the_page_says(ran):
    runs = ran[0] / "runs" / "data"
    human, judged = open_dataset(runs / "prepared" / "train"), open_dataset(runs / "relabelled")
    assert [e.prompt.tolist() for e in judged] == [e.prompt.tolist() for e in human]
    assert {tuple(e.scores.tolist()) for e in judged} <= {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    asked, versus = open_dataset(runs / "posts" / "train"), open_dataset(runs / "sft_vs_ipo")
    assert {e.prompt.tobytes() for e in versus} == {e.prompt.tobytes() for e in asked}
    assert versus.card.responses_per_prompt == 2
    assert len(open_dataset(runs / "mixed")) == len(judged) + len(versus)


def test_the_job_on_both_datasets_is_as_long_as_their_epoch(ran):
    runs = ran[0] / "runs" / "data"
    datasets = [runs / name / "train" for name in ("prepared", "posts")]
    steps = sum(len(open_dataset(dataset)) for dataset in datasets) // SIZE["BATCH_SIZE"]
    assert [path.name for path in (runs / "ipo_both" / "checkpoints").iterdir()] == [str(steps)]
    # The job used the log-probs that `data reference` stored; a job with another digest would have stored its own.
    assert [len(list(dataset.glob("reference/*/log_probs.npy"))) for dataset in datasets] == [1, 1]


def test_the_python_of_the_page_runs(ran, capsys):
    padding, reading = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    with contextlib.chdir(ran[0]):
        exec(padding, {})
        shares = [float(share) for share in re.findall(r": ([\d.]+)% of", capsys.readouterr().out)]
        exec(reading, {})
    assert len(shares) == 3 and shares[0] > shares[1] >= shares[2] > 0
    assert capsys.readouterr().out.startswith(str(len(open_dataset(ran[0] / "runs" / "data" / "mixed"))))
