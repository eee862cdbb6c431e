"""Pairs per second of TRL's online DPO trainer on the Llama of trl_update_step.py; started by online_step.py.

Needs torch, transformers, trl and datasets: the environment that `make parity` makes. Prints a line of JSON with the
rates of all steps but the first.
"""

import json
import tempfile

from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl_update_step import Clock, llama, pairs, settings, shape_flags, tokenizer


def even_tokens(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of even ids in each completion: a judge that costs nothing."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main() -> None:
    """Draws two samples per prompt, without an end id, and updates."""
    parser = shape_flags(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = OnlineDPOConfig(
            **settings(options, folder),
            loss_type="ipo",
            temperature=1.0,
            top_k=0,
            max_new_tokens=options.response_length,
            generation_kwargs={"min_new_tokens": options.response_length},
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
    print(json.dumps({"rates": clock.rates(options.batch), "parameters": trainer.model.num_parameters()}))


if __name__ == "__main__":
    main()
