"""Pairs per second of TRL's DPO trainer on a Llama with the sizes of "compared" in update_step.py, which starts this.

Needs torch, transformers, trl and datasets: the environment that `make parity` makes. Prints a line of JSON for each
treatment of the reference, with the rates of all steps but the first.
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

VOCABULARY = 32128


def llama() -> LlamaForCausalLM:
    """A Llama with random parameters; it has as many as our decoder, apart from one norm per layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, intermediate_size=1408, vocab_size=VOCABULARY, tie_word_embeddings=True)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one word per id."""
    words = {"<pad>": 0, "<end>": 1, "<unknown>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **special)


def pairs(options: argparse.Namespace, count: int) -> Dataset:
    """Pairs of random words, of full length after the end id is added."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    rows = [
        {
            "prompt": text(options.prompt_length),
            "chosen": " " + text(options.response_length - 1),
            "rejected": " " + text(options.response_length - 1),
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


class Clock(TrainerCallback):
    """Records the time at the end of every step."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *_, **__):
        """Called by the trainer."""
        self.times.append(time.perf_counter())

    def rates(self, pairs: int) -> list[float]:
        """Pairs per second of all steps but the first."""
        return [pairs / (end - start) for start, end in zip(self.times, self.times[1:], strict=False)]


def shape_flags(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of all peers: the shape of a batch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=64)
    return parser


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The settings of both trainers: float32 on CPUs, full batches, and nothing beside training."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "max_length": options.prompt_length + options.response_length,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def measure(options: argparse.Namespace, precompute: bool) -> None:
    """Trains for the requested steps and prints the rates."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**settings(options, folder), loss_type=["ipo"], precompute_ref_log_probs=precompute)
        trainer = DPOTrainer(
            llama(),
            None if precompute else llama(),
            args=config,
            train_dataset=pairs(options, options.batch * options.steps),
            processing_class=tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"reference": "precomputed" if precompute else "every step", "rates": clock.rates(options.batch), "GiB": peak}
    print(json.dumps(row | {"parameters": trainer.model.num_parameters()}))


def main() -> None:
    """Runs one variant per process, so that peak memory belongs to that variant alone."""
    parser = shape_flags(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precompute", action="store_true")
    options = parser.parse_args()
    measure(options, options.precompute)


if __name__ == "__main__":
    main()
