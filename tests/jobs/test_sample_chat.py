"""Prompts as conversations: the chat template that writes them, the end of an answer, and turns at the keyboard."""

import dataclasses
import io
import json
import shutil

import jax
import pytest
from byte_tokenizer import CHATML, make_tokenizer
from job_runs import MODEL, run_job
from tiny_models import random_params

from alignment_gap.checkpoints import Network, find_checkpoint, read_network, write_checkpoint
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, TextSourceConfig, load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.sample import SampleConfig, sample_texts
from alignment_gap.models import make_policy
from alignment_gap.training import OptimizerConfig

END = "<|im_end|>"
ASKED = "<s><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as an import makes it: random parameters, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    folder.mkdir()
    tokenizer = folder / "tokenizer"
    make_tokenizer(tokenizer, tokens=("<|im_start|>", END), chat_template=CHATML)
    vocabulary = load_vocabulary(tokenizer)
    config = dataclasses.replace(MODEL, vocabulary_size=vocabulary.size)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(random_params(make_policy(config))))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    tensors = {name: from_array(leaf, stacked="layers" in name) for name, leaf in named.items()}
    network = Network(model=config, vocabulary=str(tokenizer), vocabulary_digest=vocabulary.digest)
    write_checkpoint(folder, 0, network, tensors)
    return folder


@pytest.fixture
def config(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hi\n")
    return SampleConfig(str(run), prompts=str(path), response_length=6, format="jsonl")


def records(config):
    return [json.loads(text) for text in sample_texts(config)]


def prompt(config):
    return records(config)[0]["prompt"]


@pytest.mark.slow
def test_a_prompt_is_what_the_user_says_in_the_checkpoint_s_own_template(config, tmp_path):
    assert prompt(config) == ASKED.format("hi")
    assert prompt(dataclasses.replace(config, template="none")) == "<s>hi"
    assert prompt(dataclasses.replace(config, template="plain")) == "<s>\n\nHuman: hi\n\nAssistant:"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert prompt(dataclasses.replace(config, template=str(tmp_path / "own.jinja"))) == "<s>[hi]"
    (tmp_path / "dated.jinja").write_text("<s>{{ strftime_now('%d %b') }}")
    dated = dataclasses.replace(config, template=str(tmp_path / "dated.jinja"))
    assert prompt(dated) == "<s>26 Jul"
    assert prompt(dataclasses.replace(dated, template_date="2026-12-01")) == "<s>01 Dec"


@pytest.mark.slow
def test_a_record_may_hold_messages(config, tmp_path):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": messages}) + "\n")
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}{END}\n" for message in messages)
    chats = dataclasses.replace(config, prompts=str(tmp_path / "chats.jsonl"))
    assert prompt(chats) == f"<s>{turns}<|im_start|>assistant\n"
    with pytest.raises(UserError, match=r"chats.jsonl:1 holds messages, and the run has no chat template: give templ"):
        records(dataclasses.replace(chats, template="none"))


def test_lines_of_the_keyboard_are_turns_and_an_empty_one_begins_anew(config, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    first, second, third = records(dataclasses.replace(config, prompts=None, samples=2))
    assert first["prompt"] == ASKED.format("one") and third["prompt"] == ASKED.format("three")
    # The conversation continues with the first sample.
    answer = first["responses"][0]
    assert second["prompt"] == first["prompt"] + answer + f"{END}\n" + ASKED.format("two").removeprefix("<s>")


@pytest.mark.slow
def test_an_answer_ends_with_any_end_id_of_the_generation_config(config, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    long = dataclasses.replace(config, run=str(copy), samples=16, response_length=12)
    lengths = records(long)[0]["tokens"]
    assert max(lengths) > 1
    # Here every id ends an answer.
    size = load_vocabulary(run / "tokenizer").size
    (copy / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(size)]}))
    assert records(long)[0]["tokens"] == [1] * 16
    assert records(dataclasses.replace(long, template="none"))[0]["tokens"] == [1] * 16


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "FOLDER"])
def test_a_trained_run_speaks_as_its_prompts_were_prepared(template, config, run, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {digit}"}],
            "chosen": [{"role": "assistant", "content": digit}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for digit in "12345678"
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = str(run / "tokenizer") if template == "FOLDER" else template
    source = TextSourceConfig(str(tmp_path / "pairs.jsonl"), template=place)
    limits = Limits(prompt_length=80, response_length=24)
    make(PREPARE, PrepareConfig(source, str(run / "tokenizer"), limits, validation=0.0, workers=1), tmp_path / "pairs")
    job = JobConfig(
        loss=LossConfig("sft"),
        source=DatasetConfig(str(tmp_path / "pairs" / "train"), batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        start=str(run),
        steps=1,
        log_every=1,
    )
    trained = run_job(job, tmp_path / "trained")
    assert read_network(find_checkpoint(trained)).template == place
    expected = ASKED.format("hi") if template == "FOLDER" else "<s>hi"
    assert prompt(dataclasses.replace(config, run=str(trained))) == expected


BAD = {
    "missing": ("nowhere.jinja", r"cannot read the template nowhere.jinja"),
    "no jinja": ("{% for %}", r"the chat template is not jinja \(line 1"),
    "refused": ("{{ raise_exception('no user') }}", r"prompts.txt:1: refused by the chat template \(no user\): fix"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_cannot_be_used_is_one_line(name, config, tmp_path):
    source, message = BAD[name]
    place = tmp_path / "bad.jinja"
    place.write_text(source)
    template = source if name == "missing" else str(place)
    with pytest.raises(UserError, match=message) as error:
        records(dataclasses.replace(config, template=template))
    assert "\n" not in str(error.value)
