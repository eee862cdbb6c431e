"""Tokens per second of transformers' `generate` on the Llama of trl_update_step.py; started by sampler.py.

Prints a line of JSON with the rates of all calls but the first.
"""

import json
import time

import torch
from trl_update_step import VOCABULARY, llama, shape_flags


def main() -> None:
    """Draws two samples per prompt, without an end id."""
    parser = shape_flags(__doc__)
    parser.add_argument("--calls", type=int, default=4)
    options = parser.parse_args()
    model = llama().eval()
    prompts = torch.randint(3, VOCABULARY, (options.batch, options.prompt_length))
    rates = []
    for _ in range(options.calls):
        start = time.perf_counter()
        with torch.inference_mode():
            drawn = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                num_return_sequences=2,
                min_new_tokens=options.response_length,
                max_new_tokens=options.response_length,
                pad_token_id=0,
            )
        tokens = drawn.shape[0] * (drawn.shape[1] - options.prompt_length)
        rates.append(tokens / (time.perf_counter() - start))
    print(json.dumps({"rates": rates[1:], "parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
