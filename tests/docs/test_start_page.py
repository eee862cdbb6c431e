"""The commands and the Python of docs/start.md, docs/reading_a_run.md and docs/faq.md run in order, at a tiny size."""

import contextlib
import io
import json
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap import losses
from alignment_gap.cli.main import main

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
START, READING, FAQ = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("start", "reading_a_run", "faq")
)
TRAIN = {"TRAIN_STEPS": 2, "BATCH_SIZE": 8, "JobConfig.log_every": 1}
NETWORK = {"T5Config.width": 16, "T5Config.heads": 2, "T5Config.head_size": 8, "T5Config.mlp_width": 16}
NETWORK |= {"T5Config.encoder_layers": 1, "T5Config.decoder_layers": 1}
# Flags that make each command small. Of equal flags the last one counts.
SMALL = {
    "data prepare": ["--workers=1", "--posts.pairs=32", "--posts.validation_pairs=8"],
    "train": [f"--gin.{name}={value}" for name, value in TRAIN.items()],
    "evaluate": ["--batch_size=8", "--prompts=8", "--kl_prompts=8", "--pairs=8"],
    "sample": ["--response_length=4"],
}


def commands(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line) for line in lines if line.startswith("alignment-gap")]


def run(words):
    """What a command prints."""
    more = next((flags for name, flags in SMALL.items() if " ".join(words[1:]).startswith(name)), [])
    if "--gin_file=gin/runs/sft.gin" in words:
        more = [*more, *(f"--gin.{name}={value}" for name, value in NETWORK.items())]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [*words, *more])
        main()
    assert ended.value.code == 0, words
    return said.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder after all commands, and the output of each command, by its words."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "gin").symlink_to(ROOT / "gin")
    with contextlib.chdir(folder):
        return folder, {" ".join(words): run(words) for words in commands(START + READING + FAQ)}


def lines_of(folder, run_name):
    path = folder / "runs" / "start" / run_name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_has_the_win_rates_that_the_page_names(ran):
    (table,) = (said for words, said in ran[1].items() if words.startswith("alignment-gap evaluate"))
    assert "win_rate.rubric.sft" in table and "win_rate.rubric.offline" in table and "kl" in table


def test_every_metric_of_a_run_is_in_the_table(ran):
    table = READING[READING.index("| metric |") : READING.index("At the first step")]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row[:1] == "|")))
    for name in ("sft", "offline", "online"):
        found = {key for line in lines_of(ran[0], name) for key in line if not key.startswith("seconds_")}
        assert found <= named, name


def test_the_first_step_is_what_the_page_says(ran):
    first = lines_of(ran[0], "online")[0]
    assert (first["loss"], first["accuracy"]) == pytest.approx((25.0, 0.5), rel=1e-4)
    np.testing.assert_allclose([first[name] for name in ("margin", "chosen_log_ratio")], 0.0, atol=1e-4)


def test_the_python_prints_the_metrics_and_makes_a_loss(ran, capsys):
    printing, adding = re.findall(r"```python\n(.*?)```", READING, flags=re.DOTALL)
    with contextlib.chdir(ran[0]):
        exec(printing, {})
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["step", "loss"] and [row.split()[0] for row in rows] == ["1", "2"]
    scope: dict = {}
    exec(adding, scope)
    arrays = dict.fromkeys(("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), jnp.zeros(1))
    given = arrays | {"logps": jnp.array([[-2.0, -3.0]]), "scores": jnp.array([[1.0, 0.0]])}
    np.testing.assert_allclose(scope["anchored"](**given), np.log(2) + 0.1 * 2.0, rtol=1e-6)


def test_the_python_of_the_faq_is_dpo(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", FAQ, flags=re.DOTALL)
    exec(code, {})
    np.testing.assert_allclose(float(capsys.readouterr().out.strip(" []\n")), -jax.nn.log_sigmoid(0.2), rtol=1e-5)


def test_the_losses_that_the_pages_name_are_there():
    for name in ("dpo", "ipo", "slic", "cpo", "orpo", "apo_zero", "nca", "best_of_n", "sft", "raft", "reinforce"):
        assert name in losses.names() and f"`{name}`" in READING
