"""Small examples, for tests of data and of code that reads it."""

import numpy as np

from alignment_gap.data.records import Example


def make_random_examples(
    count: int, *, responses: int = 2, seed: int = 0, with_reference: bool = False, with_sampler: bool = False
) -> list[Example]:
    """Examples of random tokens, with reference and sampler log-probs on request."""
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, 100, rng.integers(1, longest + 1)).astype(np.int32)

    examples = []
    for number in range(count):
        answers = tuple(tokens(5) for _ in range(responses))
        reference, sampler = (
            tuple(-rng.random(len(a)).astype(np.float32) for a in answers) if wanted else None
            for wanted in (with_reference, with_sampler)
        )
        scores = rng.random(responses).astype(np.float32)
        examples.append(Example(1000 + number, tokens(9), answers, scores, reference, sampler))
    return examples


def plain(example):
    """The content as Python numbers, which compare exactly."""
    per_token = (example.reference_log_probs, example.sampler_log_probs)
    return (
        int(example.prompt_id),
        example.prompt.tolist(),
        [response.tolist() for response in example.responses],
        example.scores.tolist(),
        *(None if rows is None else [row.tolist() for row in rows] for rows in per_token),
    )
