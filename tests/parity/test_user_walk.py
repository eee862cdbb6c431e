"""A user's way with a Llama: LoRA by online IPO with a reward model, then evaluation, export, and use elsewhere."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import peft
import pytest
import torch
import transformers
from byte_tokenizer import CHATML, make_tokenizer
from huggingface_hub import ModelCard
from transformers_harness import our_logits, reload, their_logits

from alignment_gap.data.records import open_dataset
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import load_policy

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def command(*arguments, text=None, path=ROOT):
    """Runs alignment-gap on 8 virtual devices, as a shell would, with `path` for modules; returns what it printed."""
    devices = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    code = "from alignment_gap.cli.main import main; main()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=environment, input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("walk")
    torch.manual_seed(0)
    for name, model_class, settings in (
        ("llama", transformers.LlamaForCausalLM, {}),
        ("scorer", transformers.LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        model_class(transformers.LlamaConfig(**SIZES, **settings)).save_pretrained(folder / name)
        make_tokenizer(folder / name, tokens=("<|im_start|>", "<|im_end|>"), eos_token="</s>", chat_template=CHATML)
        command("checkpoint", "import", f"--from={folder / name}", f"--output={folder / name}_run")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {number}"}],
            "chosen": [{"role": "assistant", "content": str(number)}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for number in range(64)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, start = folder / "llama_run" / "tokenizer", folder / "llama_run"
    command(
        *("data", "prepare", f"--source={folder / 'chats.jsonl'}", f"--vocabulary={tokenizer}"),
        *(f"--template={tokenizer}", "--prompt_length=64", "--response_length=16", f"--output={folder / 'pairs'}"),
    )
    command(
        *("train", f"--gin_file={ROOT}/gin/runs/online_ipo.gin", f"--gin.PROMPTS={folder / 'pairs' / 'train'}"),
        *(f"--gin.START={start}", f"--gin.JUDGE={folder / 'scorer_run'}", "--gin.ADAPTER_RANK=4"),
        *("--gin.TRAIN_STEPS=6", "--gin.BATCH_SIZE=8", "--gin.LEARNING_RATE=3e-2", "--gin.MeshConfig.layout=fsdp"),
        f"--workdir={folder / 'tuned'}",
    )
    command(
        *("evaluate", f"--run={folder / 'tuned'}", f"--dataset={folder / 'pairs' / 'train'}", "--prompts=16"),
        *("--kl_prompts=16", "--pairs=16", f"--judges=scorer={folder / 'scorer_run'}", f"--opponents=start={start}"),
        *("--batch_size=16", f"--output={folder / 'measured'}"),
    )
    for name, words in (("huggingface", (f"--evaluation={folder / 'measured'}",)), ("peft", ())):
        command(
            *("checkpoint", "export", f"--checkpoint={folder / 'tuned'}", f"--format={name}", *words),
            f"--output={folder / name}",
        )
    return folder


def test_transformers_and_peft_load_what_was_trained_with_the_same_logits(walked):
    policy, params = load_policy(walked / "tuned", make_mesh(MeshConfig(1, 1, 1)))
    base = transformers.LlamaForCausalLM.from_pretrained(walked / "llama", attn_implementation="eager").eval()
    merged, plain = reload(walked / "huggingface"), reload(walked / "llama")
    adapted = peft.PeftModel.from_pretrained(base, walked / "peft").eval()
    moved = 0.0
    for example in open_dataset(walked / "pairs" / "train")[:4]:
        texts = example.prompt, example.responses[0]
        ours = np.asarray(our_logits(policy, params, texts[0][None], [len(texts[0])], texts[1][None, None]))[0, 0]
        for theirs in (merged, adapted):
            np.testing.assert_allclose(their_logits(theirs, *texts), ours, rtol=0, atol=1e-4)
        moved = max(moved, np.abs(their_logits(plain, *texts) - ours).max())
    assert moved > 1e-2


def test_a_reward_model_with_another_tokenizer_judges_texts(walked, tmp_path):
    """The page's function, with a small DeBERTa; the texts reach its tokenizer as they are in the dataset."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.DebertaV2Config(vocab_size=300, num_labels=1, **sizes)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path / "deberta")
    make_tokenizer(tmp_path / "deberta", begins=False, eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")
    page = (ROOT / "docs" / "huggingface.md").read_text()
    code = page.partition("`deberta.py`:\n\n```python\n")[2].partition("```")[0]
    name = "OpenAssistant/reward-model-deberta-v3-large-v2"
    assert name in code
    (tmp_path / "deberta_judge.py").write_text(code.replace(name, str(tmp_path / "deberta")))
    pairs, labelled = walked / "pairs" / "train", tmp_path / "labelled"
    command(
        *("data", "label", f"--dataset={pairs}", "--judge=deberta_judge:rewards", "--judge.labels=rewards"),
        *("--batch_size=16", f"--output={labelled}"),
        path=tmp_path,
    )
    spec = importlib.util.spec_from_file_location("deberta_judge", tmp_path / "deberta_judge.py")
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    tokenizer = transformers.AutoTokenizer.from_pretrained(walked / "llama_run" / "tokenizer")
    for before, after in zip(open_dataset(pairs)[:4], open_dataset(labelled)[:4], strict=True):
        # The template's marks are part of the texts, the end id of a response is not.
        prompt = tokenizer.decode(before.prompt)
        assert prompt.startswith("<s><|im_start|>user\nsay ")
        responses = [tokenizer.decode(ids[:-1]) for ids in before.responses]
        np.testing.assert_allclose(after.scores, judge.rewards([prompt], [responses])[0], rtol=0, atol=1e-5)
    assert len({float(score) for example in open_dataset(labelled) for score in example.scores}) > 8


def test_the_card_says_what_was_done_and_measured(walked):
    card = ModelCard((walked / "huggingface" / "README.md").read_text())
    assert card.data.library_name == "transformers" and {"ipo", "online"} <= {*card.data.tags}
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["kl"] > 0 and 0 <= measured["win_rate.scorer.start"] <= 1
    assert ModelCard((walked / "peft" / "README.md").read_text()).data.library_name == "peft"


def test_the_tuned_run_speaks_the_chat_template_of_its_checkpoint(walked):
    """transformers' own tokenizer writes the same prompts."""
    out = command(
        *("sample", f"--run={walked / 'tuned'}", "--format=jsonl", "--response_length=8", "--batch_size=8"),
        text="say 3\n",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(walked / "huggingface")
    messages = [{"role": "user", "content": "say 3"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert json.loads(out)["prompt"] == expected
