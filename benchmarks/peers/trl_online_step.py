"""Pairs per second of TRL's online DPO trainer on the Llama of trl_update_step.py; started by online_step.py.

Needs torch, transformers, trl and datasets: the environment that `make parity` makes. Prints a line of JSON with the
rates of all steps but the first.
"""

import argparse
import json
import tempfile

from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl_update_step import Clock, llama, pairs, tokenizer


def even_tokens(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of even ids in each completion: a judge that costs nothing."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main() -> None:
    """Draws two samples per prompt, without an end id, and updates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = OnlineDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=1e-5,
            loss_type="ipo",
            temperature=1.0,
            top_k=0,
            max_new_tokens=options.response_length,
            generation_kwargs={"min_new_tokens": options.response_length},
            max_length=options.prompt_length + options.response_length,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = OnlineDPOTrainer(
            llama(),
            llama(),
            reward_funcs=even_tokens,
            args=config,
            train_dataset=pairs(options, options.batch * options.steps).select_columns("prompt"),
            processing_class=tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    rates = [options.batch / (end - start) for start, end in zip(clock.times, clock.times[1:], strict=False)]
    print(json.dumps({"rates": rates, "parameters": trainer.model.num_parameters()}))


if __name__ == "__main__":
    main()
